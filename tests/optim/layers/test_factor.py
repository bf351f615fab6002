"""Singular triples, who is drawn, what is swapped, and a step on the manifold of matrices of low rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinrank.optim.linalg.factor import (
    balanced,
    draw,
    exchange_of,
    mixture,
    riemannian_step,
    singular,
    unit_columns,
)

SHAPES = [(5, 5), (7, 4), (4, 9), (1, 6), (6, 1)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_triples_are_the_weight_in_order_with_fixed_signs(shape):
    weight = normal(*shape)
    u, s, v = singular(weight)
    assert torch.allclose(u * s @ v.mT, weight, atol=1e-12)
    eye = torch.eye(len(s), dtype=torch.float64)
    assert torch.allclose(u.mT @ u, eye, atol=1e-12)
    assert torch.allclose(v.mT @ v, eye, atol=1e-12)
    assert (s.diff() <= 0).all()
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    negative = singular(-weight)  # the same triples but for the right vectors' signs
    assert torch.allclose(negative[0], u, atol=1e-12)
    assert torch.allclose(negative[2], -v, atol=1e-12)


def test_half_precision_is_decomposed_in_float32_and_what_is_not_finite_is_refused():
    assert singular(normal(4, 3).bfloat16())[0].dtype == torch.float32
    weight = normal(4, 3)
    weight[1, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        singular(weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_factors_are_the_best_approximation(shape):
    weight, rank = normal(*shape), max(1, min(shape) - 1)
    b, a = balanced(weight, rank)
    s = torch.linalg.svdvals(weight)
    assert torch.isclose((weight - b @ a).norm(), s[rank:].norm(), atol=1e-12)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), atol=1e-12)


def test_the_mixture_is_half_chance_half_size():
    s = torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert torch.allclose(mixture(s), torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64))
    assert torch.equal(mixture(torch.zeros(4)), torch.full((4,), 0.25, dtype=torch.float64))
    counts = torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        counts[draw(mixture(s), 1, generator)] += 1
    assert (counts / 2000 - mixture(s)).abs().max() < 0.04  # three standard deviations of the largest


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.data())
def test_the_fewest_places_are_swapped(k, data):
    count = data.draw(st.integers(1, k))
    order = torch.tensor(data.draw(st.permutations(range(k))))
    chosen = torch.tensor(data.draw(st.permutations(range(k)))[:count])
    into, out_of = exchange_of(order, count, chosen)
    assert len(into) == len(out_of) == len(set(chosen.tolist()) - set(order[:count].tolist()))
    new = order.clone()
    new[into], new[count + out_of] = order[count + out_of], order[into]
    assert set(new[:count].tolist()) == set(chosen.tolist())
    assert sorted(new.tolist()) == list(range(k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_of_length_one_are_left_to_the_bit(dtype):
    x = normal(37, 5).to(dtype)
    x[:, 3] = 0
    once = x * unit_columns(x.square().sum(0))
    assert torch.allclose(once.norm(dim=0)[[0, 1, 2, 4]], torch.ones(4, dtype=dtype))
    assert not once[:, 3].any()
    assert torch.equal(unit_columns(once.square().sum(0)), torch.ones(5, dtype=dtype))
    assert torch.equal(unit_columns(torch.tensor([torch.inf, torch.nan])), torch.ones(2))


@pytest.mark.parametrize(("shape", "rank"), [((8, 6), 3), ((6, 8), 2), ((5, 5), 5), ((7, 1), 1)])
def test_a_step_on_the_manifold_is_the_best_approximation_of_the_projected_step(shape, rank):
    m, n, g = normal(shape[0], rank), normal(shape[1], rank, seed=1), normal(*shape, seed=2)
    rate = 0.05
    m_new, n_new = riemannian_step(m, n, rate * g @ n, rate * g.mT @ m)
    u, v = torch.linalg.qr(m).Q, torch.linalg.qr(n).Q
    tangent = u @ u.mT @ g + g @ v @ v.mT - u @ u.mT @ g @ v @ v.mT
    a, s, b = torch.linalg.svd(m @ n.mT - rate * tangent, full_matrices=False)
    best = a[:, :rank] * s[:rank] @ b[:rank]
    assert torch.allclose(m_new @ n_new.mT, best, atol=1e-11)
    assert torch.allclose(m_new.mT @ m_new, n_new.mT @ n_new, atol=1e-10)  # balanced
