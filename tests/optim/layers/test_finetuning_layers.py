"""Fine-tuning reparameterisations: the same function at first, the right numbers trained, and dense weights again."""

import copy
import inspect
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from small_models import LAYERS, gpt2, inputs, llama, logits, net
from torch import nn
from torch.nn import functional as F

from thinrank.optim import AdamWConfig, build
from thinrank.optim.grouping import Role, roles
from thinrank.optim.layers import (
    REPARAMS,
    SORSA,
    SVFT,
    Layer,
    QRLoRA,
    ReparamConfig,
    SpectralAdapter,
    SVFit,
    convert,
    layers,
    merge,
    penalty,
)
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.qr_lora import leading
from thinrank.optim.layers.sorsa import SORSALinear, skewness
from thinrank.optim.layers.spectral_adapter import cayley
from thinrank.optim.layers.svft import SVFTLinear
from thinrank.optim.linalg.pivoted import pivoted_qr

WAYS: dict[str, tuple[ReparamConfig, set[str]]] = {
    "sorsa": (SORSA(rank=2, lr=1e-3), {"U", "s", "V"}),
    "sorsa/alpha": (SORSA(rank=0.4, alpha=5.0, lr=1e-3), {"U", "s", "V"}),
    "svfit": (SVFit(rank=3), {"s"}),
    "svft": (SVFT(), {"values"}),
    "svft/banded": (SVFT(pattern="banded", bands=2), {"values"}),
    "svft/random": (SVFT(pattern="random", bands=1, gate=True), {"values", "gate"}),
    "spectral_adapter": (SpectralAdapter(rank=2, offset=1), {"A_u", "A_v"}),
    "spectral_adapter/rotational": (SpectralAdapter(rank=3, mode="rotational"), {"A_u", "A_v"}),
    "qr_lora": (QRLoRA(tau=0.8), {"s"}),
    "qr_lora/rank": (QRLoRA(rank=4), {"s"}),
}
both = pytest.mark.parametrize("way", WAYS)


def moved(model: nn.Module, seed: int = 0) -> None:
    """Gives all trained parameters other values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def converted(way: str, dtype: torch.dtype = torch.float32) -> Any:
    model = net(dtype)
    convert(model, WAYS[way][0])
    return model


# What all of them keep ------------------------------------------------------------------------------------------------


@both
def test_the_function_is_the_same_at_first(way):
    model, x = net(), inputs()
    before = model(x)
    report = convert(model, WAYS[way][0])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert [row.name for row in report.rows] == list(LAYERS)


@both
def test_the_right_parameters_are_trained(way):
    model = converted(way)
    for layer in layers(model).values():
        trained = {name for name, p in layer.named_parameters() if p.requires_grad} - {"bias"}
        assert trained == WAYS[way][1]
        assert layer.bias is None or not layer.bias.requires_grad
        assert not any(b.is_floating_point() for b in layer.buffers())
    role = roles(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert role[name] is (Role.MATRIX if p.ndim == 2 else Role.COEFFICIENT)


@both
def test_the_rest_of_the_model_is_frozen_unless_it_is_to_learn_too(way):
    config, own = WAYS[way]
    model = llama()
    report = convert(model, config)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == own
    assert report.trained[1] == sum(row.trained for row in report.rows)
    model = llama()
    convert(model, replace(config, freeze=False))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.rpartition(".")[0] in layers(model) for name in frozen)


@both
def test_gradients_are_those_of_finite_differences(way):
    model = converted(way, torch.float64)
    moved(model)
    for layer in layers(model).values():
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)

        def function(x, *values, layer=layer, names=tuple(trained)):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(function, (x, *(p.detach().requires_grad_() for p in trained.values())))


@both
def test_a_layer_is_its_weight_and_merges_into_what_it_was(way):
    model, x = converted(way, torch.float64), inputs(torch.float64)
    moved(model)
    for layer in layers(model).values():
        z = torch.randn(4, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(z), F.linear(z, layer.weight(), layer.bias))
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)
    kinds = [type(model.get_submodule(name)) for name in LAYERS]
    assert kinds == [type(net().get_submodule(name)) for name in LAYERS]


@both
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_language_model_comes_and_goes(way, make):
    model = make()
    before = logits(model)
    convert(model, WAYS[way][0])
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    moved(model)
    expected = logits(model)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(m, Layer) for m in model.modules())


@both
def test_steps_lower_the_loss_and_leave_frozen_weights_alone(way):
    model, x = converted(way), inputs()
    y = torch.randn(7, 8, generator=torch.Generator().manual_seed(2))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = build(model, AdamWConfig(lr=0.01))
    losses = []
    for _ in range(12):
        loss = F.mse_loss(model(x), y)
        losses.append(float(loss.detach()))
        more = penalty(model)
        (loss if more is None else loss + more).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@both
def test_copies_and_saved_states_are_the_same_model(way):
    model, x = converted(way), inputs()
    moved(model)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    moved(twin, seed=1)
    assert torch.equal(model(x), expected)
    if way == "qr_lora":
        return  # its rank depends on the weights
    other = net()
    for p in other.parameters():
        p.data.mul_(0.9)  # other weights, so that everything has to come from the state
    convert(other, WAYS[way][0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


@both
def test_on_the_meta_device_shapes_are_the_same(way):
    model = net()
    with torch.device("meta"):
        shapes = type(model)()
    report, planned = (convert(m, WAYS[way][0]) for m in (model, shapes))
    if way == "qr_lora":  # there are no values to choose a rank by
        assert [row.rank for row in planned.rows] == [min(row.shape) for row in planned.rows]
        return
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.named_parameters()}
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in shapes.parameters()]
    assert report.table() == planned.table()
    assert all(p.is_meta for p in shapes.parameters())


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_stay(way, dtype):
    model, x = net(dtype), inputs(dtype)
    before = model(x)
    convert(model, WAYS[way][0])
    assert {p.dtype for p in model.parameters()} == {dtype}
    tolerance = 1e-12 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
    model(x).sum().backward()


@both
def test_under_autocast_it_is_the_same_up_to_rounding(way):
    model, x = converted(way), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)


# SORSA ----------------------------------------------------------------------------------------------------------------


def test_sorsas_penalty_is_the_mean_over_all_factors_of_the_norm():
    model = net(torch.float64)
    convert(model, SORSA(rank=2, gamma=4e-4, lr=1e-3))
    moved(model)
    found = [layer for layer in layers(model).values() if isinstance(layer, SORSALinear)]
    factors = [f.detach() for layer in found for f in (layer.U, layer.V)]
    norms = [math.sqrt(float((f.mT @ f - torch.eye(2, dtype=f.dtype)).square().sum())) for f in factors]
    assert len(norms) == 2 * len(LAYERS)
    value = penalty(model)
    assert value is not None
    assert float(value.detach()) == pytest.approx(0.4 * sum(norms) / len(norms))


def test_sorsas_penalty_has_the_gradient_of_the_norm_and_none_at_orthonormal_factors():
    f = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(skewness, (f,))
    eye = torch.eye(6, 3, requires_grad=True)
    skewness(eye).backward()
    assert skewness(eye).item() == 0.0
    assert eye.grad is not None
    assert not eye.grad.any()
    half = torch.linalg.qr(torch.randn(6, 3)).Q.bfloat16().requires_grad_()
    skewness(half).backward()
    assert half.grad is not None
    assert bool(half.grad.isfinite().all())


def test_a_plain_step_on_sorsas_penalty_has_a_length_that_the_learning_rate_does_not_change():
    steps = []
    for lr in (1e-3, 0.1):
        model = net(torch.float64)
        convert(model, SORSA(rank=2, gamma=4e-4, lr=lr, targets=["tall"]))
        layer = layers(model)["tall"]
        assert isinstance(layer, SORSALinear)
        with torch.no_grad():
            layer.U.mul_(1.1)
            before = layer.U.clone()
        value = penalty(model)
        assert value is not None
        value.backward()
        torch.optim.SGD(model.parameters(), lr=lr).step()
        steps.append(before - layer.U.detach())
    torch.testing.assert_close(steps[0], steps[1])


def test_sorsa_without_gamma_has_no_penalty_and_needs_no_learning_rate():
    model = net()
    convert(model, SORSA(rank=2, gamma=0.0))
    assert penalty(model) is None


def test_sorsa_takes_the_largest_singular_triples_out_of_the_weight():
    model, plain = net(torch.float64), net(torch.float64)
    convert(model, SORSA(rank=2, alpha=4.0, lr=1.0))
    for name, layer in layers(model).items():
        assert isinstance(layer, SORSALinear)
        assert layer.residual is not None
        weight = Dense.of(plain.get_submodule(name)).weight
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(layer.s.detach(), s[:2])
        torch.testing.assert_close(layer.residual.detach(), weight - 2.0 * (u[:, :2] * s[:2]) @ vt[:2])


# SVFit, SVFT ----------------------------------------------------------------------------------------------------------


def test_svfit_changes_singular_values_and_nothing_else():
    model = net(torch.float64)
    convert(model, SVFit(rank=2))
    layer: Any = layers(model)["tall"]
    with torch.no_grad():
        before = layer.weight()
        layer.s.mul_(0.9)
    u, s, vt = torch.linalg.svd(before, full_matrices=False)
    s[:2] *= 0.9
    torch.testing.assert_close(layer.weight().detach(), (u * s) @ vt)


@pytest.mark.parametrize(("pattern", "count"), [("plain", 5), ("banded", 19), ("random", 19), ("topk", 19)])
def test_svft_trains_as_many_numbers_as_the_paper_says(pattern, count):
    k, d = 5, 2
    assert count == (k if pattern == "plain" else k * (2 * d + 1) - d * (d + 1))
    model = net()
    convert(model, SVFT(pattern=pattern, bands=d, targets=["square"]))
    layer = layers(model)["square"]
    assert isinstance(layer, SVFTLinear)
    assert layer.parameters_trained() == count
    if layer.index is not None:
        assert len(set(layer.index.tolist())) == count
        assert 0 <= int(layer.index.min()) <= int(layer.index.max()) < k * k


def test_svft_puts_its_numbers_where_the_pattern_says():
    model = net(torch.float64)
    convert(model, SVFT(pattern="banded", bands=1, gate=True))
    moved(model)
    for layer in layers(model).values():
        assert isinstance(layer, SVFTLinear)
        assert layer.gate is not None
        k = layer.rank
        m = torch.zeros(k, k, dtype=torch.float64)
        places = [(i, j) for i in range(k) for j in range(k) if abs(i - j) <= 1]
        for (i, j), value in zip(places, layer.values.tolist(), strict=True):
            m[i, j] = value / (1 + math.exp(-layer.gate.item()))
        torch.testing.assert_close(layer.weight().detach(), (layer.U @ (torch.diag(layer.s) + m) @ layer.V.mT).detach())


def test_svft_topk_takes_the_largest_products_of_singular_vectors():
    model = net(torch.float64)
    convert(model, SVFT(pattern="topk", bands=0, targets=["square"]))
    layer = layers(model)["square"]
    assert isinstance(layer, SVFTLinear)
    assert layer.index is not None
    found = (layer.U.mT @ layer.V).abs().reshape(-1).detach()
    assert set(layer.index.tolist()) == set(found.topk(5).indices.tolist())


def test_more_bands_than_there_are_are_all():
    model = net()
    convert(model, SVFT(pattern="banded", bands=99, targets=["square"]))
    assert layers(model)["square"].parameters_trained() == 25


def test_random_places_depend_on_the_seed_and_the_name_alone():
    found: list[Any] = []
    for seed in (0, 0, 1):
        model = net()
        torch.manual_seed(seed + 7)
        convert(model, SVFT(pattern="random", bands=1), seed=seed)
        found.append({name: layer.get_buffer("index") for name, layer in layers(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in LAYERS)
    assert any(not torch.equal(found[0][name], found[2][name]) for name in LAYERS)


# Spectral Adapter -----------------------------------------------------------------------------------------------------


def test_cayleys_matrix_is_orthogonal():
    a = 3 * torch.randn(5, 5, dtype=torch.float64)
    turn, skew, eye = cayley(a), (a - a.mT) / 2, torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(turn.mT @ turn, eye)
    torch.testing.assert_close(turn, (eye - skew) @ torch.linalg.inv(eye + skew))
    assert torch.equal(cayley(torch.zeros(3, 3)), torch.eye(3))
    assert cayley(a.bfloat16()).dtype == torch.bfloat16


def test_turned_vectors_stay_orthonormal_and_singular_values_stay():
    model = net(torch.float64)
    convert(model, SpectralAdapter(rank=5, mode="rotational"))
    layer: Any = layers(model)["wide"]  # all of its triples
    before = torch.linalg.svdvals(layer.weight().detach())
    moved(model)
    for side in (layer.left(), layer.right()):
        torch.testing.assert_close(side.mT @ side, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight().detach()), before)
    assert layer.parameters_trained() == 2 * 5**2


def test_blocks_with_other_offsets_do_not_touch_and_can_be_added():
    plain = net(torch.float64)
    start = Dense.of(plain.tall).weight
    changes = []
    for offset in (0, 2):
        model = net(torch.float64)
        convert(model, SpectralAdapter(rank=2, mode="rotational", offset=offset, targets=["tall"]))
        moved(model, seed=offset)
        changes.append(layers(model)["tall"].weight().detach() - start)
    assert float((changes[0].mT @ changes[1]).abs().max()) < 1e-12
    assert float((changes[0] @ changes[1].mT).abs().max()) < 1e-12


# QR-LoRA --------------------------------------------------------------------------------------------------------------


def test_qr_lora_is_the_sum_of_leading_terms():
    model, plain = net(torch.float64), net(torch.float64)
    convert(model, QRLoRA(tau=0.8))
    moved(model)
    for name, layer in layers(model).items():
        found: Any = layer
        weight = Dense.of(plain.get_submodule(name)).weight
        q, r, order = pivoted_qr(weight)
        squares = r[:, order].diagonal().square()
        rank = found.rank
        assert squares[:rank].sum() >= 0.8 * squares.sum() > squares[: rank - 1].sum()
        terms = sum(found.s[i] * torch.outer(q[:, i], r[i]) for i in range(rank))
        torch.testing.assert_close(layer.weight().detach(), (weight + terms).detach())


@pytest.mark.parametrize(("tau", "rank"), [(0.5, 1), (0.7, 2), (0.91, 3), (1.0, 4)])
def test_the_rank_is_the_least_with_so_much_energy(tau, rank):
    assert leading(torch.tensor([0.6, 0.3, 0.07, 0.03], dtype=torch.float64), tau) == rank


def test_qr_lora_of_nothing_has_rank_one():
    model = net()
    model.wide.weight.data.zero_()
    convert(model, QRLoRA(targets=["wide"]))
    assert layers(model)["wide"].parameters_trained() == 1


# Refusals and words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SORSA(gamma=-1.0), "gamma must be a number at least 0"),
        (lambda: SORSA(lr=0.0), "lr must be a number above 0"),
        (lambda: SORSA(alpha=0.0), "alpha must be a number above 0"),
        (lambda: SORSA(rank=0), "rank must be at least 1"),
        (lambda: SORSA(factors=0), "factors must be at least 1, got 0: leave it out"),
        (lambda: SVFT(pattern="top_k"), r"pattern must be one of .* \(did you mean 'topk'"),
        (lambda: SVFT(bands=-1), "bands must be a whole number of at least 0, got -1"),
        (lambda: SpectralAdapter(mode="turn"), "mode must be one of additive, rotational"),
        (lambda: SpectralAdapter(offset=-1), "offset must be a whole number of at least 0"),
        (lambda: QRLoRA(tau=0.0), "tau must be a number above 0 and at most 1"),
        (lambda: QRLoRA(rank=0), "rank must be at least 1, or a share above 0, got 0: leave it to tau"),
        (lambda: convert(net(), SORSA(rank=2)), "lr must be the optimizer's learning rate .*: set it, or gamma=0"),
        (lambda: convert(net(), SVFit(rank=6)), "rank 6 is above the shorter side of wide"),
        (lambda: convert(net(), SVFT(pattern="topk")), "pattern=topk compares .* for tall, .*: choose banded"),
        (lambda: convert(net(), SpectralAdapter(rank=3, offset=3)), "offset 3 and rank 3 go beyond .* wide"),
        (lambda: convert(net(), QRLoRA(rank=9)), "rank 9 is above the shorter side of tall"),
    ],
)
def test_bad_values_are_refused_by_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@both
def test_weights_that_are_not_finite_are_refused_and_named(way):
    model = net()
    model.square.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="square has entries that are not finite"):
        convert(model, WAYS[way][0])
    assert not layers(model)


@pytest.mark.parametrize("name", ["sorsa", "svfit", "svft", "spectral_adapter", "qr_lora", "clover"])
def test_they_are_registered_and_say_whose_their_defaults_are(name):
    cls = REPARAMS[name]
    assert cls().name == name
    assert not cls.PRETRAINS
    text = inspect.getdoc(cls) or ""
    assert "Defaults: " in text
    assert "ours" in text
    assert text.endswith(f"Equations and shapes: `{cls.__module__}`.")
    assert all(f.metadata.get("help") for f in fields(cls))
