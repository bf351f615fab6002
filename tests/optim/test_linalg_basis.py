"""Laws of the bases of a dominant subspace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, decaying, eye_error, seeded

from thinrank.optim.linalg.basis import (
    captured_energy,
    fix_signs,
    random_columns,
    subspace_iteration,
    svd_bases,
    svd_basis,
)

sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))


def energy(x, basis):
    return float(captured_energy(x, x @ basis))


@given(sizes, st.data(), st.booleans(), st.sampled_from(["fixed", "lapack"]))
@LAW
def test_svd_basis_is_orthonormal_ordered_and_best(size, data, transposed, signs):
    long, short = size
    rank = data.draw(st.integers(1, min(size)))
    x = decaying(long, short, dtype=torch.float64, seed=data.draw(st.integers(0, 99)))
    basis = svd_basis(x, rank, transposed=transposed, signs=signs)
    assert basis.shape == (short, rank)
    assert eye_error(basis) < 1e-12
    images = (x @ basis).norm(dim=0)  # the singular values, falling
    torch.testing.assert_close(images, 0.7 ** torch.arange(rank, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@given(sizes, st.integers(0, 99))
@LAW
def test_signs_are_a_convention(size, seed):
    """The entry of largest magnitude is positive, whichever sign the factorisation left."""
    basis = seeded(*size, seed=seed)
    fixed = fix_signs(basis)
    peaks = fixed.gather(-2, fixed.abs().argmax(-2, keepdim=True))
    assert bool((peaks > 0).all())
    assert torch.equal(fixed.abs(), basis.abs())
    assert torch.equal(fix_signs(-basis), fixed)
    assert torch.equal(fix_signs(fixed), fixed)


def test_fixed_signs_agree_between_both_ways_to_factorise():
    x = decaying(17, 9, dtype=torch.float64)
    torch.testing.assert_close(svd_basis(x, 5), svd_basis(x, 5, transposed=True))


def test_batches_are_independent():
    x = torch.stack([decaying(12, 7, seed=i) for i in range(3)])
    for i in range(3):
        torch.testing.assert_close(svd_basis(x, 4)[i], svd_basis(x[i], 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_both_sides_diagonalise(transposed):
    x = decaying(11, 6, dtype=torch.float64)
    left, right = svd_bases(x, 4, transposed=transposed)
    assert eye_error(left) < 1e-12
    assert eye_error(right) < 1e-12
    small = left.mT @ x @ right
    torch.testing.assert_close(small, torch.diag(0.7 ** torch.arange(4, dtype=torch.float64)), rtol=1e-9, atol=1e-12)


@given(st.integers(2, 24), st.integers(2, 24), st.data())
@LAW
def test_subspace_iteration_nears_the_best_subspace(long, short, data):
    """Cold, with oversampling and two products: at most 2 % of the energy of the exact SVD is lost."""
    rank = data.draw(st.integers(1, min(long, short)))
    x = decaying(long, short, ratio=0.6, seed=data.draw(st.integers(0, 99)))
    width = min(short, rank + 8)
    start = random_columns(short, width, torch.Generator().manual_seed(1), torch.device("cpu"))
    basis, low = subspace_iteration(x, start, rank, iterations=2)
    assert basis.shape == (short, rank)
    assert eye_error(basis) < 1e-5
    best = energy(x, svd_basis(x, rank))
    assert 0.98 * best <= energy(x, basis) <= best + 1e-6
    torch.testing.assert_close(low, x @ basis, rtol=0.0, atol=1e-5 * float(x.norm()))
    images = low.norm(dim=0)
    assert bool((images[1:] <= images[:-1] * (1 + 1e-4) + 1e-6).all())
    assert torch.equal(fix_signs(basis), basis)


def test_a_warm_start_needs_one_product():
    """A basis of a matrix nearby, one product: closer to the best than a cold start of the same cost."""
    x = seeded(64, 40, seed=1)
    near = x + 0.1 * seeded(64, 40, seed=2)
    best = energy(x, svd_basis(x, 8))
    cold = torch.linalg.qr(seeded(40, 8, seed=3)).Q
    warm = energy(x, subspace_iteration(x, svd_basis(near, 8), 8, iterations=1)[0])
    assert warm > 0.99 * best
    assert warm > energy(x, subspace_iteration(x, cold, 8, iterations=1)[0]) + 0.02


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1.0, 1e6, 1e30])
def test_subspace_iteration_knows_no_unit(scale):
    """The products with xᵀx used to overflow (1e30) or vanish (1e-25) in float32, and the basis with them."""
    x = decaying(20, 12)
    start = seeded(12, 12)
    expected, expected_low = subspace_iteration(x, start, 3, iterations=2)
    basis, low = subspace_iteration(x * scale, start, 3, iterations=2)
    torch.testing.assert_close(basis, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(low / scale, expected_low, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 2])
def test_products_in_bfloat16_keep_the_energy(iterations):
    """The basis tilts by about bfloat16's rounding and the energy by its square; the basis itself is float32's."""
    x, start = decaying(96, 64, ratio=0.95, seed=1), seeded(64, 24, seed=2)
    exact, _ = subspace_iteration(x, start, 16, iterations=iterations)
    basis, low = subspace_iteration(x, start, 16, iterations=iterations, dtype=torch.bfloat16)
    assert basis.dtype == low.dtype == torch.float32
    assert not torch.equal(basis, exact)
    assert eye_error(basis) < 1e-5
    assert energy(x, basis) > energy(x, exact) - 1e-3
    torch.testing.assert_close(low, x @ basis, rtol=0.0, atol=2**-7 * float((x @ basis).abs().max()))


def test_subspace_iteration_of_nothing_is_still_a_basis():
    x = torch.zeros(2, 9, 6)
    assert eye_error(subspace_iteration(x, seeded(2, 6, 6), 3, iterations=2)[0]) < 1e-5


@given(st.integers(1, 16), st.integers(1, 16), st.data())
@LAW
def test_captured_energy_is_a_share_that_grows_with_rank(long, short, data):
    x = seeded(long, short, seed=data.draw(st.integers(0, 99)))
    shares = [energy(x, svd_basis(x, rank)) for rank in range(1, min(long, short) + 1)]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0, abs=1e-5)


def test_captured_energy_of_nothing_is_zero():
    assert captured_energy(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1)).tolist() == [0.0, 0.0]


def test_random_columns_depend_on_their_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = random_columns(4, 3, torch.Generator().manual_seed(7), torch.device("cpu"))
    torch.manual_seed(6)
    assert torch.equal(first, random_columns(4, 3, torch.Generator().manual_seed(7), torch.device("cpu")))
    torch.manual_seed(5)
    random_columns(4, 3, torch.Generator().manual_seed(8), torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
