"""When subspaces are renewed: in a fixed gap, spread over it, and in a gap that every matrix finds for itself."""

import pytest
import torch
from laws import decaying, seeded

from thinrank.optim import GaLore, GaLoreConfig
from thinrank.optim.inner.adam import Adam
from thinrank.optim.lowrank.lift import Project
from thinrank.optim.lowrank.renewals import Renewals
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.sparse import SparseResidual
from thinrank.optim.lowrank.subspace import PowerIteration, Svd
from thinrank.optim.rule import Step

CPU = torch.device("cpu")
KEYS = [0, 2**31, 2**32 - 1]
STEPS = 40


def renewed_at(rule, gradients, keys=(0,)):
    """The steps at which the basis of each matrix of the batch changed, or was found anew to be the same."""
    batch = len(keys)
    state = rule.init((batch, 8, 5), CPU)
    found = [[] for _ in keys]
    for t in range(STEPS):
        x = torch.stack([gradients(t, i) for i in range(batch)])
        if "renewed" in state:
            rule.update(x, state, Step(count=[t] * batch, keys=keys))
            for i, last in enumerate(state["renewed"].tolist()):
                if t == 0 or last == t:
                    found[i].append(t)
        else:
            before = state["basis"].clone()
            rule.update(x, state, Step(count=[t] * batch, keys=keys))
            for i in range(batch):
                if not torch.equal(before[i], state["basis"][i]):
                    found[i].append(t)
    return found


def rule_of(every, rank=2, **how):
    return LowRank(subspace=Svd(rank=rank, every=every), inner=Adam(), renewals=Renewals(**how))


def steady(t, i):
    return decaying(8, 5, seed=i)


def turning(t, i):
    return seeded(8, 5, seed=100 * t + i)


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_fixed_gap(every):
    assert renewed_at(rule_of(every), turning, KEYS) == [list(range(0, STEPS, every))] * 3


def test_a_spread_gap_begins_early_by_the_name():
    zero, half, one = renewed_at(rule_of(6, stagger=True), turning, KEYS)
    assert zero == list(range(0, STEPS, 6))
    assert half == [0, *range(3, STEPS, 6)]
    assert one == [0, *range(1, STEPS, 6)]


def test_steady_subspaces_double_their_gap_and_turning_ones_keep_it():
    rule = rule_of(3, lazy=0.9)
    first, second = renewed_at(rule, lambda t, i: (steady if i == 0 else turning)(t, i), [0, 1])
    assert first == [0, 3, 9, 21]  # 3, 6, 12, 24 apart
    assert second == list(range(0, STEPS, 3))


def test_a_subspace_that_turns_goes_back_to_the_first_gap():
    (found,) = renewed_at(rule_of(3, lazy=0.9), lambda t, i: steady(t, int(t >= 10)))
    assert found == [0, 3, 9, 21, 24, 30]  # the turn of step 10 is seen at 21


@pytest.mark.parametrize("lazy", [0.3, 0.5])
def test_the_threshold_is_the_overlap(lazy):
    """One of two directions stays, so that the overlap is a half, exactly."""
    low, high = torch.zeros(8, 5), torch.zeros(8, 5)
    low[0, 0] = low[1, 1] = high[0, 0] = high[1, 2] = 1.0
    low[0, 0] = high[0, 0] = 2.0
    (found,) = renewed_at(rule_of(4, lazy=lazy), lambda t, i: low if t < 4 else high)
    assert found[:3] == [0, 4, 12]
    (found,) = renewed_at(rule_of(4, lazy=0.6), lambda t, i: low if t < 4 else high)
    assert found[:3] == [0, 4, 8]


def test_spread_and_found_together():
    """The first renewal is early by the name; the doubled gap counts from there."""
    zero, half, one = renewed_at(rule_of(6, stagger=True, lazy=0.9), steady, KEYS)
    assert zero == [0, 6, 18]
    assert half == [0, 3, 15, 39]
    assert one == [0, 1, 13, 37]


def test_a_gradient_that_is_no_number_does_not_count_as_a_renewal():
    """The matrix keeps what it has and renews at the next step."""

    def broken(t, i):
        return torch.full((8, 5), torch.nan) if t in (3, 4) else steady(t, i)

    assert renewed_at(rule_of(3, lazy=0.9), broken) == [[0, 5, 11, 23]]


def test_entries_are_chosen_anew_with_the_subspace():
    rule = LowRank(
        subspace=PowerIteration(rank=2, every=3),
        inner=Adam(),
        lift=SparseResidual(density=0.1, reselect="renewal", renewals=Renewals(lazy=0.9)),
        renewals=Renewals(lazy=0.9),
    )
    state = rule.init((1, 8, 5), CPU)
    chosen = []
    for t in range(STEPS):
        before = state["entries"].clone()
        # one subspace for all, and what it misses moves from step to step
        x = torch.zeros(8, 5)
        x[0, 0], x[1, 1], x[2 + t % 5, 2 + t % 3] = 200.0, 100.0, 1.0
        rule.update(x[None], state, Step(count=[t], keys=[0]))
        if not torch.equal(before, state["entries"]):
            chosen.append(t)
    assert chosen == [0, 3, 9, 21]


def test_it_is_one_key_of_the_optimizer_and_goes_through_a_checkpoint():
    def run(optimizer, weight, steps):
        for t in steps:
            weight.grad = decaying(12, 6, seed=int(t >= 9))
            optimizer.step()

    whole = torch.nn.Parameter(torch.zeros(12, 6))
    optimizer = GaLore([whole], rank=2, update_proj_gap=2, lazy_overlap=0.9)
    run(optimizer, whole, range(20))
    part = torch.nn.Parameter(torch.zeros(12, 6))
    first = GaLore([part], rank=2, update_proj_gap=2, lazy_overlap=0.9)
    run(first, part, range(7))
    second = GaLore([part], rank=2, update_proj_gap=2, lazy_overlap=0.9)
    second.load_state_dict(first.state_dict())
    run(second, part, range(7, 20))
    assert torch.equal(whole, part)
    assert float(optimizer.state[whole]["gap"]) == float(second.state[part]["gap"]) > 2
    fixed = torch.nn.Parameter(torch.zeros(12, 6))
    run(GaLore([fixed], rank=2, update_proj_gap=2), fixed, range(20))
    assert not torch.equal(whole, fixed)


@pytest.mark.parametrize("mode", ["off", "project"])
def test_a_renewal_between_two_readings_is_told_at_the_next(mode):
    """At update 4 of 8 the second of two equal directions turns: half of the old subspace is in the new one."""
    low, high = torch.zeros(8, 5), torch.zeros(8, 5)
    low[0, 0] = high[0, 0] = 2.0
    low[1, 1] = high[1, 2] = 1.0
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 8, bias=False), "b": torch.nn.Linear(5, 8, bias=False)})
    optimizer = GaLore(model.named_parameters(), rank=2, update_proj_gap=4)
    optimizer.in_backward(mode)
    told = []
    for t in range(8):
        grads = low if t < 4 else high, low
        sum((p * g).sum() for p, g in zip(model.parameters(), grads, strict=True)).backward()
        optimizer.measure = t in (2, 6, 7)
        optimizer.step()
        optimizer.zero_grad()
        if t in (2, 6, 7):
            told.append(optimizer.measured["subspace_overlap"])
    assert told[0] == told[2] == {}
    assert told[1] == pytest.approx({"a.weight": 0.5, "b.weight": 1.0}, abs=1e-5)


@pytest.mark.parametrize("mode", ["off", "project"])
def test_a_skipped_renewal_is_counted_wherever_it_falls(mode):
    weight = torch.nn.Parameter(torch.zeros(8, 5))
    optimizer = GaLore([("w", weight)], rank=2, update_proj_gap=2)
    optimizer.in_backward(mode)
    for t in range(4):
        (weight * (torch.full((8, 5), torch.nan) if t == 2 else steady(t, 0))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_renewals == {"w": 1}


def test_the_key_reaches_every_rule():
    rule = GaLoreConfig(lazy_overlap=0.4, stagger=True).matrix_rule()
    assert rule is not None
    assert rule.renewals == Renewals(stagger=True, lazy=0.4)
    assert isinstance(rule.lift, Project)
