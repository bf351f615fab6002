"""Spectral Adapter: some singular vectors of a weight are shifted or turned (Zhang & Pilanci 2024, arXiv 2405.13952).

    W₀ = U diag(s) Vᵀ ;  U₁ (out, r), s₁ (r,), V₁ (in, r): a block of r triples, from number `offset` on

    additive     W = R + (U₁ + A_u) diag(s₁) (V₁ + A_v)ᵀ            A_u (out, r), A_v (in, r) trained, zero at first
    rotational   W = R + U₁ Cay(A_u) diag(s₁) (V₁ Cay(A_v))ᵀ        A_u, A_v (r, r) trained, zero at first

    Cay(A) = (I − K) (I + K)⁻¹,  K = (A − Aᵀ) / 2                   orthogonal for every A

The other triples stay, as R = W₀ − U₁ diag(s₁) V₁ᵀ. Models that were trained with other offsets can be fused, since
their blocks do not overlap. Ours: R is kept as a matrix, which costs less than the other vectors would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from thinrank.optim.layers.base import FineTuning, RankedReparam, like
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.triples import TripleLinear
from thinrank.optim.linalg.factor import singular
from thinrank.optim.methods.config import choice

MODES = ("additive", "rotational")


def cayley(a: Tensor) -> Tensor:
    """The orthogonal matrix that belongs to the skew-symmetric part of `a` (r, r); in float32 or better within."""
    x = a.to(torch.promote_types(a.dtype, torch.float32))
    skew = (x - x.mT) / 2
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye + skew, eye - skew).to(a.dtype)  # both are polynomials in K and commute


class AdditiveLinear(TripleLinear):
    """Singular vectors and what is added to them.

    Attributes:
        A_u: (out, r), trained.
        A_v: (in, r), trained.
    """

    FAN_IN: ClassVar[Mapping[str, int]] = {"V": 0, "A_v": 0}

    def __init__(self, dense: Dense, rank: int) -> None:
        super().__init__(dense, rank)
        self.A_u, self.A_v = like(dense, self.out_features, rank), like(dense, self.in_features, rank)

    def left(self) -> Tensor:
        return self.U + self.A_u

    def right(self) -> Tensor:
        return self.V + self.A_v


class RotationalLinear(TripleLinear):
    """Singular vectors and what turns them.

    Attributes:
        A_u, A_v: (r, r), trained.
    """

    def __init__(self, dense: Dense, rank: int) -> None:
        super().__init__(dense, rank)
        self.A_u, self.A_v = like(dense, rank, rank), like(dense, rank, rank)

    def left(self) -> Tensor:
        return self.U @ cayley(self.A_u)

    def right(self) -> Tensor:
        return self.V @ cayley(self.A_v)


@dataclass(frozen=True, kw_only=True)
class SpectralAdapter(FineTuning, RankedReparam):
    """Spectral Adapter (Zhang & Pilanci 2024, arXiv 2405.13952): singular vectors are shifted, or turned.

    Defaults: the authors' are mode=additive and offset=0, the largest singular values; ours are rank=8 and what the
    shared classes say is.

    Equations and shapes: `thinrank.optim.layers.spectral_adapter`.
    """

    name: str = field(default="spectral_adapter", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    rank: int | float = field(
        default=8, metadata={"help": "singular triples in the block: a number, or a share of the shorter side"}
    )
    mode: str = field(default="additive", metadata={"help": "what is trained: additive (shifts), rotational (turns)"})
    offset: int = field(default=0, metadata={"help": "larger singular values that come before the block"})

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("mode", self.mode, MODES)
        if isinstance(self.offset, bool) or not isinstance(self.offset, int) or self.offset < 0:
            raise ValueError(f"offset must be a whole number of at least 0, got {self.offset!r}: 0 is usual")

    def check(self, dense: Dense) -> None:
        super().check(dense)
        if self.offset + self.rank_of(dense) > min(dense.shape):
            raise ValueError(
                f"offset {self.offset} and rank {self.rank} go beyond the shorter side of {dense.name}, {dense.shape}: "
                "lower one of them, or exclude that layer"
            )

    def layer(self, dense: Dense, generator: torch.Generator) -> TripleLinear:
        rank = self.rank_of(dense)
        layer = (AdditiveLinear if self.mode == "additive" else RotationalLinear)(dense, rank)
        if dense.is_meta:
            return layer
        left, s, right = singular(dense.weight, self.offset + rank)
        block = slice(self.offset, None)
        layer.start_(dense, left[:, block], s[block], right[:, block])
        with torch.no_grad():
            layer.A_u.zero_()
            layer.A_v.zero_()
        return layer
