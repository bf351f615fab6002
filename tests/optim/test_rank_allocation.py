"""A rank for each matrix: the laws of the allocation, and the way from a model to groups."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import LAW, decaying, eye_error, seeded
from reference.welore import kept, welore
from torch import Tensor, nn

from thinrank.optim import (
    AdamW,
    AdamWConfig,
    DCTAdamWConfig,
    GaLore,
    GaLoreConfig,
    LDAdamConfig,
    MFACConfig,
    allocated_ranks,
    build,
    route,
)
from thinrank.optim.allocation import spectrum
from thinrank.optim.inner.moments import first_moment
from thinrank.optim.linalg.allocate import (
    allocate_ranks,
    bounded_counts,
    global_threshold,
    keep_counts,
    relative,
    stretched,
    with_hysteresis,
)


@st.composite
def spectra(draw):
    """One to five spectra of one to twelve values, some of them equal."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    value = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 2.0]) | st.floats(0.0, 9.0, width=32)
    return [torch.tensor(draw(st.lists(value, min_size=n, max_size=n))) for n in lengths]


def below(values: list[Tensor], threshold: float) -> float:
    return sum(int((v < threshold).sum()) for v in values) / sum(len(v) for v in values)


# --- one threshold ----------------------------------------------------------------------------------------------------


@given(spectra())
@LAW
def test_normalised_spectra_lie_between_zero_and_one_and_keep_their_order(values):
    for normalised in (stretched, relative):
        for v in values:
            new = normalised(v)
            assert float(new.min()) >= 0.0
            assert float(new.max()) <= 1.0
            order = v.argsort()
            assert bool((new[order].diff() >= 0).all())
    assert torch.equal(stretched(torch.tensor([3.0, 1.0, 2.0])), torch.tensor([1.0, 0.0, 0.5]))
    assert torch.equal(stretched(torch.full((3,), 2.0)), torch.ones(3))
    assert torch.equal(relative(torch.zeros(3)), torch.zeros(3))


@given(spectra(), st.floats(0.0, 1.0))
@LAW
def test_a_threshold_hits_its_reduction_as_nearly_as_equal_values_allow(values, reduction):
    threshold = global_threshold(values, reduction)
    total = sum(len(v) for v in values)
    assert below(values, threshold) <= reduction + 1e-9
    through = sum(int((v <= threshold).sum()) for v in values) / total
    assert math.isinf(threshold) or through > reduction - 1e-9  # the next threshold would be too far
    if len(torch.cat(values).unique()) == total:
        assert abs(below(values, threshold) - reduction) < 1 / total
    assert sum(keep_counts(values, threshold)) == round(total * (1 - below(values, threshold)))


@given(spectra(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
@LAW
def test_more_reduction_keeps_less_everywhere(values, one, other):
    little, much = sorted((one, other))
    kept = [keep_counts(values, global_threshold(values, share)) for share in (little, much)]
    assert all(a >= b for a, b in zip(*kept, strict=True))


def test_a_grid_finds_no_better_threshold_than_the_exact_one():
    """WeLore's own search, thresholds from 0 to 1 by 0.005."""
    values = [stretched(torch.linalg.svdvals(seeded(40, 24, seed=i) * 0.7**i)) for i in range(4)]
    for reduction in (0.1, 0.3, 0.5, 0.7):
        exact = below(values, global_threshold(values, reduction))
        grid = [below(values, k * 0.005) for k in range(201)]
        assert max(share for share in grid if share <= reduction) <= exact <= reduction


@given(spectra(), st.integers(0, 100))
@LAW
def test_what_is_kept_is_what_halving_an_interval_finds(values, percent):
    values = [v.double() for v in values]
    scaled = [stretched(v) for v in values]
    distinct = torch.cat(scaled).unique()
    assume(len(distinct) == 1 or float(distinct.diff().min()) > 1e-15)  # an interval is not halved for ever
    found = keep_counts(scaled, global_threshold(scaled, percent / 100))
    assert found == kept([v.tolist() for v in values], percent / 100)


# --- a budget ---------------------------------------------------------------------------------------------------------


@given(spectra(), st.integers(1, 900), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.none() | st.integers(1, 9))
@LAW
def test_a_budget_is_kept_and_used(values, budget, minimum, multiple, maximum):
    values = [relative(v) for v in values]
    sizes = [(len(v) + 3 * i, len(v)) for i, v in enumerate(values)]
    options: dict[str, Any] = {"minimum": minimum, "maximum": maximum, "multiple": multiple}

    def cost(ranks):
        return sum(r * (m + n) for r, (m, n) in zip(ranks, sizes, strict=True))

    least = bounded_counts(values, math.inf, **options)
    if cost(least) > budget:
        with pytest.raises(ValueError, match=rf"budget must be at least {cost(least)} "):
            allocate_ranks(values, sizes, budget, **options)
        return
    ranks = allocate_ranks(values, sizes, budget, **options)
    assert cost(ranks) <= budget
    for rank, v in zip(ranks, values, strict=True):
        most = len(v) if maximum is None else min(maximum, len(v))
        assert min(minimum, most) <= rank <= most
        assert rank % multiple == 0 or rank in (minimum, most)
    # whatever threshold is within the budget, too, gives no more
    for threshold in [*torch.cat(values).unique().tolist(), math.inf]:
        other = bounded_counts(values, threshold, **options)
        assert cost(other) > budget or all(a >= b for a, b in zip(ranks, other, strict=True))


@given(spectra(), st.integers(0, 100), st.integers(1, 4), st.none() | st.integers(3, 11))
@settings(LAW, max_examples=40)
def test_ranks_are_those_that_halving_an_interval_finds(values, percent, step, most):
    """With a budget from that of the least ranks to that of the largest."""
    values = [v.double() for v in values]
    sides = [(len(v) + 3 * i, len(v)) for i, v in enumerate(values)]
    scaled = [relative(v) for v in values]
    distinct = torch.cat(scaled).unique()
    assume(len(distinct) == 1 or float(distinct.diff().min()) > 1e-15)
    least, largest = (
        sum(r * (m + n) for r, (m, n) in zip(bounded_counts(scaled, t, minimum=step, maximum=most), sides, strict=True))
        for t in (math.inf, 0.0)
    )
    budget = least + percent * (largest - least) // 100
    ranks = allocate_ranks(scaled, sides, budget, minimum=step, maximum=most, multiple=step)
    assert ranks == welore([v.tolist() for v in values], sides, budget, step=step, most=most)


@given(spectra(), st.integers(1, 900), st.integers(1, 900))
@LAW
def test_a_larger_budget_takes_nothing_away(values, one, other):
    sizes = [(len(v) + 2, len(v)) for v in values]
    least = sum(m + n for m, n in sizes)
    assume(min(one, other) >= least)
    small, large = (allocate_ranks(values, sizes, budget) for budget in sorted((one, other)))
    assert all(a <= b for a, b in zip(small, large, strict=True))


def test_equal_spectra_are_given_equal_ranks_and_steeper_ones_fewer():
    flat, steep = relative(torch.linspace(1, 0.5, 20)), relative(0.5 ** torch.arange(20.0))
    a, b, c = allocate_ranks([flat, steep, flat], [(30, 20)] * 3, 3 * 8 * 50)
    assert a == c > b


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), max_size=6), st.floats(0.0, 1.0))
@LAW
def test_hysteresis_moves_only_what_moved_far(pairs, share):
    old, new = [a for a, _ in pairs], [b for _, b in pairs]
    for before, after, chosen in zip(old, new, with_hysteresis(old, new, share), strict=True):
        assert chosen == (after if abs(after - before) > share * before else before)
    assert with_hysteresis([100, 100, 100], [125, 126, 70]) == [100, 126, 70]


# --- from a model -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Three matrices of one size with slow, medium and fast decay, an embedding, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.slow, self.medium, self.fast = (nn.Linear(16, 24, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            for i, (layer, ratio) in enumerate(((self.slow, 0.97), (self.medium, 0.8), (self.fast, 0.4))):
                layer.weight.copy_(decaying(24, 16, ratio=ratio, seed=i))


NAMES = ["slow.weight", "medium.weight", "fast.weight"]


def test_a_reduction_gives_up_that_share_of_all_directions():
    ranks = allocated_ranks(Model(), GaLoreConfig(), reduction=0.5)
    assert list(ranks) == NAMES
    kept = [rank or 0 for rank in ranks.values()]
    assert sum(kept) == 24
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[2]


@pytest.mark.parametrize("sketch", [None, 12])
def test_without_a_number_the_budget_is_that_of_the_uniform_rank(sketch):
    ranks = allocated_ranks(Model(), GaLoreConfig(rank=4), sketch=sketch)
    kept = [rank or 0 for rank in ranks.values()]
    assert 11 <= sum(kept) <= 12
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 4 > kept[2]


def test_spectra_of_gradients():
    model = Model()
    with pytest.raises(ValueError, match=r"slow\.weight has no gradient: run one backward"):
        allocated_ranks(model, GaLoreConfig(rank=4), "gradient")
    for name, ratio in zip(NAMES, (0.4, 0.8, 0.97), strict=True):
        model.get_parameter(name).grad = decaying(24, 16, ratio=ratio)
    ranks = allocated_ranks(model, GaLoreConfig(rank=4), "gradient")
    assert ranks["slow.weight"] < 4 < ranks["fast.weight"]  # type: ignore[operator]  (no dense_above, so no None)
    model.get_parameter(NAMES[1]).grad[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(ValueError, match=r"the gradient of medium\.weight is not finite"):
        allocated_ranks(model, GaLoreConfig(rank=4), "gradient")


def test_a_sketch_reads_the_first_values():
    x = decaying(60, 40, ratio=0.9)
    exact = spectrum(x, None, torch.Generator())
    torch.testing.assert_close(exact, 0.9 ** torch.arange(40.0), rtol=1e-4, atol=1e-5)
    found = spectrum(x, 10, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, exact[:10], rtol=0.02, atol=0)
    assert spectrum(x, 99, torch.Generator()).shape == (40,)


@pytest.mark.parametrize(
    "config", [GaLoreConfig(rank=4), DCTAdamWConfig(rank=4), LDAdamConfig(rank=4)], ids=lambda c: c.name
)
def test_groups_by_rank_and_the_table_that_shows_them(config):
    model = Model()
    ranks = {"slow.weight": 9, "medium.weight": None, "fast.weight": 2}
    routing = route(model, config, ranks=ranks)
    rules = {row.name: row.rule for row in routing.rows}
    name = config.name
    assert [rules[n] for n in NAMES] == [f"{name}@9", "adamw", f"{name}@2"]
    for text in (f"{name}@9", f"{name}@2"):
        assert text in routing.table()
    assert {row.name: row.rank for row in routing.rows if row.rank} == {"slow.weight": 9, "fast.weight": 2}
    assert "ranks: 2 / 2 / 9 (least / median / most)" in routing.table()
    optimizer = build(model, config, ranks=ranks)
    assert routing.state_bytes() == optimizer.state_bytes()
    labels = [group["label"] for group in optimizer.param_groups]
    assert len(set(labels)) == len(labels)
    widths = [optimizer.state[model.get_parameter(n)]["exp_avg"].shape for n in NAMES]
    assert widths == [(24, 9), (24, 16), (24, 2)]
    for p in model.parameters():
        p.grad = seeded(*p.shape)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_matrices_without_a_rank_of_their_own_have_the_configuration_s():
    model = Model()
    optimizer = build(model, GaLoreConfig(rank=4), ranks={"fast.weight": 2})
    widths = [optimizer.state[model.get_parameter(n)]["exp_avg"].shape[1] for n in NAMES]
    assert widths == [4, 4, 2]
    plain, empty = build(Model(), GaLoreConfig(rank=4)), build(Model(), GaLoreConfig(rank=4), ranks={})
    assert [g["label"] for g in plain.param_groups] == [g["label"] for g in empty.param_groups]


def test_above_half_of_the_short_side_a_matrix_is_stepped_whole():
    ranks = allocated_ranks(Model(), GaLoreConfig(rank=6), dense_above=0.5)
    assert ranks["slow.weight"] is None
    assert (ranks["fast.weight"] or 99) <= 8
    rules = {row.name: row.rule for row in route(Model(), GaLoreConfig(rank=6), ranks=ranks).rows}
    assert rules["slow.weight"] == "adamw"


def test_a_convolution_has_a_rank_and_methods_without_one_have_none():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 20))
    assert set(allocated_ranks(model, GaLoreConfig(rank=2))) == {"0.weight", "2.weight"}
    assert allocated_ranks(model, GaLoreConfig(rank=None)) == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"spectra": "gradients"}, r"spectra must be one of .*did you mean 'gradient'"),
        ({"reduction": 0.5, "budget": 100}, r"reduction needs all singular values and no budget"),
        ({"reduction": 0.5, "sketch": 4}, r"reduction needs all singular values"),
        ({"reduction": 1.5}, r"reduction must be a share from 0 to 1, got 1\.5"),
        ({"minimum": 0}, r"minimum must be at least 1, got 0"),
        ({"multiple": 0.5}, r"multiple must be at least 1, got 0\.5"),
        ({"budget": 5}, r"budget must be at least 120 "),
    ],
)
def test_bad_values_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        allocated_ranks(Model(), GaLoreConfig(), **options)


def test_ranks_of_something_else_are_refused():
    with pytest.raises(ValueError, match=r"ranks: 'table\.weight' is no matrix that galore projects here"):
        build(Model(), GaLoreConfig(), ranks={"table.weight": 4})
    with pytest.raises(ValueError, match=r"ranks: adamw projects nothing: leave them out"):
        build(Model(), AdamWConfig(), ranks={"slow.weight": 4})
    with pytest.raises(ValueError, match=r"rank must be at least 1"):
        build(Model(), GaLoreConfig(), ranks={"slow.weight": 0})


# --- other ranks on the way -------------------------------------------------------------------------------------------

CONFIGS = [GaLoreConfig(rank=4), DCTAdamWConfig(rank=4), LDAdamConfig(rank=4), MFACConfig(rank=4, window=3)]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)


def go(model, optimizer, first, stop):
    for step in range(first, stop):
        for i, p in enumerate(model.parameters()):
            p.grad = seeded(*p.shape, seed=100 * step + i)
        optimizer.step()


@each
def test_with_the_same_ranks_the_run_goes_on_to_the_bit(config):
    ranks = {"slow.weight": 6, "medium.weight": None, "fast.weight": 4}
    model = Model()
    twin = copy.deepcopy(model)
    optimizer, other = (build(m, config, ranks=ranks, seed=2) for m in (model, twin))
    go(model, optimizer, 0, 4)
    go(twin, other, 0, 4)
    optimizer.reallocate(ranks)
    go(model, optimizer, 4, 8)
    go(twin, other, 4, 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@each
def test_moments_and_directions_are_cut_or_extended(config):
    model = Model()
    optimizer = build(model, config)
    go(model, optimizer, 0, 4)
    old = copy.deepcopy({name: optimizer.state[model.get_parameter(name)] for name in NAMES})
    optimizer.reallocate({"slow.weight": 9, "fast.weight": 2})
    assert optimizer.ranks() == {"slow.weight": 9, "medium.weight": 4, "fast.weight": 2}
    for name, rank in zip(NAMES, (9, 4, 2), strict=True):
        before, after = old[name], optimizer.state[model.get_parameter(name)]
        both = min(rank, 4)
        assert float(after["step"]) == 4.0
        for key in ("exp_avg", "exp_avg_sq", "window", "age"):
            if key in before:
                assert after[key].shape[-1] == rank
                assert torch.equal(after[key][..., :both], before[key][..., :both])
                assert not after[key][..., both:].any()
        if "error" in before:
            assert torch.equal(after["error"], before["error"])
        if "basis" in before:
            assert eye_error(after["basis"]) < 1e-5
            assert torch.equal(after["basis"][:, :both], before["basis"][:, :both])
        else:
            assert torch.equal(after["columns"][:both], before["columns"][:both])
            assert len(set(after["columns"].tolist())) == rank
            assert set(after["columns"].tolist()) <= set(range(16))
    go(model, optimizer, 4, 8)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_eight_bit_moments_stay_what_they_stood_for():
    """Codes are of blocks with one scale each: cut or extended, the entries that stay must mean the same numbers."""
    model = Model()
    optimizer = build(model, GaLoreConfig(rank=4, state_bits=8))
    go(model, optimizer, 0, 4)
    with torch.no_grad():
        before = {name: first_moment(optimizer.state[model.get_parameter(name)]) for name in NAMES}
    optimizer.reallocate({"slow.weight": 9, "fast.weight": 2})
    for name, rank in zip(NAMES, (9, 4, 2), strict=True):
        after = first_moment(optimizer.state[model.get_parameter(name)])
        assert after.shape == (24, rank)
        assert before[name].any()
        assert torch.equal(after[:, : min(rank, 4)], before[name][:, : min(rank, 4)])
        assert not after[:, 4:].any()


def test_what_turns_dense_starts_anew_and_its_wide_copy_stays():
    model, config = Model().to(torch.bfloat16), GaLoreConfig(rank=4, half_weights="master")
    optimizer = build(model, config)
    for step in range(4):
        for i, p in enumerate(model.parameters()):
            p.grad = seeded(*p.shape, seed=100 * step + i).to(p.dtype)
        optimizer.step()
    wide = optimizer.state[model.slow.weight]["master"].clone()
    assert not torch.equal(wide, model.slow.weight.float())
    optimizer.reallocate({"slow.weight": None})
    state = optimizer.state[model.slow.weight]
    assert float(state["step"]) == 0.0
    assert "basis" not in state
    assert torch.equal(state["master"], wide)
    assert float(optimizer.state[model.fast.weight]["step"]) == 4.0
    optimizer.step()
    assert float(state["step"]) == 1.0
    optimizer.reallocate({"slow.weight": 3})
    assert optimizer.state[model.slow.weight]["basis"].shape == (16, 3)


def test_groups_rates_schedules_and_hooks_outlive_other_ranks():
    model = Model()
    optimizer = build(model, GaLoreConfig(rank=4, lr=0.5))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.in_backward("step")
    groups = list(optimizer.param_groups)
    optimizer.step()
    optimizer.reallocate({"slow.weight": 9})
    schedule.step()
    assert [a is b for a, b in zip(optimizer.param_groups, groups, strict=True)] == [True] * len(groups)
    assert {group["lr"] for group in groups} == {0.25}
    before = model.slow.weight.detach().clone()
    model.slow(torch.ones(2, 16)).square().sum().backward()
    assert model.slow.weight.grad is None
    assert not torch.equal(model.slow.weight, before)


def test_bad_reallocations_change_nothing():
    model = Model()
    optimizer = build(model, GaLoreConfig(rank=4))
    before = {param: dict(state) for param, state in optimizer.state.items()}
    for ranks, sentence in (
        ({"slow.weight": 2, "table.weight": 4}, r"ranks: 'table\.weight' is no matrix that GaLore projects here"),
        ({"slow.weight": 2, "fast.weight": 0}, r"GaLore: rank must be at least 1 .*, got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            optimizer.reallocate(ranks)
    assert all(optimizer.state[p][key] is value for p, state in before.items() for key, value in state.items())
    assert optimizer.ranks() == {}
    with pytest.raises(ValueError, match="AdamW has no rank"):
        build(model, AdamWConfig()).reallocate({"slow.weight": 2})
    optimizer.in_backward("project")
    model.slow(torch.ones(2, 16)).square().sum().backward()
    with pytest.raises(RuntimeError, match="reallocate after step or zero_grad"):
        optimizer.reallocate({"slow.weight": 2})


def test_groups_of_one_s_own_say_ranks():
    params = [nn.Parameter(seeded(8, 6)), nn.Parameter(seeded(8, 6, seed=1)), nn.Parameter(seeded(6))]
    optimizer = GaLore([{"params": params, "ranks": [2, None, None]}])
    assert [tuple(optimizer.state[p]["exp_avg"].shape) for p in params] == [(8, 2), (8, 6), (6,)]
    assert (optimizer.directions(), optimizer.ranks()) == ({"0.0": 2}, {"0.0": 2, "0.1": None})
    assert optimizer.scale(optimizer.param_groups[0]) == 0.25
    for ranks, sentence in (
        ([2], r"GaLore: ranks must be a list of one rank for each of the 3 parameters of the group, got \[2\]"),
        ([2, 1.5, 1], r"GaLore: rank must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            GaLore([{"params": params, "ranks": ranks}])
    with pytest.raises(ValueError, match="AdamW has no rank: leave ranks out of the parameter group"):
        AdamW([{"params": params, "ranks": [2, 2, 2]}])
