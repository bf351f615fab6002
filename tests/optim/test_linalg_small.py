"""Laws of the 8-bit and 4-bit codes, of the growth limiter and of Adam's direction."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, seeded

from thinrank.optim.linalg import norms
from thinrank.optim.linalg.adam import adam_direction
from thinrank.optim.linalg.norms import frobenius, growth_limit, row_norms
from thinrank.optim.linalg.quantise import block_shape, dequantise4, dequantise8, packed_shape, quantise4, quantise8

# --- 8-bit codes ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 40), st.integers(-8, 8), st.integers(0, 99))
@LAW
def test_error_is_at_most_half_a_level(rows, columns, block, power, seed):
    x = seeded(2, rows, columns, seed=seed) * 10.0**power
    codes, scale = quantise8(x, block)
    assert codes.shape == x.shape
    assert codes.dtype is torch.int8
    assert scale.shape == block_shape(tuple(x.shape), block)
    error = (dequantise8(codes, scale, block) - x).abs()
    bound = scale.repeat_interleave(block, -1)[..., :columns] / 2
    assert bool((error <= bound * (1 + 1e-4)).all())


@given(st.integers(1, 40), st.integers(1, 16))
@LAW
def test_zeros_stay_zero(columns, block):
    x = seeded(3, columns)
    x[:, ::2] = 0.0
    x[1] = 0.0
    codes, scale = quantise8(x, block)
    assert bool((codes[x == 0] == 0).all())
    assert bool((dequantise8(codes, scale, block)[x == 0] == 0).all())


def test_all_levels_are_used():
    """The published 8-bit code divides the range by 15 and keeps 16 of 256 levels: 8 % error on normal numbers."""
    x = seeded(64, 256)
    codes, scale = quantise8(torch.linspace(-1, 1, 255).unsqueeze(0))
    assert codes.unique().numel() == 255
    codes, scale = quantise8(x)
    assert codes.unique().numel() > 250
    assert float((dequantise8(codes, scale) - x).norm() / x.norm()) < 0.01


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-30, 1e30])
def test_a_constant_row_is_not_zero_over_zero(value):
    """Range quantisers divide by max − min; a row of one value gave NaN."""
    codes, scale = quantise8(torch.full((2, 300), value))
    torch.testing.assert_close(dequantise8(codes, scale), torch.full((2, 300), value))


def test_rows_are_independent():
    """So a matrix sharded by rows quantises as the whole one does."""
    x = seeded(7, 37)
    codes, scale = quantise8(x, 16)
    for part in (x[:3], x[3:], x[2:3]):
        start = 0 if part is x[:3] else next(i for i in range(7) if torch.equal(x[i], part[0]))
        own_codes, own_scale = quantise8(part, 16)
        assert torch.equal(own_codes, codes[start : start + len(part)])
        assert torch.equal(own_scale, scale[start : start + len(part)])
    changed = x.clone()
    changed[0] *= 100
    assert torch.equal(quantise8(changed, 16)[0][1:], codes[1:])


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part", [1, 4 * 2 * 30 * 7, 2**20])
def test_rows_are_as_long_whichever_way_a_matrix_lies(monkeypatch, dtype, part):
    monkeypatch.setattr(norms, "PART_BYTES", part)
    x = seeded(2, 30, 20, dtype=dtype)
    x[0, 3] = 0.0
    true = x.double().square().sum(-1, keepdim=True).sqrt()
    for lies in (x, x.mT.contiguous().mT, x[..., ::2].repeat_interleave(2, -1)[..., ::2], x[:, :, :1]):
        found = row_norms(lies)
        assert found.dtype is torch.promote_types(dtype, torch.float32)
        assert found.shape == (*lies.shape[:-1], 1)
        torch.testing.assert_close(
            found.double(), lies.double().square().sum(-1, keepdim=True).sqrt(), rtol=1e-6, atol=0
        )
    torch.testing.assert_close(row_norms(x.mT.contiguous().mT).double(), true, rtol=1e-6, atol=0)
    assert row_norms(x[:, :0].mT.contiguous().mT).shape == (2, 0, 1)


# --- 4-bit codes ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 40), st.integers(-8, 8), st.integers(0, 99))
@LAW
def test_four_bits_are_off_by_half_a_level(rows, columns, block, power, seed):
    """Of any width, odd ones too, and blocks that end between two halves of a byte."""
    x = seeded(2, rows, columns, seed=seed) * 10.0**power
    codes, scale = quantise4(x, block)
    assert codes.dtype is torch.uint8
    assert codes.shape == packed_shape(tuple(x.shape)) == (2, rows, (columns + 1) // 2)
    assert scale.shape == block_shape(tuple(x.shape), block)
    error = (dequantise4(codes, scale, columns, block) - x).abs()
    bound = scale.repeat_interleave(block, -1)[..., :columns] / 2
    assert bool((error <= bound * (1 + 1e-4)).all())


@given(st.lists(st.integers(-7, 7), min_size=1, max_size=40))
@LAW
def test_four_bit_levels_come_back_in_their_order(levels):
    """Published code packs neighbours and unpacks all high halves before all low ones: another matrix."""
    x = torch.tensor([[7.0, *levels]])  # a block's largest entry sets its scale: here one
    codes, scale = quantise4(x)
    assert torch.equal(scale, torch.ones(1, 1))
    assert torch.equal(dequantise4(codes, scale, x.shape[-1]), x)


def test_all_four_bit_levels_are_used_and_zero_bytes_are_zeros():
    codes, scale = quantise4(torch.linspace(-1, 1, 15).unsqueeze(0))
    assert dequantise4(codes, scale, 15).unique().numel() == 15
    x = seeded(3, 11)
    x[:, ::2] = 0.0
    x[1] = 0.0
    codes, scale = quantise4(x)
    assert bool((dequantise4(codes, scale, 11)[x == 0] == 0).all())
    assert not bool(codes[1].any())
    zeros = dequantise4(torch.zeros(2, 6, dtype=torch.uint8), torch.zeros(2, 1), 11)
    assert torch.equal(zeros, torch.zeros(2, 11))


# --- the limiter ----------------------------------------------------------------------------------------------------


def test_frobenius_norms_of_a_batch():
    x = seeded(3, 4, 5)
    torch.testing.assert_close(frobenius(x), x.flatten(1).norm(dim=1))


@given(st.floats(1.0, 3.0), st.sampled_from([0.0, 1e-6, 0.5, 10.0]), st.sampled_from([0.0, 1e-20, 0.7, 50.0]))
@LAW
def test_growth_is_limited_and_falls_are_followed(limit, before, now):
    factor, norm = growth_limit(torch.tensor([now]), torch.tensor([before]), limit)
    assert 0.0 <= float(factor) <= 1.0
    assert float(norm) == pytest.approx(float(factor) * now, rel=1e-5)
    if before == 0.0 or now <= limit * before:  # nothing before, or no growth: nothing is limited
        assert float(factor) == pytest.approx(1.0, rel=1e-6)
    else:
        assert float(norm) == pytest.approx(limit * before, rel=1e-5)


# --- Adam -----------------------------------------------------------------------------------------------------------


def plain_adam(grads, count, *, betas, eps, eps_raw):
    """Kingma & Ba, algorithm 1, in float64, over all of `grads`; `count` is added to every step's number."""
    m = torch.zeros_like(grads[0], dtype=torch.float64)
    v, out = m.clone(), m
    for t, grad in enumerate(grads, start=1 + count):
        g = grad.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        fix1, fix2 = 1 - betas[0] ** t, (1 - betas[1] ** t) ** 0.5
        out = m / fix1 / (v.sqrt() / fix2 + (eps / fix2 if eps_raw else eps))
    return out


@pytest.mark.parametrize("eps_raw", [False, True])
@pytest.mark.parametrize("equal", [True, False], ids=["one count (fused)", "a count each"])
def test_direction_equals_the_equations(equal, eps_raw):
    options = {"betas": (0.8, 0.95), "eps": 1e-3, "eps_raw": eps_raw}
    grads = [seeded(2, 5, 3, seed=i) for i in range(6)]
    ages = [0, 0] if equal else [0, 7]
    m, v, out = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)
    for t, grad in enumerate(grads, start=1):
        out = adam_direction(grad, m, v, [t + age for age in ages], **options)
    for i, age in enumerate(ages):
        expected = plain_adam([g[i] for g in grads], age, **options)
        torch.testing.assert_close(out[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_fused_and_plain_paths_agree():
    grads = [seeded(3, 4, seed=i) for i in range(5)]
    states = [(torch.zeros(3, 4), torch.zeros(3, 4)) for _ in range(2)]
    for t, grad in enumerate(grads, start=1):
        fused = adam_direction(grad, *states[0], [t, t, t], betas=(0.9, 0.999), eps=1e-8)
        plain = adam_direction(grad, *states[1], torch.full((3, 4), float(t)), betas=(0.9, 0.999), eps=1e-8)
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states[0], states[1])


def test_every_column_is_corrected_by_its_own_age():
    """A column that enters late steps as one in the first step; with the matrix's count, 3.2 times as far."""
    m, v = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    grad = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    for t in range(1, 2001):
        adam_direction(grad, m, v, torch.tensor([[[float(t), 1.0]]]), betas=(0.9, 0.999), eps=1e-8)
    grad = torch.ones(1, 2, 2)
    late = adam_direction(grad, m.clone(), v.clone(), torch.tensor([[[2001.0, 1.0]]]), betas=(0.9, 0.999), eps=1e-8)
    torch.testing.assert_close(late, torch.ones(1, 2, 2), rtol=1e-3, atol=1e-3)
    global_count = adam_direction(grad, m, v, [2001], betas=(0.9, 0.999), eps=1e-8)
    assert float(global_count[0, 0, 1]) > 2.9


def test_the_gradient_is_left_alone():
    grad = seeded(1, 3, 3)
    before = grad.clone()
    adam_direction(grad, torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), [1], betas=(0.9, 0.999), eps=1e-8)
    assert torch.equal(grad, before)


def test_sliced_moments_are_not_misread():
    """A rank's rows of a batch are a slice; torch's fused kernel, which compares no strides, walked over other rows."""
    whole = [torch.zeros(2, 6, 3) for _ in range(2)]
    own = [torch.zeros(2, 4, 3) for _ in range(2)]
    for t in range(1, 4):
        grad = seeded(2, 4, 3, seed=t)
        options: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8}
        sliced = adam_direction(grad, whole[0][:, :4], whole[1][:, :4], [t, t], **options)
        expected = adam_direction(grad, own[0], own[1], [t, t], **options)
        torch.testing.assert_close(sliced, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[0][:, :4], own[0])
    assert bool((whole[0][:, 4:] == 0).all())
