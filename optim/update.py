"""What a rule hands back: a direction for the weights, dense or in factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dense:
    """A full-size direction, `(..., long, short)`."""

    direction: Tensor

    def materialise(self) -> Tensor:
        return self.direction

    def apply_(self, index: int, weight: Tensor, *, keep: float, step: float) -> None:
        """`weight ← keep·weight − step·direction[index]`, in place; `weight` is a (long, short) view."""
        if keep != 1.0:
            weight.mul_(keep)
        weight.add_(self.direction[index].to(weight.dtype), alpha=-step)


@dataclass(frozen=True, slots=True)
class Factored:
    """`direction @ basisᵀ (+ residual)`: two thin tensors to send, one matrix product to apply.

    Attributes:
        direction: `(..., long, r)`, in the dtype that the product shall have.
        basis: `(..., short, r)`, of the same dtype.
        residual: `(..., long, short)`, the part outside the subspace, for the methods that have one.
    """

    direction: Tensor
    basis: Tensor
    residual: Tensor | None = None

    def materialise(self) -> Tensor:
        full = (self.direction @ self.basis.mT).float()
        return full if self.residual is None else full + self.residual

    def apply_(self, index: int, weight: Tensor, *, keep: float, step: float) -> None:
        """`weight ← keep·weight − step·update[index]`, in place; `weight` is a (long, short) view."""
        direction, basis = self.direction[index], self.basis[index]
        if direction.dtype == torch.float32 or direction.dtype == weight.dtype:
            weight.addmm_(direction.to(weight.dtype), basis.to(weight.dtype).mT, beta=keep, alpha=-step)
        else:  # factors of lower precision than the weight: a fast product, then one pass in the weight's precision
            if keep != 1.0:
                weight.mul_(keep)
            weight.add_(direction @ basis.mT, alpha=-step)
        if self.residual is not None:
            weight.add_(self.residual[index].to(weight.dtype), alpha=-step)


Update = Dense | Factored
