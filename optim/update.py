"""What a rule hands back: a direction for the weights, in factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """`direction @ basisᵀ (+ rows ∘ rest)`: two thin tensors to send, one matrix product to apply.

    Attributes:
        direction: `(batch, long, r)`, in the dtype that the product shall have.
        basis: `(batch, short, r)`, of the same dtype.
        rest: `(batch, long, short)`, a full-size part, for the methods that have one.
        rows: `(batch, long, 1)`, what each row of `rest` is multiplied by; None stands for ones.
    """

    direction: Tensor
    basis: Tensor
    rest: Tensor | None = None
    rows: Tensor | None = None

    def materialise(self) -> Tensor:
        """The update in full, float32."""
        full = (self.direction @ self.basis.mT).float()
        if self.rest is None:
            return full
        return full + (self.rest if self.rows is None else self.rows * self.rest)

    def apply_(self, weights: Sequence[Tensor], *, keep: float, step: float) -> None:
        """`weight ← keep·weight − step·update` for the weights of the batch in order, (long, short) views, in place."""
        dtype = weights[0].dtype
        if self.direction.dtype in (torch.float32, dtype):
            for weight, direction, basis in zip(weights, self.direction.to(dtype), self.basis.to(dtype), strict=True):
                weight.addmm_(direction, basis.mT, beta=keep, alpha=-step)
        else:  # factors of lower precision than the weight: a fast product, then one pass in the weight's precision
            for weight, direction, basis in zip(weights, self.direction, self.basis, strict=True):
                if keep != 1.0:
                    weight.mul_(keep)
                weight.add_(direction @ basis.mT, alpha=-step)
        if self.rest is None:
            return
        rest = self.rest.to(dtype)
        if self.rows is None:
            torch._foreach_add_(list(weights), rest.unbind(), alpha=-step)
        else:
            rows = self.rows.to(dtype).expand_as(rest)
            torch._foreach_addcmul_(list(weights), rest.unbind(), rows.unbind(), value=-step)
