"""SLTrain: sparse plus low-rank pre-training (Han et al. 2024, arXiv 2406.02214).

    W = (α / r) B A + S

with a support of S of ⌊δ out in⌋ entries that is drawn once and fixed; A uniform, B zero, the values of S uniform up
to 1/sqrt(in). W is built where it is needed and nothing but x and the factors is kept for the way back:

    ∂A = (α/r) Bᵀ G,  ∂B = (α/r) G Aᵀ,  ∂values = G[support],   G = δᵀ x
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thinrank.optim.layers.base import RankedReparam, like, uniform_
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.optim.layers.spectral import computed_in, flat
from thinrank.optim.methods.config import number


def _weight(a: Tensor, b: Tensor, values: Tensor, index: Tensor, scale: float) -> Tensor:
    dense = (b @ a).mul_(scale)
    dense.view(-1).index_add_(0, index, values)
    return dense


class _SparsePlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, index: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b, values, index)
        ctx.scale = scale
        return x @ _weight(a, b, values, index, scale).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        x, a, b, values, index = ctx.saved_tensors
        dx = grad @ _weight(a, b, values, index, ctx.scale) if ctx.needs_input_grad[0] else None
        g = grad.mT @ x
        return dx, (b.mT @ g).mul_(ctx.scale), (g @ a.mT).mul_(ctx.scale), g.view(-1)[index], None, None


class SLTrainLinear(LowRankLinear):
    """Factors and scattered entries.

    Attributes:
        values: of S, (K,).
        index: where they are, in the weight row by row, (K,) int64, rising; a buffer.
    """

    COEFFICIENTS = ("values",)

    def __init__(self, dense: Dense, rank: int, count: int, *, scale: float) -> None:
        super().__init__(dense, rank, scale=scale)
        self.values = like(dense, count)
        self.register_buffer("index", torch.empty(count, dtype=torch.int64, device=dense.weight.device))
        self.index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        with computed_in(x, self.A, self.B, self.values) as (low, a, b, values):
            y = _SparsePlusLowRank.apply(flat(low), a, b, values, self.index, self.scale)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def weight(self) -> Tensor:
        return self.product().reshape(-1).index_add(0, self.index, self.values).view(*self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def flops(self) -> int:
        return 2 * self.out_features * self.in_features  # of one token; W itself is built once for all of them


@dataclass(frozen=True, kw_only=True)
class SLTrain(RankedReparam):
    """SLTrain (Han et al. 2024, arXiv 2406.02214): factors, and entries at places that were drawn once.

    Defaults: the authors' are delta=0.03 and alpha=16.0, of their 130M and 350M models (32 at 60M, 8 at 1B); what the
    shared class says is ours.

    Equations and shapes: `thinrank.optim.layers.sltrain`.
    """

    name: str = field(default="sltrain", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    delta: float = field(default=0.03, metadata={"help": "share of the entries that are trained as they are"})
    alpha: float = field(default=16.0, metadata={"help": "the factors' product is multiplied by alpha / rank"})

    def __post_init__(self) -> None:
        super().__post_init__()
        number("delta", self.delta, high=1.0)
        number("alpha", self.alpha, open_low=True)

    def layer(self, dense: Dense, generator: torch.Generator) -> SLTrainLinear:
        rank, (out, width) = self.rank_of(dense), dense.shape
        count = max(1, int(self.delta * out * width + 1e-9))
        layer = SLTrainLinear(dense, rank, count, scale=self.alpha / rank)
        if not dense.is_meta:
            layer.start_("lora", dense, generator)
            with torch.no_grad():
                layer.index.copy_(torch.randperm(out * width, generator=generator)[:count].sort().values)
                uniform_(layer.values, width**-0.5, generator)
        return layer
