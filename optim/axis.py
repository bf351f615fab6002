"""The one seam between the mathematics and the machines: other rows of a matrix, and other data."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

Asking = Generator[Tensor, Tensor, T]
"""A computation that yields a tensor wherever replicas, which compute the same of other data, are to meet, and goes on
with the mean of what they have yielded. Where what it yields is linear in the data, what comes of it is what one
process with all the data gets. Who drives it decides when means travel, and which of them together."""


def alone(asking: Asking[T]) -> T:
    """What comes of it where there are no replicas: each mean is the thing itself."""
    try:
        mean = next(asking)
        while True:
            mean = asking.send(mean)
    except StopIteration as end:
        return end.value


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks that a matrix's rows are spread over; the only distributed thing the mathematics may hold.

    Attributes:
        rows: ranks that hold other rows (of the long side) of the same matrix, or None when it is whole here.
        note: is told the bytes of everything that is summed over the rows' ranks, and how many these are; or None.
    """

    rows: dist.ProcessGroup | None = None
    note: Callable[[int, int], None] | None = field(default=None, compare=False)

    @property
    def whole(self) -> bool:
        """True when this rank holds every row of the matrix."""
        return self.rows is None

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the rows' ranks of something small: (short, r), (r, r), a vector, a scalar.

        A new tensor, or `x` itself where there is nobody to ask; every rank must call it, in the same order.
        """
        if self.rows is None:
            return x
        if self.note is not None:
            self.note(x.numel() * x.element_size(), dist.get_world_size(self.rows))
        out = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.rows)
        return out


WHOLE = Axis()
