"""What a step of every method and variant must and must not do, as everybody expects of a torch optimizer."""

import copy

import pytest
import torch
from cases import CONFIGS, copies, equal, give, make, run, snapshot, unchanged, weights

from thinrank.optim import DCTAdamW

# the one-wide matrices of `weights()` have one direction, and the optimizer says so
pytestmark = pytest.mark.filterwarnings("ignore:rank 3 is above the 1 directions")

every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every
def test_closure_runs_with_gradients_on_and_its_loss_comes_back(config):
    params = weights()
    optimizer = make(config, params)
    before = copies(params)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.stack([(p**2).sum() for p in params]).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(sum((p.detach() ** 2).sum().item() for p in before), rel=1e-4)
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert optimizer.step() is None


def test_hooks_fire_in_order():
    params = weights()
    optimizer = DCTAdamW(params, rank=1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before save"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("after save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after load"))
    run(optimizer, params, 0, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before step", "after step", "before save", "after save", "before load", "after load"]


def test_a_load_hook_may_replace_what_is_loaded():
    params = weights()
    optimizer = DCTAdamW(params, rank=1)
    run(optimizer, params, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    other = DCTAdamW(copies(params), rank=1)
    other.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": saved["state"]})
    other.load_state_dict({"param_groups": saved["param_groups"], "state": {}})
    assert float(other.state_dict()["state"][0]["step"]) == 2


@every
def test_zero_grad_both_ways(config):
    params = weights()
    optimizer = make(config, params)
    run(optimizer, params, 0, 2)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    before = snapshot(optimizer, params)
    optimizer.step()  # nothing to do
    assert unchanged(before, optimizer, params)


@every
def test_parameters_without_gradient_stay_as_they_are(config):
    """Bit by bit: no decay, no momentum, no age; also where others of their bucket have one."""
    params = weights()
    optimizer = make(config, params, weight_decay=0.5)
    run(optimizer, params, 0, 4)
    for without in ((0,), (1, 3, 5), (2, 4, 6, 7)):
        frozen = [params[i] for i in without]
        before = snapshot(optimizer, frozen)
        moving = copies(params)
        give(params, 10, without=without)
        optimizer.step()
        assert unchanged(before, optimizer, frozen)
        for i, (p, old) in enumerate(zip(params, moving, strict=True)):
            assert torch.equal(p, old) == (i in without)


@every
def test_partly_present_gradients_equal_separate_optimizers(config):
    """Counts differ between the matrices of one bucket then, and renewals fall on different steps."""
    params = weights()
    alone = copies(params)
    optimizer = make(config, [(f"p{i}", p) for i, p in enumerate(params)])
    optimizers = [make(config, [(f"p{i}", p)]) for i, p in enumerate(alone)]
    for step in range(9):
        without = tuple(i for i in range(len(params)) if (step + i) % 3 == 0) if step != 4 else tuple(range(8))
        give(params, step, without=without)
        give(alone, step, without=without)
        optimizer.step()
        for each in optimizers:
            each.step()
    for p, a in zip(params, alone, strict=True):
        torch.testing.assert_close(p, a, rtol=1e-4, atol=1e-5)


@every
def test_gradients_are_not_touched(config):
    params = weights()
    optimizer = make(config, params)
    for step in range(4):
        give(params, step)
        grads = [p.grad for p in params]
        versions = [g.clone() for g in grads if g is not None]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert all(torch.equal(p.grad, v) for p, v in zip(params, versions, strict=True) if p.grad is not None)


@every
def test_no_global_generator_is_read_or_moved(config):
    ends = []
    for seed in (1, 2):
        params = weights()
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        optimizer = make(config, params)
        run(optimizer, params, 0, 5)
        assert torch.equal(torch.random.get_rng_state(), before)
        ends.append(params)
    assert equal(*ends)


@every
def test_the_dry_step_of_a_distributed_checkpoint_leaves_no_trace(config):
    """torch performs `step()` with zero gradients at lr 0 to have state exist; here it exists already."""
    for first in (0, 4):
        params = weights()
        optimizer = make(config, params, weight_decay=0.1)
        run(optimizer, params, 0, first)
        before = snapshot(optimizer, params)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.0) if first else 0.0
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step(closure=None)
        assert unchanged(before, optimizer, params)


@every
def test_a_real_step_at_lr_zero_moves_moments_only(config):
    """Warm-ups begin at 0: the weights stay, the moments do not."""
    params = weights()
    optimizer = make(config, params)
    optimizer.param_groups[0]["lr"] = 0.0
    before = copies(params)
    run(optimizer, params, 0, 2)
    assert equal(params, before)
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params)
    moments = [v for key, v in optimizer.state[params[0]].items() if key.startswith(("exp_avg", "momentum"))]
    assert any(bool(v.any()) for v in moments)
