"""What travelled in a run, kept round by round, and the clocks of the ranks on any network, told from it afterwards.

What ranks send each other does not depend on the network, so that one run has the times of all: `Recorder` is a
simulator that writes down what it carries, and `replay` lets it travel again, as `Simulator` would have had it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinrank.optim.gossip.compress import Compressor
from thinrank.optim.gossip.cost import Network, all_reduce_bytes, ring_messages, tree_messages
from thinrank.optim.gossip.parts import made
from thinrank.optim.gossip.rounds import Mean, Step, Swap
from thinrank.optim.gossip.schemes import Place, Scheme
from thinrank.optim.gossip.simulator import Simulator
from thinrank.optim.gossip.topology import topology

BACKWARD = 2 / 3
"""The share of a step's computation behind which gradients can be averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of an exchange.

    Attributes:
        sends: (source, target, bytes), in the order in which each source sends.
        mean: bytes of what all ranks have the mean of; 0: a round of messages.
        early: weights are known before anything comes.
    """

    sends: tuple[tuple[int, int, int], ...] = ()
    mean: int = 0
    early: bool = False


Exchange = tuple[Round, ...]


class Trace:
    """The exchanges of a run, each kind of them once, and which of them each step had; one of no round for none."""

    def __init__(self, kinds: Sequence[Exchange] = (), steps: Sequence[int] = ()) -> None:
        self.kinds, self.steps = dict.fromkeys(kinds), list(steps)

    def add(self, exchange: Exchange) -> None:
        self.kinds.setdefault(exchange)
        self.steps.append(list(self.kinds).index(exchange))

    def exchanges(self) -> list[Exchange]:
        """One for each step."""
        kinds = list(self.kinds)
        return [kinds[k] for k in self.steps]

    def bytes(self, ranks: int) -> float:
        """That leave a rank in a step, on average over ranks and steps."""
        sent = [
            sum(sum(n for *_, n in each.sends) / ranks + all_reduce_bytes(ranks, each.mean) for each in kind)
            for kind in self.kinds
        ]
        return sum(sent[k] for k in self.steps) / max(1, len(self.steps))

    def as_json(self) -> dict[str, Any]:
        kinds = [[{"sends": r.sends, "mean": r.mean, "early": r.early} for r in kind] for kind in self.kinds]
        return {"kinds": kinds, "steps": self.steps}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Trace:
        def one(r: Mapping[str, Any]) -> Round:
            return Round(sends=tuple((i, j, n) for i, j, n in r["sends"]), mean=r["mean"], early=r["early"])

        return cls([tuple(one(r) for r in kind) for kind in found["kinds"]], found["steps"])


class Recorder(Simulator):
    """A simulator that keeps the rounds of the exchange that it has driven last.

    Attributes:
        rounds: those.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__(ranks)
        self.rounds: list[Round] = []

    def run(self, steps: Sequence[Step | None]) -> Any:
        self.rounds = []
        return super().run(steps)

    def _round(self, asked: Mapping[int, Swap | Mean]) -> Any:
        sends = [
            (i, j, len(message))
            for i, ask in asked.items()
            if isinstance(ask, Swap)
            for j, message in ask.sends.items()
        ]
        means = [ask.values.nbytes for ask in asked.values() if isinstance(ask, Mean)]
        early = all(ask.weights is not None for ask in asked.values())
        self.rounds.append(Round(sends=tuple(sends), mean=max(means, default=0), early=early))
        return super()._round(asked)


def ranks_of(
    name: str, ranks: int, codec: Compressor, shapes: list[tuple[int, ...]], seed: int, options: Mapping[str, Any]
) -> list[Scheme]:
    """Every rank's side of an exchange on a ring."""
    graph = topology("ring", ranks)
    places = [Place(rank=i, topology=graph, seed=seed, compressor=codec) for i in range(ranks)]
    return [made(name, place, codec, shapes, False, options) for place in places]


def timed(step: Step, spent: list[float], clock: Callable[[], float] = time.process_time) -> Step:
    """A rank's part of an exchange, whose own seconds by a clock are appended to `spent` at its end."""
    total, answer = 0.0, None
    while True:
        before = clock()
        try:
            ask = step.send(answer)
        except StopIteration as end:
            spent.append(total + clock() - before)
            return end.value
        total += clock() - before
        answer = yield ask


def replay(
    trace: Trace,
    ranks: int,
    network: Network,
    *,
    compute: float,
    codec: float = 0.0,
    behind: float = 0.0,
    reduce: str = "ring",
) -> list[float]:
    """Seconds at the end of each step, those of the rank that is last.

    A round with weights that are known early travels while the next steps are computed, as `Gossip` with `overlap` has
    it: what is left of an exchange is waited for when the next one begins.

    Args:
        compute: seconds of a step's own computation on each rank.
        codec: seconds of a rank in an exchange, such as for compression.
        behind: the share of `compute` behind whose end an exchange runs, as gradients behind backward.
        reduce: how the mean over all ranks is found, `ring` or `tree`.
    """
    clocks = [0.0] * ranks
    ready, left = clocks, ()
    ends = []
    for exchange in trace.exchanges():
        begins = [clock + (1 - behind) * compute for clock in clocks]
        clocks = [clock + compute for clock in clocks]
        if exchange and behind:
            for each in exchange:
                begins = carried(begins, each, network, reduce)
            clocks = [codec + max(pair) for pair in zip(clocks, begins, strict=True)]
        elif exchange:
            clocks = finished(clocks, ready, left, network, reduce)
            clocks = [clock + codec for clock in clocks]
            late = next((k for k, each in enumerate(exchange) if each.early), len(exchange))
            for each in exchange[:late]:
                clocks = carried(clocks, each, network, reduce)
            ready = carried(clocks, exchange[late], network, reduce) if late < len(exchange) else clocks
            left = exchange[late + 1 :]
        ends.append(max(clocks))
    return ends


def finished(clocks: list[float], ready: list[float], left: Exchange, network: Network, reduce: str) -> list[float]:
    """The clocks once what is under way has come, and the rounds that are left have been gone through."""
    clocks = [max(pair) for pair in zip(clocks, ready, strict=True)]
    for each in left:
        clocks = carried(clocks, each, network, reduce)
    return clocks


def carried(clocks: Sequence[float], each: Round, network: Network, reduce: str = "ring") -> list[float]:
    """The clocks after a round that begins at `clocks`."""
    if each.mean:
        n = len(clocks)
        messages = ring_messages(n) if reduce == "ring" else tree_messages(n)
        seconds = messages * network.latency + all_reduce_bytes(n, each.mean) / network.bandwidth
        return [max(clocks) + seconds] * n
    free, after = list(clocks), list(clocks)
    for i, j, n in each.sends:
        free[i] += n / network.bandwidth
        after[j] = max(after[j], free[i] + network.latency)
    return after
