"""CLOVER: cores between orthonormal vectors of every head, in models with and without shared values, biases, fused q, k
and v."""

import copy
from typing import Any

import pytest
import torch
from small_models import VOCAB, gpt2, llama, logits, net, opt
from torch import nn

from thinrank.optim import AdamWConfig, build
from thinrank.optim.layers import CLOVER, convert, layers, merge
from thinrank.optim.layers.clover import FrozenLinear, HeadwiseLinear, Pair, across
from thinrank.optim.layers.dense import Dense

ALL = ["attention", "up_proj"]
MODELS = {
    "llama": (llama, ALL),
    "llama with shared values": (lambda: llama(kv_heads=2), ALL),
    "llama with biases": (lambda: llama(attention_bias=True), ALL),
    "opt": (opt, ["attention", "fc1"]),
    "gpt2": (gpt2, ["attention", "c_fc"]),
}
every = pytest.mark.parametrize("kind", MODELS)


def converted(kind: str) -> Any:
    make, targets = MODELS[kind]
    model = make()
    convert(model, CLOVER(targets=targets))
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights by the name of their layer."""
    return {name.removesuffix(".weight"): p.detach() for name, p in model.named_parameters()}


def moved(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in layers(model).values():
            if isinstance(layer, HeadwiseLinear):
                layer.core.add_(0.2 * torch.randn_like(layer.core))


@every
def test_the_function_is_the_same_at_first_and_dense_weights_do_what_the_cores_did(kind):
    make, _ = MODELS[kind]
    before = logits(make())
    model = converted(kind)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    moved(model)
    expected = logits(model)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    kinds = {name: type(m) for name, m in make().named_modules()}
    assert kinds == {name: type(m) for name, m in model.named_modules()}


@every
def test_cores_are_trained_and_nothing_else(kind):
    model = converted(kind)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"core"}
    for name, layer in layers(model).items():
        trained = {key: p for key, p in layer.named_parameters() if p.requires_grad}
        if isinstance(layer, FrozenLinear):
            assert not trained
            assert name.endswith(("o_proj", "out_proj", "attn.c_proj"))
        else:
            assert trained.keys() == {"core"}
            assert trained["core"].shape == (layer.out_features, 8)  # heads of 32 / 4


@every
def test_bases_are_orthonormal_in_every_head(kind):
    model = converted(kind)
    for name, layer in layers(model).items():
        if isinstance(layer, HeadwiseLinear):
            basis = layer.basis.unflatten(0, (-1, 8))
            joint = name.endswith("v_proj") and kind in ("llama with biases", "opt")
            if not joint:  # there it is orthonormal together with a column for the bias
                torch.testing.assert_close(basis @ basis.mT, torch.eye(8).expand(len(basis), 8, 8))
        elif kind in ("llama", "llama with biases", "opt"):
            base: Any = layer.base
            base = base.unflatten(1, (-1, 8)).transpose(0, 1)
            torch.testing.assert_close(base.mT @ base, torch.eye(8).expand(len(base), 8, 8))


@pytest.mark.parametrize(("kind", "joint"), [("llama", True), ("llama with biases", True), ("opt", True),
                                             ("llama with shared values", False)])  # fmt: skip
def test_values_go_with_the_output_where_each_head_has_its_own(kind, joint):
    model = converted(kind)
    plain = weights(MODELS[kind][0]())
    for name, layer in layers(model).items():
        if name.endswith("v_proj"):
            assert isinstance(layer, HeadwiseLinear)
            cores = layer.cores()
            diagonal = torch.diag_embed(cores.diagonal(dim1=1, dim2=2))
            assert torch.equal(cores, diagonal) == joint
            if joint:
                assert bool((cores.diagonal(dim1=1, dim2=2).diff() <= 0).all())
        if isinstance(layer, FrozenLinear):
            assert torch.equal(layer.base, plain[name]) != joint


def test_heads_products_are_kept_and_their_singular_values_are_the_cores():
    model, plain = converted("llama"), weights(llama())
    names = [name for name in layers(model) if name.endswith("v_proj")]
    for name in names:
        v, o = (plain[name.replace("v_proj", x)].double() for x in ("v_proj", "o_proj"))
        found: Any = layers(model)[name]
        for h in range(4):
            rows = slice(8 * h, 8 * h + 8)
            s = torch.linalg.svdvals(o[:, rows] @ v[rows])[:8]
            torch.testing.assert_close(found.cores()[h].diagonal().double(), s, rtol=1e-4, atol=1e-4)


def test_the_small_decomposition_is_the_large_one():
    v, o = torch.randn(6, 9, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    u, s, vt = across(v, o, 3)
    for h in range(2):
        rows = slice(3 * h, 3 * h + 3)
        product = o[:, rows] @ v[rows]
        torch.testing.assert_close((u[h] * s[h]) @ vt[h], product)
        torch.testing.assert_close(s[h], torch.linalg.svdvals(product)[:3])
        for basis in (u[h], vt[h].mT):
            torch.testing.assert_close(basis.mT @ basis, torch.eye(3, dtype=torch.float64))


def test_a_bias_of_values_is_kept_where_their_weight_has_no_full_rank():
    values, output = nn.Linear(5, 4), nn.Linear(4, 6)
    with torch.no_grad():
        values.weight[1:] = values.weight[0]
    pair = Pair(Dense.of(values), Dense.of(output), 4)
    first, second = pair.values_layer(pair.values), pair.output_layer(pair.output)
    x = torch.randn(3, 5)
    torch.testing.assert_close(second(first(x)), output(values(x)))
    assert first.bias is not values.bias
    assert not pair._found, "what both have taken is held no longer"


def test_gradients_are_those_of_finite_differences():
    model = llama().double()
    convert(model, CLOVER(targets=ALL))
    moved(model)
    for layer in [layer for layer in layers(model).values() if isinstance(layer, HeadwiseLinear)][:4]:
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
        core = layer.core.detach().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, core, layer=layer: torch.func.functional_call(layer, {"core": core}, (x,)),
            (x, core),
            fast_mode=True,
        )


@every
def test_steps_lower_the_loss(kind):
    model = converted(kind)
    ids = torch.arange(24).view(2, 12) * 7 % VOCAB
    optimizer = build(model, AdamWConfig(lr=3e-3))
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@every
def test_copies_saved_states_and_shapes_are_the_same_model(kind):
    make, targets = MODELS[kind]
    model = converted(kind)
    moved(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    other = make()
    for p in other.parameters():
        p.data.mul_(0.9)
    convert(other, CLOVER(targets=targets))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    with torch.device("meta"):
        shapes = make()
    convert(shapes, CLOVER(targets=targets))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.named_parameters()}
    assert all(p.is_meta for p in shapes.parameters())


def test_what_stands_between_values_and_output_keeps_them_apart():
    model: Any = llama()
    for block in model.model.layers:
        block.self_attn.sub_norm = nn.LayerNorm(32)
    before = logits(model)
    convert(model, CLOVER())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    plain = weights(llama())
    for name, layer in layers(model).items():
        if isinstance(layer, FrozenLinear):
            assert torch.equal(layer.base, plain[name])


def test_layers_remember_what_was_said_and_not_the_model_that_they_were_made_of():
    model = converted("llama")
    said = CLOVER(targets=ALL)
    for layer in layers(model).values():
        assert layer.config == said
        assert vars(layer.config) == vars(said)


def test_an_output_that_is_not_converted_stays_as_it_is():
    model = llama()
    before = logits(model)
    convert(model, CLOVER(exclude=["o_proj"]))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(layer, FrozenLinear) for layer in layers(model).values())


@pytest.mark.parametrize(
    ("make", "config", "sentence"),
    [
        (llama, lambda: CLOVER(group=0), "group must be at least 1 row, got 0: leave it out"),
        (llama, lambda: CLOVER(targets=["up_proj"]), "group must say how many rows of .*up_proj are a block"),
        (llama, lambda: CLOVER(targets=ALL, group=7), "the 48 rows of .*up_proj are no multiple of 7: set group"),
        (net, lambda: CLOVER(targets=["tall"], group=10), "at least as many inputs as a block has rows, 10, and tall"),
    ],
)
def test_bad_values_are_refused_by_one_sentence(make, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert(make(), config())


def test_one_layer_alone_is_refused():
    with pytest.raises(ValueError, match="clover must see the whole model"):
        CLOVER().plan([])
    with pytest.raises(ValueError, match="clover must be planned for the whole model first"):
        CLOVER().layer(Dense.of(nn.Linear(4, 4)), torch.Generator())


def test_weights_that_are_not_finite_are_refused_and_named():
    model: Any = llama()
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj .*not finite"):
        convert(model, CLOVER())
    assert not layers(model)
