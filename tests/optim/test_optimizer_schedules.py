"""Learning rates, schedulers, and copies of an optimizer in the middle of a run."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import CONFIGS, copies, equal, make, run, weights
from laws import seeded
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, SequentialLR

from thinrank.optim import DCTAdamW
from thinrank.optim.lowrank import subspace

# the one-wide matrices of `weights()` have one direction, and the optimizer says so
pytestmark = pytest.mark.filterwarnings("ignore:rank 3 is above the 1 directions")

every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


# --- rates and schedules ----------------------------------------------------------------------------------------------


@every
def test_a_tensor_for_a_learning_rate(config):
    ends = []
    for lr in (0.02, torch.tensor(0.02)):
        params = weights()
        optimizer = make(config, params, lr=lr)
        run(optimizer, params, 0, 4)
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


SCHEDULES = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 / (step + 1)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, 1.0, 3), LambdaLR(optimizer, lambda step: 0.9**step)], [3]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@every
def test_schedulers_reach_the_step(config, schedule):
    """Compared with the same values set by hand; OneCycleLR also moves β1."""
    with warnings.catch_warnings():
        # SequentialLR of torch steps its schedulers once by itself and warns about its own call
        warnings.filterwarnings("ignore", message=r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*")
        params, by_hand = weights(), weights()
        optimizer, twin = make(config, params), make(config, by_hand)
        scheduler = schedule(optimizer)
        for step in range(6):
            twin.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            twin.param_groups[0]["betas"] = optimizer.param_groups[0]["betas"]
            run(optimizer, params, step, step + 1)
            run(twin, by_hand, step, step + 1)
            scheduler.step()
    assert equal(params, by_hand)
    assert optimizer.param_groups[0]["lr"] != config.lr
    if isinstance(scheduler, OneCycleLR):
        assert optimizer.param_groups[0]["betas"] != config.betas


def test_moving_betas_neither_rebuild_nor_pile_up():
    """A rule is made anew for every value of betas: each used to build, and keep, an n × n cosine matrix of its own."""
    weight = nn.Parameter(seeded(12, 9))
    optimizer = DCTAdamW([weight], rank=2)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=40)
    subspace._matrix.cache_clear()
    for step in range(30):
        run(optimizer, [weight], step, step + 1)
        scheduler.step()
    assert subspace._matrix.cache_info().misses == 1
    assert len(optimizer._rules) <= 2


# --- copies -----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_identically(config, how):
    params = weights()
    optimizer = make(config, params)
    run(optimizer, params, 0, 4)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    others = twin.param_groups[0]["params"]
    assert not any(a is b for a, b in zip(params, others, strict=True))
    before = copies(params)
    run(twin, others, 4, 8)
    assert equal(params, before)  # a copy shares nothing
    run(optimizer, params, 4, 8)
    assert equal(params, others)


@every
def test_a_pair_of_model_and_optimizer_stays_a_pair(config):
    model = nn.ParameterList(weights())
    optimizer = make(config, model.parameters())
    run(optimizer, list(model), 0, 2)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    assert all(a is b for a, b in zip(model2, optimizer2.param_groups[0]["params"], strict=True))
    run(optimizer2, list(model2), 2, 6)
    run(optimizer, list(model), 2, 6)
    assert equal(list(model), list(model2))
