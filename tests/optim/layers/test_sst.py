"""Sparse spectral training: both engines, both gradients, draws, swaps, rounds, and exact resumption."""

import copy
import itertools
from typing import Any

import pytest
import torch
from models import Mlp, batch, layers, loss_of, prepared, train

from thinrank.optim import AdamWConfig, GaLoreConfig
from thinrank.optim.layers import SST, Upkeep, convert, warmth
from thinrank.optim.layers.spectral import dense_cost, factor_cost
from thinrank.optim.linalg.factor import mixture

ENGINES = ("factors", "dense")


def spectral(rank=3, seed=0, dtype=torch.float64, **settings):
    model = Mlp(dtype=dtype)
    convert(model, SST(rank=rank, **{"every": 4, "warmup": 0, **settings}), seed=seed)
    return model


def gradients(layer, x, y):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * y).sum().backward()
    return x.grad, {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("engine", "rank", "layer"), list(itertools.product(ENGINES, (1, 3, 6), ("up", "down"))))
def test_default_gradients_by_finite_differences(engine, rank, layer):
    module = getattr(spectral(rank, gradient="default", engine=engine), layer)
    x = torch.randn(2, 3, module.in_features, dtype=torch.float64, requires_grad=True)
    names = ("U", "V", "s", "bias")

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *(module.get_parameter(key) for key in names)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", ["up", "square", "down"])
def test_enhanced_gradients_leave_out_the_singular_value(engine, layer):
    module = getattr(spectral(engine=engine), layer)
    x = torch.randn(7, module.in_features, dtype=torch.float64)
    y = torch.randn(7, module.out_features, dtype=torch.float64)
    dx, found = gradients(module, x, y)
    assert dx is not None
    g, order = y.mT @ x, module.order
    u = torch.cat([module.U, module.U_rest], 1) if module.U_rest is not None else module.U
    v = torch.cat([module.V, module.V_rest], 1) if module.V_rest is not None else module.V
    assert torch.allclose(found["U"], g @ module.V, atol=1e-12)
    assert torch.allclose(found["V"], g.mT @ module.U, atol=1e-12)
    expected = torch.empty_like(module.s)
    expected[order] = (u * (g @ v)).sum(0)
    assert torch.allclose(found["s"], expected, atol=1e-12)
    assert torch.allclose(dx, y @ module.weight(), atol=1e-12)
    assert "U_rest" not in found


@pytest.mark.parametrize("gradient", ["enhanced", "default"])
def test_the_engines_are_interchangeable(gradient):
    found = {}
    for engine in ENGINES:
        model = spectral(gradient=gradient, engine=engine)
        optimizer, _ = prepared(model)
        train(model, optimizer, range(10))
        found[engine] = model.state_dict()
    for key, value in found["factors"].items():
        assert torch.allclose(value, found["dense"][key], atol=1e-9), key


def test_the_engine_is_the_cheaper_one():
    layer = spectral(rank=2, engine="auto").square
    turning = next(n for n in range(1, 1000) if layer.engine(n) == "dense")
    sizes = (10, 10, 10, 2)
    assert dense_cost(turning, *sizes, trained=True) < factor_cost(turning, *sizes, trained=True)
    assert dense_cost(turning - 1, *sizes, trained=True) >= factor_cost(turning - 1, *sizes, trained=True)
    with torch.no_grad():  # one direction alone: W is built once, for 10 tokens of what it costs
        assert layer.engine(11) == "dense"
        assert layer.engine(10) == "factors"


def test_bfloat16_autocast_rounds_factors_and_keeps_gradients_in_float32():
    for engine in ENGINES:
        model = spectral(dtype=torch.float32, engine=engine)
        x = batch(0, dtype=torch.float32)[0]
        exact = model.up(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model.up(x)
        assert rounded.dtype == torch.bfloat16
        assert (rounded - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
        rounded.float().square().sum().backward()
        assert model.up.U.grad.dtype == torch.float32


# --- between steps ----------------------------------------------------------------------------------------------------


def test_the_rules_hold_after_every_step():
    model = spectral(iterations=2)
    optimizer, _ = prepared(model)
    for step in range(20):
        before = {name: (layer.order.clone(), layer.U_rest) for name, layer in layers(model).items()}
        rest: Any = {name: None if u is None else u.detach().clone() for name, (_, u) in before.items()}
        train(model, optimizer, range(step, step + 1))
        for name, layer in layers(model).items():
            assert (layer.s >= 0).all()
            for vectors in (layer.U, layer.V):
                assert torch.allclose(vectors.norm(dim=0), torch.ones(3, dtype=torch.float64), atol=1e-12)
            if (step + 1) % 4:  # frozen columns to the bit within an iteration
                assert torch.equal(layer.order, before[name][0])
                assert torch.equal(layer.U_rest, rest[name])
            assert sorted(layer.order.tolist()) == list(range(layer.short))
            assert int(layer.clock) == step + 1


def test_a_resampling_and_a_round_leave_the_function_and_forget_the_vectors():
    """At step 4 others are drawn; at step 8 the SVD is made anew as well."""
    model = spectral(iterations=2)
    optimizer, upkeep = prepared(model)
    upkeep.detach()
    for due, forgotten in ((4, ("U", "V")), (8, ("U", "V", "s"))):
        optimizer, upkeep = prepared(model)
        train(model, optimizer, range(int(model.up.clock), due - 1))
        upkeep.detach()
        train(model, optimizer, range(due - 1, due))
        with torch.no_grad():
            for layer in layers(model).values():
                layer.s.clamp_(min=0)
                for vectors in (layer.U, layer.V):
                    vectors /= vectors.norm(dim=0)
        weights = {name: layer.weight().detach().clone() for name, layer in layers(model).items()}
        orders = [layer.order.clone() for layer in layers(model).values()]
        upkeep = Upkeep(model, optimizer)
        upkeep.after()
        changed = [not torch.equal(a, b.order) for a, b in zip(orders, layers(model).values(), strict=True)]
        assert any(changed)
        for name, layer in layers(model).items():
            assert torch.allclose(layer.weight(), weights[name], atol=1e-12), name
            for key in ("U", "V", "s"):
                state = optimizer.state[layer.get_parameter(key)]
                assert bool(state["exp_avg"].any()) == (key not in forgotten), (due, name, key)
                assert float(state["step"]) == (0.0 if key in forgotten else float(state["step"]))
            if "s" in forgotten:
                u = torch.cat([layer.U, layer.U_rest], 1)
                assert torch.allclose(u.mT @ u, torch.eye(layer.short, dtype=torch.float64), atol=1e-12)
                assert (layer.s.diff() <= 0).all()
        upkeep.detach()


def test_all_pairs_and_plain_descent_are_descent_on_the_factors():
    """r = k, default gradient, no normalisation, SGD: what autograd makes of U diag(s) Vᵀ."""
    model = spectral(rank=6, gradient="default")
    layer = model.up
    factors = [p.detach().clone().requires_grad_() for p in (layer.U, layer.s, layer.V)]
    assert layer.U_rest is None
    x, _ = batch(0)
    order = layer.order
    ((x @ (factors[0] * factors[1][order] @ factors[2].mT).mT + layer.bias.detach()).sin()).sum().backward()
    layer(x).sin().sum().backward()
    for mine, theirs in zip((layer.U, layer.s, layer.V), factors, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-12)


def test_who_is_drawn():
    model = spectral(rank=3)
    layer = model.square
    s = torch.tensor([8.0, 4.0, 2.0] + [0.0] * 7)
    counts = {}
    for sampling in ("mixture", "spectrum", "uniform", "top"):
        layer.config = SST(rank=3, sampling=sampling)
        chosen = [layer.chosen(s, torch.Generator().manual_seed(i)) for i in range(600)]
        assert all(len(set(c.tolist())) == 3 for c in chosen)
        counts[sampling] = torch.bincount(torch.cat(chosen), minlength=10) / 600
    assert counts["top"].tolist() == [1, 1, 1] + [0] * 7
    assert counts["spectrum"].tolist() == [1, 1, 1] + [0] * 7  # no others have any weight
    assert (counts["uniform"] - 0.3).abs().max() < 0.08
    assert counts["mixture"][0] > counts["mixture"][1] > counts["mixture"][3] > 0
    assert mixture(s)[0] > mixture(s)[9] > 0


def test_equal_seeds_draw_alike_and_others_do_not():
    orders = []
    for seed in (0, 0, 1):
        model = spectral(rank=2)
        optimizer, _ = prepared(model, seed=seed)
        train(model, optimizer, range(8))
        orders.append(torch.cat([layer.order for layer in layers(model).values()]))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("config", [AdamWConfig(lr=1e-2), GaLoreConfig(lr=1e-2, rank=2, update_proj_gap=3)])
@pytest.mark.parametrize("at", [3, 4, 6, 8])
def test_a_run_that_was_cut_goes_on_to_the_bit(config, at, tmp_path):
    def fresh():
        model = spectral(rank=3, iterations=2)
        return model, *prepared(model, config)

    model, optimizer, _ = fresh()
    train(model, optimizer, range(14))
    cut, first, _ = fresh()
    train(cut, first, range(at))
    torch.save({"model": cut.state_dict(), "optimizer": first.state_dict()}, tmp_path / "cut.pt")
    found = torch.load(tmp_path / "cut.pt", weights_only=True)
    again, second, _ = fresh()  # its upkeep was there before loading
    train(again, second, range(2))
    again.load_state_dict(found["model"])
    second.load_state_dict(found["optimizer"])
    train(again, second, range(at, 14))
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_any_optimizer_of_torch_is_attended():
    model = spectral(iterations=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    upkeep = Upkeep(model, optimizer)
    train(model, optimizer, range(4))
    assert int(model.up.clock) == 4
    assert not optimizer.state[model.up.U]["exp_avg"].any()
    assert optimizer.state[model.up.s]["exp_avg"].any()
    upkeep.detach()
    train(model, optimizer, range(1))
    assert int(model.up.clock) == 4


def test_a_step_without_gradients_leaves_values_to_the_bit():
    model = spectral()
    optimizer, _ = prepared(model)
    train(model, optimizer, range(2))
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if not k.endswith("clock"))


def test_a_dry_run_of_a_distributed_checkpoint_leaves_no_trace():
    model = spectral()
    optimizer, _ = prepared(model)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_rates_rise_again_in_every_iteration():
    model = spectral(every=8, warmup=4)
    factor: Any = warmth(model)
    assert [factor(step) for step in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.25, 0.5]


def test_training_lowers_the_loss_and_more_with_enhanced_gradients_where_s_is_zero():
    for gradient in ("enhanced", "default"):
        model = spectral(gradient=gradient)
        optimizer, _ = prepared(model)
        first = loss_of(model, 0).item()
        train(model, optimizer, range(40))
        assert loss_of(model, 0).item() < 0.9 * first
    layer = spectral(gradient="default").up
    with torch.no_grad():
        layer.s.zero_()
    layer(batch(0)[0]).sum().backward()
    assert not layer.U.grad.any()  # the default gradient is dead there
    layer.config = SST(rank=3)
    layer.zero_grad()
    layer(batch(0)[0]).sum().backward()
    assert layer.U.grad.any()


def test_two_attendants_and_backward_that_steps_are_refused():
    model = spectral()
    optimizer, _ = prepared(model)
    with pytest.raises(ValueError, match="somebody attends to this optimizer's steps already"):
        Upkeep(model, optimizer)
    model = spectral()
    optimizer, upkeep = prepared(model)
    upkeep.detach()
    optimizer.in_backward("step")
    with pytest.raises(ValueError, match="leave in_backward out"):
        Upkeep(model, optimizer)
