"""Sums of one message over ranks: in the backend's ring, in two hops straight to whom it concerns, or in one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

DIRECT_BYTES = 4 * 2**20
"""Up to here a message goes straight, above in gloo's ring. Measured on 4 ranks at 100 Mbit/s, 20 ms one way, seconds
of a message alone: of 1.2 MB 0.22 and 0.35, 2.3 MB 0.34 and 0.48, 4.6 MB 0.63 and 0.69, 16 MB 2.18 and 2.13."""

CHUNK_BYTES = 2**19
"""Of such a message that goes both ways by itself, so that sums of one chunk come while others leave: of 4.6 MB in one
chunk 0.82 s, in four 0.63."""

TAGS = 2**20
"""So many of a group's messages before their tags come again: more than are ever on their way at one time."""


class Sum(Protocol):
    """A sum on its way."""

    def turn(self) -> None:
        """Begins the second hop, where there is one; waits for the first."""
        ...

    def mean(self) -> Tensor:
        """Waits; what is summed, divided by the number of ranks."""
        ...


def summed(flat: Tensor, group: dist.ProcessGroup | None, ranks: int) -> Sum:
    """Puts `flat`, which is to be left alone, on its way to its sum over the `ranks` of `group`."""
    short = flat.numel() * flat.element_size() <= DIRECT_BYTES
    return Direct(flat, group, ranks) if short and flat.device.type == "cpu" else Ring(flat, group, ranks)


class Ring:
    """The backend's own all-reduce."""

    def __init__(self, flat: Tensor, group: dist.ProcessGroup | None, ranks: int) -> None:
        self._flat, self._ranks = flat, ranks
        self._work = dist.all_reduce(flat, group=group, async_op=True)

    def turn(self) -> None:
        pass

    def mean(self) -> Tensor:
        wait(self._work)
        return self._flat.div_(self._ranks)


class Direct:
    """Two hops: pieces to those who sum them up, and the sums to all.

    Sums are made in float32 at least, in the order of the ranks, and are the same everywhere to the bit. What is to
    come in either hop is asked for at the start: gloo sends nothing that nobody has asked for, and if each hop asked
    for its own, another delay would go by before each. A sum may lie where its piece did: its owner has got that piece.
    """

    def __init__(self, flat: Tensor, group: dist.ProcessGroup | None, ranks: int) -> None:
        self._flat, self._turned = flat, ranks == 1
        self._chunks: list[_Chunk] = []
        if not self._turned:
            count = -(-flat.numel() * flat.element_size() // CHUNK_BYTES)
            tags = _tags(group)
            chunks = flat.chunk(max(1, count))
            self._chunks = [_Chunk(own, group, ranks, next(tags)) for own in chunks]

    def turn(self) -> None:
        if not self._turned:
            for chunk in self._chunks:
                chunk.turn()
        self._turned = True

    def mean(self) -> Tensor:
        self.turn()
        for chunk in self._chunks:
            chunk.arrive()
        return self._flat


class _Chunk:
    """A part of a message, of which each rank sums up one piece."""

    def __init__(self, flat: Tensor, group: dist.ProcessGroup | None, ranks: int, tag: int) -> None:
        self._rank, self._group, self._back = dist.get_rank(group), group, 2 * tag + 1
        each = -(-flat.numel() // ranks)
        self._pieces = [flat[min(i * each, flat.numel()) : (i + 1) * each] for i in range(ranks)]
        own = self._pieces[self._rank]
        self._in = [own if i == self._rank else torch.empty_like(own) for i in range(ranks)]
        others = [(self._rank + i) % ranks for i in range(1, ranks)]  # not all to the same one first
        self._others = others if own.numel() else []  # of whom something comes to be summed up here
        self._holders = [i for i in others if self._pieces[i].numel()]
        self._coming = [dist.irecv(self._in[i], group=group, group_src=i, tag=2 * tag) for i in self._others]
        self._sums = [dist.irecv(self._pieces[i], group=group, group_src=i, tag=self._back) for i in self._holders]
        self._leaving = [dist.isend(self._pieces[i], group=group, group_dst=i, tag=2 * tag) for i in self._holders]

    def turn(self) -> None:
        for work in self._coming:
            wait(work)
        own = self._pieces[self._rank]
        own.copy_(mean_of(self._in))
        self._leaving += [dist.isend(own, group=self._group, group_dst=i, tag=self._back) for i in self._others]
        self._in, self._coming = [], []

    def arrive(self) -> None:
        for work in (*self._sums, *self._leaving):
            wait(work)
        self._sums, self._leaving = [], []


_COUNTS: WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = WeakKeyDictionary()


def _tags(group: dist.ProcessGroup | None) -> Iterator[int]:
    """Numbers that tell the messages of a group apart, the same on all of its ranks, since they send alike: two
    optimizers may finish in another order than they began in."""
    of = dist.group.WORLD if group is None else group
    assert of is not None  # somebody has asked for its ranks
    return _COUNTS.setdefault(of, itertools.cycle(range(TAGS)))


class Scattered:
    """One hop: every rank is sent its piece by all others, and sums up.

    Args:
        pieces: for each rank of `group`, what it is to have the mean of, in parts; the same sizes on every rank.
    """

    def __init__(self, pieces: Sequence[Sequence[Tensor]], group: dist.ProcessGroup | None) -> None:
        self._ranks, sizes = len(pieces), [sum(part.numel() for part in parts) for parts in pieces]
        self._out = torch.cat([part for parts in pieces for part in parts])  # until it has left
        into = [sizes[dist.get_rank(group)]] * self._ranks
        self._in = self._out.new_empty(sum(into))
        self._work = dist.all_to_all_single(self._in, self._out, into, sizes, group=group, async_op=True)

    def turn(self) -> None:
        pass

    def mean(self) -> Tensor:
        wait(self._work)
        return mean_of(self._in.view(self._ranks, -1).unbind())


def mean_of(rows: Sequence[Tensor]) -> Tensor:
    """The mean of equal tensors, added up one after the other (torch may add up a column in another order)."""
    total = rows[0].to(torch.promote_types(rows[0].dtype, torch.float32), copy=True)
    for other in rows[1:]:
        total.add_(other)
    return total.div_(len(rows)).to(rows[0].dtype)


def wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
