"""Ordered factors: what is drawn, what it finds, what is dropped."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from thinrank.optim import AdamWConfig, build
from thinrank.optim.layers import Maestro, Upkeep, convert, layers, merge, penalty, shrink
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.optim.layers.maestro import MaestroLinear


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 9, **more), nn.Linear(9, 5, bias=False, **more)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def net(seed: int = 0, **config: Any) -> Net:
    torch.manual_seed(seed)
    made = Net()
    convert(made, Maestro(**config))
    return made


def parts(model: nn.Module) -> list[MaestroLinear]:
    return [layer for layer in layers(model).values() if isinstance(layer, MaestroLinear)]


def cuts(model: nn.Module) -> list[int]:
    return [layer.known("cut") for layer in parts(model)]


def train(model: Net, optimizer: Any, steps: int, first: int = 0, micro: int = 1) -> list[list[int]]:
    """Returns the cuts that were used."""
    used = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        used.append(cuts(model))
        for part in range(micro):
            x = numbers(16, 6, seed=10 * step + part)
            loss = (model(x) - torch.sin(x[:, :5])).square().mean()
            add = penalty(model)
            assert add is not None
            ((loss + add) / micro).backward()
            assert cuts(model) == used[-1]
        optimizer.step()
    return used


def test_it_begins_as_the_layer_it_replaces():
    torch.manual_seed(0)
    model = Net()
    x = numbers(4, 6)
    y = model(x)
    convert(model, Maestro())
    torch.testing.assert_close(model(x), y)
    one, two = parts(model)
    assert one.U.shape == (9, 6)
    assert one.V.shape == (6, 6)
    assert two.U.shape == (5, 5)
    assert two.V.shape == (9, 5)
    for layer in (one, two):  # balanced, and columns by falling length
        lengths = layer.U.detach().norm(dim=0)
        torch.testing.assert_close(lengths, layer.V.detach().norm(dim=0))
        assert bool((lengths[:-1] >= lengths[1:]).all())


def test_the_model_of_rank_b_has_the_first_b_columns():
    layer = parts(net())[0]
    assert layer.bias is not None
    x = numbers(4, 6)
    for b in range(7):
        layer.note_("cut", b)
        expected = x @ (layer.U[:, :b] @ layer.V[:, :b].mT).mT + layer.bias
        torch.testing.assert_close(layer.train()(x), expected)
        torch.testing.assert_close(layer.eval()(x), x @ layer.weight().mT + layer.bias)
    layer.train().note_("cut", 2)
    layer(x).sum().backward()
    for factor in (layer.U, layer.V):  # all have gradients, as DDP wants; what took no part has zeros
        assert factor.grad is not None
        assert bool((factor.grad[:, :2] != 0).all())
        assert not bool(factor.grad[:, 2:].any())


def test_lasso_is_its_formula_and_its_gradient_is_finite_at_zero():
    model = net(lasso=0.3)
    expected = 0.0
    for layer in parts(model):
        for factor in (layer.U.detach(), layer.V.detach()):
            expected += 0.3 * sum(float(factor[:, b:].norm()) for b in range(factor.shape[1]))
    got = penalty(model)
    assert got is not None
    torch.testing.assert_close(got.detach(), torch.tensor(expected))
    layer = parts(model)[0]
    with torch.no_grad():
        layer.U[:, 3:] = 0
    layer.penalty().backward()
    assert layer.U.grad is not None
    assert bool(torch.isfinite(layer.U.grad).all())
    assert not bool(layer.U.grad[:, 3:].any())
    u = layer.U.detach()[:, :3].double()
    by_hand = torch.zeros_like(u)
    for b in range(3):
        by_hand[:, b:] += 0.3 * u[:, b:] / u[:, b:].norm()
    torch.testing.assert_close(layer.U.grad[:, :3].double(), by_hand)
    layer.note_("width", 2)  # what is gone adds nothing
    expected = 0.3 * sum(float(f.detach()[:, b:2].norm()) for f in (layer.U, layer.V) for b in range(2))
    torch.testing.assert_close(layer.penalty().detach(), torch.tensor(expected))


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_all_pairs_are_used_before_one_is_used_again():
    model = net(every=None)
    optimizer = build(model, AdamWConfig(lr=1e-3))
    upkeep = Upkeep(model, optimizer, seed=3)
    before = torch.random.get_rng_state()
    used = train(model, optimizer, 23, micro=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert used[0] == [6, 5]  # nothing is drawn for the first step
    pairs = {(0, b) for b in range(1, 7)} | {(1, b) for b in range(1, 6)}
    rounds = [used[1:12], used[12:23]]
    for each in rounds:
        assert all(cut[0] == 6 or cut[1] == 5 for cut in each)  # one layer at a time
        ones = sorted(cut[0] for cut in each if cut[0] < 6), sorted(cut[1] for cut in each if cut[1] < 5)
        assert ones == ([1, 2, 3, 4, 5], [1, 2, 3, 4])
        assert sum(cut == [6, 5] for cut in each) == len(pairs) - 9  # (0, 6) and (1, 5) are the whole model
    assert rounds[0] != rounds[1]
    upkeep.detach()


def test_each_layer_draws_for_itself_across_layers():
    model = net(sampler="across_layers", every=None)
    optimizer = build(model, AdamWConfig(lr=1e-3))
    Upkeep(model, optimizer)
    used = train(model, optimizer, 200)[1:]
    for place, width in enumerate((6, 5)):
        counts = torch.bincount(torch.tensor([cut[place] for cut in used]), minlength=width + 1)
        assert counts[0] == 0
        assert int(counts[1:].min()) > 0.4 * len(used) / width
    assert len({tuple(cut) for cut in used}) > 25


@pytest.mark.parametrize("sampler", ["per_layer", "across_layers"])
def test_draws_depend_on_the_seed_and_a_resumed_run_goes_on(sampler):
    def begin(seed: int = 1) -> tuple[Net, Any]:
        model = net(sampler=sampler, every=4, eps=0.05, lasso=0.02)
        optimizer = build(model, AdamWConfig(lr=0.02))
        Upkeep(model, optimizer, seed=seed)
        return model, optimizer

    whole, optimizer = begin()
    used = train(whole, optimizer, 30)
    assert train(*begin(2), 30) != used
    one, optimizer = begin()
    assert train(one, optimizer, 17) == used[:17]
    saved = copy.deepcopy((one.state_dict(), optimizer.state_dict()))
    two, optimizer = begin()
    two.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(two, optimizer, 13, first=17) == used[17:]
    assert any(layer.known("width") < layer.rank for layer in parts(two))
    for a, b in zip(whole.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# --- what it finds ----------------------------------------------------------------------------------------------------


def test_of_a_linear_map_it_finds_the_singular_triples_in_order():
    """Isotropic x, factors that begin at random: their first b columns become the best approximation of rank b."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(numbers(n, 4, seed=n))[0] for n in (7, 4))
    s = torch.tensor([3.0, 2.0, 1.2, 0.6])
    target = left * s @ right.mT
    model = nn.Sequential(nn.Linear(4, 7, bias=False))
    convert(model, Maestro(sampler="across_layers", every=None))
    layer = parts(model)[0]
    with torch.no_grad():
        for seed, factor in enumerate((layer.U, layer.V)):
            factor.copy_(0.5 * numbers(*factor.shape, seed=seed))
    optimizer = build(model, AdamWConfig(lr=0.03, betas=(0.9, 0.99)))
    Upkeep(model, optimizer)
    steps, x = 1200, torch.eye(4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        optimizer.zero_grad()
        F.mse_loss(model(x), target.mT).backward()
        optimizer.step()
    for b in range(1, 5):
        best = left[:, :b] * s[:b] @ right[:, :b].mT
        got = layer.U[:, :b].detach() @ layer.V[:, :b].detach().mT
        assert float((got - best).norm()) < 0.03 * float(s[0])


def test_a_lasso_narrows_to_the_rank_of_the_map():
    torch.manual_seed(0)
    target = numbers(8, 2) @ numbers(2, 6, seed=1)
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    convert(model, Maestro(lasso=1e-2, eps=0.02, every=100, sampler="across_layers"))
    optimizer = build(model, AdamWConfig(lr=0.02))
    Upkeep(model, optimizer)
    steps = 1000
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        x = numbers(32, 6, seed=step)
        add = penalty(model)
        assert add is not None
        optimizer.zero_grad()
        (F.mse_loss(model(x), x @ target.mT) + add).backward()
        optimizer.step()
    layer = parts(model)[0]
    assert layer.known("width") == 2
    assert layer.U.shape == (8, 6)  # so that the optimizer's state fits
    model.eval()
    x = numbers(50, 6, seed=5000)
    y = model(x).detach()
    assert float((y - x @ target.mT).norm()) < 0.05 * float(y.norm())
    del optimizer
    assert shrink(model) == {"0": 2}
    torch.testing.assert_close(model(x), y)


# --- what is dropped --------------------------------------------------------------------------------------------------


def test_narrowing_is_by_importance_and_never_undone():
    model = net(eps=0.01, every=1)
    optimizer = build(model, AdamWConfig(lr=0.0))
    upkeep = Upkeep(model, optimizer)
    one, two = parts(model)
    with torch.no_grad():
        one.U[:, 4:] *= 1e-6
        two.V[:] = 0
    train(model, optimizer, 1)
    assert [one.known("width"), two.known("width")] == [4, 0]
    with torch.no_grad():
        one.U[:, 4:] = 1.0
    used = train(model, optimizer, 8, first=1)
    assert one.known("width") == 4
    assert sorted(cut[0] for cut in used[:4]) == [1, 2, 3, 4]  # shuffled anew, and a layer of width 0 has no pair
    x = numbers(3, 6)
    assert not bool(model.eval()(x).any())
    with torch.no_grad():
        one.V[0, 0] = float("nan")
    upkeep.after()
    assert one.known("width") == 4  # a step that went wrong drops nothing


def test_shrink_keeps_the_function_and_takes_the_smaller_form():
    model = net().eval()
    parts(model)[0].note_("width", 2)
    x = numbers(4, 6)
    y = model(x)
    assert shrink(model) == {"one": 2, "two": None}  # (9 + 5) 5 > 45
    assert isinstance(model.one, LowRankLinear)
    assert type(model.two) is nn.Linear
    assert not model.one.training
    torch.testing.assert_close(model(x), y)
    merge(model)
    torch.testing.assert_close(model(x), y)
    model = net().eval()
    for layer in parts(model):
        layer.note_("width", 0)
    y = model(x)
    assert shrink(model) == {"one": 0, "two": 0}
    torch.testing.assert_close(model(x), y)


def test_shrink_refuses_what_would_go_wrong():
    model = net()
    optimizer = build(model, AdamWConfig())
    with pytest.raises(ValueError, match="an optimizer steps the factors of one"):
        shrink(model, optimizer)
    with pytest.raises(ValueError, match=r"no layer of Maestro: convert\(model, Maestro\(\)\)"):
        shrink(Net())


# --- several ranks ----------------------------------------------------------------------------------------------------


def on_ranks(sampler: str, sharded: bool = False) -> tuple[list[list[int]], list[int], list[Tensor]]:
    """Every rank has its share of the rows; returns what was cut, what is left, and the weights."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bare: Any = net(sampler=sampler, every=3, eps=0.1, lasso=0.02)
    model = bare
    if sharded:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh("cpu", (size,))
        for layer in parts(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = build(bare, AdamWConfig(lr=0.02))
    upkeep, used = Upkeep(bare, optimizer, seed=4), []  # of the model itself, whose names are those of one process
    for step in range(14):
        x = numbers(16, 6, seed=step).chunk(size)[rank]
        add = penalty(model)
        assert add is not None
        optimizer.zero_grad()
        ((model(x) - torch.sin(x[:, :5])).square().mean() + add).backward()
        used.append(cuts(model))
        optimizer.step()
    upkeep.detach()
    weights: list[Any] = [p.detach() for p in model.parameters()]
    return (
        used,
        [layer.known("width") for layer in parts(model)],
        [getattr(w, "full_tensor", w.clone)() for w in weights],
    )


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("sampler", ["per_layer", "across_layers"])
def test_ranks_draw_alike_and_train_as_one_process_does(ranks, sampler, sharded):
    alone = on_ranks(sampler)
    assert sum(alone[1]) < 11
    for used, widths, weights in ranks(2).run(on_ranks, sampler, sharded):
        assert (used, widths) == alone[:2]
        torch.testing.assert_close(weights, alone[2], rtol=1e-3, atol=1e-4)


# --- what all layers do -----------------------------------------------------------------------------------------------


def test_copies_checkpoints_and_merged_models_are_the_same():
    model = net(every=None)
    optimizer = build(model, AdamWConfig(lr=1e-2))
    upkeep = Upkeep(model, optimizer)
    train(model, optimizer, 5)
    parts(model)[0].note_("width", 4)
    x = numbers(4, 6)
    for mode in (True, False):
        model.train(mode)
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        other = net(seed=9).train(mode)
        other(x)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), y)
    upkeep.detach()
    del optimizer
    merge(model)
    assert type(model.one) is nn.Linear
    torch.testing.assert_close(model(x), model.eval()(x))
    torch.testing.assert_close(model(x), y)


def test_on_the_meta_device_it_has_the_same_shapes():
    model = Net(device="meta")
    convert(model, Maestro())
    state = net().state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    model.load_state_dict(state, assign=True)
    x = numbers(2, 6)
    assert torch.equal(model(x), net()(x))


def test_training_lowers_the_loss():
    model = net(lasso=1e-4)
    optimizer = build(model, AdamWConfig(lr=1e-2))
    Upkeep(model, optimizer)
    x = numbers(256, 6, seed=77)

    def loss() -> float:
        model.eval()
        value = (model(x) - torch.sin(x[:, :5])).square().mean().item()
        model.train()
        return value

    first = loss()
    train(model, optimizer, 60)
    assert loss() < 0.6 * first


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sampler": "per_layers"}, "sampler must be one of per_layer, across_layers, got 'per_layers' .did you mean"),
        ({"lasso": -1.0}, "lasso must be a number at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be a number at least 0, got nan"),
        ({"every": 0}, "every must be at least 1 step, got 0"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Maestro(**values)


def test_a_weight_that_is_not_finite_is_refused():
    dense = nn.Linear(3, 3)
    nn.init.constant_(dense.weight, float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        Maestro().layer(Dense.of(dense), torch.Generator())
