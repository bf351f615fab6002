"""The optimizers by name, for one's own training loop; their arguments are the fields of the configurations."""

from __future__ import annotations

from typing import Any, ClassVar

from thinrank.optim.methods import (
    AdamWConfig,
    ApolloConfig,
    ApolloMiniConfig,
    AuONConfig,
    DCTAdamWConfig,
    Dion2Config,
    DionConfig,
    FiraConfig,
    GaLoreConfig,
    GaLorePlusConfig,
    LDAdamConfig,
    MFACConfig,
    MuonConfig,
    SubspaceAdamWConfig,
    TrionConfig,
)
from thinrank.optim.methods.config import MethodConfig
from thinrank.optim.optimizer import MatrixOptimizer


class AdamW(MatrixOptimizer):
    """`torch.optim.AdamW(fused=True)`, to the bit, with this suite's reports. See `thinrank.optim.methods.adamw`."""

    Config = AdamWConfig


class RankedGroups(MatrixOptimizer):
    """Optimizers whose parameter groups say `rank` where they are to be projected, as galore-torch's do.

    The other groups are stepped by AdamW. A `rank` given to the class is the default of the groups that say none.

    Raises:
        ValueError: for a bad value, or when no group has a rank.
    """

    OWN_DEFAULTS: ClassVar[dict[str, Any]] = {"rank": None}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if all(rank is None for group in self.param_groups for rank in (group["rank"], *(group["ranks"] or ()))):
            name = type(self).__name__
            raise ValueError(f"{name}: no parameter group has a rank: give rank=… here or in a group, or use AdamW")


class GaLore(RankedGroups):
    """GaLore; accepts galore-torch's parameter groups unchanged. See `thinrank.optim.methods.galore`.

    Groups without a rank are stepped by AdamW as galore-torch does it: eps before the bias correction, decay after the
    update.
    """

    Config = GaLoreConfig


class Fira(RankedGroups):
    """Fira; accepts the fira package's parameter groups unchanged. See `thinrank.optim.methods.fira`."""

    Config = FiraConfig
    ALIASES: ClassVar[dict[str, str]] = {"alpha": "scale"}


class Apollo(RankedGroups):
    """APOLLO; accepts apollo-torch's parameter groups unchanged. See `thinrank.optim.methods.apollo`."""

    Config = ApolloConfig


class ApolloMini(Apollo):
    """APOLLO with the defaults of APOLLO-Mini, for groups with `rank=1`. See `thinrank.optim.methods.apollo`."""

    Config = ApolloMiniConfig


class GaLorePlus(RankedGroups):
    """GaLore+: shared heads, fast subspaces, sparse residuals. See `thinrank.optim.methods.galore_plus`.

    Accepts galore-torch's parameter groups. A group of attention weights says `proj_type="right"` and `heads` (its
    heads are rows: q, k, v) or `"left"` (columns: o) to have its heads share a basis; with `sections`, the parts of a
    fused weight, `heads` may be one number for each.
    """

    Config = GaLorePlusConfig


class DCTAdamW(MatrixOptimizer):
    """DCT-AdamW: AdamW on the strongest columns of a fixed basis. See `thinrank.optim.methods.dct_adamw`."""

    Config = DCTAdamWConfig


class LDAdam(MatrixOptimizer):
    """LDAdam: Adam in a subspace learned anew at every step. See `thinrank.optim.methods.ldadam`."""

    Config = LDAdamConfig


class MFAC(MatrixOptimizer):
    """M-FAC: the inverse of a Fisher matrix of the last gradients, in a subspace. See `thinrank.optim.methods.mfac`."""

    Config = MFACConfig


class SubspaceAdamW(MatrixOptimizer):
    """AdamW in a warm-started dominant subspace plus a scaled residual. See `thinrank.optim.methods.subspace_adamw`."""

    Config = SubspaceAdamWConfig


class Muon(MatrixOptimizer):
    """Muon: momentum with all singular values at one, for matrices. See `thinrank.optim.methods.muon`.

    Everything else is AdamW's, and wants a far smaller learning rate: give embeddings and the head (with
    `elementwise=True`) and vectors a group of their own, as `build` does.
    """

    Config = MuonConfig


class AuON(MatrixOptimizer):
    """AuON, or Hybrid-AuON with `newton_schulz_steps` above zero. See `thinrank.optim.methods.auon`.

    Groups are as for `Muon`.
    """

    Config = AuONConfig


class Dion(MatrixOptimizer):
    """Dion: orthonormal updates of low rank from a full momentum. See `thinrank.optim.methods.dion`."""

    Config = DionConfig


class Trion(MatrixOptimizer):
    """Trion: orthonormal updates on the strongest columns of a fixed basis. See `thinrank.optim.methods.trion`."""

    Config = TrionConfig


class Dion2(MatrixOptimizer):
    """Dion2: orthonormal updates of some of a weight's own rows or columns. See `thinrank.optim.methods.dion2`."""

    Config = Dion2Config


OPTIMIZERS: dict[type[MethodConfig], type[MatrixOptimizer]] = {
    cls.Config: cls
    for cls in (
        AdamW,
        GaLore,
        Fira,
        Apollo,
        ApolloMini,
        GaLorePlus,
        DCTAdamW,
        LDAdam,
        MFAC,
        SubspaceAdamW,
        Muon,
        AuON,
        Dion,
        Trion,
        Dion2,
    )
}
"""Which class a configuration builds."""
