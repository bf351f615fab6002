"""When a matrix's subspace is renewed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.rule import State, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewals:
    """At a matrix's first update, and then once in every gap: in a fixed one, or in one that each matrix finds.

    `every` is the subspace's gap, in updates of the matrix. With `lazy`, a matrix whose new subspace has at least that
    overlap with the old one doubles its own gap, and one that turned further goes back to `every`. That layers differ
    in how long their subspaces hold, and that a steady one's gap may double, is Q-GaLore's (Zhang et al. 2024, arXiv
    2407.08296: a cosine similarity of 0.4, averaged over some renewals); the measure (`Change.overlap`, 1 where nothing
    turned, rank / side for directions at random), one renewal in the place of several, and the way back are ours.

    Attributes:
        stagger: the matrices' first gaps differ, by their names, so that no step renews all of them.
        lazy: the overlap, in (0, 1]; None: the gap is fixed.
    """

    stagger: bool = False
    lazy: float | None = None

    def init(self, batch: int, device: torch.device, every: int) -> State:
        """With `lazy`: `gap` and `renewed` (batch,), float32 on the CPU, where they are read without waiting for a
        device: the updates until the next renewal, and how many had been made before the last one."""
        if self.lazy is None:
            return {}
        place = device if device.type == "meta" else torch.device("cpu")
        values = {"gap": float(every), "renewed": 0.0}
        return {key: torch.full((batch,), value, dtype=torch.float32, device=place) for key, value in values.items()}

    def due(self, state: State, step: Step, every: int) -> list[int]:
        """The matrices that are to be renewed in this step, asked before `done`."""
        if self.lazy is None:
            return [i for i in range(len(step.count)) if self._on_time(step, every, i)]
        ends = (state["renewed"] + state["gap"]).tolist()
        return [i for i, count in enumerate(step.count) if count == 0 or count >= ends[i]]

    def now(self, state: State, step: Step, every: int, index: int) -> bool:
        """True when a matrix renews in this step, asked after `done`."""
        if self.lazy is None:
            return self._on_time(step, every, index)
        return step.count[index] == 0 or float(state["renewed"][index]) == step.count[index]

    def done(self, state: State, step: Step, every: int, overlap: Tensor | None) -> None:
        """Notes that all matrices of `state` were renewed.

        Args:
            overlap: of their old and new subspaces, (batch,); None at the first update, which has no old one; no number
                for a matrix that was not renewed after all, and will be at its next update.
        """
        if self.lazy is None:
            return
        if overlap is None:
            lead = [self._lead(step, every, i) for i in range(len(step.count))]
            state["renewed"].copy_(torch.tensor([c - ahead for c, ahead in zip(step.count, lead, strict=True)]))
            return
        found = overlap.to(state["gap"])
        now = torch.tensor(list(step.count), dtype=torch.float32)
        state["renewed"].copy_(torch.where(found.isnan(), state["renewed"], now))
        gap = torch.where(found >= self.lazy, 2.0 * state["gap"], float(every))
        state["gap"].copy_(torch.where(found.isnan(), state["gap"], gap))

    def _on_time(self, step: Step, every: int, index: int) -> bool:
        count = step.count[index]
        return count == 0 or (count + self._lead(step, every, index)) % every == 0

    def _lead(self, step: Step, every: int, index: int) -> int:
        """How much earlier than others a matrix renews."""
        return step.keys[index] * every >> 32 if self.stagger and step.keys else 0
