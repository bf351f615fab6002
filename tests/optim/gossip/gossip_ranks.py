"""Ranks of a simulator that minimise quadratics of their own: what tests of schemes share."""

from __future__ import annotations

from typing import Any

import torch

from thinrank.optim.gossip.compress import compressor
from thinrank.optim.gossip.schemes import Place, scheme_class
from thinrank.optim.gossip.simulator import Simulator, run
from thinrank.optim.gossip.topology import topology

SIZE = 96

CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}  # float32, some hundred sums


def schemes(
    name, graph, codec: Any = "float32", *, size=SIZE, shapes=None, check_every=100, seed=0, patience=100, **options
):
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

    def train(self, ranks, steps=300, simulator=None, lr=0.1):
        simulator = simulator or Simulator(len(ranks))
        weights = started(ranks, torch.zeros(self.targets.shape[1]))
        errors = []
        for step in range(steps):
            weights = step_all(simulator, ranks, weights, self.updates(weights, step, lr))
            errors.append(self.error(weights))
        return weights, sum(errors[-50:]) / 50
