"""Parameter groups, names, and the switches and values that are refused."""

import inspect
import io
from typing import Any, cast

import pytest
import torch
from cases import CONFIGS, copies, equal, give, make, run, snapshot, unchanged, weights
from laws import seeded
from torch import nn

from thinrank.optim import OPTIMIZERS, AdamW, DCTAdamW, GaLore, SubspaceAdamW
from thinrank.optim.optimizers import RankedGroups

# the one-wide matrices of `weights()` have one direction, and the optimizer says so
pytestmark = pytest.mark.filterwarnings("ignore:rank 3 is above the 1 directions")

every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


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
        options: dict[str, Any] = {"rank": 2} if "rank" in cls.Config.defaults() else {}
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


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS.values())
def test_defaults_are_said_once(cls):
    """A class takes the fields of its configuration, and shows them."""
    parameters = inspect.signature(cls).parameters
    expected = {**cls.Config.defaults(), "seed": 0}
    if issubclass(cls, RankedGroups):
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
    with pytest.raises(TypeError, match=f"AdamW: got an unexpected keyword argument '{key}'"):
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


def test_arguments_may_be_given_by_position_as_to_torch():
    optimizer = DCTAdamW([nn.Parameter(seeded(3, 3))], 0.5, (0.8, 0.9), 1e-6, 0.1, rank=1)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.9), 1e-6, 0.1)
    with pytest.raises(TypeError, match="DCTAdamW: too many positional arguments"):
        DCTAdamW([nn.Parameter(seeded(3, 3))], 0.5, (0.8, 0.9), 1e-6, 0.1, 4)


def test_a_group_may_leave_the_matrices_to_adamw():
    """`elementwise=True` says so for any method; `rank=None` for those that have a rank."""
    ends = []
    for options in ({"elementwise": True}, {"rank": None}):
        weight = nn.Parameter(seeded(6, 5))
        optimizer = DCTAdamW([{"params": [weight], **options}], rank=2)
        run(optimizer, [weight], 0, 3)
        assert optimizer.state[weight]["exp_avg"].shape == (6, 5)
        ends.append([weight])
    assert equal(*ends)
