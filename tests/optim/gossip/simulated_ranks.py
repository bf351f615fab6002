"""Ranks of a simulator that minimise quadratics of their own: what tests of schemes share."""

from __future__ import annotations

from typing import Any

import torch

from thinrank.optim.gossip.compress import compressor
from thinrank.optim.gossip.rounds import PeerLost
from thinrank.optim.gossip.schemes import Place, scheme_class
from thinrank.optim.gossip.schemes.copies import Copies
from thinrank.optim.gossip.simulator import Simulator, run
from thinrank.optim.gossip.topology import topology

SIZE = 96

CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}  # float32, some hundred sums


def schemes(
    name, graph, codec: Any = "float32", *, size=SIZE, shapes=None, check_every=100, seed=0, patience=100, **options
) -> list[Any]:
    """A rank's side each."""
    graph = topology(graph, 8) if isinstance(graph, str) else graph
    codec = compressor(codec) if isinstance(codec, str) else codec
    bound = codec.bind(shapes or [(size,)])
    common = {"topology": graph, "seed": seed, "check_every": check_every, "patience": patience, "compressor": codec}
    places = [Place(rank=i, **common) for i in range(graph.size)]
    return [scheme_class(name)(place, bound, **options) for place in places]


def started(ranks, weights=None, size=SIZE):
    """All with the same weights; these."""
    weights = torch.randn(size, generator=torch.Generator().manual_seed(1)) if weights is None else weights
    for rank in ranks:
        rank.start(weights)
    return [weights.clone() for _ in ranks]


def introduced(ranks, weights, simulator=None):
    """Each with its own weights."""
    return run(simulator or Simulator(len(ranks)), [rank.introduce(w) for rank, w in zip(ranks, weights, strict=True)])


def spread(n, size=SIZE, seed=2):
    """Different weights for each of n ranks."""
    return list(torch.randn(n, size, generator=torch.Generator().manual_seed(seed)))


def updates(n, step, size=SIZE, scale=0.1):
    generator = torch.Generator().manual_seed(1000 + step)
    return list(scale * torch.randn(n, size, generator=generator))


def step_all(simulator, ranks, weights, moves):
    return run(simulator, [rank.step(w, u) for rank, w, u in zip(ranks, weights, moves, strict=True)])


def followed(name, graph, codec: Any = "float32", steps=12, size=96, **options):
    """All ranks' weights after each step of the same updates."""
    ranks = schemes(name, graph, codec, size=size, **options)
    weights, simulator, path = started(ranks, size=size), Simulator(len(ranks)), []
    for step in range(steps):
        weights = step_all(simulator, ranks, weights, updates(len(ranks), step, size))
        path.append(torch.stack(weights))
    return torch.stack(path), ranks, simulator


def apart(weights):
    """√(Σ‖xᵢ − x̄‖² / Σ‖xᵢ‖²)."""
    x = torch.stack(list(weights)).double()
    return float((x - x.mean(0)).norm() / x.norm())


def still(ranks, weights, steps, simulator=None):
    """Steps without updates."""
    simulator = simulator or Simulator(len(ranks))
    nothing = [torch.zeros_like(w) for w in weights]
    for _ in range(steps):
        weights = step_all(simulator, ranks, weights, nothing)
    return weights


def heard(ranks, size=SIZE, steps=3):
    """Every message of some steps: from whom, for whom, and its bytes. The global generator is left alone."""
    found = []

    class Listen:
        def carried(self, count, source, target, message):
            found.append((source, target, bytes(message.tolist())))
            return message

        def delay(self, count, source, target):
            return 0.0

    weights, simulator = started(ranks, size=size), Simulator(len(ranks), faults=Listen())
    before = torch.get_rng_state()
    for step in range(steps):
        weights = step_all(simulator, ranks, weights, updates(len(ranks), step, size))
    assert torch.equal(torch.get_rng_state(), before)
    return found


class Quadratics:
    """Rank i minimises ½‖x − bᵢ‖² with noise; together they minimise ½‖x − b̄‖²."""

    def __init__(self, n, size=SIZE, noise=0.3, seed=3):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randn(n, size, generator=generator)
        self.noise = noise

    def updates(self, weights, step, lr=0.1):
        generator = torch.Generator().manual_seed(step)
        noise = self.noise * torch.randn(len(weights), weights[0].numel(), generator=generator)
        return [-lr * (w - b + e) for w, b, e in zip(weights, self.targets, noise, strict=True)]

    def error(self, weights):
        """Of the ranks' mean."""
        best = self.targets.mean(0)
        return float((torch.stack(list(weights)).mean(0) - best).norm() / best.norm())

    def train(self, ranks, steps=160, simulator=None, lr=0.1):
        simulator = simulator or Simulator(len(ranks))
        weights = started(ranks, torch.zeros(self.targets.shape[1]))
        errors = []
        for step in range(steps):
            weights = step_all(simulator, ranks, weights, self.updates(weights, step, lr))
            errors.append(self.error(weights))
        return weights, sum(errors[-50:]) / 50


# --- faults -----------------------------------------------------------------------------------------------------------


def diverged(ranks):
    """(i, j) of every copy of j on rank i that is not there, or not equal to the bit; dead ranks are None."""
    return [
        (i, j)
        for i, rank in enumerate(ranks)
        if isinstance(rank, Copies)
        for j in rank.sources
        if ranks[j] is not None and not (j in rank.copies and torch.equal(rank.copies[j], ranks[j].public))
    ]


def attempt(simulator, ranks, weights, moves) -> tuple[list[Any], dict[int, Any]]:
    """One exchange in which ranks may be dead (None) or fail. Who failed keeps weights and update, if that is finite.

    Returns the weights, and what was raised by the rank that raised it.
    """
    steps = [rank and rank.step(w, u) for rank, w, u in zip(ranks, weights, moves, strict=True)]
    found = simulator.run(steps)
    raised = {i: each for i, each in enumerate(found) if isinstance(each, Exception)}
    assert all(isinstance(each, PeerLost) for each in raised.values()), raised
    new = [
        w + u.nan_to_num(0.0) * bool(u.isfinite().all()) if i in raised else w if each is None else each
        for i, (w, u, each) in enumerate(zip(weights, moves, found, strict=True))
    ]
    return new, raised


def reformed(simulator, ranks, graph, weights, newcomers=()) -> tuple[list[Any], dict[int, Any]]:
    """All who are alive begin on a new graph; their weights, and what was raised."""
    steps = max(rank.steps for i, rank in enumerate(ranks) if rank is not None and i not in newcomers)
    found = simulator.run(
        [
            rank and rank.reform(graph, None if i in newcomers else weights[i], steps=steps, newcomers=newcomers)
            for i, rank in enumerate(ranks)
        ]
    )
    raised = {i: each for i, each in enumerate(found) if isinstance(each, Exception)}
    return [
        w if i in raised or each is None else each for i, (w, each) in enumerate(zip(weights, found, strict=True))
    ], raised


def flipped(message, place=77):
    """A copy with one bit changed."""
    message = message.clone()
    message[place // 8 % len(message)] ^= 1 << (place % 8)
    return message
