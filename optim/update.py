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


def memory_of(x: Tensor) -> Tensor:
    """`x` (..., long, short) as it lies in memory, from the first entry of each matrix to its last: (..., length), a
    view, whatever the strides of a matrix are. `memory_places` are indices into it.
    """
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True))
    return x.as_strided((*x.shape[:-2], length), (*x.stride()[:-2], 1))


def memory_places(index: Tensor, x: Tensor) -> Tensor:
    """Where in `memory_of(x)` the places `index` of a matrix, counted row by row (`row · short + column`), are: int64.

    One gather by one index is several times faster than one by rows and columns, and a matrix that lies row by row,
    as most do, needs no division.
    """
    short, (by_row, by_column) = x.shape[-1], x.stride()[-2:]
    index = index.long()
    if by_row == short * by_column:
        return index if by_column == 1 else index * by_column
    return index * by_column + (index // short).mul_(by_row - short * by_column)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A basis of unit vectors: what is multiplied by it is put into columns, and no product is needed.

    Attributes:
        index: `(batch, r)` int64, the columns, none twice.
        short: how many there are.
    """

    index: Tensor
    short: int


Factor = float | Sequence[float]
"""A number for all matrices of a batch, or one for each."""

SMALL = 2**19
"""Entries of a batch of weights up to which a CPU makes an update in full: 2 MiB, what its cache holds."""


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

    def materialise(self, *, transposed: bool = False) -> Tensor:
        """The update in full, float32, its matrices lying transposed in memory if that is asked for."""
        full = None
        if self.direction is not None and self.basis is not None:
            if isinstance(self.basis, Columns):
                full = self.direction.new_zeros((*self.direction.shape[:-1], self.basis.short), dtype=torch.float32)
                full.scatter_(-1, self.basis.index.unsqueeze(-2).expand_as(self.direction), self.direction.float())
            elif transposed:
                full = torch.bmm(self.basis, self.direction.mT).float().mT
            else:
                full = torch.bmm(self.direction, self.basis.mT).float()
        if self.rest is not None:
            if full is None:
                full = (self.rest if self.rows is None else self.rows * self.rest).float()
            elif self.rows is None:
                full = full.add_(self.rest)
            else:
                full = full.addcmul_(self.rows.float(), self.rest.float())
        assert full is not None  # an update has one of the two
        if self.entries is not None:
            full = full.clone() if full is self.rest else full
            memory_of(full).scatter_(-1, memory_places(self.entries.index, full), self.entries.values)
        return full

    def apply_(self, weights: Sequence[Tensor], *, keep: Factor, step: Factor) -> None:
        """`weight ← keep·weight − step·update` for the weights of the batch in order, (long, short) views, in place.

        Args:
            keep, step: one number for all weights, or one for each.
        """
        dtype = weights[0].dtype
        if self._small(weights):
            if keep != 1.0:
                torch._foreach_mul_(list(weights), keep)
            _subtract_(weights, self.materialise(transposed=weights[0].stride(-1) != 1), step)
            return
        keeps, steps = _each(keep, len(weights)), _each(step, len(weights))
        entries = None if self.entries is None else _Kept(self.entries, weights)
        if self.direction is None or self.basis is None:
            if keep != 1.0:
                torch._foreach_mul_(list(weights), keep)
        elif isinstance(self.basis, Columns):
            if keep != 1.0:
                torch._foreach_mul_(list(weights), keep)
            all_of = zip(weights, self.direction.to(dtype), self.basis.index, steps, strict=True)
            for weight, direction, index, alpha in all_of:
                weight.index_add_(-1, index, direction, alpha=-alpha)
        elif self.direction.dtype in (torch.float32, dtype):
            if keep != 1.0 and weights[0].device.type == "cpu":
                # oneDNN makes a new kernel for each factor of what it adds to, and this one moves with the rate
                torch._foreach_mul_(list(weights), keep)
                keeps = _each(1.0, len(weights))
            all_of = zip(weights, self.direction.to(dtype), self.basis.to(dtype), keeps, steps, strict=True)
            for weight, direction, basis, beta, alpha in all_of:
                weight.addmm_(direction, basis.mT, beta=beta, alpha=-alpha)
        else:  # factors of lower precision than the weight: a fast product, then one pass in the weight's precision
            for weight, direction, basis, beta, alpha in zip(
                weights, self.direction, self.basis, keeps, steps, strict=True
            ):
                if beta != 1.0:
                    weight.mul_(beta)
                weight.add_(direction @ basis.mT, alpha=-alpha)
        if self.rest is not None:
            rest = self.rest.to(dtype)
            if self.rows is None:
                _subtract_(weights, self.rest if isinstance(step, Sequence) else rest, step)
            else:
                rows = self.rows.to(dtype).expand_as(rest)
                if isinstance(step, Sequence):
                    torch._foreach_addcmul_(list(weights), rest.unbind(), rows.unbind(), [-s for s in step])
                else:
                    torch._foreach_addcmul_(list(weights), rest.unbind(), rows.unbind(), value=-step)
        if entries is not None:
            entries.put_(keep=keep, step=step)

    def _small(self, weights: Sequence[Tensor]) -> bool:
        """True for float32 weights, in a CPU's memory, so small that a call for each of them would cost more than the
        update in full does.
        """
        first, factors = weights[0], (self.direction, self.basis)
        return (
            1 < len(weights) <= SMALL // max(first.numel(), 1)
            and first.device.type == "cpu"
            and all(isinstance(x, Tensor) and x.dtype is first.dtype is torch.float32 for x in factors)
        )


class _Kept:
    """What weights hold at `entries` now, for when everything else of an update has been applied."""

    def __init__(self, entries: Entries, weights: Sequence[Tensor]) -> None:
        self.values = entries.values
        lies = weights[0].stride()
        if all(weight.stride() == lies for weight in weights):
            size = memory_of(weights[0]).shape
            self.memory = [weight.as_strided(size, (1,)) for weight in weights]
            self.places = memory_places(entries.index, weights[0]).unbind()
        else:
            self.memory = [memory_of(weight) for weight in weights]
            self.places = [memory_places(index, weight) for index, weight in zip(entries.index, weights, strict=True)]
        # one by one out of the weights, then all of a batch together
        self.old = torch.stack([flat.gather(0, at) for flat, at in zip(self.memory, self.places, strict=True)])

    def put_(self, *, keep: Factor, step: Factor) -> None:
        """`keep·old − step·value` into the weights."""
        old = self.old.float()
        if keep != 1.0:
            old = torch.stack(torch._foreach_mul(old.unbind(), keep)) if isinstance(keep, Sequence) else old.mul_(keep)
        if isinstance(step, Sequence):
            new = torch.sub(old, torch.stack(torch._foreach_mul(self.values.unbind(), list(step))))
        else:
            new = torch.add(old, self.values, alpha=-step)
        for flat, at, value in zip(self.memory, self.places, new.to(self.old.dtype).unbind(), strict=True):
            flat.scatter_(0, at, value)


def _each(factor: Factor, count: int) -> Sequence[float]:
    return factor if isinstance(factor, Sequence) else [factor] * count


def _subtract_(weights: Sequence[Tensor], update: Tensor, step: Factor) -> None:
    """`weight ← weight − step·update` for each of a batch, in place."""
    if isinstance(step, Sequence):
        own = torch._foreach_mul(update.unbind(), list(step))  # in its own precision, and rounded once
        torch._foreach_sub_(list(weights), [each.to(weights[0].dtype) for each in own])
    else:
        torch._foreach_add_(list(weights), update.unbind(), alpha=-step)
