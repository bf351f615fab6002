"""What travels, counted: whoever hands something to a collective tells it here, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Count:
    """What this rank has handed to collectives since it was made, by what it was.

    Attributes:
        payload: bytes of the tensors themselves.
        messages: how many; the two hops of a short sum are one.
        egress: bytes that leave a rank, in the mean over the ranks: of a sum over n ranks 2 (n−1)/n of the payload, in
            a ring and in two hops; of what goes to one rank, the payload.
    """

    payload: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    egress: float = 0.0

    def note(self, parts: Iterable[tuple[str, int]], ranks: int, passes: int = 2) -> None:
        """Counts one message, of parts with a name and a number of bytes, that `ranks` ranks sum up, or with one pass
        instead of two, of which each has a share, or ends up with one, or with all of one rank's."""
        self.messages += 1
        for name, size in parts:
            self.payload[name] += size
            self.egress += size * passes * (ranks - 1) / ranks

    def sent(self, parts: Iterable[tuple[str, int]]) -> None:
        """Counts one message of parts that leave this rank, each for one other."""
        self.messages += 1
        for name, size in parts:
            self.payload[name] += size
            self.egress += size

    def total(self) -> int:
        """Bytes of all payloads."""
        return sum(self.payload.values())


@dataclass(slots=True)
class Wire(Count):
    """All that this rank has sent for an optimizer: of steps and, in `rare`, beside them.

    Attributes:
        rare: what no step needs, by kind: `start` (the first rank's weights, and the lists of parameters by which ranks
            make sure that they have the same), `checks` (fingerprints of replicas; whether a step at learning rate zero
            is one), `measured` (what ranks tell each other of a step with `measure`), and what travels when a run is
            saved or exported, `state`, `weights` and `memories`.
    """

    rare: Count = field(default_factory=Count)
