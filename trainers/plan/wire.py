"""Bytes that a process sends for a step, from shapes and ranks alone: the formula beside which others are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thinrank.optim.grouping import Row

FLOAT = 4
"""Bytes of a coordinate, of an entry, and of the flag that says whether a parameter had a gradient."""


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
    """

    kind: str
    between: int
    renewal: int
    averaged: float
    passes: int = 2


@dataclass(frozen=True, slots=True)
class Traffic:
    """All that travels for a step; sums over its transfers."""

    transfers: tuple[Transfer, ...] = ()

    def payload(self, when: str) -> float:
        """Bytes of the tensors `between` renewals, in a `renewal`, or `averaged`."""
        return sum(getattr(each, when) for each in self.transfers)

    def leaving(self, when: str, world: int) -> float:
        """Bytes that leave each of `world` processes, in a ring: passes · (world − 1) / world of the payload."""
        return sum(each.passes * getattr(each, when) for each in self.transfers) * (world - 1) / world


def gradient_bytes(rows: Sequence[Row]) -> int:
    """Bytes of all gradients."""
    return sum(row.elements * row.itemsize for row in rows)


def steady(kind: str, size: int, passes: int = 2) -> Transfer:
    """What travels alike in every step."""
    return Transfer(kind=kind, between=size, renewal=size, averaged=float(size), passes=passes)


def averaged_gradients(rows: Sequence[Row]) -> Traffic:
    """Every gradient, summed up for all, as DDP does it."""
    return Traffic((steady("gradients", gradient_bytes(rows)),))


def averaged_images(rows: Sequence[Row], *, dtype: torch.dtype | None = None, messages: str = "auto") -> Traffic:
    """What `MatrixOptimizer.replicate` sends: coordinates of matrices (and entries), their gradients when a step
    chooses by them, and the gradients of everything else.

    Args:
        rows: of `route`.
        dtype: of the messages; None: float32 for coordinates and entries, a gradient's own for gradients.
        messages: `auto`, or `full` for whole gradients.
    """
    # by kind: between renewals, in one, and in the mean
    sums: dict[str, list[float]] = {}

    def add(kind: str, between: int, renewal: int, averaged: float) -> None:
        found = sums.setdefault(kind, [0, 0, 0.0])
        for i, value in enumerate((between, renewal, averaged)):
            found[i] += value

    own = None if dtype is None else dtype.itemsize
    for row in rows:
        whole = row.elements * (own or row.itemsize)
        if row.sends_image and messages == "auto":
            add("renewals", 0, whole, whole / row.gap)
            for kind, numbers in row.image.items():
                size = numbers * (own or FLOAT)
                add(kind, size, 0, size * (1 - 1 / row.gap))
        else:
            add("gradients" if row.matrices else "dense", whole, whole, float(whole))
    flags = len(rows) * (own or FLOAT)
    add("present", flags, flags, float(flags))
    return Traffic(
        tuple(
            Transfer(kind=kind, between=int(between), renewal=int(renewal), averaged=mean)
            for kind, (between, renewal, mean) in sums.items()
        )
    )
