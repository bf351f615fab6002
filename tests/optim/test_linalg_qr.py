"""Laws of the orthonormal factors of tall matrices, and of what they are made of."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, eye_error, seeded

from thinrank.optim.axis import Axis
from thinrank.optim.linalg.norms import all_finite, peak, reciprocal_peak, unit_columns
from thinrank.optim.linalg.orthogonal import SHAPE_SCALES, cholesky_qr, householder_qr, shape_scale

FACTORS = pytest.mark.parametrize("factor", [cholesky_qr, householder_qr])
SIZES = [(8, 3), (9, 1), (40, 8), (64, 64), (300, 100)]


def conditioned(long: int, r: int, condition: float, seed: int = 0):
    """float64, singular values from one down to 1/condition."""
    left = torch.linalg.qr(seeded(long, r, seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(seeded(r, r, seed=seed + 1, dtype=torch.float64)).Q
    return (left * condition ** -torch.linspace(0, 1, r, dtype=torch.float64)) @ right


@FACTORS
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_columns_are_orthonormal_in_float32(factor, size, condition):
    """A plain Cholesky factor of the Gram matrix does not exist from a condition of 3e3 on."""
    x = conditioned(size[0], size[1], condition).float()
    q = factor(x)
    assert q.dtype is torch.float32
    assert eye_error(q) < 1e-5
    torch.testing.assert_close(q @ (q.mT @ x), x, rtol=1e-4, atol=1e-5)  # the same span


@given(st.integers(1, 12), st.integers(0, 12), st.floats(0.0, 5.0), st.integers(0, 99))
@LAW
def test_it_is_the_qr_with_a_positive_diagonal(r, more, power, seed):
    """Of which there is one, so that both ways agree, in float64 to nine digits less those of the condition."""
    x = torch.stack([conditioned(r + more, r, 10.0**power, seed), seeded(r + more, r, seed=seed, dtype=torch.float64)])
    q = cholesky_qr(x)
    triangle = q.mT @ x
    torch.testing.assert_close(triangle.tril(-1), torch.zeros_like(triangle), rtol=0, atol=1e-9)
    assert bool((triangle.diagonal(dim1=-2, dim2=-1) > 0).all())
    torch.testing.assert_close(householder_qr(x), q, rtol=0, atol=1e-8)


@FACTORS
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_columns_does_not_matter(factor, size):
    x = seeded(2, 40, 8)
    torch.testing.assert_close(factor(x * size), factor(x), rtol=1e-5, atol=1e-6)
    if factor is cholesky_qr:  # nor that of single ones
        mixed = torch.tensor([1e30, 1.0, 1e-30, 1.0, 1e20, 1.0, 1e-10, 1.0])
        torch.testing.assert_close(factor(x * mixed), factor(x), rtol=1e-5, atol=1e-6)


@FACTORS
@pytest.mark.parametrize(("long", "r", "true"), [(8, 3, 2), (40, 8, 3), (300, 100, 20), (300, 100, 0)])
def test_columns_without_a_direction_are_zero(factor, long, r, true):
    """Not random, not NaN: rank `true`, up to the rounding of two products, in a batch with a sound neighbour."""
    x = seeded(long, true) @ seeded(true, r, seed=1)
    sound = seeded(long, r, seed=2)
    q, neighbour = factor(torch.stack([x, sound]))
    lengths = q.norm(dim=0)
    alive = lengths > 0.5
    torch.testing.assert_close(lengths, alive.float(), rtol=0, atol=1e-5)
    assert int(alive.sum()) == true
    assert not bool(q[:, ~alive].any())
    if true:
        assert eye_error(q[:, alive]) < 1e-5
        torch.testing.assert_close(q @ (q.mT @ x), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(neighbour, factor(sound.unsqueeze(0))[0])


@given(st.integers(1, 6), st.booleans(), st.integers(0, 99))
@LAW
def test_a_complete_qr_is_a_qr_and_the_only_one(rank, dependent, seed):
    """Orthonormal whatever the columns are; for independent ones R has a positive diagonal, and signs are R's."""
    x = seeded(2, 6, rank, seed=seed, dtype=torch.float64)
    if dependent:
        x[0, :, rank // 2] = x[0, :, 0] * (rank // 2 > 0)
    q = householder_qr(x, complete=True)
    assert all(eye_error(each) < 1e-13 for each in q)
    r = q.mT @ x
    torch.testing.assert_close(q @ r, x)
    torch.testing.assert_close(r.triu(), r, rtol=0, atol=1e-12)
    assert bool((torch.diagonal(r[dependent:], dim1=-2, dim2=-1) > 0).all())
    turned = x * torch.tensor([(-1.0) ** i for i in range(rank)], dtype=torch.float64)
    twin = householder_qr(turned, complete=True)
    torch.testing.assert_close((q * twin).sum(-2)[dependent:].abs(), torch.ones(2 - dependent, rank).double())
    if not dependent:
        assert torch.equal(q, householder_qr(x))


@pytest.mark.parametrize("dependent", [False, True], ids=["zero", "dependent"])
def test_a_column_without_a_direction_among_others(dependent):
    """Those behind it are what they are without it. (Reflections put some direction in its place.)"""
    x = seeded(30, 6)
    x[:, 2] = x[:, 0] - 3 * x[:, 1] if dependent else 0.0
    others = [0, 1, 3, 4, 5]
    q = cholesky_qr(x)
    assert not bool(q[:, 2].any())
    torch.testing.assert_close(q[:, others], cholesky_qr(x[:, others]), rtol=1e-5, atol=1e-5)


def test_what_is_no_number_stays_with_its_matrix():
    x = seeded(3, 20, 4)
    x[1, 3, 2] = torch.nan
    x[2, 0, 0] = torch.inf
    q = cholesky_qr(x)
    torch.testing.assert_close(q[0], cholesky_qr(x[0]))
    assert not bool(q[1].isfinite().all())


def split_rows(split):
    start = sum(split[: dist.get_rank()])
    x = seeded(2, 11, 4, dtype=torch.float64)
    x[1, :, 3] = x[1, :, 0] - x[1, :, 2]
    return cholesky_qr(x[:, start : start + split[dist.get_rank()]], Axis(rows=dist.group.WORLD))


@pytest.mark.parametrize("split", [(7, 4), (9, 2), (11, 0)], ids=str)
def test_rows_on_ranks_equal_the_whole(ranks, split):
    x = seeded(2, 11, 4, dtype=torch.float64)
    x[1, :, 3] = x[1, :, 0] - x[1, :, 2]
    together = torch.cat(ranks(2).run(split_rows, split), -2)
    torch.testing.assert_close(together, cholesky_qr(x), rtol=1e-9, atol=1e-12)


# --- what stands beside it -------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 6), st.integers(-30, 30), st.integers(0, 99))
@LAW
def test_unit_columns(n, r, power, seed):
    x = seeded(2, n, r, seed=seed)
    x[0, :, 0] = 0.0
    unit = unit_columns(x * 10.0**power)
    assert not bool(unit[0, :, 0].any())
    lengths = unit.norm(dim=-2)
    lengths[0, 0] = 1.0
    torch.testing.assert_close(lengths, torch.ones(2, r))
    torch.testing.assert_close(unit * x.norm(dim=-2, keepdim=True), x)


def test_the_peak_is_the_largest_magnitude():
    x = seeded(3, 4, 5)
    torch.testing.assert_close(peak(x), x.abs().amax((1, 2), keepdim=True))
    x[0] = -x[0].abs()
    x[1], x[2, 1, 1] = 0.0, torch.nan
    assert float(peak(x)[0]) == float(x[0].abs().max())
    assert float(peak(x)[1]) == 0.0
    assert bool(peak(x)[2].isnan())
    assert bool(reciprocal_peak(x)[1].isfinite())
    assert torch.equal(peak(x[:, :0]), torch.zeros(3, 1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_matrix_with_something_that_is_no_number_is_found(value):
    x = seeded(3, 4, 5)
    x[0, 1, 2] = 3e38  # large, and a number
    x[1, 2, 3] = value
    assert all_finite(x).tolist() == [[[True]], [[False]], [[True]]]


def test_scales_for_the_shape():
    assert [shape_scale(name, 64, 16) for name in SHAPE_SCALES] == pytest.approx([2.0, 2.0, 1.6, 1.0])
    assert [shape_scale(name, 16, 64) for name in SHAPE_SCALES] == pytest.approx([1.0, 0.5, 1.6, 1.0])
    with pytest.raises(ValueError, match="original"):
        shape_scale("kimi", 2, 2)
