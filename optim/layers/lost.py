"""LOST: low-rank and sparse pre-training (Li et al. 2025, arXiv 2508.02668).

Once, at the beginning, of the weight W (out, in) = U diag(s) Vᵀ that was there:

    B = U_r sqrt(s_r),  A = sqrt(s_r) V_rᵀ                          the dominant part
    W' = U_q diag(s_q) V_qᵀ  of the next q singular values          the residual
    I  = the K = max(1, ⌊δ in⌋) columns of W' with the largest norms ;  W_s = W[:, I]

    y = γ B act(A x) + (1 − γ) W_s x[I] + b

A, B and W_s are trained; I and γ are fixed. W_s has the values of W itself, not of W'. A column is an input channel,
so that the sparse part is a gather and a dense product. Read from the first author's code and from reviews; the paper's
own δ, γ and act for each size were not available to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from thinrank.optim.layers.base import RankedReparam, like
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.lowrank import ACTIVATIONS, LowRankLinear
from thinrank.optim.linalg.factor import singular
from thinrank.optim.methods.config import choice, number

SELECTIONS = ("residual", "weight", "random")


def strongest_columns(weight: Tensor, count: int) -> Tensor:
    """Indices of the `count` columns of `weight` (out, in) with the largest norms, rising (int64)."""
    return torch.linalg.vector_norm(weight, dim=0).topk(count).indices.sort().values


class LOSTLinear(LowRankLinear):
    """Factors, and some columns of the weight itself.

    Attributes:
        columns: W_s, (out, K).
        index: I, (K,) int32, rising; a buffer.
    """

    def __init__(self, dense: Dense, rank: int, count: int, *, act: str, gamma: float) -> None:
        super().__init__(dense, rank, act=act, scale=gamma)
        self.columns = like(dense, self.out_features, count)
        self.register_buffer("index", torch.empty(count, dtype=torch.int32, device=dense.weight.device))
        self.index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        sparse = F.linear(x.index_select(-1, self.index), self.columns)
        return super().forward(x) + sparse * (1.0 - self.scale)

    def weight(self) -> Tensor:
        return self.product().index_add(1, self.index, self.columns, alpha=1.0 - self.scale)


@dataclass(frozen=True, kw_only=True)
class LOST(RankedReparam):
    """LOST (Li et al. 2025, arXiv 2508.02668): factors of the dominant part, and the columns that they miss most.

    Defaults: the authors' are delta=0.01, the lower end of what they recommend, gamma=0.5, the upper, act=silu, which
    their code leaves out by default, and residual=256; ours are selection=residual and what the shared class says is.

    Equations and shapes: `thinrank.optim.layers.lost`.
    """

    name: str = field(default="lost", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    delta: float = field(default=0.01, metadata={"help": "share of the input channels that keep their own column"})
    gamma: float = field(default=0.5, metadata={"help": "weight of the factors; the columns have 1 - gamma"})
    act: str = field(default="silu", metadata={"help": "between the factors: silu, identity (which can be merged)"})
    residual: int = field(
        default=256, metadata={"help": "singular values, after the first `rank`, by which columns are chosen"}
    )
    selection: str = field(
        default="residual", metadata={"help": "columns by norms of: residual (the paper), weight; or random"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        number("delta", self.delta, high=1.0)
        number("gamma", self.gamma, high=1.0)
        choice("act", self.act, ACTIVATIONS)
        choice("selection", self.selection, SELECTIONS)
        if not isinstance(self.residual, int) or self.residual < 1:
            raise ValueError(f"residual must be at least 1 singular value, got {self.residual!r}: 256 is usual")

    def layer(self, dense: Dense, generator: torch.Generator) -> LOSTLinear:
        rank, width = self.rank_of(dense), dense.shape[1]
        count = max(1, int(self.delta * width + 1e-9))
        layer = LOSTLinear(dense, rank, count, act=self.act, gamma=self.gamma)
        if dense.is_meta:
            return layer
        left, s, right = singular(dense.weight)
        with torch.no_grad():
            layer.B.copy_(left[:, :rank] * s[:rank].sqrt())
            layer.A.copy_((right[:, :rank] * s[:rank].sqrt()).mT)
            kept = slice(rank, rank + self.residual)
            if self.selection == "random":
                index = torch.randperm(width, generator=generator)[:count].sort().values
            elif self.selection == "weight" or rank == len(s):  # nothing is left to choose by
                index = strongest_columns(dense.weight, count)
            else:  # ‖W'[:, j]‖ = ‖diag(s) V_jᵀ‖, since the columns of U are orthonormal
                index = strongest_columns((right[:, kept] * s[kept]).mT, count)
            layer.index.copy_(index)
            layer.columns.copy_(dense.weight[:, index.to(dense.weight.device)])
        return layer
