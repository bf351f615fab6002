"""Laws of Adam's direction, momentum, heads, norms, bases, dither, products, Newton-Schulz, for any shape and size."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, eye_error, seeded
from reference.muon import moved

from thinrank.optim.linalg.adam import adam_direction
from thinrank.optim.linalg.basis import svd_bases
from thinrank.optim.linalg.fixed import dct_matrix, dct_rows_fft
from thinrank.optim.linalg.heads import head_norms, largest_heads, take_heads
from thinrank.optim.linalg.momentum import momentum_direction
from thinrank.optim.linalg.norms import all_finite, cosh_rms, frobenius, peak, row_norms
from thinrank.optim.linalg.orthogonal import SETS, newton_schulz
from thinrank.optim.linalg.products import product
from thinrank.optim.linalg.quantise import dither

SIDE = st.integers(1, 9)
SEED = st.integers(0, 999)
BETA = st.sampled_from([0.0, 0.5, 0.9, 0.999])

# --- Adam -------------------------------------------------------------------------------------------------------------


def adam(grads, betas, *, eps=1e-8, eps_raw=False, start=0):
    """The direction after the last of `grads` (steps, batch, long, short), with `start` updates before the first."""
    m, v = torch.zeros_like(grads[0]), torch.zeros_like(grads[0])
    direction = m
    for t, grad in enumerate(grads, start=1 + start):
        direction = adam_direction(grad, m, v, [t] * len(grad), betas=betas, eps=eps, eps_raw=eps_raw)
    return direction, m, v


@given(SIDE, SIDE, st.integers(1, 12), BETA, BETA, st.booleans(), SEED)
@LAW
def test_adam_is_its_sums_in_float64(long, short, steps, beta1, beta2, eps_raw, seed):
    """The moments as sums over all gradients, not by recursion."""
    grads = seeded(steps, 2, long, short, seed=seed)
    direction, m, v = adam(grads, (beta1, beta2), eps=1e-3, eps_raw=eps_raw)
    ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    weights = [(1 - beta) * (torch.full_like(ages, beta) ** ages) for beta in (beta1, beta2)]
    first = torch.tensordot(weights[0], grads.double(), 1)
    second = torch.tensordot(weights[1], grads.double() ** 2, 1)
    fix1, fix2 = (1 - beta**steps for beta in (beta1, beta2))
    expected = first / fix1 / ((second / fix2).sqrt() + 1e-3 / (fix2**0.5 if eps_raw else 1.0))
    for found, true in ((m, first), (v, second), (direction, expected)):
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-6)  # a dozen roundings; 1−β is off by 1e-5


@given(SIDE, SIDE, st.integers(1, 12), BETA, BETA, st.integers(-12, 12), SEED)
@LAW
def test_adam_does_not_see_the_size_and_turns_with_the_sign(long, short, steps, beta1, beta2, power, seed):
    """Exactly, for a power of two and no eps: nothing is rounded otherwise."""
    grads = seeded(steps, 2, long, short, seed=seed)
    direction, _, _ = adam(grads, (beta1, beta2), eps=0.0)
    scaled, _, _ = adam(-(2.0**power) * grads, (beta1, beta2), eps=0.0)
    assert torch.equal(scaled, -direction)


@given(SIDE, SIDE, st.integers(1, 30), SEED)
@LAW
def test_adam_is_no_longer_than_its_bound(long, short, steps, seed):
    """|direction|² ≤ Σ a²/b for the weights a, b of the two moments (Cauchy and Schwarz); 1 at the first step."""
    betas = (0.9, 0.999)
    grads = seeded(steps, 2, long, short, seed=seed) * torch.logspace(-3, 3, steps)[:, None, None, None]
    direction, _, _ = adam(grads, betas, eps=0.0)
    a, b = ([(1 - beta) * beta**age / (1 - beta**steps) for age in range(steps)] for beta in betas)
    bound = math.sqrt(sum(x * x / y for x, y in zip(a, b, strict=True)))
    assert float(direction.abs().max()) <= bound * (1 + 1e-4)
    if steps == 1:
        torch.testing.assert_close(direction.abs(), torch.ones_like(direction), rtol=1e-4, atol=0)


# --- momentum ---------------------------------------------------------------------------------------------------------


@given(SIDE, SIDE, st.integers(1, 12), BETA, st.booleans(), SEED)
@LAW
def test_momentum_is_its_sum_in_float64(long, short, steps, mu, nesterov, seed):
    grads = seeded(steps, long, short, seed=seed)
    buffer = torch.zeros(long, short)
    direction = buffer
    for grad in grads:
        before = grad.clone()
        direction = momentum_direction(grad, buffer, mu, nesterov=nesterov)
        assert torch.equal(grad, before)
    ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    mean = torch.tensordot((1 - mu) * torch.full_like(ages, mu) ** ages, grads.double(), 1)
    torch.testing.assert_close(buffer.double(), mean, rtol=1e-4, atol=1e-6)
    expected = mu * mean + (1 - mu) * grads[-1].double() if nesterov else mean
    torch.testing.assert_close(direction.double(), expected, rtol=1e-4, atol=1e-6)


# --- heads ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), SIDE, st.integers(-30, 30), st.data())
@LAW
def test_the_largest_heads_by_a_sort_of_their_norms(heads, rows, short, power, data):
    """Also where squares are no float32, and with equal heads, of which the lower number comes first."""
    kinds = data.draw(st.lists(st.integers(0, 3), min_size=heads, max_size=heads))  # equal kinds are equal heads
    k = data.draw(st.integers(1, heads))
    each = [seeded(rows, short, seed=kind) * 10.0**power for kind in kinds]
    x = torch.stack([torch.cat(each), torch.cat(each[::-1])])
    found = largest_heads(x, heads, k)
    taken = take_heads(x, heads, found)
    assert taken.shape == (2, k * rows, short)
    for b, own in enumerate((each, each[::-1])):
        norms = [float(one.double().norm()) for one in own]
        assert head_norms(x, heads)[b].tolist() == pytest.approx(norms, rel=1e-6)
        expected = sorted(range(heads), key=lambda i: (-norms[i], i))[:k]
        assert found[b].tolist() == expected
        assert torch.equal(taken[b], torch.cat([own[i] for i in expected]))


# --- norms ------------------------------------------------------------------------------------------------------------


@given(SIDE, SIDE, st.integers(-15, 15), st.sampled_from(["rows", "columns", "gaps"]), SEED)
@LAW
def test_rows_are_measured_one_by_one(long, short, power, lies, seed):
    """However the matrix lies; no squares overflow or vanish at 1e15 and 1e-15."""
    x = seeded(2, long, short, seed=seed) * 10.0**power
    y = {"rows": x, "columns": x.mT.contiguous().mT, "gaps": x.repeat_interleave(2, -1)[..., ::2]}[lies]
    expected = torch.tensor([[[math.hypot(*row)] for row in one.tolist()] for one in x], dtype=torch.float64)
    found = row_norms(y)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)  # half as many roundings as numbers
    turned = row_norms(y @ torch.linalg.qr(seeded(short, short, seed=seed + 1)).Q)
    torch.testing.assert_close(turned, found, rtol=1e-5, atol=0)


@given(SIDE, SIDE, st.integers(-15, 15), st.integers(0, 9), SEED)
@LAW
def test_frobenius_norms_are_lengths_of_all_entries_and_add_up_as_squares(long, short, power, cut, seed):
    x = seeded(2, long, short, seed=seed) * 10.0**power
    expected = torch.tensor([math.hypot(*one.flatten().tolist()) for one in x], dtype=torch.float64)
    torch.testing.assert_close(frobenius(x).double(), expected, rtol=1e-5, atol=0)
    parts = [frobenius(part).double() ** 2 for part in (x[:, :cut], x[:, cut:])]  # of which one may have no rows
    torch.testing.assert_close(sum(parts), expected**2, rtol=2e-5, atol=0)
    torch.testing.assert_close(frobenius(x.mT), frobenius(x), rtol=1e-6, atol=0)


ENTRY = st.floats(width=32) | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 3.0 * 2.0**126, 2.0**-149])


@given(st.lists(st.lists(ENTRY, min_size=6, max_size=6), min_size=1, max_size=3))
@LAW
def test_the_largest_magnitude_is_a_number_where_all_entries_are(entries):
    """Exactly, of numbers of any size."""
    x = torch.tensor(entries).view(-1, 2, 3)
    largest, finite = peak(x), all_finite(x)
    assert largest.shape == finite.shape == (len(entries), 1, 1)
    for one, found, fine in zip(entries, largest.flatten().tolist(), finite.flatten().tolist(), strict=True):
        assert fine == all(math.isfinite(entry) for entry in one)
        if any(math.isnan(entry) for entry in one):
            assert math.isnan(found)
        else:
            assert found == max(abs(entry) for entry in one)


@given(SIDE, SIDE, st.floats(0.0, 25.0), SEED)
@LAW
def test_cosh_is_between_that_of_zero_and_of_the_largest_entry(long, short, size, seed):
    """And by its definition in float64; even, and no less for a larger matrix of the same directions."""
    x = (seeded(2, long, short, seed=seed).sign() * seeded(2, long, short, seed=seed + 1).abs().clamp(max=1.0)) * size
    found = cosh_rms(x)
    largest = x.double().abs().amax((-2, -1))
    assert bool((found >= 1.0).all())
    assert bool((found.double() <= largest.cosh() * (1 + 1e-5)).all())
    torch.testing.assert_close(found.double(), x.double().cosh().square().mean((-2, -1)).sqrt(), rtol=1e-5, atol=0)
    assert torch.equal(cosh_rms(-x), found)
    assert bool((cosh_rms(1.5 * x) >= found).all())


# --- bases ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), max_size=2), st.integers(1, 40), st.booleans(), st.booleans(), SEED)
@LAW
def test_cosines_by_an_fft_are_those_of_the_matrix(batch, n, transposed, double, seed):
    """Of rows however many and however they lie; the lengths of rows stay, and a sum has the sum of the cosines."""
    x = seeded(*batch, n, seed=seed, dtype=torch.float64 if double else torch.float32)
    if transposed and batch:
        x = x.mT.contiguous().mT
    found = dct_rows_fft(x)
    assert found.dtype is x.dtype
    assert found.shape == x.shape
    assert not transposed or not x.numel() or found.stride() == x.stride()
    close: dict[str, Any] = {"rtol": 0, "atol": (1e-13 if double else 1e-5) * n**0.5}
    torch.testing.assert_close(found.double(), x.double() @ dct_matrix(n).T, **close)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), **close)
    other = seeded(*x.shape, seed=seed + 1, dtype=x.dtype)
    torch.testing.assert_close(dct_rows_fft(x - 2.0 * other), found - 2.0 * dct_rows_fft(other), **close)


@given(SIDE, SIDE, st.integers(1, 9), st.booleans(), st.integers(-12, 12), SEED)
@LAW
def test_two_bases_from_one_factorisation_make_a_matrix_diagonal(long, short, rank, transposed, power, seed):
    """With falling singular values on the diagonal, so that what both leave out is the least that is possible."""
    rank = min(rank, long, short)
    x = seeded(2, long, short, seed=seed, dtype=torch.float64) * 10.0**power
    left, right = svd_bases(x, rank, transposed=transposed)
    assert left.shape == (2, long, rank)
    assert right.shape == (2, short, rank)
    values = torch.linalg.svdvals(x)
    for i in range(2):
        assert max(eye_error(left[i]), eye_error(right[i])) < 1e-12
    core = left.mT @ x @ right / values[:, :1, None]
    torch.testing.assert_close(core, (values[:, :rank] / values[:, :1]).diag_embed(), rtol=0, atol=1e-12)


# --- dither -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.integers(1, 300), st.integers(1, 9))
@LAW
def test_a_matrix_has_its_dither_alone_and_in_a_batch(counts, width, block):
    found = dither(counts, width, torch.device("cpu"), block)
    assert found.shape[-1] == min(width, block)
    assert found.ndim == (1 if len(set(counts)) == 1 else 4)
    assert bool((found >= 0).all())
    assert bool((found < 1).all())
    for i, count in enumerate(counts):
        assert torch.equal(
            dither([count], width, torch.device("cpu"), block), found if found.ndim == 1 else found[i, 0, 0]
        )


@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 256))
@LAW
def test_the_dither_of_a_place_leaves_no_gap_in_any_run_of_steps(first, steps, place):
    """n steps along the golden ratio leave gaps of at most 1.9/n on the circle (three gaps: Sós 1958). Places up to 193
    are rounded to 2⁻¹⁷."""
    values = sorted(float(dither([first + i], 256, torch.device("cpu"))[place - 1]) for i in range(steps))
    gaps = [after - before for before, after in zip(values, [*values[1:], values[0] + 1.0], strict=True)]
    assert max(gaps) <= 1.9 / steps + 2 * 2.0**-17


# --- products and orthogonal factors ----------------------------------------------------------------------------------


@given(SIDE, SIDE, SIDE, st.integers(1, 3), st.booleans(), st.booleans(), SEED)
@LAW
def test_a_product_however_its_factors_lie(n, k, m, batch, first, second, seed):
    a, b = seeded(batch, n, k, seed=seed), seeded(batch, k, m, seed=seed + 1)
    true = a.double() @ b.double()
    a, b = (x.mT.contiguous().mT if turned else x for x, turned in ((a, first), (b, second)))
    torch.testing.assert_close(product(a, b).double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(a[0], b).double(), a[0].double() @ b.double(), rtol=1e-5, atol=1e-5)


@given(SIDE, SIDE, st.sampled_from(sorted(SETS)), st.sampled_from(["plain", "gram", "auto"]), SEED)
@LAW
def test_newton_schulz_moves_singular_values_and_nothing_else(long, short, name, form, seed):
    """Of wide and tall matrices: by its polynomials, the same for the transpose and in turned coordinates, blind to the
    size."""
    few = SETS[name]
    x = seeded(long, short, seed=seed, dtype=torch.float64)
    own = newton_schulz(x, few, dtype=torch.float64, form=form)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    size = float(x.abs().max())
    expected = u @ moved(s, few.triples, few.safety, few.eps * size).diag() @ vh
    exact: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(own, expected, **exact)
    for other, back in (
        (x.mT, own.mT),
        (2.0**20 * x, own),
        (-x, -own),
        (x.flip(0), own.flip(0)),
        (x.flip(-1), own.flip(-1)),
    ):
        torch.testing.assert_close(newton_schulz(other, few, dtype=torch.float64, form=form), back, **exact)


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(sorted(SETS)), SEED)
@LAW
def test_newton_schulz_in_float32_is_that_in_float64(long, short, name, seed):
    """Five iterations with coefficients near four: some hundred roundings of numbers near one."""
    x = seeded(2, long, short, seed=seed)
    exact = newton_schulz(x.double(), SETS[name], dtype=torch.float64)
    for form in ("plain", "gram"):
        found = newton_schulz(x, SETS[name], dtype=torch.float32, form=form)
        assert found.dtype is torch.float32
        assert float((found.double() - exact).abs().max()) < 1e-3
