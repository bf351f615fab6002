"""The optimizers by name, for one's own training loop; their arguments are the fields of the configurations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from thinrank.optim.methods import AdamWConfig, DCTAdamWConfig, GaLoreConfig, SubspaceAdamWConfig
from thinrank.optim.methods.config import MethodConfig
from thinrank.optim.optimizer import MatrixOptimizer


class AdamW(MatrixOptimizer):
    """`torch.optim.AdamW(fused=True)`, to the bit, with this suite's reports. See `thinrank.optim.methods.adamw`."""

    Config = AdamWConfig

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, seed=seed)


class GaLore(MatrixOptimizer):
    """GaLore; accepts galore-torch's parameter groups unchanged. See `thinrank.optim.methods.galore`.

    Groups with a `rank` are projected, the others are stepped by AdamW as galore-torch does it (eps before the bias
    correction, decay after the update). `rank` here is the default for groups that do not say.

    Raises:
        ValueError: for a bad value, or when no group has a rank.
    """

    Config = GaLoreConfig

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        projection_dtype: str = "float32",
        proj_type: str = "std",
        svd: str = "exact",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "projection_dtype": projection_dtype,
            "proj_type": proj_type,
            "svd": svd,
        }
        super().__init__(params, defaults, seed=seed)
        if all(group["rank"] is None for group in self.param_groups):
            raise ValueError("GaLore: no parameter group has a rank: give rank=… here or in a group, or use AdamW")


class DCTAdamW(MatrixOptimizer):
    """DCT-AdamW: AdamW on the strongest columns of a fixed basis. See `thinrank.optim.methods.dct_adamw`.

    Parameters of at least two dimensions are projected unless their group's `rank` is None.
    """

    Config = DCTAdamWConfig

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = 0.25,
        update_proj_gap: int = 1,
        scale: float = 1.0,
        projection_dtype: str = "float32",
        basis: str = "dct",
        norm: str = "l1",
        transport: str = "rotate",
        error_feedback: str = "off",
        column_age: bool = True,
        engine: str = "auto",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "projection_dtype": projection_dtype,
            "basis": basis,
            "norm": norm,
            "transport": transport,
            "error_feedback": error_feedback,
            "column_age": column_age,
            "engine": engine,
        }
        super().__init__(params, defaults, seed=seed)


class SubspaceAdamW(MatrixOptimizer):
    """AdamW in a warm-started dominant subspace plus a scaled residual. See `thinrank.optim.methods.subspace_adamw`.

    Parameters of at least two dimensions are projected unless their group's `rank` is None.
    """

    Config = SubspaceAdamWConfig

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = 0.25,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        projection_dtype: str = "float32",
        transport: str = "rotate",
        residual: str = "full",
        residual_limit: float = 1.01,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "projection_dtype": projection_dtype,
            "transport": transport,
            "residual": residual,
            "residual_limit": residual_limit,
        }
        super().__init__(params, defaults, seed=seed)


OPTIMIZERS: dict[type[MethodConfig], type[MatrixOptimizer]] = {
    cls.Config: cls for cls in (AdamW, GaLore, DCTAdamW, SubspaceAdamW)
}
"""Which class a configuration builds."""
