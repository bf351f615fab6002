"""What one rank asks of whoever carries messages: to swap some with others, or the mean of something over all ranks."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One round: messages that leave at once, and those that are waited for. Every rank takes part in every round.

    Attributes:
        sends: uint8 (bytes,), by the rank that each is for.
        expects: how many bytes come from which rank.
        weights: this rank's weights after the step where they do not depend on what comes: they may be used while
            messages are under way. None where they do.
    """

    sends: Mapping[int, Tensor] = field(default_factory=dict)
    expects: Mapping[int, int] = field(default_factory=dict)
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean of `values` over all ranks, exact but for rounding, the same on all to the bit.

    Attributes:
        values: float32, of one shape on all ranks.
        weights: as of `Swap`.
    """

    values: Tensor
    weights: Tensor | None = None


Came = Mapping[int, Tensor | None]
"""Messages by the rank they are from; None for one that was lost."""

Step = Generator[Swap | Mean, Any, Tensor]
"""One rank's part of an exchange: yields a `Swap` and goes on with what `Came`, or a `Mean` and goes on with a tensor;
returns the weights after the step. Who drives it, processes or a simulator, decides how messages travel."""


class PeerLost(RuntimeError):
    """A neighbour has not been heard of for too long, or cannot be reached.

    Attributes:
        ranks: who; none where it can be any.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks
