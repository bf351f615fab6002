"""Weights in pieces on several ranks: where they lie, who steps them, and how gradients get there and updates back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from thinrank.optim.exchange.replicas import Group, Span, length
from thinrank.optim.exchange.wire import Count, Wire

SPREAD_BYTES = 16 * 2**20
"""Of what all ranks are sent at once: each rank's share lies in its memory once for every other rank meanwhile."""


class Shards(Protocol):
    """Where the weights of an optimizer lie: the one thing that knows how a framework shards them."""

    @property
    def group(self) -> Group | None:
        """The ranks that the pieces lie on; None: all processes."""
        ...

    @property
    def wire(self) -> Wire:
        """Where everything that is sent for the pieces is counted."""
        ...

    @property
    def replicas(self) -> Group | None:
        """The ranks that hold the same pieces, between which the framework averages gradients; None: there is one."""
        ...

    def __contains__(self, param: Tensor) -> bool:
        """Whether it lies in pieces of which this knows."""
        ...

    def shape(self, param: Tensor) -> tuple[int, ...]:
        """Of the whole weight."""
        ...

    def spans(self, param: Tensor) -> Sequence[Span]:
        """Each rank's piece, in the order of the group's ranks; disjoint, and everything together."""
        ...

    def weight(self, param: Tensor) -> Tensor:
        """This rank's piece of what is stepped (the float32 master where there is one): 1-D, written to in place."""
        ...

    def gradient(self, param: Tensor) -> Tensor | None:
        """This rank's piece of the gradient, its mean over all data: 1-D; None where no rank has one in this step."""
        ...


def common(one: Span, other: Span) -> Span:
    """What both have; nothing, somewhere, where they have nothing."""
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return start, max(start, stop)


def even(size: int, ranks: int, unit: int = 1) -> list[Span]:
    """`size` units, each of `unit` entries, cut into pieces as equal as torch cuts them: ⌈size/ranks⌉ units for each
    rank until there are none left."""
    each = -(-size // ranks)
    ends = [min(rank * each, size) * unit for rank in range(ranks + 1)]
    return [(start, stop) if stop > start else (0, 0) for start, stop in pairwise(ends)]


def rows_of(shape: Sequence[int], ranks: int) -> list[Span]:
    """Each rank's piece of a weight that is cut into rows: ⌈rows/n⌉ each, and the last ranks what is left, if any."""
    rows = shape[0] if shape else 1
    return even(rows, ranks, math.prod(shape) // max(rows, 1))


def owners(spans: Sequence[Sequence[Span]], costs: Sequence[float]) -> list[int]:
    """Which rank steps each weight: of those that hold about as much of it as anybody (half of the largest piece, or
    more), the one with the least to do; the dearest weights first.

    Args:
        spans: of each weight, every rank's piece.
        costs: of a step of each weight, in any unit.

    Returns:
        A rank for each weight: within (4/3 − 1/3n) of the best balance where pieces are even (Graham 1969), and where
        most of the weight is where they are not.
    """
    load = [0.0] * (len(spans[0]) if spans else 0)
    found = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: (-costs[i], i)):
        most = max(map(length, spans[i]))
        able = [rank for rank, span in enumerate(spans[i]) if 2 * length(span) >= most]
        found[i] = min(able, key=lambda rank: (load[rank], rank))
        load[found[i]] += costs[i]
    return found


@dataclass(frozen=True, slots=True)
class Parcel:
    """A tensor that goes from the pieces of all ranks to one rank, or from one rank to the pieces of all.

    Attributes:
        owner: the one rank.
        spans: each rank's piece.
        dtype: what travels.
        kind: what it is, for the count.
        piece: this rank's: what it sends to the owner, or None where the owner sends.
        whole: what this rank, the owner, sends: flattened, or None.
    """

    owner: int
    spans: Sequence[Span]
    dtype: torch.dtype
    kind: str
    piece: Tensor | None = None
    whole: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A tensor that lies in pieces and is to lie in other ones.

    Attributes:
        piece: this rank's, as it lies (1-D).
        lies, goes: each rank's piece, before and after.
        kind: what it is, for the count.
    """

    piece: Tensor
    lies: Sequence[Span]
    goes: Sequence[Span]
    kind: str


def travels(parcel: Parcel) -> bool:
    """False where all of it lies on its owner, as every rank knows."""
    return any(length(span) for rank, span in enumerate(parcel.spans) if rank != parcel.owner)


class Carrier:
    """Moves parcels, many in one message: all ranks give the same parcels in the same order.

    A rank's own piece of what it owns does not travel. What travels is bytes, so that one message may hold gradients,
    weights and updates of any dtypes.
    """

    def __init__(self, group: Group | None, wire: Count, device: torch.device) -> None:
        self.group, self.wire, self.device = group, wire, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    @property
    def everybody(self) -> Group:
        group = self.group or dist.group.WORLD
        assert group is not None  # there is one, or no rank could have been asked for
        return group

    def bring(self, parcels: Sequence[Parcel]) -> list[Tensor | None]:
        """Each parcel's pieces, put together on its owner (1-D); None on the other ranks."""
        if not any(map(travels, parcels)):
            return [parcel.piece if parcel.owner == self.rank else None for parcel in parcels]
        sends: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        sizes = [0] * self.ranks
        counted: list[tuple[str, int]] = []
        for parcel in parcels:
            assert parcel.piece is not None
            if parcel.owner != self.rank:
                sends[parcel.owner].append(parcel.piece.to(parcel.dtype))
                counted.append((parcel.kind, length(parcel.spans[self.rank]) * parcel.dtype.itemsize))
            else:
                for rank in range(self.ranks):
                    sizes[rank] += 0 if rank == self.rank else length(parcel.spans[rank]) * parcel.dtype.itemsize
        received = self._swap(sends, sizes, counted)
        found: list[Tensor | None] = []
        places = [0] * self.ranks
        for parcel in parcels:
            if parcel.owner != self.rank:
                found.append(None)
                continue
            assert parcel.piece is not None
            whole = torch.empty(sum(map(length, parcel.spans)), dtype=parcel.dtype, device=self.device)
            for rank, (start, stop) in enumerate(parcel.spans):
                if rank == self.rank:
                    whole[start:stop] = parcel.piece
                elif stop > start:
                    size = (stop - start) * parcel.dtype.itemsize
                    whole[start:stop] = _as(received[rank], places[rank], size, parcel.dtype)
                    places[rank] += size
            found.append(whole)
        return found

    def give(self, parcels: Sequence[Parcel]) -> list[Tensor]:
        """This rank's piece of each parcel that its owner holds whole (1-D)."""
        if not any(map(travels, parcels)):
            return [self._own(parcel) for parcel in parcels]
        sends: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        sizes = [0] * self.ranks
        counted: list[tuple[str, int]] = []
        for parcel in parcels:
            if parcel.owner == self.rank:
                assert parcel.whole is not None
                for rank, (start, stop) in enumerate(parcel.spans):
                    if rank != self.rank and stop > start:
                        sends[rank].append(parcel.whole[start:stop].to(parcel.dtype))
                        counted.append((parcel.kind, (stop - start) * parcel.dtype.itemsize))
            else:
                sizes[parcel.owner] += length(parcel.spans[self.rank]) * parcel.dtype.itemsize
        received = self._swap(sends, sizes, counted)
        found: list[Tensor] = []
        places = [0] * self.ranks
        for parcel in parcels:
            if parcel.owner == self.rank:
                found.append(self._own(parcel))
                continue
            size = length(parcel.spans[self.rank]) * parcel.dtype.itemsize
            found.append(_as(received[parcel.owner], places[parcel.owner], size, parcel.dtype))
            places[parcel.owner] += size
        return found

    def spread(self, parcels: Sequence[Parcel]) -> list[Tensor]:
        """Each parcel's pieces, put together on every rank (1-D), `SPREAD_BYTES` of them at a time."""
        found: list[Tensor] = []
        some: list[Parcel] = []
        held = 0
        for parcel in parcels:
            some.append(parcel)
            held += sum(map(length, parcel.spans)) * parcel.dtype.itemsize
            if held >= SPREAD_BYTES:
                found += self._spread(some)
                some, held = [], 0
        return found + self._spread(some)

    def _spread(self, parcels: Sequence[Parcel]) -> list[Tensor]:
        if not parcels or self.ranks == 1:
            return [parcel.piece.to(parcel.dtype) for parcel in parcels if parcel.piece is not None]
        out = [parcel.piece.to(parcel.dtype) for parcel in parcels if parcel.piece is not None]
        assert len(out) == len(parcels)  # every rank has a piece of every parcel, though it may be empty
        sends = [[] if rank == self.rank else out for rank in range(self.ranks)]
        sizes = [
            0 if rank == self.rank else sum(length(p.spans[rank]) * p.dtype.itemsize for p in parcels)
            for rank in range(self.ranks)
        ]
        counted = [(p.kind, length(p.spans[self.rank]) * p.dtype.itemsize * (self.ranks - 1)) for p in parcels]
        received = self._swap(sends, sizes, counted)
        found: list[Tensor] = []
        places = [0] * self.ranks
        for parcel, own in zip(parcels, out, strict=True):
            whole = torch.empty(sum(map(length, parcel.spans)), dtype=parcel.dtype, device=self.device)
            for rank, (start, stop) in enumerate(parcel.spans):
                size = (stop - start) * parcel.dtype.itemsize
                if rank == self.rank:
                    whole[start:stop] = own
                elif size:
                    whole[start:stop] = _as(received[rank], places[rank], size, parcel.dtype)
                    places[rank] += size
            found.append(whole)
        return found

    def move(self, moves: Sequence[Move]) -> list[Tensor]:
        """This rank's piece of each tensor as it is to lie (1-D)."""
        if not moves:
            return []
        sends: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        sizes = [0] * self.ranks
        counted: list[tuple[str, int]] = []
        for each in moves:
            first, wide = each.lies[self.rank][0], each.piece.element_size()
            for rank in range(self.ranks):
                if rank == self.rank:
                    continue
                start, stop = common(each.lies[self.rank], each.goes[rank])
                if start < stop:
                    sends[rank].append(each.piece[start - first : stop - first])
                    counted.append((each.kind, (stop - start) * wide))
                sizes[rank] += length(common(each.lies[rank], each.goes[self.rank])) * wide
        received = self._swap(sends, sizes, counted)
        found: list[Tensor] = []
        places = [0] * self.ranks
        for each in moves:
            first, wide = each.goes[self.rank][0], each.piece.element_size()
            piece = each.piece.new_empty(length(each.goes[self.rank]))
            for rank in range(self.ranks):
                start, stop = common(each.lies[rank], each.goes[self.rank])
                size = (stop - start) * wide
                if rank == self.rank:
                    own = each.piece[start - each.lies[rank][0] : stop - each.lies[rank][0]]
                    piece[start - first : stop - first] = own
                elif size:
                    piece[start - first : stop - first] = _as(received[rank], places[rank], size, each.piece.dtype)
                    places[rank] += size
            found.append(piece)
        return found

    def _own(self, parcel: Parcel) -> Tensor:
        if parcel.whole is None:  # of what another rank holds whole, there is nothing here
            return torch.empty(0, dtype=parcel.dtype, device=self.device)
        return parcel.whole[slice(*parcel.spans[self.rank])].to(parcel.dtype)

    def _swap(self, sends: list[list[Tensor]], sizes: list[int], counted: Sequence[tuple[str, int]]) -> list[Tensor]:
        """Bytes to every rank and from every rank, in one message; none where nothing travels between any two."""
        out = [_bytes(tensor) for own in sends for tensor in own]
        flat = torch.cat(out) if out else torch.empty(0, dtype=torch.uint8, device=self.device)
        into = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        splits = [sum(tensor.numel() * tensor.element_size() for tensor in own) for own in sends]
        dist.all_to_all_single(into, flat, sizes, splits, group=self.group)
        self.wire.sent(counted)
        return list(into.split(sizes))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _as(flat: Tensor, start: int, size: int, dtype: torch.dtype) -> Tensor:
    part = flat[start : start + size]
    if start % dtype.itemsize:  # a view needs its place to be a multiple of what an entry takes
        part = part.clone()
    return part.view(dtype)
