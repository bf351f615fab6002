"""Who steps what where ranks share out an optimizer's work: decided by shapes, rules and where pieces lie alone.

Every rank decides for itself and finds the same, as does whoever plans a run without any of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.exchange.replicas import batches
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
        way: `piece`: element by element, nothing travels (8-bit moments: where pieces are whole blocks). `rows`: each
            rank steps whole rows, and the method's small sums travel (`Axis`). `here`: it lies on its owner whole.
            `delta`: its gradient goes to the owner, and what is to be added comes back. `whole`: the weight itself goes
            to the owner as well, and comes back, for steps that look at it (8-bit moments in blocks of the whole,
            16-bit weights that are rounded by a master or by chance). Of replicas (`own`), `told`: what the update is
            made of travels; `all`: every rank steps it.
        dtype: of what is stepped.
        rows: of `rows`, where a cut goes through a row: which whole ones each rank steps. What it lacks of their
            gradient comes from its neighbours, and as much of the update goes back. None: `spans` are whole rows.
    """

    spans: Sequence[Span]
    shape: tuple[int, ...]
    owner: int | None
    way: str
    dtype: torch.dtype
    rows: Sequence[Span] | None = None

    @property
    def steps(self) -> Sequence[Span]:
        """What each rank steps where all step something."""
        return self.spans if self.rows is None else self.rows

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
        Place(own, weight.shape, owner, way, weight.dtype, _moved_rows(own, weight.columns) if way == "rows" else None)
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
    whole = _whole_rows(spans, weight.columns) if weight.columns else []
    return "rows" if sum(length(span) > 0 for span in whole) > 1 else "delta"


def _whole_rows(spans: Sequence[Span], columns: int) -> list[Span]:
    """The pieces with their ends moved to the next end of a row, before or after."""
    found = [[(end + columns // 2) // columns * columns for end in span] for span in spans]
    return [(start, stop) if start < stop else (0, 0) for start, stop in found]


def _moved_rows(spans: Sequence[Span], columns: int) -> Sequence[Span] | None:
    rows = _whole_rows(spans, columns)
    return None if rows == list(spans) else rows


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
    """Which weights, by number, are brought together: first those of which nothing is brought, then weights of all
    owners alike, so that they have something to do at the same time, and last rows that cuts go through."""
    queues: list[list[int]] = [[] for _ in range(ranks)]
    for i, place in enumerate(places):
        if place.owner is not None:
            queues[place.owner].append(i)
    found: list[list[int]] = [[i for i, place in enumerate(places) if place.owner is None and place.rows is None]]
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
    moved = (i for i, place in enumerate(places) if place.rows is not None)
    return [*found, *batches(moved, lambda i: 4 * max(map(length, places[i].steps)), CHUNK_BYTES)]


def at(owner: int, size: int, ranks: int) -> list[Span]:
    """The spans of something of `size` entries that lies on its owner whole."""
    return [(0, size) if rank == owner else (0, 0) for rank in range(ranks)]


def cost(shape: tuple[int, ...]) -> float:
    """Of a step of a whole weight, in the order of its products."""
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    return float(rows) * columns * min(rows, columns)


def blocks(key: str, span: Span) -> Span:
    """Which entries of a tensor of state belong to those of the weight: one each, or one scale for a block of codes."""
    return (span[0] // BLOCK, -(-span[1] // BLOCK)) if key.endswith("_scale") else span


def held_where(place: Place, key: str, like: Tensor, along: Mapping[str, int]) -> Sequence[Span]:
    """Which entries of a tensor of state each rank has, its rows first.

    Args:
        key, like: its name, and a tensor of its whole shape.
        along: of what is stepped by rows, which dimension these are, by name.
    """
    if key in along:
        rows, columns = like.shape[along[key]], math.prod(place.shape[1:])
        each = like.numel() // max(rows, 1)
        return [(start // columns * each, stop // columns * each) for start, stop in place.steps]
    if place.way == "piece" and key != "step":
        return [blocks(key, span) for span in place.spans]
    owner = place.owner or 0  # or it is the same everywhere
    return at(owner, like.numel(), len(place.spans))
