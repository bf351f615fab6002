"""One layer that is a frozen matrix and a few directions beside it; its variants are who of them is trained.

    W = R + c L C Vᵀ        R (out, in) frozen,  L (out, r),  C (r, r),  V (in, r)

With C = diag(s) these are singular triples. A method starts from factors of the weight W₀ that was there and takes them
out of it, R = W₀ − c U diag(s) Vᵀ, computed in float32 or better and from the factors as they are stored, so that the
layer does at first what the dense one did; where the factors are all of W₀, there is no R.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinrank.optim.layers.base import Layer, like
from thinrank.optim.layers.dense import Dense


class TripleLinear(Layer):
    """A frozen matrix and a product of a left factor, a small core and a right factor.

    Args:
        dense: the layer that is replaced.
        rank: r.
        trained: which of `U`, `s` and `V` are.
        residual: whether there is an R.
        scale: c.

    Attributes:
        residual: R, (out, in), frozen, or None.
        U: (out, r).
        s: (r,).
        V: (in, r).
    """

    COEFFICIENTS = ("s",)
    FAN_IN: ClassVar[Mapping[str, int]] = {"V": 0}

    def __init__(
        self,
        dense: Dense,
        rank: int,
        *,
        trained: Collection[str] = (),
        residual: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(dense)
        self.rank, self.scale = rank, scale
        self.residual: nn.Parameter | None = like(dense, *dense.shape, trained=False) if residual else None
        self.U = like(dense, self.out_features, rank, trained="U" in trained)
        self.s = like(dense, rank, trained="s" in trained)
        self.V = like(dense, self.in_features, rank, trained="V" in trained)

    def start_(self, dense: Dense, left: Tensor, s: Tensor, right: Tensor) -> None:
        """Takes the factors `left` (out, r), `s` (r,), `right` (in, r), and leaves the rest of the weight to R."""
        with torch.no_grad():
            for mine, value in ((self.U, left), (self.s, s), (self.V, right)):
                mine.copy_(value)
            if self.residual is not None:
                kind = torch.promote_types(dense.weight.dtype, torch.float32)
                u, stored, v = (p.to(kind) for p in (self.U, self.s, self.V))
                self.residual.copy_(torch.addmm(dense.weight.to(kind), u * stored, v.mT, alpha=-self.scale))

    # --- what variants change -----------------------------------------------------------------------------------------

    def left(self) -> Tensor:
        """L, (out, r)."""
        return self.U

    def right(self) -> Tensor:
        """V, (in, r)."""
        return self.V

    def core(self, z: Tensor) -> Tensor:
        """C z for each row of `z` (…, r)."""
        return z * self.s

    # --- the weight ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        z = self.core(F.linear(x, self.right().mT))
        z = z if self.scale == 1.0 else z * self.scale
        if self.residual is None:
            return F.linear(z, self.left(), self.bias)
        return F.linear(x, self.residual, self.bias) + F.linear(z, self.left())

    def weight(self) -> Tensor:
        product = self.left() @ self.core(self.right()).mT * self.scale
        return product if self.residual is None else self.residual + product

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.residual is not None else (self.left() * self.scale, self.core(self.right()).mT)

    def flops(self) -> int:
        beside = 0 if self.residual is None else self.residual.numel()
        return 2 * (beside + self.rank * (self.out_features + self.in_features + 1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
