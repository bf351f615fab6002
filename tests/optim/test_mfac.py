"""M-FAC: its inverse against definitions in float64, its window, and what a renewal does to both."""

from typing import Any

import pytest
import torch
from cases import moved
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, decaying, seeded
from reference.mfac import explicit, mfac, projected, recursive
from torch import nn

from thinrank.optim import MFAC
from thinrank.optim.inner import mfac as inner
from thinrank.optim.linalg.woodbury import ROUNDING, fisher_coefficients
from thinrank.optim.lowrank.transport import Rotate, Rotation, Slots
from thinrank.optim.rule import Step


def direction(gradients, which, damping, divisor):
    """`F⁻¹ g_which` for `gradients` (batch, m, d) by the suite's function, and the damping it used."""
    norms = gradients.norm(dim=-1)
    rows = gradients / norms.clamp(min=1e-300).unsqueeze(-1)
    place = torch.tensor(which)
    weights = fisher_coefficients(rows @ rows.mT, norms, place, damping=damping, divisor=divisor)
    floor = damping + ROUNDING * norms.square().sum(-1) / divisor
    return (weights.unsqueeze(-2) @ rows).squeeze(-2), floor


@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([1e-5, 1e-2, 10.0]), st.integers(0, 99))
@LAW
def test_the_solve_equals_the_explicit_inverse_and_the_recursion(m, d, damping, seed):
    gradients = seeded(3, m, d, seed=seed, dtype=torch.float64)
    gradients[1, : m // 2] = 0.0  # places not yet filled
    which = [seed % m, m - 1, (seed + 1) % m]
    found, floor = direction(gradients, which, damping, float(m))
    for i, j in enumerate(which):
        for definition in (explicit, recursive):
            expected = definition(gradients[i], gradients[i, j], float(floor[i]), m)
            torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))


def test_parallel_gradients_in_float32_stay_positive_definite():
    """S is singular but for its rounding, which is a million times the damping and would be what is inverted."""
    one = 1e3 * seeded(1, 1, 500)
    gradients = one.expand(1, 32, 500) + 1e-4 * seeded(1, 32, 500, seed=1)
    found, floor = direction(gradients, [31], 1e-5, 32.0)
    expected = explicit(gradients[0], gradients[0, 31], float(floor), 32)
    room = 4 * torch.finfo(torch.float32).eps / ROUNDING
    assert float((found[0].double() - expected).norm()) < room * float(expected.norm())


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_a_window_with_one_gradient_divides_by_its_square(size):
    """`F = λI + g gᵀ`: a small gradient is multiplied by 1/λ, a large one divided by its square."""
    rule = inner.MFAC(window=4, damping=0.01)
    state = rule.init((1, 5, 3), torch.device("cpu"))
    g = size * seeded(1, 5, 3) / seeded(1, 5, 3).norm()
    found = rule.precondition(g, state, Step(count=[0]))
    torch.testing.assert_close(found, g / (0.01 + size**2 * (1 + ROUNDING)), rtol=1e-5, atol=0)


def test_the_oldest_gradient_is_replaced_in_every_matrix_by_its_own_count():
    rule = inner.MFAC(window=3)
    state = rule.init((2, 5, 2), torch.device("cpu"))
    counts = [0, 7]
    grads = [seeded(2, 5, 2, seed=i) for i in range(5)]
    for step, g in enumerate(grads):
        rule.precondition(g, state, Step(count=[c + step for c in counts]))
    held = state["window"] * state["window_norm"][..., None, None]
    for i, first in enumerate(counts):
        for step in (2, 3, 4):  # the last three
            torch.testing.assert_close(held[i, (first + step) % 3], grads[step][i])


@pytest.mark.parametrize("shape", [(6, 4), (3, 7)], ids=["tall", "wide"])
def test_equals_the_equations_in_float64(shape):
    start, grads = seeded(*shape), [seeded(*shape, seed=i + 1) for i in range(20)]
    weight = nn.Parameter(start.clone())
    optimizer = MFAC([weight], lr=0.1, window=5, damping=0.01, space="whole")
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    expected = mfac(start, grads, lr=0.1, window=5, damping=0.01, rounding=ROUNDING)
    apart = (weight.detach().double() - expected).norm()
    assert float(apart) <= 1e-4 * float((expected - start).norm())


@pytest.mark.parametrize("finish", ["momentum", "adam"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (6, 1), (1, 6), (1, 1)], ids=str)
def test_in_a_subspace_it_equals_the_equations(shape, finish):
    """Over three renewals, some of them before the window is full."""
    start, grads = seeded(*shape), [decaying(*shape, ratio=0.5, seed=i + 1) for i in range(17)]
    options = {"lr": 0.05, "rank": min(3, *shape), "window": 7, "damping": 0.01, "finish": finish, "scale": 0.5}
    options |= {"betas": (0.8, 0.99), "eps": 1e-4, "weight_decay": 0.1}
    weight = nn.Parameter(start.clone())
    optimizer = MFAC([weight], update_proj_gap=5, **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    expected = projected(start, grads, gap=5, rounding=ROUNDING, **options)
    rounding = 17 * 2.0**-24 * float(expected.norm())  # of the weight, in every step
    assert moved(weight, expected) <= 1e-5 * moved(start, expected) + rounding


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=["tall", "wide"])
def test_at_full_rank_the_subspace_makes_no_difference(shape):
    """The inverse Fisher does not know in which coordinates it is written, also across renewals."""
    ends = []
    options: dict[str, Any] = {"lr": 0.1, "window": 5, "damping": 0.01, "weight_decay": 0.1}
    spaces: list[dict[str, Any]] = [{"space": "whole"}, {"rank": 1.0, "update_proj_gap": 3}]
    for space in spaces:
        weight = nn.Parameter(seeded(*shape))
        optimizer = MFAC([weight], **options, **space)
        for step in range(14):
            weight.grad = seeded(*shape, seed=step + 1)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_what_both_subspaces_hold_of_the_window_survives_a_renewal():
    window = seeded(1, 4, 6, 3)
    old = torch.eye(5)[:, :3]
    turned = torch.linalg.qr(seeded(2, 2)).Q
    new = torch.zeros(5, 3)
    new[:2, :2], new[4, 2] = turned, 1.0  # shares the first two directions, in other letters
    state = {"exp_avg": seeded(1, 6, 3, seed=1), "window": window.clone()}
    Rotate((0.9, 0.99), also=("window",)).carry(state, Rotation((new.mT @ old).unsqueeze(0)), [5])
    shared = torch.eye(5)[:, :2]
    torch.testing.assert_close(state["window"] @ new.mT, window @ old.mT @ shared @ shared.mT, rtol=1e-5, atol=1e-6)


def test_slots_that_changed_their_column_are_empty_in_the_window_too():
    state = {"exp_avg": torch.ones(1, 5, 2), "window": torch.ones(1, 4, 5, 2)}
    Rotate((0.9, 0.99), also=("window",)).carry(state, Slots(torch.tensor([[True, False]])), [5])
    for value in state.values():
        assert bool((value[..., 0] == 1.0).all())
        assert bool((value[..., 1] == 0.0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_window_survives_a_gradient_of_no_or_huge_numbers(value):
    """NaN would stay in the window for as many steps; 1e30 stays, and holds the directions beside it short."""
    weight = nn.Parameter(seeded(6, 4))
    optimizer = MFAC([weight], window=3, space="whole")
    before = weight.detach().clone()
    for step in range(8):
        before = weight.detach().clone()
        weight.grad = seeded(6, 4, seed=step)
        if step == 2:
            weight.grad[1, 1] = value
        optimizer.step()
        assert all(bool(t.isfinite().all()) for t in (weight, *optimizer.state[weight].values()))
    assert float((weight.detach() - before).norm()) > 1e-5


def test_natural_galore_is_adam_on_the_preconditioned_gradient():
    weight, twin = nn.Parameter(seeded(6, 4)), nn.Parameter(seeded(6, 4))
    optimizer = MFAC([weight], lr=0.01, window=5, damping=0.01, space="whole", finish="adam")
    reference = torch.optim.Adam([twin], lr=0.01)
    last: list[torch.Tensor] = []
    for step in range(12):
        grad = decaying(6, 4, seed=step)
        weight.grad = grad.clone()
        optimizer.step()
        last = [*last, grad.flatten()][-5:]
        rows = torch.stack(last)
        floor = 0.01 + ROUNDING * float(rows.square().sum()) / len(last)
        twin.grad = explicit(rows, rows[-1], floor, len(last)).float().view(6, 4)
        reference.step()
    torch.testing.assert_close(weight, twin, rtol=1e-3, atol=1e-4)
