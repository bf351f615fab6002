"""Conversion and merge: what is replaced, what is said of it, what is refused, and that merging undoes it."""

import copy
import itertools

import pytest
import torch
from models import VOCABULARY, Mlp, language_model, layers
from torch import nn

from thinrank.optim import AdamWConfig, Role, build, roles
from thinrank.optim.layers import (
    LOST,
    REPARAMS,
    SST,
    CoLA,
    Layer,
    LowRank,
    NotMergeable,
    ReparamConfig,
    SLTrain,
    convert,
    merge,
)

KINDS = ("llama", "tied", "gpt2", "opt")
NAMES = [name for name, config in REPARAMS.items() if name != "none" and config.PRETRAINS]
IDS = torch.arange(24).view(2, 12) % VOCABULARY


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(("kind", "name"), list(itertools.product(KINDS, NAMES)))
def test_a_merged_model_is_one_of_transformers_and_gives_the_same(kind, name):
    dense = language_model(kind)
    model = copy.deepcopy(dense)
    conversion = convert(model, REPARAMS[name]())
    assert len(conversion.rows) == 2 * {"llama": 7, "tied": 7, "gpt2": 4, "opt": 6}[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # as training would
    expected = logits(model)
    try:
        merge(model)
    except NotMergeable:
        assert name in ("cola", "lost")
        return
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(p.shape == q.shape for p, q in zip(model.parameters(), dense.parameters(), strict=True))
    assert torch.allclose(logits(model), expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [SST(rank=4), LowRank(rank=1.0), LOST(delta=1.0, gamma=0.0, act="identity")])
def test_what_loses_nothing_leaves_the_function(kind, config):
    model = language_model(kind)
    expected = logits(model)
    convert(model, config)
    assert torch.allclose(logits(model), expected, atol=2e-5)


def test_embeddings_head_norms_and_biases_stay_and_roles_are_told():
    model = language_model("opt")
    convert(model, SST(rank=4), targets=["attention"])
    found = roles(model)
    assert {name.rpartition(".")[2] for name, role in found.items() if role is Role.COEFFICIENT} == {"s"}
    assert found["model.decoder.embed_tokens.weight"] is Role.EMBEDDING
    assert found["model.decoder.layers.0.self_attn.q_proj.U"] is Role.MATRIX
    assert found["model.decoder.layers.0.self_attn.q_proj.bias"] is Role.VECTOR
    assert not [name for name in layers(model) if "fc" in name]
    optimizer = build(model, AdamWConfig(lr=1e-3, vector_lr=0.5, weight_decay=0.1))
    (group,) = [g for g in optimizer.param_groups if g["role"] == "coefficient"]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_the_meta_device_are_those_of_a_conversion(name):
    config = REPARAMS[name]()
    real, meta = language_model(), language_model().to("meta")
    first, second = convert(real, config), convert(meta, config)
    assert first.rows == second.rows
    shapes = [{k: (v.shape, v.dtype) for k, v in model.state_dict().items()} for model in (real, meta)]
    assert shapes[0] == shapes[1]
    assert all(value.is_meta for value in meta.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_draws_the_same_and_nothing_global_is_touched(name):
    models = [language_model() for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        convert(model, REPARAMS[name](), seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    one, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[key], same[key]) for key in one)
    drawn = name not in ("lost", "lowrank", "maestro")
    assert any(not torch.equal(one[key], other[key]) for key in one) == drawn


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_the_parameters(name):
    model = language_model()
    before = sum(p.numel() for p in model.parameters())
    conversion = convert(model, REPARAMS[name]())
    assert conversion.parameters == (before, sum(p.numel() for p in model.parameters()))
    assert conversion.trained[1] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(r.held - r.dense for r in conversion.rows) == conversion.parameters[1] - before
    assert f"{conversion.parameters[1]:,}" in conversion.table()
    assert conversion.weights == (4 * before, 4 * conversion.parameters[1])
    assert conversion.training[1] == 4 * conversion.parameters[1] + 12 * conversion.trained[1]
    assert name in conversion.table()


def test_the_published_counts():
    """LOST, δ = 1 %, on a layer of the 130M size: r (m + n) + ⌊δ n⌋ m; SST: m k + n k + k, of which r (m + n) + k."""
    model = nn.Sequential(nn.Linear(768, 2048, bias=False)).to("meta")
    (row,) = convert(model, LOST(rank=256, delta=0.01)).rows
    assert row.held == row.trained == 256 * (768 + 2048) + 7 * 2048
    model = nn.Sequential(nn.Linear(768, 2048, bias=False)).to("meta")
    (row,) = convert(model, SST(rank=64)).rows
    assert (row.held, row.trained) == (768 * (768 + 2048) + 768, 64 * (768 + 2048) + 768)


def test_a_trained_conversion_carries_over_to_a_copy_and_a_file(tmp_path):
    model = Mlp()
    convert(model, SLTrain(rank=2))
    clone = copy.deepcopy(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = Mlp(seed=1)
    convert(other, SLTrain(rank=2), seed=5)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(model(x), clone(x))
    assert torch.equal(model(x), other(x))
    assert all(isinstance(layer, Layer) for layer in layers(clone).values())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["nothing_like_it"], "matches no matrix"),
        (["embed_tokens"], "the embedding's weight, which stays dense"),
        (["lm_head"], "the head's weight, which stays dense"),
    ],
)
def test_targets_that_cannot_be(targets, match):
    model = language_model()
    before = copy.deepcopy(model).state_dict()
    with pytest.raises(ValueError, match=match):
        convert(model, SST(rank=4), targets=targets)
    assert model.state_dict().keys() == before.keys()


def test_a_convolution_is_left_by_a_preset_and_refused_by_name():
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(8, 8))
    assert convert(copy.deepcopy(model), LowRank(rank=2)).kept == ["0.weight"]
    with pytest.raises(ValueError, match=r"0\.weight is no linear layer's weight"):
        convert(model, LowRank(rank=2), targets=["^0"])


def test_converting_twice_and_merging_nothing():
    model = language_model()
    with pytest.raises(ValueError, match="no converted layer"):
        merge(model)
    convert(model, LowRank(rank=4))
    with pytest.raises(ValueError, match=r"converted already .*LowRankLinear"):
        convert(model, SST(rank=4))


def test_no_kind_of_layers():
    with pytest.raises(ValueError, match=r"q_proj stays dense: reparam=none replaces nothing, so choose a kind"):
        convert(language_model(), ReparamConfig())


def test_a_weight_that_two_layers_share():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        convert(model, LowRank(rank=2))


def test_a_rank_above_a_short_side_names_the_layer():
    with pytest.raises(ValueError, match=r"rank 20 is above the shorter side of model.layers.0.self_attn.k_proj"):
        convert(language_model(), LowRank(rank=20))


def test_a_weight_that_is_not_finite():
    model = language_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj has entries that are not finite"):
        convert(model, LowRank(rank=4))
    assert not layers(model)


def test_an_optimizer_of_the_factors_forbids_merging():
    model = language_model()
    convert(model, LowRank(rank=4))
    optimizer = build(model, AdamWConfig())
    with pytest.raises(ValueError, match="an optimizer steps the factors"):
        merge(model, optimizer)
    assert layers(model)


def test_a_checkpoint_of_another_rank():
    saved, model = Mlp(), Mlp()
    convert(saved, LowRank(rank=2))
    convert(model, LowRank(rank=3))
    with pytest.raises(
        RuntimeError, match=r"up.A is \(2, 6\) in what is loaded, and \(3, 6\) here: convert the model with the rank"
    ):
        model.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("config", [CoLA(rank=4), LOST(rank=4)])
def test_a_non_linearity_forbids_merging_with_a_bound_that_holds(config):
    model = Mlp()
    convert(model, config)
    with pytest.raises(NotMergeable, match=r"up cannot be merged: there is a SiLU .* up to .* times the length of x"):
        merge(model)
    layer = model.up
    x = torch.randn(50, 6, dtype=torch.float64)
    near = x @ (0.5 * layer.scale * layer.B @ layer.A).mT
    off = (layer.hidden(x) @ layer.B.mT - near).norm(dim=-1) / x.norm(dim=-1)
    bound = abs(layer.scale) * torch.linalg.matrix_norm(layer.B, 2) * torch.linalg.matrix_norm(layer.A, 2) / 2
    assert off.max() <= bound


BAD = [
    (LowRank, {"rank": 0}, "rank must be at least 1"),
    (LowRank, {"rank": 1.5}, "rank must be a number above 0 and at most 1"),
    (LowRank, {"rank": True}, "rank must be at least 1"),
    (LowRank, {"init": "ones"}, "init must be one of"),
    (LOST, {"delta": 1.5}, "delta must be a number at least 0 and at most 1"),
    (LOST, {"gamma": -0.1}, "gamma must be a number at least 0"),
    (LOST, {"act": "gelu"}, "act must be one of identity, silu"),
    (SLTrain, {"delta": 2.0}, "delta must be a number at least 0 and at most 1"),
    (SST, {"every": 0}, "every must be at least 1 step"),
    (SST, {"warmup": 300}, "warmup must be from 0 to the 200 steps"),
    (SST, {"sampling": "best"}, "sampling must be one of"),
    (SST, {"engine": "sparse"}, "engine must be one of"),
    (ReparamConfig, {"targets": []}, "targets must name at least one"),
    (ReparamConfig, {"targets": "all-linear"}, "targets must be a list"),
]


@pytest.mark.parametrize(("kind", "values", "match"), BAD)
def test_bad_values(kind, values, match):
    with pytest.raises(ValueError, match=match):
        kind(**values)
