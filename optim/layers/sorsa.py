"""SORSA: the top singular triples of a weight, trained and kept nearly orthonormal (Cao 2024, arXiv 2409.00055).

    W = R + (α / r) U diag(s) Vᵀ        U (out, r), s (r,), V (in, r): of the largest r singular values of W₀

All three are trained, R = W₀ − (α/r) U diag(s) Vᵀ is not. To the loss is added

    (γ / η) · mean over U and V of all layers of ‖UᵀU − I‖_F        the norm, not its square

with η the learning rate, so that a plain gradient step of size η moves a factor by γ and the mean's share, however
large η is. The authors' code divides by the rate of the step that is to come. Here `lr` says it once, the rate that
the schedule multiplies: with a schedule of factor f the step is γ f, and the weight of the penalty is the same
throughout, so that it belongs to no optimizer and is the same for all ranks. Without α the factor before U is 1, and
orthonormal factors, at which the norm has no derivative, get a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from thinrank.optim.layers.base import FineTuning, RankedReparam
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.triples import TripleLinear
from thinrank.optim.linalg.factor import singular
from thinrank.optim.methods.config import number


def skewness(factor: Tensor) -> Tensor:
    """`‖FᵀF − I‖_F` of a factor (rows, r) in float32 or better, a scalar; its gradient at zero is zero.

    One that lies in pieces (a `DTensor`) is put together first; each rank gets its own piece of the gradient.
    """
    whole: Tensor = factor.full_tensor() if hasattr(factor, "full_tensor") else factor  # pyright: ignore
    f = whole.to(torch.promote_types(whole.dtype, torch.float32))
    return torch.linalg.matrix_norm(f.mT @ f - torch.eye(f.shape[1], dtype=f.dtype, device=f.device))


class SORSALinear(TripleLinear):
    """Singular triples that are trained, beside what is left of the weight.

    Attributes:
        weighting: what ‖UᵀU − I‖_F and ‖VᵀV − I‖_F are multiplied by in the loss.
    """

    def __init__(self, dense: Dense, rank: int, *, scale: float, weighting: float) -> None:
        super().__init__(dense, rank, trained=("U", "s", "V"), scale=scale)
        self.weighting = weighting

    def penalty(self) -> Tensor | None:
        return self.weighting * (skewness(self.U) + skewness(self.V)) if self.weighting else None


@dataclass(frozen=True, kw_only=True)
class SORSA(FineTuning, RankedReparam):
    """SORSA (Cao 2024, arXiv 2409.00055): the top singular triples are trained, and held nearly orthonormal.

    `penalty(model)` must be added to the loss, and `lr` must be the optimizer's.

    Defaults: the authors' are rank=128, alpha=None, which stands for a factor of 1, and gamma=0.0004; they train by
    lr=3e-05, but here there is none (lr=None), since it must be that of the run; ours are factors=None, which stands
    for all U and V that are converted at once, and what the shared classes say is.

    Equations and shapes: `thinrank.optim.layers.sorsa`.
    """

    name: str = field(default="sorsa", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    rank: int | float = field(
        default=128, metadata={"help": "singular triples trained: a number, or a share of the shorter side"}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "the triples' product is multiplied by alpha / rank; null: by 1"}
    )
    gamma: float = field(
        default=4e-4, metadata={"help": "step by which orthonormality is kept, whatever the learning rate; 0: not"}
    )
    lr: float | None = field(
        default=None, metadata={"help": "what gamma is divided by: the optimizer's lr (`${optimizer.lr}`)"}
    )
    factors: int | None = field(
        default=None, metadata={"help": "factors over which the penalty is a mean; null: all that are converted"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            number("alpha", self.alpha, open_low=True)
        number("gamma", self.gamma)
        if self.lr is not None:
            number("lr", self.lr, open_low=True)
        if self.factors is not None and (
            isinstance(self.factors, bool) or not isinstance(self.factors, int) or self.factors < 1
        ):
            raise ValueError(f"factors must be at least 1, got {self.factors!r}: leave it out for all of them")

    def check(self, dense: Dense) -> None:
        super().check(dense)
        if self.gamma and self.lr is None:
            raise ValueError(
                f"lr must be the optimizer's learning rate where gamma is above 0, since the penalty's weight is "
                f"{self.gamma} / lr: set it, or gamma=0"
            )

    @property
    def penalises(self) -> bool:
        return self.gamma > 0

    def plan(self, denses: Iterable[Dense], model: nn.Module | None = None) -> SORSA:
        return self if self.factors is not None else replace(self, factors=2 * sum(1 for _ in denses))

    def layer(self, dense: Dense, generator: torch.Generator) -> SORSALinear:
        rank = self.rank_of(dense)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        weighting = self.gamma / self.lr / (self.factors or 2) if self.lr is not None else 0.0
        layer = SORSALinear(dense, rank, scale=scale, weighting=weighting)
        if not dense.is_meta:
            layer.start_(dense, *singular(dense.weight, rank))
        return layer
