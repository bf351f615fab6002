"""What a detector is told of a step, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is known of a step before it is made.

    Attributes:
        loss: of the step, in nats where it is a language model's.
        norm: of all gradients together, before any clipping.
        ratios: by parameter name, what `update_ratios` gives; for detectors that need them.
    """

    loss: float
    norm: float
    ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a detector says of a step.

    Attributes:
        reason: why it is a spike, as the end of a sentence; None where it is none.
        limit: the largest norm of all gradients that the detector would let through; None where it has no opinion.
    """

    reason: str | None = None
    limit: float | None = None

    @property
    def spike(self) -> bool:
        return self.reason is not None


class Detector(Protocol):
    """Judges steps one after the other."""

    def judge(self, reading: Reading) -> Verdict:
        """Whether the step is a spike, by the steps before it; changes nothing."""
        ...

    def learn(self, reading: Reading, verdict: Verdict) -> None:
        """Takes the step into the statistics, after it was judged."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The statistics as plain numbers and lists."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from saved statistics."""
        ...
