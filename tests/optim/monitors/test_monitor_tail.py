"""Power laws are found where they are, noise has the α of noise, and both are what the definition says."""

import math

import pytest
import torch
from planted import normal, orthonormal, pareto, pareto_quantiles

from thinrank.optim.monitors import (
    alpha_weighted,
    eigenvalues,
    erg_count,
    hill,
    hill_alpha,
    log_alpha_norm,
    marchenko_pastur_quantile,
    power_law,
)
from thinrank.optim.monitors import singular_values as values
from thinrank.optim.monitors.tail import scan, tail_from


def plain_fit(x):
    """α and D of the tail from every value on but the last, written down as the definition reads."""
    x = sorted(x.tolist())
    found = []
    for i in range(len(x) - 1):
        tail = x[i:]
        n = len(tail)
        total = sum(math.log(each / tail[0]) for each in tail)
        alpha = 1 + n / total if total > 0 else math.nan
        ks = max(abs(1 - (each / tail[0]) ** (1 - alpha) - j / n) for j, each in enumerate(tail))
        found.append((alpha, ks))
    return found


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.0])
def test_a_power_law_is_recovered(alpha):
    """The standard error of n draws is (α − 1) / √n."""
    x = pareto(alpha, 1000)
    for mode in ("median", "fit", "peak"):
        tail = hill(x, mode)
        assert float(tail.alpha) == pytest.approx(alpha, abs=3 * float(tail.sigma))
        assert bool(tail.reliable)
    fit = power_law(x)
    assert fit.alpha == pytest.approx(alpha, abs=3 * fit.sigma)
    assert fit.reliable
    assert fit.sigma == pytest.approx((fit.alpha - 1) / math.sqrt(fit.num_pl_spikes), rel=1e-12)


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.0])
def test_a_power_law_without_chance_is_recovered_closely(alpha):
    assert float(hill_alpha(pareto_quantiles(alpha, 4000))) == pytest.approx(alpha, rel=0.01)


@pytest.mark.parametrize(("ratio", "alpha"), [(1, 2.13), (2, 2.71), (4, 3.43), (8, 4.50)])
def test_noise_has_the_alpha_of_its_shape_and_is_called_unreliable(ratio, alpha):
    tail = hill(eigenvalues(values(normal(256, 256 * ratio))))
    assert float(tail.alpha) == pytest.approx(alpha, abs=0.1)
    assert not bool(tail.reliable)


def test_a_scan_is_the_definition():
    x = pareto(2.5, 60, seed=3)
    alpha, ks = scan(x)
    expected = plain_fit(x)
    torch.testing.assert_close(alpha, torch.tensor([a for a, _ in expected], dtype=torch.float64))
    torch.testing.assert_close(ks, torch.tensor([d for _, d in expected], dtype=torch.float64))
    best = min(range(len(expected)), key=lambda i: expected[i][1])
    tail = hill(x, "fit")
    assert (float(tail.alpha), int(tail.size)) == (pytest.approx(expected[best][0]), 60 - best)
    assert float(tail.xmin) == float(x[best])
    whole = tail_from(x, 30)
    assert float(whole.alpha) == pytest.approx(expected[30][0])
    assert float(whole.ks) == pytest.approx(expected[30][1])


def test_a_scan_in_blocks_is_a_scan(monkeypatch):
    x = torch.stack([pareto(2.5, 50, seed=i) for i in range(3)])
    whole = scan(x)
    monkeypatch.setattr("thinrank.optim.monitors.tail._SCANNED", 450)
    for mine, theirs in zip(scan(x), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["median", "fit", "peak"])
def test_a_batch_is_its_matrices_one_by_one(mode):
    x = torch.stack([pareto(2 + i, 80, seed=i) for i in range(4)]).view(2, 2, 80)
    batched = hill(x, mode)
    for i in range(2):
        for j in range(2):
            for mine, alone in zip(batched, hill(x[i, j], mode), strict=True):
                torch.testing.assert_close(mine[i, j], alone)


@pytest.mark.parametrize("mode", ["median", "fit", "peak"])
def test_scale_order_and_rotation_do_not_matter(mode):
    weight = normal(60, 80, dtype=torch.float64)
    x = eigenvalues(values(weight))
    tail = hill(x, mode)
    shuffled = x[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    turned = orthonormal(60, 60) @ weight @ orthonormal(80, 80)
    for other in (shuffled, 1e4 * x, eigenvalues(values(turned))):
        again = hill(other, mode)
        torch.testing.assert_close(again.alpha, tail.alpha, rtol=1e-9, atol=0)
        assert int(again.size) == int(tail.size)


def test_the_peak_bounds_from_below_as_well():
    """A bulk with its peak at 1, below which another power law begins: a scan may start there, `peak` may not."""
    x = torch.cat([pareto_quantiles(2.0, 40, xmin=0.001), torch.linspace(1.0, 1.02, 200), pareto_quantiles(3.0, 300)])
    tail = hill(x.double(), "peak")
    assert 0.9 <= float(tail.xmin) <= 1.5


def test_an_alpha_needs_a_tail():
    assert math.isnan(float(hill_alpha(torch.ones(10))))
    assert math.isnan(float(hill_alpha(torch.tensor([0.0, 0.0, 0.0, 1.0]))))
    with pytest.raises(ValueError, match="at least 2 eigenvalues"):
        hill(torch.ones(1))
    with pytest.raises(ValueError, match="xmin must be one of median, fit, peak"):
        hill(torch.ones(4), "mean")
    for spectrum in (torch.ones(10), torch.full((10,), 1e-6)):
        with pytest.raises(ValueError, match="no two different eigenvalues above 1e-05"):
            power_law(spectrum)
    with pytest.raises(ValueError, match="one spectrum"):
        power_law(torch.rand(2, 8))


def test_fingers_are_removed_where_they_hide_a_tail():
    """The quantiles of noise with two values above the edge: without these α is lower by more than one."""
    noise = torch.tensor([marchenko_pastur_quantile((i + 0.5) / 100, 2.0) for i in range(100)], dtype=torch.float64)
    x = torch.cat([noise, noise[-1] * torch.tensor([1.2, 1.3], dtype=torch.float64)])
    raw, fit = power_law(x), power_law(x, max_fingers=10)
    assert (raw.num_fingers, fit.num_fingers) == (0, 2)
    assert fit.alpha + 1 < raw.alpha == fit.raw_alpha
    assert fit.xmax == float(noise[-1])
    alone = power_law(noise)
    assert (fit.alpha, fit.D, fit.num_pl_spikes) == (alone.alpha, alone.D, alone.num_pl_spikes)
    assert power_law(x, max_fingers=10, finger_thresh=2.0).num_fingers == 0
    assert power_law(pareto_quantiles(2.1, 200), max_fingers=10).num_fingers == 0


def test_the_words_are_weightwatchers():
    x = pareto_quantiles(1.6, 400)
    assert power_law(x).warning == "over-trained"
    assert power_law(pareto_quantiles(3.0, 400)).warning == ""
    assert power_law(pareto_quantiles(8.0, 400)).warning == "under-trained"


def test_alpha_with_size():
    assert alpha_weighted(3.0, 100.0) == pytest.approx(6.0)
    x = pareto(3.0, 50)
    assert log_alpha_norm(x, 3.0) == pytest.approx(math.log10(float(x.pow(3).sum())))
    assert log_alpha_norm(torch.tensor([1e200, 1e200], dtype=torch.float64), 4.0) == pytest.approx(800 + math.log10(2))


# The condition of SETOL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "share"), [(1, 0.73), (2, 0.81), (4, 0.87)])
def test_noise_has_its_share_above_the_trace_log_condition(ratio, share):
    count = erg_count(eigenvalues(values(normal(256, 256 * ratio))))
    assert float(count) / 256 == pytest.approx(share, abs=0.02)


def test_the_count_is_where_the_product_falls_below_one():
    x = pareto(2.0, 40, seed=5)
    scaled = (x * len(x) / x.sum()).flip(0)
    product, expected = 1.0, 0
    for each in scaled.tolist():
        product *= each
        expected += 1
        if product < 1:
            break
    assert int(erg_count(x)) == expected
    both = erg_count(torch.stack([x, 7 * x]))
    assert both.tolist() == [expected, expected]


def test_a_running_product_would_overflow_and_a_sum_of_logarithms_does_not():
    x = torch.cat([torch.full((3000,), 1e-3), torch.full((1000,), 10.0)])
    scaled = x.double() * len(x) / x.double().sum()
    assert torch.isinf(scaled.flip(0).cumprod(0)[:1000]).any()
    assert 1000 < int(erg_count(x)) < 2000


def test_equal_values_and_zeros_have_no_tail():
    assert int(erg_count(torch.full((300,), 0.3))) == 0
    assert int(erg_count(torch.zeros(5))) == 0
    assert int(erg_count(torch.tensor([1.0, 0.0, 0.0]))) == 2
