"""Equal matrices that are stepped together, and the states that belong to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.matrix import MatrixView
from thinrank.optim.rule import MatrixRule, State, Step, beside, key_of

OF_PARAMETER = ("step", "master")
"""State that a parameter has once, however many matrices it is seen as."""


@dataclass(slots=True)
class Bucket:
    """Equal matrices of one group that are stepped together, and their stacked state.

    Attributes:
        params: the parameters; each has `view.blocks` matrices here.
        names: of the parameters.
        view: how the matrices lie in a parameter.
        prefix: of this view's keys in a parameter's state.
        stacked: the state, one row for each matrix; the parameters' own states are views of it.
        counts: finished updates of each parameter.
        keys: a stable number for each matrix.
        section: of a fused weight, which part of it the view shows.
        rank: of these matrices; None where the method has none.
        axis: the ranks that hold other rows of these matrices; None where nobody does.
        overlap: of each matrix, the share of the old subspace in the new one at its last renewal since somebody asked;
            no number for those that had none.
    """

    params: list[torch.nn.Parameter]
    names: list[str]
    view: MatrixView
    prefix: str
    stacked: State
    counts: Tensor
    keys: list[int]
    section: int
    rank: int | float | None
    axis: Axis | None = None
    overlap: Tensor | None = None

    @classmethod
    def of(
        cls,
        members: Sequence[tuple[torch.nn.Parameter, str]],
        states: Sequence[State],
        view: MatrixView,
        prefix: str,
        section: int,
        rank: int | float | None,
        axis: Axis | None = None,
    ) -> Bucket:
        """Stacks the states of `members` and puts views of the stack in their place."""
        keys = [k[len(prefix) :] for k in states[0] if k not in OF_PARAMETER and k.startswith(prefix)]
        stacked: State = {}
        for key in keys:
            parts = [state[prefix + key] for state in states]
            stacked[key] = torch.cat(parts) if view.blocks > 1 else torch.stack(parts)
            for i, state in enumerate(states):
                state[prefix + key] = (
                    stacked[key][i * view.blocks : (i + 1) * view.blocks] if view.blocks > 1 else stacked[key][i]
                )
        counts = torch.stack([state["step"].cpu() for state in states])
        for i, state in enumerate(states):
            state["step"] = counts[i]
        names = [name for _, name in members]
        numbers = [key_of(f"{prefix}{name}.{block}") for name in names for block in range(view.blocks)]
        return cls([param for param, _ in members], names, view, prefix, stacked, counts, numbers, section, rank, axis)

    def rows(self, active: Sequence[int]) -> list[int] | slice:
        """Rows of the stack that belong to the parameters at the places `active` (rising)."""
        return _rows(active, self.view.blocks)

    def places(self, active: Sequence[int], which: Sequence[int], device: torch.device) -> Tensor | slice:
        """Rows of the stack of the matrices `which` (rising) of a step of the parameters at `active`."""
        rows = self.rows(active)
        if isinstance(rows, slice) and len(which) == rows.stop - rows.start:
            return rows
        return beside([rows.start + i if isinstance(rows, slice) else rows[i] for i in which], device)

    def advance(self, active: Sequence[int]) -> None:
        """Counts one more finished update of the parameters at `active`."""
        self.counts[_rows(active, 1)] += 1.0

    def state(self, active: Sequence[int]) -> State:
        """The state of the parameters at `active`; to be handed to `keep` once it has changed."""
        rows = self.rows(active)
        return {key: value[rows] for key, value in self.stacked.items()}

    def keep(self, active: Sequence[int], state: State) -> None:
        """Writes back what `state` gave as copies."""
        rows = self.rows(active)
        if not isinstance(rows, slice):
            for key, value in state.items():
                self.stacked[key][rows] = value

    def step(self, active: Sequence[int], group: dict[str, Any], record: dict[str, Tensor] | None = None) -> Step:
        """The circumstances of the next update of the parameters at `active`."""
        blocks = self.view.blocks
        counts = self.counts.tolist()
        return Step(
            count=[int(counts[i]) for i in active for _ in range(blocks)],
            keys=[self.keys[i * blocks + b] for i in active for b in range(blocks)],
            seed=group["seed"],
            axis=WHOLE if self.axis is None else self.axis,
            transposed=self.view.transposed,
            record=record,
            notes=[],
            held=[],
            overlaps=[],
        )

    def remember(self, active: Sequence[int], overlaps: Sequence[tuple[Sequence[int], Tensor]]) -> None:
        """Takes what a step of the parameters at `active` has left of its renewals; no host waits for it."""
        for which, values in overlaps:
            if self.overlap is None:
                self.overlap = values.new_full((len(self.keys),), math.nan)
            places = self.places(active, which, values.device)
            old = self.overlap[places]
            self.overlap[places] = torch.where(values.isnan(), old, values)  # no number: not renewed, after all

    def overlaps(self) -> dict[str, float]:
        """What `remember` was given since it was asked last, by parameter: the mean of its matrices."""
        if self.overlap is None:
            return {}
        values = self.overlap.reshape(len(self.params), self.view.blocks).nanmean(-1).tolist()
        self.overlap = None
        return {
            self.prefix + name: value for name, value in zip(self.names, values, strict=True) if not math.isnan(value)
        }


@dataclass(frozen=True, slots=True)
class Turn:
    """One update of the parameters of a bucket at the places `active`.

    Attributes:
        state: theirs, which the update changes, and `Bucket.keep` writes back.
        step: its circumstances.
    """

    bucket: Bucket
    active: list[int]
    rule: MatrixRule
    group: dict[str, Any]
    state: State
    step: Step

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [self.bucket.params[i] for i in self.active]


def _rows(active: Sequence[int], blocks: int) -> list[int] | slice:
    if active[-1] - active[0] == len(active) - 1:  # side by side: views, without a copy
        return slice(active[0] * blocks, (active[-1] + 1) * blocks)
    return [i * blocks + b for i in active for b in range(blocks)]


@dataclass(slots=True)
class Layout:
    """How the parameters of one group are stepped: matrices in buckets, the rest, with their keys, one by one."""

    buckets: list[Bucket]
    rest: list[tuple[torch.nn.Parameter, int]]
