"""Ranks in one process: messages as bytes, a clock that follows rates and delays, and whatever may go wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import key_of
from thinrank.optim.gossip.rounds import Mean, Step, Swap


class Faults(Protocol):
    """What happens to a message on its way."""

    def carried(self, count: int, source: int, target: int, message: Tensor) -> Tensor | None:
        """The message as it arrives, another where it was damaged, or None where it is lost.

        Args:
            count: rounds that the simulator has seen before this one.
            source: who sends it.
            target: whom it is for.
            message: uint8, not to be changed.
        """
        ...

    def delay(self, count: int, source: int, target: int) -> float:
        """Seconds that it takes longer than usual."""
        ...


@dataclass(slots=True)
class Chance:
    """Loses and damages messages at random; the same of the same seed.

    Attributes:
        seed: of chance.
        drop: share of messages that are lost.
        corrupt: share of those that arrive, in which one bit is flipped.
        partitions: (first round, last round + 1, ranks on one side): what would cross is lost.
        slow: seconds by which all that a rank sends comes later.
    """

    seed: int = 0
    drop: float = 0.0
    corrupt: float = 0.0
    partitions: Sequence[tuple[int, int, frozenset[int]]] = ()
    slow: Mapping[int, float] = field(default_factory=dict)

    def carried(self, count: int, source: int, target: int, message: Tensor) -> Tensor | None:
        for start, stop, side in self.partitions:
            if start <= count < stop and (source in side) != (target in side):
                return None
        generator = torch.Generator().manual_seed(key_of(self.seed, source, count, target))
        lost, damaged = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if lost < self.drop:
            return None
        if damaged < self.corrupt:
            message = message.clone()
            place = int(torch.randint(8 * len(message), (), generator=generator))
            message[place // 8] ^= 1 << (place % 8)
        return message

    def delay(self, count: int, source: int, target: int) -> float:
        return self.slow.get(source, 0.0)


class Simulator:
    """Carries the messages of all ranks of a group in lockstep, in the order of the ranks.

    A rank that has ended, or was never there (None), sends nothing, and what it should have sent is lost to others.

    Args:
        ranks: how many.
        rate: bytes per second that leave a rank; infinite by default.
        latency: seconds from one rank to another.
        timeout: seconds that a rank waits for a message that does not come.
        faults: what goes wrong; None: nothing.

    Attributes:
        clock: seconds on each rank.
        sent: bytes that have left each rank, those that were lost on their way among them.
        count: rounds so far.
    """

    def __init__(
        self,
        ranks: int,
        *,
        rate: float = math.inf,
        latency: float = 0.0,
        timeout: float = 0.0,
        faults: Faults | None = None,
    ) -> None:
        if ranks < 1 or not rate > 0 or latency < 0 or timeout < 0:
            raise ValueError(
                f"a simulator needs at least 1 rank, a rate above 0 and times of at least 0, got ranks={ranks}, "
                f"rate={rate}, latency={latency}, timeout={timeout}: leave out what needs not be simulated"
            )
        self.ranks, self.rate, self.latency, self.timeout, self.faults = ranks, rate, latency, timeout, faults
        self.clock = [0.0] * ranks
        self.sent = [0] * ranks
        self.count = 0

    def work(self, rank: int, seconds: float) -> None:
        """Lets time go by on one rank, as its own computation does."""
        self.clock[rank] += seconds

    def run(self, steps: Sequence[Step | None]) -> list[Tensor | Exception | None]:
        """Drives one exchange on all ranks to its end.

        Args:
            steps: a rank's each; None: it is dead.

        Returns:
            Each rank's new weights, or the error that ended its exchange, or None of a dead rank.
        """
        results: list[Tensor | Exception | None] = [None] * self.ranks
        answers: dict[int, Mapping[int, Tensor | None] | Tensor | None] = {
            i: None for i, step in enumerate(steps) if step is not None
        }
        while answers:
            asked: dict[int, Swap | Mean] = {}
            for i, answer in answers.items():
                step = steps[i]
                assert step is not None
                try:
                    asked[i] = step.send(answer)
                except StopIteration as end:
                    results[i] = end.value
                except Exception as error:  # the rank fails, the others go on
                    results[i] = error
            answers = self._round(asked) if asked else {}
        return results

    def _round(self, asked: Mapping[int, Swap | Mean]) -> dict[int, Mapping[int, Tensor | None] | Tensor | None]:
        self.count += 1
        swaps = {i: ask for i, ask in asked.items() if isinstance(ask, Swap)}
        means = {i: ask.values for i, ask in asked.items() if isinstance(ask, Mean)}
        found: dict[int, Mapping[int, Tensor | None] | Tensor | None] = dict(self._swapped(swaps))
        if means:
            mean = self._mean(means)
            found |= {i: mean.clone() for i in means}
        return found

    def _swapped(self, swaps: Mapping[int, Swap]) -> dict[int, dict[int, Tensor | None]]:
        began = list(self.clock)
        arrived: dict[tuple[int, int], tuple[Tensor, float]] = {}
        for i, swap in swaps.items():
            free = began[i]
            for j, message in swap.sends.items():
                self.sent[i] += len(message)
                free += len(message) / self.rate
                carried = message if self.faults is None else self.faults.carried(self.count - 1, i, j, message)
                late = 0.0 if self.faults is None else self.faults.delay(self.count - 1, i, j)
                if carried is not None:
                    arrived[i, j] = carried, free + self.latency + late
        came: dict[int, dict[int, Tensor | None]] = {}
        for i, swap in swaps.items():
            came[i] = {}
            for j in swap.expects:
                message, when = arrived.get((j, i), (None, began[i] + self.timeout))
                came[i][j] = message
                self.clock[i] = max(self.clock[i], when)
        return came

    def _mean(self, values: Mapping[int, Tensor]) -> Tensor:
        """In float64 and the order of the ranks; as long as an all-reduce in a ring takes."""
        n, total = len(values), torch.stack([each.double() for each in values.values()]).mean(0)
        size = next(iter(values.values())).nbytes
        when = max(self.clock[i] for i in values) + 2 * (n - 1) * (self.latency + size / n / self.rate)
        for i in values:
            self.sent[i] += round(2 * (n - 1) / n * size)
            self.clock[i] = when
        return total.float()


def run(simulator: Simulator, steps: Sequence[Step | None]) -> list[Tensor]:
    """`simulator.run` where nothing may fail: the new weights, of ranks that are not dead; raises the first error."""
    found = simulator.run(steps)
    for each in found:
        if isinstance(each, Exception):
            raise each
    return [each for each in found if isinstance(each, Tensor)]
