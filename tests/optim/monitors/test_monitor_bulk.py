"""Noise is told from what stands out of it."""

import math

import pytest
import torch
from planted import normal, orthonormal

from thinrank.optim.monitors import (
    bulk,
    correlation_trap,
    eigenvalues,
    farms_alpha,
    fitted_bulk,
    hill_alpha,
    kurtosis,
    marchenko_pastur_quantile,
    pooled_eigenvalues,
    singular_values,
)
from thinrank.optim.monitors.farms import square_blocks, window_shape, window_starts


def spiked(out, wide, strengths, seed=0):
    """Noise of variance 1 / longer side, with directions of the given singular values planted in it."""
    noise = normal(out, wide, seed=seed, dtype=torch.float64) / max(out, wide) ** 0.5
    s = torch.tensor(strengths, dtype=torch.float64)
    left, right = orthonormal(out, len(s), seed + 1), orthonormal(wide, len(s), seed + 2)
    return noise + left @ torch.diag(s) @ right.mT


@pytest.mark.parametrize("Q", [1.0, 1.5, 4.0])
def test_the_quantiles_are_those_of_the_law(Q):
    """Against a plain integral of the density."""
    a, b = (1 - Q**-0.5) ** 2, (1 + Q**-0.5) ** 2
    x = a + (b - a) * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = Q * ((b - x) * (x - a)).sqrt() / (2 * math.pi * x)
    mass = density.cumsum(0) * (b - a) / 200_000
    assert float(mass[-1]) == pytest.approx(1, abs=5e-3)
    for p in (0.1, 0.5, 0.9):
        assert marchenko_pastur_quantile(p, Q) == pytest.approx(float(x[(mass < p).sum()]), rel=0.02, abs=2e-3)


def test_the_median_of_the_square_law():
    """Of singular values it is the quarter circle, whose median solves s √(4 − s²) / 2 + 2 arcsin(s / 2) = π / 2."""
    s = marchenko_pastur_quantile(0.5, 1.0) ** 0.5
    assert s * math.sqrt(4 - s * s) / 2 + 2 * math.asin(s / 2) == pytest.approx(math.pi / 2, abs=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        marchenko_pastur_quantile(0.5, 0.5)


@pytest.mark.parametrize("shape", [(200, 200), (200, 500), (500, 120)])
@pytest.mark.parametrize("find", [bulk, fitted_bulk])
def test_noise_is_all_bulk(find, shape):
    found = find(eigenvalues(singular_values(normal(*shape) * 3)), shape)
    assert float(found.sigma) == pytest.approx(1, abs=0.03)
    assert float(found.softrank) == pytest.approx(1, abs=0.06)
    assert int(found.spikes) == 0
    edge = 9 * (max(shape) ** 0.5 + min(shape) ** 0.5) ** 2
    assert float(found.high) == pytest.approx(edge, rel=0.06)


@pytest.mark.parametrize("shape", [(200, 200), (120, 400)])
@pytest.mark.parametrize("find", [bulk, fitted_bulk])
def test_planted_spikes_are_counted_and_the_noise_below_is_measured(find, shape):
    weight = spiked(shape[0], shape[1], [4.0, 3.5, 3.0])
    found = find(eigenvalues(singular_values(weight)), shape)
    assert int(found.spikes) == 3
    edge = (1 + (min(shape) / max(shape)) ** 0.5) ** 2
    assert float(found.high) == pytest.approx(edge, rel=0.06)
    assert float(found.softrank) == pytest.approx(edge / float(singular_values(weight)[0]) ** 2, rel=0.06)


def test_only_the_median_finds_noise_below_a_giant():
    shape = (200, 300)
    x = eigenvalues(singular_values(spiked(200, 300, [100.0])))
    assert float(bulk(x, shape).high) == pytest.approx((1 + (2 / 3) ** 0.5) ** 2, rel=0.06)
    assert int(bulk(x, shape).spikes) == 1


def test_noise_seldom_has_an_outlier():
    """About 1.3 % of small matrices do; 4 % of 500 would be five standard errors more."""
    x = eigenvalues(singular_values(normal(500, 32, 32)))
    assert int((bulk(x, (32, 32)).spikes > 0).sum()) <= 20


def test_a_batch_is_its_matrices_one_by_one_and_pools_are_taken():
    weights = torch.stack([spiked(40, 60, [3.0] * i, seed=i) for i in range(1, 4)])
    x = eigenvalues(singular_values(weights))
    batched = bulk(x, (40, 60))
    assert batched.spikes.tolist() == [1, 2, 3]
    for i in range(3):
        for mine, alone in zip(batched, bulk(x[i], (40, 60)), strict=True):
            torch.testing.assert_close(mine[i], alone)
    assert int(bulk(x.flatten(), (40, 60)).spikes) == 6
    for find in (bulk, fitted_bulk):
        with pytest.raises(ValueError, match="has 40 eigenvalues, got 39"):
            find(x[0, 1:], (40, 60))


def test_outlier_entries_are_a_trap_and_directions_are_none():
    trapped = normal(100, 100)
    trapped[3, 7] = 90.0
    assert int(correlation_trap(trapped).spikes) == 1
    assert float(kurtosis(trapped)) > 1000
    assert int(correlation_trap(spiked(100, 100, [5.0, 4.0]).float()).spikes) == 0
    assert float(kurtosis(normal(300, 300))) == pytest.approx(3, abs=0.1)
    assert float(kurtosis(normal(300, 300).uniform_(generator=torch.Generator().manual_seed(0)))) == pytest.approx(
        1.8, abs=0.02
    )


def test_shuffling_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    weight = normal(40, 40)
    first, second = correlation_trap(weight), correlation_trap(weight)
    pooled_eigenvalues(weight, rows=8, draw="random")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first.high, second.high, rtol=0, atol=0)
    other = correlation_trap(weight, seed=1)
    assert float(other.high) != float(first.high)


# FARMS ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["windows", "random"])
@pytest.mark.parametrize("shape", [(256, 256), (256, 1024), (512, 100), (100, 512)])
def test_windows_of_noise_have_one_alpha_whatever_the_shape(shape, draw):
    assert float(farms_alpha(normal(*shape), rows=96, draw=draw)) == pytest.approx(2.10, abs=0.05)


def test_windows_of_another_ratio_have_another_alpha():
    wide = hill_alpha(eigenvalues(singular_values(normal(96, 192))))
    assert float(farms_alpha(normal(300, 500), rows=96, ratio=2.0)) == pytest.approx(float(wide), abs=0.15)


def test_where_windows_lie():
    assert window_starts(512, 96, 5) == [0, 104, 208, 312, 416]
    assert window_starts(100, 96, 5) == [0, 1, 2, 3, 4]
    assert window_starts(96, 96, 5) == [0]
    assert window_shape((512, 100), 128, 1.0) == (100, 100)
    assert window_shape((512, 100), 128, 2.0) == (50, 100)
    assert window_shape((64, 512), 128, 2.0) == (64, 128)


def test_the_pool_is_that_of_the_windows(monkeypatch):
    weight = normal(20, 30, dtype=torch.float64)
    expected = [
        singular_values(weight[top : top + 8, left : left + 8]).square()
        for top in window_starts(20, 8, 3)
        for left in window_starts(30, 8, 3)
    ]
    found = pooled_eigenvalues(weight, rows=8, per_side=3)
    torch.testing.assert_close(found, torch.cat(expected).sort().values)
    monkeypatch.setattr("thinrank.optim.monitors.farms._PART", 130)  # two windows at a time
    torch.testing.assert_close(pooled_eigenvalues(weight, rows=8, per_side=3), found)
    assert len(pooled_eigenvalues(torch.stack([weight, weight]), rows=8, per_side=3)) == 2 * len(found)


def test_random_windows_do_not_care_for_the_order_of_neurons():
    """Two kinds of neurons in two blocks: contiguous windows see pure blocks, random ones the mixture."""
    weight = normal(256, 256)
    weight[:128] *= 10
    mixed = weight[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    by_chance, by_place = (
        abs(float(farms_alpha(weight, rows=64, per_side=k, draw=draw)) - float(farms_alpha(mixed, rows=64, draw=draw)))
        for draw, k in (("random", 8), ("windows", 5))
    )
    assert by_chance < by_place / 2


def test_blocks_of_convolutions_are_square():
    kernels = normal(9, 50, 20)
    blocks = square_blocks(kernels)
    assert blocks.shape == (18, 20, 20)
    assert torch.equal(blocks[0], kernels[0, :20])
    assert torch.equal(blocks[1], kernels[0, 20:40])
    assert square_blocks(kernels.mT).shape == (18, 20, 20)


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match="per_side must be at least 2, got 1"):
        farms_alpha(normal(10, 10), per_side=1)
    with pytest.raises(ValueError, match="rows and ratio must be above 0"):
        farms_alpha(normal(10, 10), ratio=0.0)
    with pytest.raises(ValueError, match="draw must be windows or random, got 'blocks'"):
        farms_alpha(normal(10, 10), draw="blocks")
    with pytest.raises(ValueError, match="not finite"):
        farms_alpha(torch.full((10, 10), torch.nan))
