"""What everybody expects of a torch optimizer, for every method and variant."""

import copy
import inspect
import io
import pickle
import warnings
from typing import Any, cast

import pytest
import torch
from cases import CONFIGS, LOW_RANK, copies, equal, give, make, run, snapshot, unchanged, weights
from laws import seeded
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, SequentialLR

from thinrank.optim import OPTIMIZERS, AdamW, DCTAdamW, GaLore, SubspaceAdamW
from thinrank.optim.lowrank import subspace

# the one-wide matrices of `weights()` have one direction, and the optimizer says so
pytestmark = pytest.mark.filterwarnings("ignore:rank 3 is above the 1 directions")

every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
low_rank = pytest.mark.parametrize("config", LOW_RANK.values(), ids=LOW_RANK)


# --- stepping ---------------------------------------------------------------------------------------------------------


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
    assert bool(optimizer.state[params[0]]["exp_avg"].any())


# --- groups -----------------------------------------------------------------------------------------------------------


@every
def test_a_group_added_later(config):
    params = weights()
    optimizer = make(config, params[:4])
    run(optimizer, params[:4], 0, 3)
    optimizer.add_param_group({"params": params[4:], "lr": 0.5})
    late = copies(params[4:])
    run(optimizer, params, 3, 5)
    assert [float(optimizer.state[p]["step"]) for p in params] == [5.0] * 4 + [2.0] * 4
    assert not any(torch.equal(a, b) for a, b in zip(late, params[4:], strict=True))


BAD_GROUPS = [
    ({"lr": -1.0}, "lr must be a number at least 0"),
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"betas": 0.9}, "betas must be two numbers"),
    ({"rank": 0}, "rank must be at least 1"),
    ({"update_proj_gap": 0}, "update_proj_gap must be at least 1"),
    ({"sections": (1, 2)}, "sections must be positive and add up"),
    ({"sections": 3}, "sections"),
    ({"blocks": 5}, "blocks must divide"),
    ({"weight_decay": float("nan")}, "weight_decay must be a number"),
]


@pytest.mark.parametrize(("bad", "sentence"), BAD_GROUPS, ids=[str(bad) for bad, _ in BAD_GROUPS])
def test_a_refused_group_leaves_the_optimizer_as_it_was(bad, sentence):
    params = weights()
    optimizer = DCTAdamW(params, rank=1)
    run(optimizer, params, 0, 2)
    state_before = len(optimizer.state)
    late = [nn.Parameter(seeded(4, 4)), nn.Parameter(seeded(8, 8))]
    with pytest.raises(ValueError, match=sentence) as caught:
        optimizer.add_param_group({"params": late, **bad})
    assert "\n" not in str(caught.value)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == state_before
    twin = DCTAdamW(copies(params), rank=1)
    twin.load_state_dict(optimizer.state_dict())
    other = twin.param_groups[0]["params"]
    run(optimizer, params, 2, 4)
    run(twin, other, 2, 4)
    assert equal(params, other)
    optimizer.add_param_group({"params": late})  # the same parameters, well


def test_what_cannot_be_stepped_is_refused():
    for cls in OPTIMIZERS.values():
        options: dict[str, Any] = {} if cls is AdamW else {"rank": 2}
        with pytest.raises(NotImplementedError, match=rf"{cls.__name__} steps real parameters; 0.0 is complex"):
            cls([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))], **options)
        with pytest.raises(ValueError, match=rf"{cls.__name__} steps floating-point parameters"):
            cls([nn.Parameter(torch.zeros(3, 3, dtype=torch.int64), requires_grad=False)], **options)


@every
def test_sparse_gradients_are_refused_before_anything_moves(config):
    table = nn.Embedding(5, 4, sparse=True)
    dense = nn.Parameter(seeded(6, 5))
    params = [dense, cast("nn.Parameter", table.weight)]
    optimizer = make(config, params)
    table(torch.tensor([1, 2])).sum().backward()
    dense.grad = seeded(6, 5)
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=f"{type(optimizer).__name__} needs dense gradients"):
        optimizer.step()
    assert unchanged(before, optimizer, params)


@every
def test_empty_groups_and_empty_parameters(config):
    empty, weight = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(seeded(6, 5))
    optimizer = make(config, [{"params": []}, {"params": [empty, weight]}])
    before = weight.detach().clone()
    for step in range(2):
        give([empty, weight], step)
        optimizer.step()
    assert not torch.equal(weight, before)
    optimizer.load_state_dict(optimizer.state_dict())


@every
def test_a_scalar_parameter(config):
    weight, scalar = nn.Parameter(seeded(6, 5)), nn.Parameter(torch.tensor(1.0))
    optimizer = make(config, [weight, scalar])
    give([weight, scalar], 0)
    optimizer.step()
    assert scalar.item() != 1.0


def test_named_parameters_and_pairs():
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    optimizer = DCTAdamW(net.named_parameters(), rank=2)
    assert optimizer.names(0) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == optimizer.names(0)
    optimizer = DCTAdamW([{"params": [("here", nn.Parameter(seeded(4, 4)))]}], rank=2)
    assert optimizer.names(0) == ["here"]


def test_names_decide_random_choices_and_places_do_not():
    """So that a model with its layers in another order, or on another rank, draws the same numbers."""
    ends = []
    for order in ([0, 1], [1, 0]):
        params = [nn.Parameter(seeded(12, 9, seed=i)) for i in range(2)]
        optimizer = SubspaceAdamW([(f"layer{i}", params[i]) for i in order], rank=2, update_proj_gap=2)
        run(optimizer, params, 0, 5)
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_another_seed_is_another_choice():
    starts = []
    for seed in (0, 0, 1):
        weight = nn.Parameter(seeded(20, 18))
        optimizer = SubspaceAdamW([weight], rank=2, seed=seed)
        run(optimizer, [weight], 0, 1)
        starts.append(optimizer.state[weight]["basis"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.allclose(starts[0], starts[2], atol=1e-3)


def test_sections_and_blocks_equal_separate_parameters():
    """A fused q, k, v weight steps like three, and heads step like matrices of their own."""
    fused = nn.Parameter(seeded(16, 6))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split([8, 4, 4])]
    optimizer = DCTAdamW([{"params": [fused], "sections": (8, 4, 4)}], rank=2, weight_decay=0.1)
    apart = DCTAdamW(parts, rank=2, weight_decay=0.1)
    heads = nn.Parameter(fused.detach().clone())
    single = [nn.Parameter(part.clone()) for part in fused.detach().split(4)]
    by_head = DCTAdamW([{"params": [heads], "blocks": 4}], rank=2, weight_decay=0.1)
    each = DCTAdamW(single, rank=2, weight_decay=0.1)
    for step in range(4):
        grad = seeded(16, 6, seed=step + 1)
        fused.grad, heads.grad = grad.clone(), grad.clone()
        for part, piece in zip(parts, grad.split([8, 4, 4]), strict=True):
            part.grad = piece.clone()
        for part, piece in zip(single, grad.split(4), strict=True):
            part.grad = piece.clone()
        for stepper in (optimizer, apart, by_head, each):
            stepper.step()
    torch.testing.assert_close(fused, torch.cat([*parts]))
    torch.testing.assert_close(heads, torch.cat([*single]))
    assert {"0.columns", "1.columns", "2.columns"} <= set(optimizer.state[fused])
    assert by_head.state[heads]["columns"].shape == (4, 2)


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


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS.values())
def test_defaults_are_said_once(cls):
    """The class's signature and the configuration's fields must not drift apart."""
    parameters = inspect.signature(cls).parameters
    expected = {**cls.Config.defaults(), "seed": 0}
    if cls is GaLore:
        expected["rank"] = None  # as in galore-torch, a group without a rank is not projected
    found = {name: p.default for name, p in parameters.items() if name != "params"}
    assert found == expected
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["params", "lr", "betas", "eps", "weight_decay"]
    loader = inspect.signature(cls.load_state_dict)
    assert loader.parameters.keys() == {"self", "state_dict"}  # torch calls it by keyword


@pytest.mark.parametrize("key", ["maximize", "amsgrad", "foreach", "fused", "capturable", "differentiable"])
def test_switches_of_torch_that_are_not_here_are_refused(key):
    """Not ignored: a run that asked to maximise must not minimise. (foreach and fused only say how fast.)"""
    with pytest.raises(TypeError, match=key):
        make(CONFIGS["adamw"], [nn.Parameter(seeded(3, 3))], **{key: True})
    if key not in ("foreach", "fused"):
        with pytest.raises(ValueError, match=f"AdamW has no {key}"):
            AdamW([{"params": [nn.Parameter(seeded(3, 3))], key: True}])
    AdamW([{"params": [nn.Parameter(seeded(3, 3))], key: False}])


def test_galore_without_a_rank_is_refused():
    with pytest.raises(ValueError, match="no parameter group has a rank"):
        GaLore([nn.Parameter(seeded(3, 3))])


def test_the_state_holds_tensors_only():
    for config in CONFIGS.values():
        params = weights()
        optimizer = make(config, params)
        run(optimizer, params, 0, 2)
        assert all(isinstance(v, torch.Tensor) for p in params for v in optimizer.state[p].values())
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
