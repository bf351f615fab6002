"""Layers of two factors and what stands beside them: values, gradients, degenerate cases."""

import copy
from typing import Any

import pytest
import torch
from models import Mlp, batch, layers, loss_of, prepared, train
from torch.nn import functional as F

from thinrank.optim.layers import LORO, LOST, CoLA, LowRank, ReLoRA, SLTrain, convert, warmth
from thinrank.optim.layers.lost import strongest_columns
from thinrank.optim.linalg.factor import singular

CONFIGS = {
    "lowrank": LowRank(rank=3),
    "cola": CoLA(rank=3),
    "lost": LOST(rank=3, delta=0.4, gamma=0.7),
    "lost/gathered": LOST(rank=2, delta=0.8),
    "lost/linear": LOST(rank=3, delta=0.4, act="identity", selection="random"),
    "sltrain": SLTrain(rank=3, delta=0.2),
    "loro": LORO(rank=3, every=3, warmup=0),
    "relora": ReLoRA(rank=3, every=3, warmup=0),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layer", ["up", "square", "down"])
def test_gradients_by_finite_differences(name, layer):
    model = Mlp()
    convert(model, CONFIGS[name])
    module = getattr(model, layer)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 2, module.in_features, dtype=torch.float64, requires_grad=True)
    names = [key for key, p in module.named_parameters() if p.requires_grad]

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *(module.get_parameter(key) for key in names)))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_autocast_is_the_product_of_rounded_factors(name):
    model = Mlp(dtype=torch.float32)
    convert(model, CONFIGS[name])
    x = torch.randn(16, 6)
    exact = model.up(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.up(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    rounded.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.up.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss(name):
    model = Mlp()
    convert(model, CONFIGS[name])
    optimizer, _ = prepared(model)
    first = loss_of(model, 0).item()
    train(model, optimizer, range(60))
    assert loss_of(model, 0).item() < 0.9 * first


def test_lost_is_its_formula():
    model = Mlp()
    weight, bias = model.up.weight.detach().clone(), model.up.bias
    convert(model, LOST(rank=2, delta=0.5, gamma=0.3, residual=3))
    layer, x = model.up, batch(0)[0]
    u, s, v = singular(weight)
    residual = u[:, 2:5] * s[2:5] @ v[:, 2:5].mT
    index = residual.norm(dim=0).topk(3).indices.sort().values
    assert torch.equal(layer.index.long(), index)
    z = x @ (v[:, :2] * s[:2].sqrt())
    expected = 0.3 * F.silu(z) @ (u[:, :2] * s[:2].sqrt()).mT + 0.7 * x[:, index] @ weight[:, index].mT + bias
    assert torch.allclose(layer(x), expected, atol=1e-12)


def test_lost_of_all_columns_is_the_dense_layer_beside_its_factors():
    model = Mlp()
    dense = copy.deepcopy(model.up)
    convert(model, LOST(rank=6, delta=1.0, gamma=0.25, act="identity"))
    x = batch(0)[0]
    assert torch.allclose(model.up(x), dense(x), atol=1e-12)  # γ W + (1 − γ) W


def test_the_strongest_columns_are_told_by_their_norms():
    weight = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 2.5, 0.0, 2.0]])
    assert strongest_columns(weight, 2).tolist() == [2, 3]


def test_cola_begins_with_the_variance_of_its_formula():
    model = torch.nn.Sequential(torch.nn.Linear(300, 500, bias=False))
    convert(model, CoLA(rank=100))
    (layer,) = layers(model).values()
    product = (layer.B @ layer.A).detach()
    assert product.var().item() == pytest.approx(1 / 800, rel=0.05)


def test_sltrain_is_a_dense_weight_of_two_parts():
    model = Mlp()
    convert(model, SLTrain(rank=2, delta=0.25, alpha=4.0))
    layer = model.square
    with torch.no_grad():
        layer.B.normal_()
    dense = 2.0 * layer.B @ layer.A
    sparse = torch.zeros(100, dtype=torch.float64)
    sparse[layer.index] = layer.values.detach()
    assert len(layer.values) == 25
    assert torch.allclose(layer.weight(), dense + sparse.view(10, 10))
    assert (layer.values.abs() <= 10**-0.5).all()
    x = torch.randn(4, 10, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ (dense + sparse.view(10, 10)).mT)


# --- what acts between steps ------------------------------------------------------------------------------------------


def test_relora_merges_without_a_change_of_the_function_and_starts_anew():
    model = Mlp()
    convert(model, ReLoRA(rank=2, every=4, warmup=2, keep=0.0))
    optimizer, upkeep = prepared(model)
    x, base = batch(0)[0], model.up.base.detach().clone()
    train(model, optimizer, range(3))
    assert torch.equal(model.up.base, base)
    upkeep.detach()
    train(model, optimizer, range(3, 4))
    before, drawn = model(x), model.up.A.detach().clone()
    again = copy.deepcopy(model)
    optimizer, upkeep = prepared(again)
    assert int(again.up.clock) == 3
    upkeep.after()  # as after a fourth step
    assert torch.allclose(again(x), before, atol=1e-12)
    assert not again.up.B.any()
    assert again.up.A.any()
    assert not torch.equal(again.up.A, drawn)
    assert not torch.equal(again.up.base, base)


def test_relora_forgets_or_prunes_the_moments_of_its_factors():
    for keep, share in ((0.0, 0.0), (0.25, 0.25)):
        model = Mlp()
        convert(model, ReLoRA(rank=4, every=4, warmup=0, keep=keep))
        optimizer, _ = prepared(model)
        train(model, optimizer, range(4))
        state = optimizer.state[model.square.B]
        assert state["exp_avg"].ne(0).double().mean().item() == pytest.approx(share, abs=0.05)
        assert float(state["step"]) == (4.0 if keep else 0.0)
        assert optimizer.state[model.up.bias]["exp_avg"].any()


def test_moments_of_eight_bits_cannot_be_pruned():
    from thinrank.optim import AdamWConfig

    model = torch.nn.Sequential(torch.nn.Linear(96, 96))
    convert(model, ReLoRA(rank=64, every=1, warmup=0))
    optimizer, _ = prepared(model, AdamWConfig(state_bits=8))
    model(torch.randn(2, 96)).sum().backward()
    with pytest.raises(ValueError, match="use optimizer=adamw with state_bits=32, or keep=0"):
        optimizer.step()


def test_rates_rise_again_after_a_merge():
    model = Mlp()
    assert warmth(model) is None
    convert(model, ReLoRA(rank=2, every=10, warmup=4))
    factor: Any = warmth(model)
    assert [factor(step) for step in (0, 5, 9, 10, 11, 12, 13, 14, 20)] == [1, 1, 1, 0, 0.25, 0.5, 0.75, 1, 0]


def test_lora_from_random_weights_never_merges():
    model = Mlp()
    convert(model, ReLoRA(rank=2, every=None))
    optimizer, _ = prepared(model)
    base = model.up.base.detach().clone()
    train(model, optimizer, range(5))
    assert torch.equal(model.up.base, base)
    assert int(model.up.clock) == 0


def test_loros_exact_step_is_that_of_the_manifold():
    """With plain descent the factors' steps are η G N and η Gᵀ M, so that the law of `riemannian_step` holds."""
    from thinrank.optim.layers import Upkeep

    model = Mlp()
    convert(model, LORO(rank=3, every=1, warmup=0))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    Upkeep(model, plain)
    layer = model.square
    m, n = layer.B.detach().clone(), layer.A.detach().mT.clone()
    dense = (m @ n.mT).requires_grad_()

    def dense_loss():
        x, y = batch(0)
        h = torch.tanh(torch.tanh(model.up(x)) @ dense.mT)
        return F.mse_loss(model.last(model.down(h)), y)

    (g,) = torch.autograd.grad(dense_loss(), dense)
    loss_of(model, 0).backward()
    plain.step()
    u, v = torch.linalg.qr(m).Q, torch.linalg.qr(n).Q
    tangent = u @ u.mT @ g + g @ v @ v.mT - u @ u.mT @ g @ v @ v.mT
    a, s, b = torch.linalg.svd(m @ n.mT - 0.1 * tangent)
    assert torch.allclose(layer.weight(), a[:, :3] * s[:3] @ b[:3], atol=1e-12)


def test_loros_other_steps_are_shorter_and_moments_begin_anew():
    lazy, full = Mlp(), Mlp()
    convert(lazy, LORO(rank=3, every=2, warmup=0))
    convert(full, LowRank(rank=3, init="xavier"))
    optimizers = [prepared(model)[0] for model in (lazy, full)]
    before = lazy.square.A.detach().clone()
    assert torch.equal(before, full.square.A)
    for model, optimizer in zip((lazy, full), optimizers, strict=True):
        train(model, optimizer, range(1))
    assert torch.allclose(lazy.square.A - before, 0.3 * (full.square.A - before), atol=1e-14)
    train(lazy, optimizers[0], range(1, 2))
    assert not optimizers[0].state[lazy.square.A]["exp_avg"].any()
    assert torch.allclose(lazy.square.A @ lazy.square.A.mT, lazy.square.B.mT @ lazy.square.B, atol=1e-12)


def test_a_skipped_step_leaves_loros_factors():
    model = Mlp()
    convert(model, LORO(rank=3, every=1, warmup=0))
    optimizer, _ = prepared(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()  # as a guard does: no gradient anywhere
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "clock" not in key)


def test_every_layer_has_the_shape_of_the_dense_one():
    for config in CONFIGS.values():
        model = Mlp()
        convert(model, config)
        for layer in layers(model).values():
            assert layer(torch.randn(3, 4, layer.in_features, dtype=torch.float64)).shape == (3, 4, layer.out_features)
