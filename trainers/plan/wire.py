"""Bytes that a process sends for a step, from shapes and ranks alone: the formula beside which others are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thinrank.optim.grouping import Row
from thinrank.optim.messages import COARSE, ONE_WAY, sign_bytes
from thinrank.optim.remembering import MEMORIES_EVERY

FLOAT = 4
"""Bytes of a coordinate, of an entry, and of the flag that says whether a parameter had a gradient."""


WHENS = ("between", "renewal", "averaged")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What travels in one collective pattern, in bytes of the tensors themselves.

    Attributes:
        kind: what it is; `MatrixOptimizer.wire` counts under the same names.
        between: in a step between renewals.
        renewal: in a step that renews every subspace.
        averaged: over the steps from one renewal to the next.
        passes: how often it leaves a process, but for its own share, on the way round all processes: 2 for a sum that
            everybody gets (all-reduce), 1 for one of which everybody gets a part (reduce-scatter), for parts that
            everybody gets (all-gather), and for what goes to one owner or comes from it.
        first: in the first steps, which search for a subspace; None: as in a renewal.
        ranks: the same of each process, where they send unlike much: then the figures above are means over them.
        among: how many processes pass it round; 0: all do or, with `ranks`, each byte goes to one other.
    """

    kind: str
    between: float
    renewal: float
    averaged: float
    passes: int = 2
    first: float | None = None
    ranks: tuple[Transfer, ...] = ()
    among: int = 0

    def size(self, when: str) -> float:
        """Bytes `between` renewals, in a `renewal`, in a `first` step, or `averaged`."""
        found = getattr(self, when)
        return self.renewal if found is None else found

    def leaving(self, when: str, world: int, rank: int | None = None) -> float:
        """Bytes that leave a process of `world`: of the one that is number `rank`, or in the mean."""
        size = self.ranks[rank].size(when) if self.ranks and rank is not None else self.size(when)
        if self.ranks and not self.among:
            return size
        group = self.among or world
        return self.passes * size * (group - 1) / group


@dataclass(frozen=True, slots=True)
class Traffic:
    """All that travels for a step.

    Attributes:
        transfers: what the optimizer sends, or DDP in its place; all sums are over these.
        framework: what a framework that keeps weights in pieces sends by itself, for passes and gradients.
    """

    transfers: tuple[Transfer, ...] = ()
    framework: tuple[Transfer, ...] = ()

    @property
    def is_unlike(self) -> bool:
        """Whether processes send unlike much."""
        return any(each.ranks for each in self.transfers)

    def payload(self, when: str, rank: int | None = None) -> float:
        """Bytes of the tensors `between` renewals, in a `renewal`, in a `first` step, or `averaged`; of the process
        that is number `rank`, or in the mean."""
        return sum(
            each.ranks[rank].size(when) if each.ranks and rank is not None else each.size(when)
            for each in self.transfers
        )

    def leaving(self, when: str, world: int, rank: int | None = None) -> float:
        """Bytes that leave each of `world` processes, in a ring of n: passes · (n − 1) / n of the payload, and all of
        what goes to one other; of the process that is number `rank`, or in the mean."""
        return sum(each.leaving(when, world, rank) for each in self.transfers)

    def fullest(self, when: str, world: int) -> float:
        """Bytes that leave the process that sends most."""
        return max(self.leaving(when, world, rank) for rank in range(world))

    def by_framework(self, world: int) -> float:
        """Bytes that leave each process for the framework, in every step."""
        return sum(each.leaving("averaged", world) for each in self.framework)

    def kinds(self) -> dict[str, dict[str, float]]:
        """Payload by kind, and when."""
        found: dict[str, dict[str, float]] = {}
        for each in self.transfers:
            own = found.setdefault(each.kind, dict.fromkeys(WHENS, 0))
            for when in WHENS:
                own[when] += each.size(when)
        return found


def gradient_bytes(rows: Sequence[Row]) -> int:
    """Bytes of all gradients."""
    return sum(row.elements * row.itemsize for row in rows)


def width(row: Row, embeddings: str) -> int:
    """Bytes of an entry of a gradient on its way, where messages have no type of their own."""
    rounded = "bfloat16" in embeddings and not row.matrices and row.role in ("embedding", "head")
    return torch.bfloat16.itemsize if rounded else row.itemsize


def sketched(row: Row, norms: bool) -> int:
    """Numbers of a sketch of a gradient that stays where it is: without norms, one that tells whether it is finite."""
    return row.sketch if norms else 1


def image(row: Row, norms: bool) -> dict[str, int]:
    """Numbers that travel in the place of a gradient, by kind."""
    return row.image | {"norms": row.sketch} if norms else row.image


def steady(kind: str, size: int, passes: int = 2) -> Transfer:
    """What travels alike in every step."""
    return Transfer(kind=kind, between=size, renewal=size, averaged=float(size), passes=passes)


def averaged_gradients(rows: Sequence[Row]) -> Traffic:
    """Every gradient, summed up for all, as DDP does it."""
    return Traffic((steady("gradients", gradient_bytes(rows)),))


def averaged_images(
    rows: Sequence[Row],
    *,
    dtype: torch.dtype | None = None,
    messages: str = "auto",
    world: int = 1,
    memories_every: int | None = MEMORIES_EVERY,
    embeddings: str = "dense",
    norms: bool = True,
) -> Traffic:
    """What `MatrixOptimizer.replicate` sends: coordinates of matrices (and entries), their gradients when a step
    chooses by them, and the gradients of everything else.

    Args:
        rows: of `route`.
        dtype: of the messages; None: float32 for coordinates and entries, a gradient's own for gradients.
        messages: `auto`, `full` for whole gradients, `signs` or `majority` for signs of what subspaces miss of them.
        world: the processes, which what is counted, or gathered, of signs depends on.
        memories_every: steps between two messages of what replicas remember apart; None: none are sent.
        embeddings: of `EMBEDDINGS`; all rows are counted.
        norms: sketches travel, by which the norm of gradients is known.
    """
    # by kind: between renewals, in one, and in the mean
    sums: dict[str, list[float]] = {}
    signed = sign_bytes(messages, world) if messages in COARSE else {}

    def add(kind: str, between: int, renewal: int, averaged: float) -> None:
        found = sums.setdefault(kind, [0, 0, 0.0])
        for i, value in enumerate((between, renewal, averaged)):
            found[i] += value

    own = None if dtype is None else dtype.itemsize
    for row in rows:
        whole = row.elements * (own or width(row, embeddings))
        if messages in COARSE and row.remainder:
            add("renewals", 0, whole, whole / row.gap)
            sizes = {kind: int(row.elements * each) for kind, each in signed.items()}
            sizes |= {"coordinates": row.remainder["coordinates"] * (own or FLOAT)}
            sizes |= {"sizes": row.remainder["rows"] * FLOAT * world}
            for kind, size in sizes.items():
                add(kind, size, 0, size * (1 - 1 / row.gap))
        elif row.asked and messages != "full":
            usual, choosing = (row.asked[key] * (own or FLOAT) for key in ("usual", "choosing"))
            sketch = sketched(row, norms) * (own or FLOAT)
            gap = row.asked["gap"]
            add("factors", usual, choosing, usual + (choosing - usual) / gap if gap else usual)
            add("norms", sketch, sketch, sketch)
            add("memories", 0, 0, row.elements * FLOAT / memories_every if row.remembered and memories_every else 0.0)
        elif row.sends_image and messages != "full":
            add("renewals", 0, whole, whole / row.gap)
            for kind, numbers in image(row, norms).items():
                size = numbers * (own or FLOAT)
                add(kind, size, 0, size * (1 - 1 / row.gap))
        else:
            add("gradients" if row.matrices else "dense", whole, whole, float(whole))
    flags = len(rows) * (own or FLOAT)
    add("present", flags, flags, float(flags))
    return Traffic(
        tuple(
            Transfer(
                kind=kind,
                between=int(between),
                renewal=int(renewal),
                averaged=mean,
                passes=1 if kind in ONE_WAY else 2,
            )
            for kind, (between, renewal, mean) in sums.items()
        )
    )
