"""Who steps what where ranks share out an optimizer's work: decided by shapes, rules and where pieces lie alone.

Every rank decides for itself and finds the same, as does whoever plans a run without any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thinrank.optim.exchange.shards import Span, even, length, owners
from thinrank.optim.linalg.quantise import BLOCK

CHUNK_BYTES = 64 * 2**20
"""Whole gradients that a rank holds at a time, or one gradient where that is larger."""

EVEN_FROM = 2**16
"""Entries from which what replicas step element by element is cut into equal pieces; smaller ones every rank steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """What of a weight, and of the rule that steps it, decides who does.

    Attributes:
        shape: of the whole weight.
        dtype: of what is stepped.
        matrix: it is seen as matrices, and not stepped element by element.
        looks: its step looks at the weight itself (16-bit weights that are rounded by a master or by chance).
        coded: its moments are 8-bit codes, in blocks of the whole.
        columns: of a matrix that ranks may step together, each its rows of the long side; 0 where they may not.
        tells: its update is made of few numbers, by which others can make it as well.
        flat: it lies in memory row by row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix: bool = False
    looks: bool = False
    coded: bool = False
    columns: int = 0
    tells: bool = False
    flat: bool = True

    @property
    def size(self) -> int:
        """Entries of the whole weight."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Place:
    """Who steps a weight that lies in pieces, and what travels for it.

    Attributes:
        spans: each rank's piece.
        shape: of the whole weight.
        owner: the rank that steps it; None where every rank steps its own piece.
        way: `piece`: element by element, nothing travels (8-bit moments: where pieces are whole blocks). `rows`: whole
            rows lie on each rank, and the method's small sums travel (`Axis`). `here`: it lies on its owner whole.
            `delta`: its gradient goes to the owner, and what is to be added comes back. `whole`: the weight itself goes
            to the owner as well, and comes back, for steps that look at it (8-bit moments in blocks of the whole,
            16-bit weights that are rounded by a master or by chance). Of replicas (`own`), `told`: what the update is
            made of travels; `all`: every rank steps it.
        dtype: of what is stepped.
    """

    spans: Sequence[Span]
    shape: tuple[int, ...]
    owner: int | None
    way: str
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Entries of the whole weight."""
        return math.prod(self.shape)


def of_pieces(weights: Sequence[Stepped], spans: Sequence[Sequence[Span]]) -> list[Place]:
    """Places of weights that a framework has cut.

    Args:
        weights: in an order that is the same on every rank.
        spans: of each weight, every rank's piece.
    """
    ways = [_way_of_pieces(weight, own) for weight, own in zip(weights, spans, strict=True)]
    owned = [i for i, way in enumerate(ways) if way in ("delta", "whole")]
    found: list[int | None] = [None] * len(weights)
    for i, owner in zip(owned, owners([spans[i] for i in owned], [cost(weights[i].shape) for i in owned]), strict=True):
        found[i] = owner
        if length(spans[i][owner]) == weights[i].size:
            ways[i] = "here"
    return [
        Place(own, weight.shape, owner, way, weight.dtype)
        for weight, own, owner, way in zip(weights, spans, found, ways, strict=True)
    ]


def _way_of_pieces(weight: Stepped, spans: Sequence[Span]) -> str:
    looks = weight.looks
    if weight.coded and not weight.matrix:
        looks = looks or any(start % BLOCK for start, stop in spans if stop > start)
    if looks:
        return "whole"
    if not weight.matrix:
        return "piece"
    several = sum(length(span) > 0 for span in spans) > 1
    columns = weight.columns
    rows = columns and several and all(start % columns == stop % columns == 0 for start, stop in spans)
    return "rows" if rows else "delta"


def of_replicas(weights: Sequence[Stepped], ranks: int, even_from: int = EVEN_FROM) -> list[Place]:
    """Places of weights that all `ranks` hold whole, and one of them, or each of them in part, steps.

    Args:
        even_from: entries from which what is stepped element by element is cut into equal pieces.
    """
    ways = [_way_of_replicas(weight, even_from) for weight in weights]
    owned = [i for i, way in enumerate(ways) if way in ("told", "whole")]
    everywhere = [[(0, weights[i].size)] * ranks for i in owned]
    by = dict(zip(owned, owners(everywhere, [cost(weights[i].shape) for i in owned]), strict=True))
    found: list[Place] = []
    for i, (weight, way) in enumerate(zip(weights, ways, strict=True)):
        spans = at(by.get(i, 0), weight.size, ranks)
        if way == "piece":
            # of whole blocks, so that 8-bit moments are those of the whole, and of whole rows, which may travel
            unit = math.lcm(math.prod(weight.shape[1:]) or 1, BLOCK if weight.coded else 1)
            spans = [(a, min(b, weight.size)) for a, b in even(-(-weight.size // unit), ranks, unit)]
        found.append(Place(spans, weight.shape, by.get(i), way, weight.dtype))
    return found


def _way_of_replicas(weight: Stepped, even_from: int) -> str:
    if weight.matrix or weight.looks:
        return "whole" if weight.looks or not weight.tells else "told"
    return "piece" if weight.size >= even_from and weight.flat else "all"


def chunks(places: Sequence[Place], ranks: int) -> list[list[int]]:
    """Which weights, by number, are brought together: first those that nobody owns, then weights of all owners alike,
    so that they have something to do at the same time."""
    queues: list[list[int]] = [[] for _ in range(ranks)]
    for i, place in enumerate(places):
        if place.owner is not None:
            queues[place.owner].append(i)
    found: list[list[int]] = [[i for i, place in enumerate(places) if place.owner is None]]
    held = [0] * ranks
    for turn in range(max(map(len, queues))):
        for owner, queue in enumerate(queues):
            if turn < len(queue):
                size = 4 * places[queue[turn]].size
                if held[owner] and held[owner] + size > CHUNK_BYTES:
                    found.append([])
                    held = [0] * ranks
                found[-1].append(queue[turn])
                held[owner] += size
    return found


def at(owner: int, size: int, ranks: int) -> list[Span]:
    """The spans of something of `size` entries that lies on its owner whole."""
    return [(0, size) if rank == owner else (0, 0) for rank in range(ranks)]


def cost(shape: tuple[int, ...]) -> float:
    """Of a step of a whole weight, in the order of its products."""
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    return float(rows) * columns * min(rows, columns)
