"""The one seam between the mathematics and the machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Axis:
    """Two groups of ranks a matrix may be spread over; the only distributed thing the mathematics may hold.

    Attributes:
        rows: ranks that hold other rows (of the long side) of the same matrix, or None when it is whole here.
        replicas: ranks that computed the gradient of other data, or None when gradients arrive averaged.
        note: is told the bytes of everything that is summed over the rows' ranks, and how many these are; or None.

    Both operations return a new tensor (or `x` itself where there is nobody to ask) and must be called by
    every rank of the group in the same order.
    """

    rows: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    note: Callable[[int, int], None] | None = field(default=None, compare=False)

    @property
    def whole(self) -> bool:
        """True when this rank holds every row of the matrix."""
        return self.rows is None

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the rows' ranks of something small: (short, r), (r, r), a vector, a scalar."""
        if self.rows is None:
            return x
        if self.note is not None:
            self.note(x.numel() * x.element_size(), dist.get_world_size(self.rows))
        return _reduced(x, self.rows)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the replicas. Linear maps of a gradient may be averaged instead of the gradient."""
        if self.replicas is None:
            return x
        return _reduced(x, self.replicas).div_(dist.get_world_size(self.replicas))


def _reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


WHOLE = Axis()
