"""What a strategy is asked for a plan, and the bytes that it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from thinrank.optim.grouping import Routing, Row
from thinrank.trainers.plan.trace import Work
from thinrank.trainers.plan.wire import Traffic


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a process holds; where processes hold unlike much, each figure is of the one that has most of it.

    Attributes:
        weights: trained or not.
        gradients: of the trained weights, complete, when the optimizer's step begins; where updates need no more, what
            is left of them.
        state: of the optimizer.
        bases: the part of `state` that says where subspaces are.
        buffers: for the exchange.
        lasting: the part of `buffers` that is always there; the rest, when nearly all gradients are.
        arriving: most of gradients, messages and what is made of them while processes meet, before the step; where no
            such time is, the gradients.
        masters: float32 copies of weights that a framework steps in their place.
        brought: whole gradients, updates and messages that are there in a step beside what it finds.
        spared: of what one process with all weights has in its passes, what is not there, or never at one time.
    """

    weights: int
    gradients: int
    state: int
    bases: int
    buffers: int = 0
    lasting: int = 0
    arriving: int = 0
    masters: int = 0
    brought: int = 0
    spared: int = 0

    def peak(self, work: Work) -> int:
        """Most bytes at one time: in the passes, when processes meet and renew by what has come, or in the step."""
        met = self.arriving + max(work.renewal, self.buffers - self.lasting)
        return (
            self.weights
            + self.state
            + self.lasting
            + max(work.passes - self.spared, met, self.gradients + self.brought + work.step)
        )


class Strategy(Protocol):
    """What a plan asks of a strategy. `rows` are `route`'s, `frozen` the bytes of weights that are not trained, and
    `in_backward` is the trainer's."""

    def held(self, rows: Sequence[Row], frozen: int, world: int, in_backward: str) -> Held: ...

    def sent(self, rows: Sequence[Row], world: int) -> Traffic: ...


@dataclass(frozen=True, kw_only=True)
class Around:
    """What a strategy may want to know of a run beside its own configuration.

    Attributes:
        routing: of the model.
        precision: of the trainer.
        accumulate: micro-batches of a step.
        clips: gradients are clipped by their norm, or a guard looks at it.
    """

    routing: Routing = field(default_factory=lambda: Routing(groups=[]))
    precision: str = "32-true"
    accumulate: int = 1
    clips: bool = True


def images_left(rows: Sequence[Row]) -> int:
    """Bytes of gradients where what updates need of them has taken their place."""
    return sum(4 * sum(row.image.values()) if row.image else row.elements * row.itemsize for row in rows)
