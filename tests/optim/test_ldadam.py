"""LDAdam against its equations, its limits, and the defects of keeping the error in `p.grad`."""

from functools import partial
from typing import Any

import pytest
import torch
from cases import moved, stepped
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, decaying, seeded
from reference.ldadam import ldadam
from torch import nn

from thinrank.optim import LDAdam
from thinrank.optim.axis import alone
from thinrank.optim.linalg.basis import momentum_iteration, svd_basis
from thinrank.optim.linalg.orthogonal import householder_qr
from thinrank.optim.methods.ldadam import LDAdamConfig
from thinrank.optim.rule import Step

STEPS = 24
SHAPES = pytest.mark.parametrize("shape", [(14, 9), (8, 15), (10, 10)], ids=["tall", "wide", "square"])


train = partial(stepped, LDAdam)


# --- the subspace -----------------------------------------------------------------------------------------------------


@given(st.floats(0.0, 1.0), st.integers(0, 99))
@LAW
def test_one_iteration_equals_its_definition(rho, seed):
    x = seeded(2, 9, 6, seed=seed, dtype=torch.float64)
    old = torch.linalg.qr(seeded(2, 6, 3, seed=seed + 1, dtype=torch.float64)).Q
    momentum = seeded(2, 9, 3, seed=seed + 2, dtype=torch.float64)
    b = rho * momentum @ old.mT + (1 - rho) * x
    torch.testing.assert_close(alone(momentum_iteration(x, old, momentum, rho)), householder_qr(b.mT @ b @ old))


def test_iterations_on_one_matrix_find_its_dominant_subspace():
    x = decaying(14, 9, ratio=0.5, dtype=torch.float64).unsqueeze(0)
    basis = torch.linalg.qr(seeded(1, 9, 3, dtype=torch.float64)).Q
    for _ in range(30):
        basis = alone(momentum_iteration(x, basis, torch.zeros(1, 14, 3, dtype=torch.float64), 0.0))
    best = svd_basis(x, 3)
    torch.testing.assert_close(basis @ basis.mT, best @ best.mT)


@pytest.mark.parametrize("size", [1e30, 1.0, 1e-30])
def test_an_iteration_does_not_depend_on_the_size(size):
    x, old = seeded(1, 9, 6), torch.linalg.qr(seeded(1, 6, 3, seed=1)).Q
    momentum = seeded(1, 9, 3, seed=2)
    expected = alone(momentum_iteration(x, old, momentum, 0.5))
    found = alone(momentum_iteration(x * size, old, momentum * size, 0.5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_of_nothing_and_of_no_number_the_old_basis_stays(value):
    old = householder_qr(seeded(1, 6, 3))
    new = alone(momentum_iteration(torch.full((1, 9, 6), value), old, torch.zeros(1, 9, 3), 0.5))
    torch.testing.assert_close(new, old)


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", ["absolute", "zero"])
@pytest.mark.parametrize("feedback", ["off", "full"])
@SHAPES
def test_equals_the_equations_in_float64(shape, feedback, negative):
    """`absolute` is the paper's step. The gradients share a part, as a model's do: the subspace is then determined."""
    start = seeded(*shape)
    grads = [decaying(*shape, seed=99) + 0.3 * decaying(*shape, seed=i + 1) for i in range(STEPS)]
    options: dict[str, Any] = {"lr": 0.01, "rank": 4, "eps": 1e-6, "weight_decay": 0.1}
    weight, optimizer = train(start, grads, error_feedback=feedback, negative_variance=negative, **options)
    expected, error, basis = ldadam(
        start, grads, feedback=feedback == "full", absolute=negative == "absolute", betas=(0.908, 0.99), **options
    )
    assert moved(weight, expected) <= 1e-3 * moved(start, expected)
    own = optimizer.state[weight]["basis"]
    torch.testing.assert_close(own @ own.mT, (basis @ basis.T).float(), rtol=1e-3, atol=1e-3)
    if feedback == "full":
        found = optimizer.state[weight]["error"]
        found = found if shape[0] >= shape[1] else found.mT
        assert moved(found, error) <= 1e-3 * float(error.norm())


@SHAPES
def test_nothing_is_lost(shape):
    """With the momentum P in full, `P + (1−β1) E` changes by `(1−β1)(G − P)`: what is not sent is kept, of both."""
    weight = nn.Parameter(seeded(*shape))
    optimizer = LDAdam([weight], rank=3)
    beta = 0.908

    def held():
        state = optimizer.state[weight]
        return state["exp_avg"] @ state["basis"].mT, state["error"]

    for step in range(12):
        momentum, error = held()
        before = momentum + (1 - beta) * error
        grad = seeded(*shape, seed=step + 1)
        weight.grad = grad
        optimizer.step()
        after = held()[0] + (1 - beta) * held()[1]
        full = grad if shape[0] >= shape[1] else grad.mT
        torch.testing.assert_close(after, before + (1 - beta) * (full - momentum), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=["tall", "wide"])
def test_at_full_rank_no_error_is_left_and_the_momentum_is_adams(shape):
    grads = [seeded(*shape, seed=i + 1) for i in range(STEPS)]
    weight, optimizer = train(seeded(*shape), grads, rank=7)
    state = optimizer.state[weight]
    assert float(state["error"].abs().max()) < 1e-4
    momentum = torch.zeros(shape)
    for grad in grads:
        momentum.lerp_(grad, 1 - 0.908)
    full = state["exp_avg"] @ state["basis"].mT
    torch.testing.assert_close(full if shape[0] > shape[1] else full.mT, momentum, rtol=1e-4, atol=1e-5)


def test_the_paper_s_absolute_value_steps_much_longer():
    """Why `zero` is the default: the longest step of a single coordinate, in learning rates."""
    longest = {}
    for negative in ("zero", "absolute"):
        rule = LDAdamConfig(rank=8, negative_variance=negative).matrix_rule()
        assert rule is not None
        state = rule.init((1, 64, 32), torch.device("cpu"))
        longest[negative] = 0.0
        for count in range(100):
            grad = decaying(64, 32, seed=count // 20).unsqueeze(0) + 0.02 * seeded(1, 64, 32, seed=count)
            direction = rule.update(grad, state, Step(count=[count])).direction
            assert direction is not None
            longest[negative] = max(longest[negative], float(direction.abs().max()))
    # with v̂ ≥ m̂² before a gradient enters, |m̂|/sqrt(v̂) is at most sqrt(β1²/β2 + (1−β1)²/(1−β2)) once bias has gone
    assert longest["zero"] < (0.908**2 / 0.99 + 0.092**2 / 0.01) ** 0.5 * 1.05
    assert longest["absolute"] > 3 * longest["zero"]


def test_feedback_sends_what_does_not_fit():
    """A gradient of full rank at rank 1: without feedback one direction moves, with it they take their turns."""
    grads = [decaying(12, 8, ratio=0.9, seed=1)] * 40
    ranks = {}
    for feedback in ("off", "full", "8bit", "4bit"):
        weight, _ = train(torch.zeros(12, 8), grads, rank=1, error_feedback=feedback)
        ranks[feedback] = int(torch.linalg.matrix_rank(weight.detach(), rtol=0.05))
    assert ranks["off"] == 1
    assert ranks["full"] > 1
    assert ranks["8bit"] > 1
    assert ranks["4bit"] > 1


def test_the_first_basis_by_iteration_is_nearly_the_exact_one():
    grads = [decaying(14, 9, ratio=0.5, seed=1)]
    bases = []
    for svd in ("exact", "power"):
        weight, optimizer = train(seeded(14, 9), grads, rank=3, svd=svd)
        bases.append(optimizer.state[weight]["basis"])
    torch.testing.assert_close(bases[0] @ bases[0].mT, bases[1] @ bases[1].mT, rtol=1e-3, atol=1e-3)


# --- what an error in p.grad comes to ---------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["off", "full", "8bit", "4bit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 4])
def test_a_gradient_that_is_no_number_counts_as_zero(value, feedback, when):
    """In the basis that was there, and for its matrix alone: the next one in the same batch steps as ever."""
    ends = []
    for spoilt in (value, 0.0):
        params = [nn.Parameter(seeded(8, 5, seed=i)) for i in range(2)]
        optimizer = LDAdam(params, rank=3, error_feedback=feedback)
        for step in range(8):
            for i, p in enumerate(params):
                p.grad = seeded(8, 5, seed=10 * step + i)
            if step == when:
                grad = params[0].grad
                assert grad is not None
                grad[2, 3] = spoilt
            optimizer.step()
        assert all(bool(t.float().isfinite().all()) for s in optimizer.state.values() for t in s.values())
        ends.append(params)
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_step_without_a_gradient_in_the_basis_that_was_there():
    """M and V decay but for what V lacks to M's square, and of the error what the basis holds is sent."""
    weight, optimizer = train(seeded(9, 6), [seeded(9, 6, seed=i + 1) for i in range(4)], rank=3, lr=0.01)
    before, state = weight.detach().clone(), {key: t.clone() for key, t in optimizer.state[weight].items()}
    weight.grad = torch.full((9, 6), torch.nan)
    optimizer.step()
    after, basis = optimizer.state[weight], state["basis"]
    assert torch.equal(after["basis"], basis)
    sent = state["error"] @ basis
    torch.testing.assert_close(after["error"], state["error"] - sent @ basis.mT, rtol=1e-4, atol=1e-5)
    b1, b2 = 0.908, 0.99
    torch.testing.assert_close(after["exp_avg"], b1 * state["exp_avg"] + (1 - b1) * sent, rtol=1e-4, atol=1e-6)
    least = (state["exp_avg"] / (1 - b1**4)).square() * (1 - b2**4)
    variance = b2 * torch.maximum(state["exp_avg_sq"], least) + (1 - b2) * sent.square()
    torch.testing.assert_close(after["exp_avg_sq"], variance, rtol=1e-4, atol=1e-6)
    direction = (after["exp_avg"] / (1 - b1**5)) / ((variance / (1 - b2**5)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), before - 0.01 * direction @ basis.mT, rtol=1e-4, atol=1e-5)


def test_gradients_and_errors_are_apart():
    """`zero_grad(set_to_none=True)` and clipping touch gradients; the error is state, and in the checkpoint."""
    weight = nn.Parameter(seeded(14, 9))
    optimizer = LDAdam([weight], rank=3)
    for step in range(3):
        grad = seeded(14, 9, seed=step)
        weight.grad = grad
        optimizer.step()
        assert torch.equal(grad, seeded(14, 9, seed=step))
        optimizer.zero_grad(set_to_none=True)
    assert float(optimizer.state_dict()["state"][0]["error"].norm()) > 0.1


def test_matrices_of_one_batch_may_be_at_different_steps():
    params = [nn.Parameter(seeded(8, 5, seed=i)) for i in range(2)]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, apart = LDAdam(params, rank=3), [LDAdam([a], rank=3) for a in alone]
    for step in range(6):
        for i, (p, a) in enumerate(zip(params, alone, strict=True)):
            p.grad = None if i == 1 and step < 3 else seeded(8, 5, seed=10 * step + i)
            a.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        for each in apart:
            each.step()
    for p, a in zip(params, alone, strict=True):
        torch.testing.assert_close(p, a, rtol=1e-4, atol=1e-5)
