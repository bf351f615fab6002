"""What a rule hands back: a direction for the weights, in parts that are small to keep and to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Some entries of each matrix of a batch.

    Attributes:
        index: `(batch, k)`, places in the matrix flattened row by row (`row · short + column`), none twice.
        values: `(batch, k)`, float32.
    """

    index: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A basis of unit vectors: what is multiplied by it is put into columns, and no product is needed.

    Attributes:
        index: `(batch, r)` int64, the columns, none twice.
        short: how many there are.
    """

    index: Tensor
    short: int


@dataclass(frozen=True, slots=True)
class Update:
    """`direction @ basisᵀ + rows ∘ rest`, with `entries` in the place of what that gives there.

    Whatever is None is not there; at least one of `direction` and `rest` is.

    Attributes:
        direction: `(batch, long, r)`, in the dtype that the product shall have.
        basis: `(batch, short, r)`, of the same dtype, or columns.
        rest: `(batch, long, short)`, a full-size part.
        rows: `(batch, long, 1)` or `(batch, 1, 1)`, what each row of `rest` is multiplied by; None stands for ones.
        entries: entries that are known better.
    """

    direction: Tensor | None = None
    basis: Tensor | Columns | None = None
    rest: Tensor | None = None
    rows: Tensor | None = None
    entries: Entries | None = None

    def materialise(self) -> Tensor:
        """The update in full, float32."""
        full = None
        if self.direction is not None and self.basis is not None:
            if isinstance(self.basis, Columns):
                full = self.direction.new_zeros((*self.direction.shape[:-1], self.basis.short), dtype=torch.float32)
                full.scatter_(-1, self.basis.index.unsqueeze(-2).expand_as(self.direction), self.direction.float())
            else:
                full = (self.direction @ self.basis.mT).float()
        if self.rest is not None:
            rest = self.rest if self.rows is None else self.rows * self.rest
            full = rest.float() if full is None else full + rest
        assert full is not None  # an update has one of the two
        if self.entries is not None:
            flat = full.flatten(-2).scatter(-1, self.entries.index.long(), self.entries.values)
            full = flat.view(full.shape)
        return full

    def apply_(self, weights: Sequence[Tensor], *, keep: float, step: float) -> None:
        """`weight ← keep·weight − step·update` for the weights of the batch in order, (long, short) views, in place."""
        dtype = weights[0].dtype
        before = [] if self.entries is None else _places(self.entries.index, weights)
        kept = [weight[place].float() for weight, place in zip(weights, before, strict=bool(before))]
        if self.direction is None or self.basis is None:
            if keep != 1.0:
                torch._foreach_mul_(list(weights), keep)
        elif isinstance(self.basis, Columns):
            if keep != 1.0:
                torch._foreach_mul_(list(weights), keep)
            for weight, direction, index in zip(weights, self.direction.to(dtype), self.basis.index, strict=True):
                weight.index_add_(-1, index, direction, alpha=-step)
        elif self.direction.dtype in (torch.float32, dtype):
            for weight, direction, basis in zip(weights, self.direction.to(dtype), self.basis.to(dtype), strict=True):
                weight.addmm_(direction, basis.mT, beta=keep, alpha=-step)
        else:  # factors of lower precision than the weight: a fast product, then one pass in the weight's precision
            for weight, direction, basis in zip(weights, self.direction, self.basis, strict=True):
                if keep != 1.0:
                    weight.mul_(keep)
                weight.add_(direction @ basis.mT, alpha=-step)
        if self.rest is not None:
            rest = self.rest.to(dtype)
            if self.rows is None:
                torch._foreach_add_(list(weights), rest.unbind(), alpha=-step)
            else:
                rows = self.rows.to(dtype).expand_as(rest)
                torch._foreach_addcmul_(list(weights), rest.unbind(), rows.unbind(), value=-step)
        if self.entries is not None:
            for weight, place, old, new in zip(weights, before, kept, self.entries.values, strict=True):
                weight[place] = (keep * old - step * new).to(dtype)


def _places(index: Tensor, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    short = weights[0].shape[-1]
    wide = index.long()
    return list(zip((wide // short).unbind(), (wide % short).unbind(), strict=True))
