"""Laws of Newton-Schulz, in both its forms, of the exact polar factor and of the scales for shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, decaying, eye_error, seeded
from reference.muon import orthogonalised

from thinrank.optim.linalg.momentum import momentum_direction
from thinrank.optim.linalg.norms import cosh_rms, peak, reciprocal_peak
from thinrank.optim.linalg.orthogonal import (
    JORDAN,
    POLAR_EXPRESS,
    SETS,
    SHAPE_SCALES,
    YOU,
    exact_polar,
    newton_schulz,
    shape_scale,
)

SHAPES = [(40, 9), (9, 40), (20, 12), (13, 13), (3, 12, 5), (2, 2, 6, 11), (1, 7), (7, 1), (1, 1)]


def with_values(values, long, seed=0):
    """A matrix (long, k) with these k singular values, float64, and its two bases."""
    left = torch.linalg.qr(seeded(long, len(values), seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(seeded(len(values), len(values), seed=seed + 1, dtype=torch.float64)).Q
    return (left * values) @ right.mT, left, right


# --- where singular values go -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize(
    ("coefficients", "least", "low", "high"),
    [
        (JORDAN, 1e-3, 0.47, 1.205),
        (JORDAN, 3e-3, 0.68, 1.205),
        (JORDAN, 1e-2, 0.68, 1.135),
        (YOU, 1e-3, 0.48, 1.155),
        (YOU, 3e-3, 0.9775, 1.145),
        (YOU, 1e-2, 0.9775, 1.0325),
        (POLAR_EXPRESS, 1e-3, 0.85, 1.145),
        (POLAR_EXPRESS, 3e-3, 0.86, 1.145),
    ],
    ids=lambda x: "" if not isinstance(x, float) else str(x),
)
def test_singular_values_end_near_one(coefficients, least, low, high, form):
    """Those above `least` of the norm end in [low, high], to the digits that are known, on the axes where they were."""
    values = torch.logspace(0, -4, 120, dtype=torch.float64)
    values[1:] *= 0.5 / values[1:].norm()  # so that the largest is near the norm, where polynomials bend down
    x, left, right = with_values(values, 150)
    out = left.mT @ newton_schulz(x, coefficients, dtype=torch.float64, form=form) @ right
    found = out.diagonal()[values / values.norm() >= least]
    assert 20 < len(found) < 120
    assert low <= float(found.min()) <= float(found.max()) <= high
    assert float((out - out.diagonal().diag()).abs().max()) < 1e-7  # nothing has turned


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_equals_the_map_of_singular_values(name, shape):
    x = seeded(*shape, dtype=torch.float64)
    own = newton_schulz(x, SETS[name], dtype=torch.float64)
    assert own.shape == x.shape
    flat = x.reshape(-1, *shape[-2:])
    few = SETS[name]
    eps = [few.eps * float(each.abs().max()) for each in flat]  # in units of the largest entry
    expected = [orthogonalised(each, few.triples, few.safety, e) for each, e in zip(flat, eps, strict=True)]
    torch.testing.assert_close(own.reshape(flat.shape), torch.stack(expected), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("steps", range(6))
def test_the_first_iterations_alone(steps):
    few = JORDAN.first(steps)
    assert len(few.triples) == steps
    for form in ("plain", "gram"):
        own = newton_schulz(seeded(12, 7), few, form=form, dtype=torch.float64)
        torch.testing.assert_close(own, orthogonalised(seeded(12, 7), few.triples), rtol=1e-5, atol=1e-6)  # eps


def test_polar_express_keeps_its_distance_from_the_edge():
    """Its polynomials are made for values up to 1/1.02: the norm is multiplied by as much."""
    x = torch.ones(1, 1)
    s = torch.tensor(1 / (1.02 + 1e-6), dtype=torch.float64)
    for a, b, c in POLAR_EXPRESS.triples:
        s = a * s + b * s**3 + c * s**5
    assert newton_schulz(x, POLAR_EXPRESS).item() == pytest.approx(float(s), rel=1e-5)


# --- two forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_both_forms_agree(name, shape):
    """Also for gradients of fast decay, whose squares are far below rounding."""
    for x in (seeded(*shape), decaying(*shape[-2:], ratio=0.5)):
        for dtype, close in ((torch.float64, 1e-7), (torch.float32, 2e-3)):
            plain, gram = (newton_schulz(x, SETS[name], form=form, dtype=dtype) for form in ("plain", "gram"))
            assert plain.dtype is dtype
            torch.testing.assert_close(gram, plain, rtol=close, atol=close)


def test_the_faster_form_is_chosen_by_the_ratio_of_the_sides():
    for shape, form in (((9, 9), "plain"), ((9, 17), "plain"), ((18, 9), "gram"), ((9, 36), "gram")):
        x = seeded(*shape)
        other = "gram" if form == "plain" else "plain"
        assert torch.equal(newton_schulz(x), newton_schulz(x, form=form))
        assert not torch.equal(newton_schulz(x), newton_schulz(x, form=other))
    with pytest.raises(ValueError, match=r"form must be one of auto, plain, gram, got 'gramm'"):
        newton_schulz(seeded(3, 3), form="gramm")


def test_bfloat16_is_taken_by_the_plain_form_alone():
    """The Gram form squares singular values before it moves them, and computes in float32 at least."""
    x = decaying(64, 8, ratio=0.3)
    half = newton_schulz(x, POLAR_EXPRESS, dtype=torch.bfloat16)
    assert half.dtype is torch.float32
    assert torch.equal(half, newton_schulz(x, POLAR_EXPRESS, dtype=torch.bfloat16, form="plain"))
    assert not torch.equal(half, newton_schulz(x, POLAR_EXPRESS))
    gram = newton_schulz(x, POLAR_EXPRESS, dtype=torch.bfloat16, form="gram")
    assert torch.equal(gram, newton_schulz(x, POLAR_EXPRESS, dtype=torch.float32, form="gram"))
    assert float(torch.linalg.matrix_norm(half, 2)) < 1.25


# --- any size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-37])
def test_the_size_does_not_matter(size, dtype, form):
    x = seeded(2, 12, 7)
    twin = x.double() * size
    own = newton_schulz(twin.float(), dtype=dtype, form=form)
    torch.testing.assert_close(own, newton_schulz((twin / size).float(), dtype=dtype, form=form), rtol=0.03, atol=0.03)
    assert float(own.norm()) > 2.0


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("name", SETS)
def test_zero_stays_zero_and_harms_nobody(name, form):
    x = torch.stack([torch.zeros(12, 7), seeded(12, 7)])
    own = newton_schulz(x, SETS[name], form=form)
    assert not bool(own[0].any())
    torch.testing.assert_close(own[1], newton_schulz(x[1], SETS[name], form=form))
    assert bool(newton_schulz(torch.full((3, 2), 1e-44)).isfinite().all())


def test_a_transposed_view_is_the_same_matrix():
    x = seeded(2, 12, 7)
    own = newton_schulz(x.mT.contiguous().mT)
    torch.testing.assert_close(own, newton_schulz(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(newton_schulz(x.mT).mT, own, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, seeded(2, 12, 7))  # and nothing was written to it


# --- the exact factor -------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@LAW
def test_the_exact_factor_is_orthonormal_and_nearest(rows, columns, seed):
    x = seeded(2, rows, columns, seed=seed, dtype=torch.float64)
    q = exact_polar(x)
    assert eye_error(q if rows >= columns else q.mT) < 1e-12
    # x = q h with h symmetric and positive, which says that q is the nearest one
    h = q.mT @ x
    torch.testing.assert_close(q @ h, x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(h, h.mT, rtol=1e-9, atol=1e-10)
    assert float(torch.linalg.eigvalsh(h).min()) > -1e-10


def test_the_exact_factor_of_what_is_missing_is_zero():
    x = decaying(8, 3, dtype=torch.float64) @ decaying(3, 5, dtype=torch.float64)
    values = torch.linalg.svdvals(exact_polar(x))
    torch.testing.assert_close(values, torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert not bool(exact_polar(torch.zeros(4, 3)).any())


def test_iterations_approach_the_exact_factor():
    x, _, _ = with_values(torch.linspace(1.0, 0.3, 9, dtype=torch.float64), 30)
    errors = [
        float((newton_schulz(x, each, dtype=torch.float64) - exact_polar(x)).abs().max()) for each in (YOU, JORDAN)
    ]
    assert errors[0] < 0.035
    assert errors[0] < errors[1] < 0.35


# --- scales, momentum, cosh -------------------------------------------------------------------------------------------


def test_scales_for_shapes():
    assert [shape_scale(name, 32, 8) for name in SHAPE_SCALES] == pytest.approx([2.0, 2.0, 0.2 * 32**0.5, 1.0])
    assert [shape_scale(name, 8, 32) for name in SHAPE_SCALES] == pytest.approx([1.0, 0.5, 0.2 * 32**0.5, 1.0])
    with pytest.raises(ValueError, match=r"one of original, spectral, match_rms_adamw, none, got 'kimi'"):
        shape_scale("kimi", 8, 8)


def test_match_rms_gives_entries_of_a_fifth():
    for shape in ((64, 16), (16, 64)):
        update = shape_scale("match_rms_adamw", *shape) * exact_polar(seeded(*shape))
        assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-5)


def test_momentum_is_heavy_ball_times_one_minus_mu():
    """torch.optim.SGD keeps the sum, this the mean; directions are equal but for the factor."""
    for nesterov in (False, True):
        weight = torch.nn.Parameter(torch.zeros(4, 3))
        sgd = torch.optim.SGD([weight], lr=1.0, momentum=0.9, nesterov=nesterov)
        buffer, total = torch.zeros(4, 3), torch.zeros(4, 3)
        for t in range(5):
            weight.grad = seeded(4, 3, seed=t)
            sgd.step()
            total -= momentum_direction(seeded(4, 3, seed=t), buffer, 0.9, nesterov=nesterov) / (1 - 0.9)
        torch.testing.assert_close(weight.detach(), total, rtol=1e-5, atol=1e-5)


def test_cosh_by_its_definition_and_beyond_overflow():
    x = seeded(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(cosh_rms(x), x.cosh().square().mean((-2, -1)).sqrt())
    assert float(cosh_rms(torch.zeros(2, 2))) == 1.0
    tiny = torch.full((4, 4), 1e-3)  # cosh² − 1 = 1e-6 is eight roundings of a float32
    assert float(cosh_rms(tiny)) - 1.0 == pytest.approx(5e-7, rel=0.2)
    for value in (100.0, -1e30, float("inf")):
        assert bool(cosh_rms(torch.full((2, 2), value)).isfinite().all())


def test_peak():
    x = torch.tensor([[[1.0, -3.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert peak(x).flatten().tolist() == [3.0, 0.0]
    assert reciprocal_peak(x).flatten().tolist() == pytest.approx([1 / 3, 1 / torch.finfo(torch.float32).tiny])
    assert float(peak(torch.zeros(1, 0, 4))) == float(peak(torch.zeros(1, 4, 0))) == 0.0
