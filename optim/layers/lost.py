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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thinrank.optim.layers.base import RankedReparam, like
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.lowrank import ACTIVATIONS, LowRankLinear
from thinrank.optim.layers.spectral import computed_in, flat
from thinrank.optim.linalg.factor import singular
from thinrank.optim.methods.config import choice, number

SELECTIONS = ("residual", "weight", "random")


def strongest_columns(weight: Tensor, count: int) -> Tensor:
    """Indices of the `count` columns of `weight` (out, in) with the largest norms, rising (int64)."""
    return torch.linalg.vector_norm(weight, dim=0).topk(count).indices.sort().values


class _Sum(torch.autograd.Function):
    """`γ act(x Aᵀ) Bᵀ + (1 − γ) x[I] W_sᵀ` as one product in and one out.

    The chosen channels are picked by rows that hold a single one, put below A: K columns more of a product cost less
    than to gather K channels and to scatter their gradients. Columns of zeros make the width one that products are
    fast at. What is put together is so again on the way back, and not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, columns: Tensor, index: Tensor, gamma: float, silu: bool
    ) -> Tensor:
        inner = x @ torch.cat([a, _picking(index, x, len(a))]).mT
        ctx.save_for_backward(x, a, b, columns, index, inner)
        ctx.gamma, ctx.silu = gamma, silu
        return _hidden(inner, len(a), silu) @ _weighted(b, columns, gamma).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (delta,) = grads
        x, a, b, columns, index, inner = ctx.saved_tensors
        rank = len(a)
        outer = delta.mT @ _hidden(inner, rank, ctx.silu)
        d_inner = delta @ _weighted(b, columns, ctx.gamma)
        if ctx.silu:
            d_inner[:, :rank] = torch.ops.aten.silu_backward(d_inner[:, :rank], inner[:, :rank])
        dx = d_inner @ torch.cat([a, _picking(index, x, rank)]) if ctx.needs_input_grad[0] else None
        da = d_inner[:, :rank].mT @ x
        chosen = outer[:, rank : rank + len(index)]
        return dx, da, outer[:, :rank] * ctx.gamma, chosen * (1.0 - ctx.gamma), None, None, None


MULTIPLE = 8
"""Of columns that matrix products are fast at: a LOST layer with 263 took a tenth longer than one with 264."""


def _padding(rank: int, count: int) -> int:
    return -(rank + count) % MULTIPLE


def _picking(index: Tensor, like: Tensor, rank: int) -> Tensor:
    """(K + padding, in), which times x is x[I], and zeros."""
    rows = like.new_zeros(len(index) + _padding(rank, len(index)), like.shape[-1])
    return rows.scatter_(1, index.long()[:, None], 1.0)


def _hidden(inner: Tensor, rank: int, silu: bool) -> Tensor:
    return torch.cat([F.silu(inner[:, :rank]), inner[:, rank:]], 1) if silu else inner


def _weighted(b: Tensor, columns: Tensor, gamma: float) -> Tensor:
    nothing = b.new_zeros(len(b), _padding(b.shape[1], columns.shape[1]))
    return torch.cat([b * gamma, columns * (1.0 - gamma), nothing], 1)


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
        if len(self.index) > self.rank:  # many channels are better gathered
            sparse = F.linear(x.index_select(-1, self.index), self.columns)
            return super().forward(x) + sparse * (1.0 - self.scale)
        with computed_in(x, self.A, self.B, self.columns) as (low, a, b, columns):
            y = _Sum.apply(flat(low), a, b, columns, self.index, self.scale, self.act == "silu")
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

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
