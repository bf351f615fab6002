"""AuON against its equations in both readings, and against what they amount to."""

import math

import pytest
import torch
from cases import moved
from laws import seeded
from reference.auon import auon
from torch import nn

from thinrank.optim import AuON, Muon
from thinrank.optim.linalg.orthogonal import JORDAN

STEPS = 8


def train(cls, start, grads, **options):
    weight = nn.Parameter(start.clone())
    optimizer = cls([weight], **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


def problem(*shape):
    return seeded(*shape), [seeded(*shape, seed=i + 1) for i in range(STEPS)]


@pytest.mark.parametrize("normalise", [True, False], ids=["paper", "code"])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("shape", [(14, 9), (8, 15), (1, 6)], ids=["tall", "wide", "row"])
def test_equals_the_equations_in_float64(shape, steps, normalise):
    start, grads = problem(*shape)
    options = {"lr": 0.1, "gamma": 2.0, "weight_decay": 0.3}
    own = train(AuON, start, grads, newton_schulz_steps=steps, normalize_update=normalise, **options)
    expected, _ = auon(start, grads, triples=JORDAN.triples[:steps], normalise=normalise, **options)
    assert moved(own, expected) <= 1e-4 * moved(start, expected)


def test_the_bound_is_seen_in_few_entries_alone():
    """rms(cosh) lies between sqrt(1 + γ²/N) and cosh(γ), which it reaches for a single entry."""
    for n, low, high in ((1, math.cosh(1.5), math.cosh(1.5)), (8, 1.017, 1.02), (64, 1.00027, 1.0003)):
        _, seen = auon(*problem(n, n), lr=0.1)
        assert low * (1 - 1e-5) <= min(seen) <= max(seen) <= high * (1 + 1e-5)  # 1e-7 beside the norm
        assert min(seen) >= math.sqrt(1 + 1.5**2 / n**2) - 1e-6


def test_the_papers_step_has_unit_norm_whatever_the_gradient():
    start = seeded(64, 64)
    for size in (1e-30, 1.0, 1e30):
        own = train(AuON, start, [size * seeded(64, 64, seed=1)], lr=1.0)
        assert moved(start, own) == pytest.approx(1.0, rel=1e-3)


def test_the_codes_step_is_nesterov_momentum():
    """`torch.optim.SGD` keeps the sum and not the mean of gradients, hence the rate; ρ is 1 + 1.5²/2/4096 here."""
    start, grads = problem(64, 64)
    own = train(AuON, start, grads, lr=0.2, normalize_update=False)
    sgd = train(torch.optim.SGD, start, grads, lr=0.2 * 0.05, momentum=0.95, nesterov=True)
    assert moved(own, sgd) <= 3e-4 * moved(start, sgd)


def test_the_codes_hybrid_of_five_iterations_is_muon():
    start, grads = problem(64, 48)
    own = train(AuON, start, grads, lr=0.2, newton_schulz_steps=5, normalize_update=False)
    other = train(Muon, start, grads, lr=0.2, adjust_lr="none")
    assert moved(own, other) <= 1e-3 * moved(start, other)


def test_one_iteration_evens_a_little():
    """Jordan's first takes small singular values three and a half times as far and none beyond 1.2."""
    grad = torch.diag(torch.tensor([1.0, 0.3, 0.1, 0.01]))
    spread = []
    for steps in (0, 1, 5):
        own = train(AuON, torch.zeros(4, 4), [grad], lr=1.0, newton_schulz_steps=steps)
        values = torch.linalg.svdvals(own)
        spread.append(float(values[0] / values[-1]))
    assert spread[0] == pytest.approx(100.0, rel=1e-3)
    assert 20.0 < spread[1] < 50.0
    assert spread[2] < 2.0


def test_zero_gradients_are_skipped():
    start = seeded(5, 4)
    for normalise in (True, False):
        own = train(AuON, start, [torch.zeros(5, 4)] * 2, lr=1.0, normalize_update=normalise)
        assert torch.equal(own, start)
