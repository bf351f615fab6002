"""Fira must follow the published trajectory: the fira package's own step, and the equations in float64."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import moved
from laws import seeded
from reference.fira import fira as equations
from torch import nn

from thinrank.optim import Apollo, Fira, FiraConfig, GaLore, SubspaceAdamW
from thinrank.optim.inner.adam import Adam
from thinrank.optim.linalg.adam import adam_direction, bias_factor
from thinrank.optim.lowrank.lift import Residual
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import Svd
from thinrank.optim.rule import Step

SHAPES = {"tall": (24, 10), "wide": (9, 31), "square": (12, 12)}
EVERY = {**SHAPES, "one wide": (7, 1), "one high": (1, 7), "one": (1, 1)}
SIDES = ["std", "reverse_std", "left", "right"]
STEPS, GAP, RANK, BETAS = 50, 20, 4, (0.9, 0.99)
OPTIONS = {"lr": 0.01, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}


def gradient(shape, step, seed=0):
    """A falling spectrum, singular values well apart, and a size that changes by the step: the limiter is at work."""
    u, _, vh = torch.linalg.svd(seeded(*shape, seed=1000 * step + seed, dtype=torch.float64), full_matrices=False)
    spectrum = 0.7 ** torch.arange(min(shape), dtype=torch.float64)
    return ((u * spectrum) @ vh * (1 + step % 4)).float()


def groups(matrices, vectors, side, alpha):
    """As the users of the fira package write them, and its `divide_params`."""
    projected = {"params": matrices, "rank": RANK, "update_proj_gap": GAP, "alpha": alpha, "proj_type": side}
    return [{"params": vectors}, projected]


@pytest.mark.parametrize("alpha", [1.0, 0.25, 4.0])
@pytest.mark.parametrize("side", SIDES)
def test_equals_the_fira_package(side, alpha):
    """50 steps over two renewals, tall, wide and square matrices and unprojected vectors in one optimizer."""
    package: Any = pytest.importorskip("fira", reason="fira (extra `compare`) is not installed")
    start = [seeded(*shape, seed=i) * 0.1 for i, shape in enumerate((*SHAPES.values(), (13,), (4, 6)))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    mine = Fira(groups(ours[:3], ours[3:], side, alpha), **OPTIONS)
    reference = package.FiraAdamW(groups(theirs[:3], theirs[3:], side, alpha), no_deprecation_warning=True, **OPTIONS)
    for step in range(STEPS):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = gradient(a.shape, step, i) if a.ndim > 1 else seeded(*a.shape, seed=step)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for x, a, b in zip(start, ours, theirs, strict=True):
        assert moved(a, b) <= 1e-6 * moved(torch.zeros(()), b), tuple(x.shape)
        assert moved(a, b) <= 1e-5 * moved(x, b), tuple(x.shape)


# outputs of fira 1.0.2: the weight's norm, and its product with a fixed matrix; one basis, so that signs do not matter
PUBLISHED = {
    ((24, 10), 1.0): (1.6865532, -0.0035035),
    ((24, 10), 0.25): (1.5861495, 0.6690217),
    ((9, 31), 1.0): (1.7705687, 1.7527301),
    ((9, 31), 0.25): (1.7000323, 1.8236156),
}


@pytest.mark.parametrize(("shape", "alpha"), PUBLISHED, ids=str)
def test_gives_what_the_fira_package_gave(shape, alpha):
    weight = nn.Parameter(seeded(*shape) * 0.1)
    optimizer = Fira([weight], rank=RANK, scale=alpha, update_proj_gap=100, **OPTIONS)
    for step in range(30):
        weight.grad = seeded(*shape, seed=1 + step) * (1 + step % 4)
        optimizer.step()
    end = weight.detach().double()
    found = (float(end.norm()), float((end * seeded(*shape, seed=99, dtype=torch.float64)).sum()))
    assert found == pytest.approx(PUBLISHED[shape, alpha], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_equations_in_float64(shape, side, alpha):
    start = seeded(*shape) * 0.1
    grads = [gradient(shape, step) for step in range(STEPS)]
    weight = nn.Parameter(start.clone())
    optimizer = Fira([weight], rank=RANK, scale=alpha, update_proj_gap=GAP, proj_type=side, **OPTIONS)
    found = []
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        found.append(float(optimizer.state[weight]["residual_norm"]))
    expected, norms = equations(start, grads, rank=RANK, scale=alpha, gap=GAP, side=side, **OPTIONS)
    assert moved(weight, expected) <= 2e-4 * moved(start, expected)
    assert found == pytest.approx(norms, rel=1e-4)
    limited = [b / a > 1.0099 for a, b in pairwise(norms)]
    assert any(limited)
    assert not all(limited)


@pytest.mark.parametrize("limit", [1.01, 1.3])
@pytest.mark.parametrize("transport", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("shape", EVERY.values(), ids=EVERY)
def test_other_transports_and_limits_equal_the_equations(shape, transport, limit):
    """Over two renewals; also of one-wide matrices, of whose gradient a scale of 0.25 leaves three quarters over."""
    start = seeded(*shape) * 0.1
    grads = [gradient(shape, step) for step in range(STEPS)]
    weight = nn.Parameter(start.clone())
    rank = min(RANK, *shape)
    optimizer = Fira(
        [weight], rank=rank, scale=0.25, update_proj_gap=GAP, transport=transport, residual_limit=limit, **OPTIONS
    )
    found = []
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        found.append(float(optimizer.state[weight]["residual_norm"]))
    named = {"scale": 0.25, "gap": GAP, "transport": transport, "limit": limit, **OPTIONS}
    expected, norms = equations(start, grads, rank=rank, **named)
    rounding = STEPS * 2.0**-24 * float(expected.norm())  # of the weight, in every step
    assert moved(weight, expected) <= 1e-5 * moved(start, expected) + rounding
    assert found == pytest.approx(norms, rel=1e-4)
    assert any(b / a == pytest.approx(limit, rel=1e-4) for a, b in pairwise(norms))


@pytest.mark.parametrize("alpha", [1.0, 0.25, 4.0])
def test_the_residual_is_never_formed_but_is_the_published_one(alpha):
    """Matrices whose counts differ, so that each is corrected by its own: α ψ Bᵀ + φ∘(G − α R Bᵀ), limited."""
    rule = LowRank(
        subspace=Svd(rank=3),
        inner=Adam(betas=BETAS, eps_raw=True),
        lift=Residual(limit=1e9, alpha=alpha, betas=BETAS),
    )
    grad, counts = seeded(3, 9, 6), [4, 0, 30]
    state = rule.init((3, 9, 6), torch.device("cpu"))
    state["basis"].copy_(torch.linalg.qr(seeded(3, 6, 3, seed=1)).Q)
    state["exp_avg"].copy_(seeded(3, 9, 3, seed=2))
    state["exp_avg_sq"].copy_(seeded(3, 9, 3, seed=3).square())
    update = rule.update(grad, state, Step(count=counts)).materialise()
    for i, count in enumerate(counts):
        low = grad[i] @ state["basis"][i]
        raw = state["exp_avg"][i] / (state["exp_avg_sq"][i].sqrt() + 1e-8)
        back = alpha * state["basis"][i].mT
        residual = (grad[i] - low @ back) * (raw.norm(dim=-1) / (low.norm(dim=-1) + 1e-8))[:, None]
        size = (1 - BETAS[1] ** (count + 1)) ** 0.5 / (1 - BETAS[0] ** (count + 1))
        torch.testing.assert_close(update[i], size * (raw @ back + residual), rtol=1e-4, atol=1e-5)
        assert float(state["residual_norm"][i]) == pytest.approx(float(residual.norm()), rel=1e-4)


def test_the_bias_factor_is_what_adam_multiplies_by():
    for counts in ([3, 3], [1, 50]):
        m, v = torch.zeros(2, 5, 4), torch.zeros(2, 5, 4)
        direction = adam_direction(seeded(2, 5, 4), m, v, counts, betas=BETAS, eps=1e-3, eps_raw=True)
        factor = bias_factor(counts, BETAS, torch.device("cpu"))
        torch.testing.assert_close(direction, factor[:, None, None] * m / (v.sqrt() + 1e-3))


def test_full_rank_is_galore_at_scale_one():
    """Nothing is left over: the residual is rounding, which the difference of two squares makes the root of."""
    ends = []
    for cls in (Fira, GaLore):
        weight = nn.Parameter(seeded(12, 7))
        optimizer = cls([weight], lr=0.01, rank=1.0, scale=1.0)
        for step in range(10):
            weight.grad = seeded(12, 7, seed=step)
            optimizer.step()
        ends.append(weight.detach())
    assert moved(*ends) < 1e-3 * moved(ends[1], seeded(12, 7))


def test_a_residual_after_zero_gradients_starts_anew():
    """The package stores the norm 0 of the first step, and lets what follows grow by 1 % a step from 1e-8."""
    weight = nn.Parameter(torch.zeros(12, 8))
    optimizer = Fira([weight], lr=1.0, rank=1)
    weight.grad = torch.zeros(12, 8)
    optimizer.step()
    weight.grad = seeded(12, 8)
    optimizer.step()
    assert int(torch.linalg.matrix_rank(weight.detach(), rtol=1e-3)) == 8


@pytest.mark.parametrize("cls", [Fira, Apollo, SubspaceAdamW])
def test_a_norm_that_overflows_where_the_projections_does_not(cls):
    """A first gradient of 1e19: rows of the gradient are infinitely long, their coordinates are not, and the limiter's
    factor was infinity over infinity."""
    for exponent in range(72, 84):
        weight = nn.Parameter(seeded(8, 5))
        optimizer = cls([weight], lr=0.01, rank=2)
        for step in range(3):
            weight.grad = seeded(8, 5, seed=step) * (10 ** (exponent / 4) if step == 0 else 1.0)
            optimizer.step()
            assert bool(weight.isfinite().all()), exponent


def test_alpha_is_another_name_for_scale():
    named = Fira([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2, "alpha": 0.0625}])
    assert named.param_groups[0]["scale"] == 0.0625
    assert "alpha" not in named.param_groups[0]
    with pytest.raises(ValueError, match=r"Fira: alpha is another name for scale: give one of the two"):
        Fira([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2, "alpha": 1.0, "scale": 1.0}])
    with pytest.raises(ValueError, match=r"Fira: scale must be a number at least 0"):
        Fira([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2, "alpha": -1.0}])
    assert FiraConfig().scale == 0.25
