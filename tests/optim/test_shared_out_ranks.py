"""Ranks shared out by an optimizer itself: the law of the sharing, when it happens, and that runs resume exactly."""

import copy
import io
import logging
from typing import Any

import pytest
import torch
from cases import small
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import LAW, decaying, seeded
from reference.welore import welore
from torch import nn

from thinrank.optim import (
    METHODS,
    AdamW,
    DCTAdamWConfig,
    GaLore,
    GaLoreConfig,
    GaLorePlusConfig,
    MFACConfig,
    RankedConfig,
    SubspaceAdamWConfig,
    build,
    route,
)
from thinrank.optim import allocation as allocation_module
from thinrank.optim.allocation import Matrix, share_out, step_of_ranks
from thinrank.optim.linalg.allocate import bounded_counts, relative
from thinrank.optim.matrix import matrix_views
from thinrank.optim.methods.config import MethodConfig


def matrix(name, source, rank, held=None):
    views = matrix_views(tuple(source.shape))
    return Matrix(name=name, views=views, source=source, rank=rank, held=rank if held is None else held)


def total(matrices, ranks):
    return sum(m.cost(ranks[m.name]) for m in matrices)


# --- the law ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 24), st.floats(0.2, 0.99)), min_size=1, max_size=5),
    st.integers(1, 20) | st.sampled_from([0.25, 0.5]),
    st.booleans(),
)
@LAW
def test_one_threshold_for_all_within_the_budget(shapes, rank, steady):
    """And the next smaller threshold would be too dear, so that the budget is used."""
    matrices = [
        matrix(str(i), decaying(long, short, ratio=ratio, seed=i), rank)
        for i, (long, short, ratio) in enumerate(shapes)
    ]
    budget, step = sum(m.cost(rank) for m in matrices), step_of_ranks(matrices)
    ranks = share_out(matrices, steady=steady)
    assert total(matrices, ranks) <= budget
    if steady:
        return
    spectra = [relative(m.spectrum()) for m in matrices]
    found = [ranks[m.name] for m in matrices]
    thresholds = [*torch.cat(spectra).unique().tolist(), float("inf")]
    chosen = [bounded_counts(spectra, t, minimum=step, multiple=step) for t in thresholds]
    assert found in chosen
    dearer = [other for other in chosen if sum(other) > sum(found)]
    assert all(sum(r * sum(m.sides) for m, r in zip(matrices, other, strict=True)) > budget for other in dearer)


@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 24), st.integers(1, 24)), min_size=1, max_size=5),
    st.integers(1, 20) | st.sampled_from([0.25, 0.5]),
    st.integers(0, 2**31),
    st.booleans(),
)
@settings(LAW, max_examples=40)
def test_ranks_of_random_spectra_are_those_of_a_search_by_halves(shapes, rank, seed, steady):
    """From the matrices on: their singular values are random numbers, and so are the ranks that they had before."""
    spectra, matrices = [], []
    for i, (long, short, held) in enumerate(shapes):
        turned = decaying(long, short, ratio=1.0, seed=seed + i, dtype=torch.float64)  # all singular values are one
        left, _, right = torch.linalg.svd(turned, full_matrices=False)
        values = seeded(left.shape[1], seed=seed + i, dtype=torch.float64).exp()
        spectra.append(values.tolist())
        matrices.append(matrix(str(i), ((left * values) @ right).float(), rank, held=min(held, long, short)))
    scaled = torch.cat([torch.tensor(each, dtype=torch.float64) / max(each) for each in spectra]).unique()
    assume(len(scaled) == 1 or float(scaled.diff().min()) > 1e-5)  # what float32 tells apart
    sides, step = [m.sides for m in matrices], step_of_ranks(matrices)
    budget = sum(m.cost(rank) for m in matrices)
    assume(sum(min(step, len(each)) * sum(both) for each, both in zip(spectra, sides, strict=True)) <= budget)
    held = [int(m.held) for m in matrices] if steady else None
    expected = welore(spectra, sides, budget, step=step, held=held)
    assert list(share_out(matrices, steady=steady).values()) == expected


def test_ranks_are_multiples_of_an_eighth_of_the_uniform_one():
    for rank, step in ((4, 1), (15, 1), (16, 2), (64, 8), (200, 16), (512, 64)):
        assert (
            step_of_ranks([matrix("w", torch.zeros(600, 600), rank), matrix("v", torch.zeros(600, 600), 600)]) == step
        )


def test_who_has_no_spectrum_keeps_its_rank_and_pays_for_it():
    slow, fast = decaying(24, 16, ratio=0.97), decaying(24, 16, ratio=0.4, seed=1)
    bad = {"zero": torch.zeros(24, 16), "nan": torch.full((24, 16), float("nan"))}
    for name, source in bad.items():
        matrices = [matrix("slow", slow, 4), matrix("fast", fast, 4), matrix(name, source, 4, held=6)]
        ranks = share_out(matrices)
        assert ranks[name] == 6
        assert ranks["slow"] > ranks["fast"]
        assert total(matrices, ranks) <= 3 * 4 * 40
    missing = Matrix(name="none", views=matrix_views((24, 16)), source=None, rank=4, held=4)
    assert share_out([missing]) == {}
    # nothing is left for the others where it holds nearly everything
    assert share_out([matrix("slow", slow, 4), matrix("zero", bad["zero"], 4, held=8)]) == {}


def test_small_changes_are_spared_unless_they_break_the_budget():
    sources = [decaying(24, 16, ratio=ratio, seed=i) for i, ratio in enumerate((0.97, 0.4))]
    new = share_out([matrix(str(i), source, 6) for i, source in enumerate(sources)])
    near = {"0": new["0"] - 1, "1": new["1"]}
    again = [matrix(str(i), source, 6, held=near[str(i)]) for i, source in enumerate(sources)]
    assert share_out(again, steady=True) == near
    assert share_out(again) == new
    dear = {"0": new["0"] + 2, "1": new["1"]}
    assert sum(dear.values()) > 12
    again = [matrix(str(i), source, 6, held=dear[str(i)]) for i, source in enumerate(sources)]
    assert share_out(again, steady=True) == new


def test_large_matrices_are_sketched_and_given_nearly_the_same(monkeypatch):
    matrices = [matrix(str(i), decaying(60, 40, ratio=r, seed=i), 4) for i, r in enumerate((0.95, 0.8, 0.5))]
    exact = share_out(matrices)
    asked = []
    whole = allocation_module.spectrum

    def watched(x, sketch, generator):
        asked.append(sketch)
        return whole(x, sketch, generator)

    monkeypatch.setattr(allocation_module, "spectrum", watched)
    assert share_out(matrices) == exact
    monkeypatch.setattr(allocation_module, "SKETCH_ABOVE", 39)
    found = share_out(matrices)
    assert asked == [None] * 3 + [16] * 3
    assert all(abs(found[name] - rank) <= 1 for name, rank in exact.items())
    assert found == share_out(matrices)  # a sketch is seeded by the name


def test_a_weight_of_several_matrices_has_one_rank():
    parts = [decaying(24, 16, ratio=0.9, seed=i) for i in range(3)]
    fused = torch.cat(parts)
    one = Matrix(name="qkv", views=matrix_views((72, 16), sections=[24] * 3), source=fused, rank=4, held=4)
    assert one.cost(4) == 3 * 4 * 40
    assert one.sides == (72, 48)
    expected = torch.stack([torch.linalg.svdvals(p) for p in parts]).square().mean(0).sqrt()
    torch.testing.assert_close(relative(one.spectrum()), relative(expected), rtol=1e-4, atol=1e-5)


def test_gradients_of_any_size_have_the_same_spectrum():
    source = decaying(24, 16, ratio=0.8)
    for size in (1e-25, 1e25):
        torch.testing.assert_close(
            relative(matrix("w", source * size, 4).spectrum()),
            relative(matrix("w", source, 4).spectrum()),
            rtol=1e-4,
            atol=1e-5,
        )


# --- when -------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Three matrices, an embedding, a norm; gradients are given."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.slow, self.medium, self.fast = (nn.Linear(16, 24, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(seeded(*p.shape, seed=i))


NAMES = ["slow.weight", "medium.weight", "fast.weight"]
EARLY, LATE = (0.97, 0.8, 0.4), (0.4, 0.8, 0.97)
"""Decay of the gradients' singular values in the first four steps, and later."""


def give(model, step):
    for i, p in enumerate(model.parameters()):
        p.grad = seeded(*p.shape, seed=100 * step + i)
    for i, (name, ratio) in enumerate(zip(NAMES, EARLY if step < 4 else LATE, strict=True)):
        model.get_parameter(name).grad = decaying(24, 16, ratio=ratio, seed=100 * step + i)


def go(model, optimizer, first, stop):
    seen = []
    for step in range(first, stop):
        give(model, step)
        optimizer.step()
        seen.append([optimizer.directions()[name] for name in NAMES])
    return seen


def twin(model):
    return copy.deepcopy(model)


RANKED = {name: cls for name, cls in METHODS.items() if issubclass(cls, RankedConfig)}


@pytest.mark.parametrize("name", RANKED)
def test_every_method_with_a_rank_is_given_ranks_by_its_first_gradient(name):
    model = Model()
    optimizer = build(model, small(name, rank=4, rank_allocation="gradient"))
    assert optimizer.ranks() == {}
    seen = go(model, optimizer, 0, 8)
    assert seen == [seen[0]] * 8
    slow, medium, fast = seen[0]
    assert slow > medium > fast
    assert 11 <= slow + medium + fast <= 12
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_first_step_is_one_of_the_ranks_that_it_decides():
    """Not of the uniform ranks, with others from the second step on."""
    model = Model()
    config = GaLoreConfig(rank=4, rank_allocation="gradient")
    optimizer = build(model, config)
    other = twin(model)
    go(model, optimizer, 0, 5)
    given = build(other, GaLoreConfig(rank=4), ranks=optimizer.ranks())
    go(other, given, 0, 5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("config", [GaLoreConfig, DCTAdamWConfig, SubspaceAdamWConfig])
def test_anew_every_few_steps(config):
    model = Model()
    optimizer = build(model, config(rank=4, rank_allocation="gradient", rank_allocation_every=3))
    seen = go(model, optimizer, 0, 8)
    assert seen[0] == seen[1] == seen[2] == seen[3]  # at step 3 the gradients have the decay of step 0
    assert seen[4] == seen[5] == seen[3]
    assert seen[6] == seen[7] != seen[5]
    assert seen[6][0] < seen[6][2]
    assert all(sum(ranks) <= 12 for ranks in seen)


def test_by_weights_at_once_and_later_after_the_step():
    model = Model()
    with torch.no_grad():
        for name, ratio in zip(NAMES, EARLY, strict=True):
            model.get_parameter(name).copy_(10 * decaying(24, 16, ratio=ratio))
    optimizer = build(model, GaLoreConfig(rank=4, lr=1e-4, rank_allocation="weight", rank_allocation_every=2))
    first = [optimizer.directions()[name] for name in NAMES]
    assert first[0] > first[1] > first[2]
    go(model, optimizer, 0, 1)
    with torch.no_grad():
        for name, ratio in zip(NAMES, LATE, strict=True):
            model.get_parameter(name).copy_(10 * decaying(24, 16, ratio=ratio))
    (second,) = go(model, optimizer, 1, 2)
    assert second[0] < second[1] < second[2]
    meta = nn.ModuleDict({"slow": nn.Linear(16, 24, device="meta")})
    with pytest.raises(ValueError, match=r"slow\.weight is on the meta device: give it values before"):
        build(meta, GaLoreConfig(rank=4, rank_allocation="weight"))


def test_a_gradient_that_is_missing_or_strange_waits(caplog):
    model = Model()
    optimizer = build(model, GaLoreConfig(rank=4, rank_allocation="gradient"))
    optimizer.step()  # nobody has a gradient
    assert optimizer.ranks() == {}
    give(model, 0)
    model.slow.weight.grad = None
    model.medium.weight.grad = torch.zeros(24, 16)
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert optimizer.ranks() == {"slow.weight": 4, "medium.weight": 4, "fast.weight": 4}
    assert "slow.weight and 1 others have no spectrum to go by" in caplog.text


def test_a_loaded_policy_outlives_copies_and_can_be_stopped():
    model = Model()
    optimizer = build(model, GaLoreConfig(rank=4, rank_allocation="gradient", rank_allocation_every=3))
    go(model, optimizer, 0, 1)
    both: Any = copy.deepcopy((model, optimizer))
    expected, found = go(model, optimizer, 1, 8), go(both[0], both[1], 1, 8)
    assert found == expected
    assert expected[0] != expected[-1]
    optimizer.allocate_ranks("uniform")
    before = optimizer.ranks()
    go(model, optimizer, 8, 10)
    for name in NAMES:
        model.get_parameter(name).grad = decaying(24, 16, ratio=0.5)
    optimizer.step()
    assert optimizer.ranks() == before


def test_classes_are_told_by_a_call_and_groups_are_counted_together():
    params = [nn.Parameter(seeded(24, 16, seed=i)) for i in range(3)]
    optimizer = GaLore([{"params": params[:1], "rank": 6}, {"params": params[1:], "rank": 3}])
    optimizer.allocate_ranks("gradient")
    for p, ratio in zip(params, (0.4, 0.4, 0.97), strict=True):
        p.grad = decaying(24, 16, ratio=ratio)
    optimizer.step()
    one, two, three = optimizer.directions().values()
    assert one == two < three
    assert 11 <= one + two + three <= 12


def test_measured_ranks():
    model = Model()
    optimizer = build(model, GaLoreConfig(rank=4, rank_allocation="gradient"))
    give(model, 0)
    optimizer.measure = True
    optimizer.step()
    assert optimizer.measured["rank"] == optimizer.directions()


def test_galore_plus_sees_what_its_heads_see():
    """Query weights are compressed on their input side, which need not be the shorter one."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.head_dim = 2, 4
            self.q_proj, self.k_proj = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)
            self.mix = nn.Linear(16, 24, bias=False)

    model = Attention()
    config = GaLorePlusConfig(rank=4, density=0.0, rank_allocation="gradient")
    optimizer = build(model, config)
    for p, ratio in zip(model.parameters(), (0.3, 0.3, 0.95), strict=True):
        p.grad = decaying(*p.shape, ratio=ratio)
    optimizer.step()
    directions = optimizer.directions()
    assert directions["mix.weight"] > directions["q_proj.weight"]
    state = optimizer.state[model.q_proj.weight]
    assert state["basis"].shape == (16, directions["q_proj.weight"])
    shown = route(model, config, ranks=optimizer.ranks())
    assert shown.state_bytes() == optimizer.state_bytes()


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 5, 6, 7])
@pytest.mark.parametrize("name", ["galore", "dct_adamw", "subspace_adamw", "dion", "ldadam"])
def test_a_killed_run_resumes_to_the_bit(name, stop):
    """Before, at and after an allocation; the new process begins with uniform ranks."""
    config = small(name, rank=4, rank_allocation="gradient", rank_allocation_every=3)
    model = Model()
    optimizer = build(model, config)
    go(model, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    held = [optimizer.directions()[name] for name in NAMES]
    expected = go(model, optimizer, stop, 10)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Model()
    other.load_state_dict(saved["model"])
    fresh = build(other, config)
    fresh.load_state_dict(saved["optimizer"])
    found = go(other, fresh, stop, 10)
    assert found == expected
    assert (held != expected[-1]) == (stop < 7)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, fresh.state[q][key]), key


def test_a_state_with_other_ranks_is_refused_when_it_does_not_fit_and_nothing_changes():
    model = Model()
    optimizer = build(model, GaLoreConfig(rank=4, rank_allocation="gradient"))
    go(model, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    uniform = build(Model(), GaLoreConfig(rank=4))
    before = uniform.state_dict()
    first = next(i for i, group in enumerate(saved["param_groups"]) if group["ranks"])
    for ranks in ([4, 4, 4], [4], [0, 4, 4]):
        bad = copy.deepcopy(saved)
        bad["param_groups"][first]["ranks"] = ranks
        with pytest.raises(ValueError, match="build the optimizer with the configuration that it was saved with"):
            uniform.load_state_dict(bad)
    assert uniform.ranks() == {}
    for key, state in uniform.state_dict()["state"].items():
        assert all(value is before["state"][key][part] for part, value in state.items())
    uniform.load_state_dict(saved)
    assert uniform.ranks() == optimizer.ranks()
    optimizer.load_state_dict(before)  # and back to what all have alike
    assert optimizer.ranks() == {}
    assert optimizer.directions() == dict.fromkeys(NAMES, 4)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "values", "sentence"),
    [
        (GaLoreConfig, {"rank_allocation": "gradients"}, r"rank_allocation must be one of .*did you mean 'gradient'"),
        (
            GaLoreConfig,
            {"rank_allocation_every": 5},
            r"rank_allocation_every=5 has nothing to allocate .*: set that to",
        ),
        (
            GaLoreConfig,
            {"rank_allocation": "weight", "rank_allocation_every": 0},
            r"rank_allocation_every must be at least 1 step, got 0",
        ),
        (GaLoreConfig, {"rank_allocation": "weight", "rank": 1}, r"nothing to share out with rank=1: set another rank"),
        (GaLoreConfig, {"rank_allocation": "weight", "rank": 1.0}, r"nothing to share out with rank=1\.0: set another"),
        (GaLoreConfig, {"rank_allocation": "weight", "rank": None}, r"nothing to share out with rank=None"),
        (METHODS["apollo_mini"], {"rank_allocation": "weight"}, r"nothing to share out with rank=1: set another rank"),
        (MFACConfig, {"rank_allocation": "weight", "space": "whole"}, r"which space='whole' does not have: use space="),
    ],
)
def test_bad_values_are_refused_at_construction(config: Any, values, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_methods_without_a_rank_have_no_such_key():
    for name, cls in METHODS.items():
        assert hasattr(cls, "rank_allocation") == issubclass(cls, RankedConfig), name
    with pytest.raises(ValueError, match="AdamW has no rank to share out"):
        AdamW([nn.Parameter(seeded(4, 4))]).allocate_ranks("weight")


def test_two_answers_to_one_question_are_refused():
    config: MethodConfig = GaLoreConfig(rank=4, rank_allocation="gradient")
    with pytest.raises(ValueError, match=r"ranks are given, and rank_allocation='gradient' would replace them: leave"):
        build(Model(), config, ranks={"slow.weight": 2})
    optimizer = build(Model(), config)
    for mode in ("project", "step"):
        with pytest.raises(ValueError, match=f"which mode '{mode}' does not keep until step: use rank_allocation="):
            optimizer.in_backward(mode)
    optimizer.in_backward("off")
    taken = build(Model(), GaLoreConfig(rank=4))
    taken.in_backward("project")
    with pytest.raises(ValueError, match=r"in_backward and replicate do not keep until step: use spectra='weight'"):
        taken.allocate_ranks("gradient")
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        taken.allocate_ranks("weight", every=0)


@pytest.mark.parametrize("mode", ["project", "step"])
def test_by_weights_it_works_with_gradients_taken_in_backward(mode):
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 8, bias=False))
    optimizer = build(model, GaLoreConfig(rank=4, lr=0.05, rank_allocation="weight", rank_allocation_every=2))
    optimizer.in_backward(mode)
    first = optimizer.ranks()
    with torch.no_grad():
        model[0].weight.copy_(decaying(24, 16, ratio=0.3))  # pyright: ignore[reportCallIssue, reportArgumentType]
    for _ in range(4):
        optimizer.zero_grad()
        model(seeded(6, 16)).square().sum().backward()
        optimizer.step()
    assert optimizer.ranks() != first
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_table_says_what_is_not_decided_yet():
    model = Model()
    text = route(model, GaLoreConfig(rank=4, rank_allocation="gradient")).table()
    assert text.endswith("shared out by the spectra of the gradients (rank_allocation=gradient)")
    assert "shared out" not in route(model, GaLoreConfig(rank=4)).table()
    optimizer = build(model, GaLoreConfig(rank=4, rank_allocation="gradient"))
    go(model, optimizer, 0, 1)
    routing = route(model, GaLoreConfig(rank=4, rank_allocation="gradient"), ranks=optimizer.ranks())
    assert "(least / median / most)" in routing.table()
    assert "shared out" not in routing.table()
    assert routing.state_bytes() == optimizer.state_bytes()
