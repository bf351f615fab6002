"""Laws that hold whatever a network does, on random schedules of faults."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import attempt, diverged, reformed, schemes, spread, started, updates

from thinrank.optim.gossip.mail import SAID
from thinrank.optim.gossip.message import HEADER_BYTES
from thinrank.optim.gossip.schemes.copies import Copies
from thinrank.optim.gossip.simulator import Chance, Simulator
from thinrank.optim.gossip.topology import among, complete, from_edges, ring, star, torus

SIZE = 24
GRAPHS = [
    ring(2),
    ring(3),
    ring(5),
    complete(4),
    star(4),
    torus(4),
    from_edges(4, [(0, 1), (1, 2), (2, 3)]),
    from_edges(5, [(0, 1, 0.3), (1, 2, 0.2), (2, 3, 0.3), (3, 4, 0.1), (4, 0, 0.25), (0, 2, 0.2)]),
]
KINDS = {
    "dpsgd": [("float32", {"order": "with"}), ("float32", {"order": "then"})],
    "dcd": [("float32", {}), ("uniform8", {}), ("uniform4", {})],
    "ecd": [("uniform8", {}), ("uniform4", {"restart": 6})],
    "choco": [
        ("uniform4", {}),
        ("uniform8", {"order": "with"}),
        ("sign", {"gamma": 0.5}),
        ("topk", {"gamma": 0.5, "order": "with"}),
    ],
}


class Network:
    """By chance until it is quiet; who could read something of whom in which exchange is kept."""

    def __init__(self, chance):
        self.chance, self.quiet = chance, False
        self.exchange = self.first = 0
        self.read, self.read_first = set(), set()

    def begin(self, exchange, count):
        self.exchange, self.first = exchange, count

    def carried(self, count, source, target, message):
        came = message if self.quiet else self.chance.carried(count, source, target, message)
        # what is said three times can be read after one fault: no flipped bit is known here to be of such a message
        if came is not None and (torch.equal(came, message) or len(message) == SAID * HEADER_BYTES):
            self.read.add((self.exchange, source, target))
            if count == self.first:
                self.read_first.add((self.exchange, source, target))
        return came

    def delay(self, count, source, target):
        return 0.0


@dataclass(kw_only=True)
class Plan:
    """One run: noisy exchanges with these faults, then quiet ones."""

    graph: int
    kind: int
    exchanges: int
    check_every: int
    patience: int
    drop: float
    corrupt: float
    seed: int
    parted: list = field(default_factory=list)  # (first round, rounds, ranks on one side as bits)
    bad: set = field(default_factory=set)  # (exchange, rank): not finite
    death: Any = None  # exchange, rank
    back: int | None = None  # exchanges later it is there again, and has forgotten all
    apart: bool = False  # ranks begin with different weights


def plans(**fixed):
    few = st.integers(0, 14)
    usual = {
        "graph": st.integers(0, len(GRAPHS) - 1),
        "kind": st.integers(0, 3),
        "exchanges": st.integers(1, 14),
        "check_every": st.integers(1, 5),
        "patience": st.integers(2, 9),
        "drop": st.sampled_from([0.0, 0.1, 0.3, 0.7]),
        "corrupt": st.sampled_from([0.0, 0.1, 0.4]),
        "seed": st.integers(0, 2**20),
        "parted": st.lists(st.tuples(few, few, st.integers(1, 14)), max_size=2),
        "bad": st.sets(st.tuples(few, st.integers(0, 4)), max_size=3),
        "death": st.none() | st.tuples(few, st.integers(0, 4)),
        "back": st.none() | st.integers(1, 5),
        "apart": st.booleans(),
    }
    return st.builds(Plan, **(usual | fixed))


class Run:
    """A plan's ranks, exchange by exchange; whenever somebody is missed, all who are left form a graph anew."""

    def __init__(self, name, plan):
        self.plan, self.graph = plan, GRAPHS[plan.graph]
        self.n = self.graph.size
        codec, options = KINDS[name][plan.kind % len(KINDS[name])]
        sides = [
            (start, start + length, frozenset(rank for rank in range(self.n) if bits >> rank & 1))
            for start, length, bits in plan.parted
        ]
        self.network = Network(Chance(seed=plan.seed, drop=plan.drop, corrupt=plan.corrupt, partitions=sides))
        self.simulator = Simulator(self.n, faults=self.network)
        settings_ = {"size": SIZE, "check_every": plan.check_every, "patience": plan.patience, **options}
        self.made = lambda graph: schemes(name, graph, codec, seed=plan.seed, **settings_)
        self.ranks = self.made(self.graph)
        if plan.apart:
            self.weights: list[Any] = self.simulator.run(
                [rank.introduce(w) for rank, w in zip(self.ranks, spread(self.n, SIZE), strict=True)]
            )
        else:
            self.weights = started(self.ranks, size=SIZE)
        self.since, self.named, self.returned = 0, set(), False
        self.dead: Any = None

    def exchange(self, step, scale=0.1):
        """The updates that took effect."""
        self.network.begin(step, self.simulator.count)
        died, who = self.plan.death or (None, None)
        if step == died:
            self.dead = who % self.n
            self.ranks[self.dead] = None
        if self.dead is not None and self.plan.back and step == died + self.plan.back:
            self.rejoin(step)
        moves = updates(self.n, step, SIZE, scale)
        for at, rank in self.plan.bad:
            if at == step:
                moves[rank % self.n][step % SIZE] = float("nan")
        self.weights, raised = attempt(self.simulator, self.ranks, self.weights, moves)
        for i, error in raised.items():
            self.judge(step, i, error.ranks)
        if raised:
            self.recover(step)
        assert all(bool(w.isfinite().all()) for w in self.weights)
        return torch.stack([u if bool(u.isfinite().all()) else torch.zeros(SIZE) for u in moves])

    def judge(self, step, i, whom):
        """Only who was really silent is said to be lost, or could not be understood."""
        self.named |= set(whom)
        for j in whom:
            first = step - self.plan.patience
            assert first >= self.since
            assert all((at, j, i) not in self.network.read for at in range(first, step))
            assert (step, j, i) not in self.network.read_first  # it may have been heard of later, in a check

    def rejoin(self, step):
        """Before an exchange. Where no weights reach it, it stays away, and is missed anew."""
        self.since, self.graph, back = step, GRAPHS[self.plan.graph], self.dead
        self.ranks[back] = self.made(self.graph)[back]
        self.weights, raised = reformed(self.simulator, self.ranks, self.graph, self.weights, newcomers={back})
        assert set(raised) <= {back}
        if raised:
            self.ranks[back] = None
        else:
            self.dead, self.returned = None, True
        self.network.begin(step, self.simulator.count)

    def recover(self, step):
        self.since = step + 1
        self.network.begin(self.since, -1)
        alive = [i for i, rank in enumerate(self.ranks) if rank is not None]
        if self.dead is not None and self.dead not in self.graph.gone:
            try:
                self.graph = self.graph.without([self.dead]).require_connected()
            except ValueError:  # of a star without its middle
                self.graph = among(ring(len(alive)), alive, self.n)
        self.weights, raised = reformed(self.simulator, self.ranks, self.graph, self.weights)
        assert not raised


@pytest.mark.parametrize("name", KINDS)
def test_copies_are_equal_or_somebody_was_missed(name):
    """After two checks in peace no copy differs, however many messages, checks, questions and copies were lost."""
    seen = {"diverged": 0, "missed": 0, "back": 0}

    @settings(max_examples=75, deadline=None, derandomize=True, database=None)
    @given(plans())
    def law(plan):
        run = Run(name, plan)
        for step in range(plan.exchanges):
            run.exchange(step)
        seen["diverged"] += bool(diverged(run.ranks))
        run.network.quiet = True
        end = plan.exchanges + 2 * plan.check_every
        for step in range(plan.exchanges, end):
            run.exchange(step)
        assert diverged(run.ranks) == []
        assert len({rank.steps for rank in run.ranks if rank}) == 1
        seen["missed"] += bool(run.named)
        seen["back"] += run.returned
        # one more exchange, because an introduction goes by the same number as the exchange after it
        if run.dead is not None and end - max(plan.death[0], run.since) > plan.patience + 1:
            assert run.dead in run.graph.gone

    law()
    assert seen["missed"] > 5
    assert seen["back"] > 2, seen
    assert seen["diverged"] > 20 or name == "dpsgd"


@pytest.mark.parametrize("order", ["with", "then"])
def test_dpsgd_agrees_again_and_keeps_its_mean(order):
    """In peace and without updates: distances go down by ρ an exchange, the mean stays."""

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(plans(kind=st.just(order == "then"), death=st.none(), patience=st.just(99)))
    def law(plan):
        run = Run("dpsgd", plan)
        for step in range(plan.exchanges):
            run.exchange(step)
        run.network.quiet = True
        run.plan.bad = set()
        run.exchange(plan.exchanges, scale=0.0)  # `with` has averaged in the last noisy exchange already
        first = torch.stack(run.weights)
        for step in range(1, 13):
            run.exchange(plan.exchanges + step, scale=0.0)
        last = torch.stack(run.weights)
        torch.testing.assert_close(last.mean(0), first.mean(0), rtol=1e-5, atol=1e-5)
        far = (last - last.mean(0)).norm(), (first - first.mean(0)).norm()
        assert far[0] <= far[1] * run.graph.second**12 * (1 + 1e-4) + 1e-5

    law()


@pytest.mark.parametrize("name", ["dpsgd", "dcd", "choco"])
def test_the_mean_moves_by_what_was_lost(name):
    """D-PSGD's by Wᵢⱼ (xᵢ − xⱼ) / n for each message that i has not got from j; of schemes with copies by
    Wᵢⱼ (copy − what it is a copy of) / n, times γ, of the copies that are mixed. Nothing else touches it."""

    fixed = {"bad": st.just(set())} if name == "dcd" else {}  # who leaves out a step in DCD does not average either

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(plans(kind=st.just(name == "dpsgd"), death=st.none(), patience=st.just(99), **fixed))
    def law(plan):
        run = Run(name, plan)
        weights = run.graph.weights()
        for step in range(plan.exchanges):
            before = torch.stack(run.weights).double()
            copies = [dict(rank.copies) if isinstance(rank, Copies) else {} for rank in run.ranks]
            moves = run.exchange(step).double()
            if name == "choco":  # mixes what it has after the messages, the repaired ones among them
                copies = [dict(rank.copies) for rank in run.ranks]
            drift = torch.zeros(SIZE, dtype=torch.float64)
            for i in range(run.n):
                for j in run.graph.sources(i):
                    if name != "dpsgd":
                        wrong = copies[i].get(j, copies[i][i]).double() - copies[j][j].double()
                    elif (step, j, i) in run.network.read:
                        continue
                    else:
                        wrong = (before + moves)[i] - (before + moves)[j]
                    drift += float(weights[i, j]) * wrong / run.n
            after = torch.stack(run.weights).double()
            torch.testing.assert_close(after.mean(0), (before + moves).mean(0) + drift, rtol=1e-5, atol=2e-6)

    law()
