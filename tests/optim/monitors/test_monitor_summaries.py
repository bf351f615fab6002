"""Ranks, conditions and drifts: closed forms, the values of noise, and what does not matter."""

import math

import pytest
import torch
from planted import normal, orthonormal, with_values
from torch import nn

from thinrank.optim.monitors import (
    condition,
    condition_quantile,
    effective_rank,
    entropy_rank,
    jensen_shannon_drift,
    l1_drift,
    log_volume,
    nuclear_norm,
    product_singular_values,
    select_by_condition,
    singular_values,
    stable_rank,
)
from thinrank.optim.monitors.spectrum import kernel_matrices
from thinrank.optim.monitors.summaries import matrix_rank, normalised_entropy, participation_ratio

RANKS = [stable_rank, effective_rank, entropy_rank, participation_ratio]


@pytest.mark.parametrize("rank", RANKS)
def test_equal_singular_values_count_one_each(rank):
    assert float(rank(torch.tensor([3.0] * 7))) == pytest.approx(7)
    assert float(rank(torch.tensor([3.0] * 7 + [0.0] * 5))) == pytest.approx(7)
    assert float(rank(torch.zeros(4))) == 0


def test_two_singular_values():
    s = torch.tensor([2.0, 1.0])
    p, q = 2 / 3, 4 / 5
    assert float(stable_rank(s)) == pytest.approx(5 / 4)
    assert float(effective_rank(s)) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)))
    assert float(entropy_rank(s)) == pytest.approx(math.exp(-q * math.log(q) - (1 - q) * math.log(1 - q)))
    assert float(participation_ratio(s)) == pytest.approx(25 / 17)
    assert float(nuclear_norm(s)) == 3
    assert float(condition(s)) == 2
    assert float(log_volume(s)) == pytest.approx(math.log(2))
    assert float(normalised_entropy(s, (2, 2))) == pytest.approx(float(entropy_rank(s).log()) / math.log(2))


@pytest.mark.parametrize(
    ("rank", "share"), [(stable_rank, 0.25), (effective_rank, 0.804), (entropy_rank, 0.606), (participation_ratio, 0.5)]
)
def test_noise_has_its_share_of_the_sides(rank, share):
    assert float(rank(singular_values(normal(512, 512)))) / 512 == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("rank", RANKS)
def test_ranks_do_not_know_scale_and_rotation(rank):
    weight = normal(20, 30, dtype=torch.float64)
    turned = 1e-5 * orthonormal(20, 20) @ weight @ orthonormal(30, 30)
    expected = rank(singular_values(weight))
    torch.testing.assert_close(rank(singular_values(turned)), expected, rtol=1e-9, atol=0)
    batch = torch.stack([weight, 3 * turned, weight.flip(0)]).view(3, 1, 20, 30)
    torch.testing.assert_close(rank(singular_values(batch)), expected.expand(3, 1), rtol=1e-9, atol=0)


def test_sixteen_bit_weights_are_measured_in_float32():
    weight = normal(40, 30).bfloat16()
    s = singular_values(weight)
    assert s.dtype == torch.float64
    torch.testing.assert_close(s, torch.linalg.svdvals(weight.double()), rtol=1e-5, atol=1e-5)
    assert not singular_values(nn.Parameter(weight)).requires_grad


def test_large_and_small_weights_do_not_overflow():
    s = torch.tensor([3e30, 1e30])
    tiny = torch.tensor([3e-30, 1e-30])
    for rank in RANKS:
        assert float(rank(s)) == pytest.approx(float(rank(tiny)))


def test_the_condition_without_the_smallest_is_stable():
    s = torch.linspace(2, 1, 100, dtype=torch.float64)
    s[-1] = 1e-9
    assert float(condition(s)) == pytest.approx(2e9)
    assert float(condition_quantile(s)) == float(s[0] / s[94])
    assert float(condition_quantile(s, 1.0)) == float(condition(s))
    assert math.isinf(float(condition(torch.tensor([1.0, 0.0]))))
    with pytest.raises(ValueError, match=r"q must be in \(0, 1\], got 0"):
        condition_quantile(s, 0)


def test_the_rank_of_a_matrix_is_torchs():
    weight = with_values(torch.tensor([3.0, 2.0, 1.0]), 20, 12).float()
    assert int(matrix_rank(singular_values(weight), (20, 12))) == 3 == int(torch.linalg.matrix_rank(weight))


def test_products_by_their_factors():
    left, right = normal(30, 5), normal(5, 20, seed=1)
    s = product_singular_values(left, right)
    expected = torch.linalg.svdvals(left.double() @ right.double())
    torch.testing.assert_close(s, expected[:5], rtol=1e-5, atol=1e-5)
    assert float(expected[5]) < 1e-12
    batch = product_singular_values(torch.stack([left, 2 * left]), right)
    torch.testing.assert_close(batch, torch.stack([s, 2 * s]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="not finite"):
        product_singular_values(left * torch.inf, right)


def test_kernels_are_a_matrix_for_each_place():
    weight = normal(6, 5, 3, 2)
    found = kernel_matrices(weight)
    assert found.shape == (6, 6, 5)
    torch.testing.assert_close(found[3], weight[:, :, 1, 1] * math.sqrt(0.5))


# KappaTune -----------------------------------------------------------------------------------------------------------


def conditioned():
    model = nn.Module()
    for name, kappa in (("first", 50.0), ("second", 2.0), ("third", 10.0)):
        layer = nn.Linear(8, 8)
        layer.weight.data = with_values(torch.linspace(1, 1 / kappa, 8), 8, 8).float()
        setattr(model, name, layer)
    model.wide = nn.Linear(5000, 4)
    nn.init.orthogonal_(model.wide.weight)
    model.flat = nn.Linear(8, 8)
    nn.init.zeros_(model.flat.weight)
    model.broken = nn.Linear(8, 8)
    nn.init.constant_(model.broken.weight, torch.nan)
    model.tied = nn.Linear(8, 8)
    model.tied.weight = model.second.weight
    return model


def test_the_least_conditioned_are_selected():
    model = conditioned()
    found = select_by_condition(model, 2)
    assert [name for name, _ in found] == ["second.weight", "third.weight"]
    assert [kappa for _, kappa in found] == pytest.approx([2, 10], rel=1e-4)
    assert select_by_condition(model.state_dict(), 2) == found
    assert [name for name, _ in select_by_condition(model, 9)] == ["second.weight", "third.weight", "first.weight"]
    assert select_by_condition(model, 1, largest_side=5000)[0][0] == "wide.weight"
    assert [name for name, _ in select_by_condition(model, 5, include="^t")] == ["third.weight"]
    assert select_by_condition(nn.ReLU(), 3) == []
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        select_by_condition(model, 0)
    with pytest.raises(ValueError, match="regular expression"):
        select_by_condition(model, 1, include="(")


# Drift ---------------------------------------------------------------------------------------------------------------


def test_drift_in_closed_form():
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert float(l1_drift(one, torch.tensor([5.0]))) == 0  # order and zeros do not matter, nor does scale
    assert float(l1_drift(one, two)) == 0
    flat = torch.tensor([1.0, 1.0])
    assert float(l1_drift(one, flat)) == pytest.approx(1)
    mixed = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert float(jensen_shannon_drift(one, flat)) == pytest.approx(mixed - 0.5)


def test_drift_is_a_symmetric_measure_of_shape_alone():
    a, b = singular_values(normal(20, 30)), singular_values(normal(20, 25, seed=1) ** 3)
    for drift, most in ((l1_drift, 2), (jensen_shannon_drift, 1)):
        assert float(drift(a, 7 * a)) == pytest.approx(0, abs=1e-12)
        assert 0 < float(drift(a, b)) < most
        torch.testing.assert_close(drift(a, b), drift(b, a))
        batched = drift(torch.stack([a, b]), torch.stack([b, b]))
        torch.testing.assert_close(batched, torch.stack([drift(a, b), drift(b, b)]))
    assert math.isnan(float(l1_drift(a, torch.zeros(20))))
