"""Every parameter gets one role and one rule, and a request that matches nothing is refused."""

import importlib
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from thinrank.optim import (
    METHODS,
    AdamWConfig,
    AuONConfig,
    GaLoreConfig,
    LDAdamConfig,
    MethodConfig,
    MFACConfig,
    MuonConfig,
    RankedConfig,
    Role,
    build,
    roles,
    route,
)


def llama(tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=48,
        tie_word_embeddings=tied, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Vision(nn.Module):
    """A convolution, attention with a fused weight, an odd parameter, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(5, 16))
        self.attention = nn.MultiheadAttention(16, 2)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)


def by_role(model: nn.Module) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, role in roles(model).items():
        found.setdefault(role.value, set()).add(name)
    return found


def test_llama_has_the_four_roles():
    found = by_role(llama())
    assert found["embedding"] == {"model.embed_tokens.weight"}
    assert found["head"] == {"lm_head.weight"}
    assert all("norm" in name for name in found["vector"])
    assert len(found["matrix"]) == 2 * 7


def test_a_tied_head_is_the_embedding_and_appears_once():
    model = llama(tied=True)
    found = by_role(model)
    assert "head" not in found
    assert found["embedding"] == {"model.embed_tokens.weight"}
    optimizer = build(model, GaLoreConfig(rank=4))
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len({id(p) for p in stepped}) == len(list(model.parameters()))


def test_gpt2_keeps_its_linear_layers_the_other_way_round_and_they_are_matrices_all_the_same():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=48, n_positions=16))
    found = by_role(model)
    assert found["embedding"] == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert {name.rpartition(".h.0.")[2] for name in found["matrix"]} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    }  # fmt: skip


def test_convolution_attention_and_head():
    found = by_role(Vision())
    assert found["matrix"] == {"patch.weight", "position", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert found["head"] == {"head.weight"}
    assert {"norm.weight", "patch.bias", "attention.in_proj_bias"} <= found["vector"]


def test_overrides_win_and_one_that_matches_nothing_is_refused():
    assert roles(Vision(), {"position": "embedding"})["position"] is Role.EMBEDDING
    with pytest.raises(ValueError, match=r"role pattern 'positoin' matches no parameter"):
        roles(Vision(), {"positoin": "embedding"})
    with pytest.raises(ValueError, match=r"a role must be one of .*, got 'embeding'"):
        roles(Vision(), {"position": "embeding"})


@pytest.mark.parametrize("name", METHODS)
def test_routing_is_total_and_disjoint(name: str):
    model = llama()
    routing = route(model, METHODS[name]())
    assert sorted(row.name for row in routing.rows) == sorted(n for n, _ in model.named_parameters())
    assert routing.elements() == sum(p.numel() for p in model.parameters())
    ids = [id(p) for group in routing.groups for _, p in group["params"]]
    assert len(ids) == len(set(ids))


def test_each_role_has_its_rate_and_vectors_have_no_decay():
    config = GaLoreConfig(lr=0.01, embedding_lr=0.02, vector_lr=0.03, scale=0.5, weight_decay=0.1, rank=4)
    rows = {row.role: row for row in route(llama(), config).rows}
    assert rows["matrix"].lr == pytest.approx(0.005)  # scale × lr is what acts
    assert rows["embedding"].lr == rows["head"].lr == 0.02
    assert rows["vector"].lr == 0.03
    groups = {group["role"]: group for group in build(llama(), config).param_groups}
    assert groups["vector"]["weight_decay"] == 0.0
    assert groups["matrix"]["weight_decay"] == groups["embedding"]["weight_decay"] == 0.1


def test_presets_and_patterns_choose_what_is_projected():
    def projected(**kwargs: Any) -> set[str]:
        rows = route(llama(), GaLoreConfig(rank=4, **kwargs)).rows
        return {re.sub(r"model\.layers\.\d+\.", "", row.name) for row in rows if row.rule == "galore"}

    attention = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    mlp = {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    assert projected() == attention | mlp
    assert projected(targets=["attention"]) == attention
    assert projected(targets=["mlp"]) == mlp
    assert projected(targets=["q_proj", "embed_tokens"]) == {"self_attn.q_proj.weight", "model.embed_tokens.weight"}
    assert projected(exclude=["down_proj"]) == attention | mlp - {"mlp.down_proj.weight"}


def test_a_target_that_matches_nothing_is_refused_with_an_example():
    with pytest.raises(ValueError, match=r"targets: 'atention' matches no matrix .*parameters are called like 'model"):
        route(llama(), GaLoreConfig(rank=4, targets=["atention"]))
    with pytest.raises(ValueError, match=r"targets: 'norm' matches no matrix"):  # vectors are never projected
        route(llama(), GaLoreConfig(rank=4, targets=["norm"]))
    with pytest.raises(ValueError, match=r"exclude: 'xyz' matches no parameter"):
        route(llama(), GaLoreConfig(rank=4, exclude=["xyz"]))
    with pytest.raises(ValueError, match=r"targets: '\(' is not a regular expression"):
        route(llama(), GaLoreConfig(rank=4, targets=["("]))


def test_frozen_parameters_are_left_out_and_said_so():
    model = llama()
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    routing = route(model, GaLoreConfig(rank=4))
    assert routing.frozen == ["model.embed_tokens.weight"]
    assert "frozen, not stepped: 1 tensors" in routing.table()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build(model, GaLoreConfig(rank=4))


def test_the_table_adds_up():
    routing = route(llama(), GaLoreConfig(rank=4))
    table = routing.table()
    assert f"{routing.elements():,}" in table
    assert f"{routing.state_bytes():,}" in table
    assert routing.state_bytes() == build(llama(), GaLoreConfig(rank=4)).state_bytes()


def test_adamw_with_one_rate_is_the_default():
    assert {row.lr for row in route(llama(), AdamWConfig(lr=1e-3)).rows} == {1e-3}


def test_a_tied_weight_is_an_embedding_also_where_the_head_comes_first():
    """The first name of a shared weight used to decide: with the head declared first it was stepped as a head."""

    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(8, 20, bias=False)
            self.table = nn.Embedding(20, 8)
            self.table.weight = self.lm_head.weight

    assert roles(HeadFirst()) == {"lm_head.weight": Role.EMBEDDING}


def test_presets_know_gpt2():
    """Its two output projections are both called `c_proj`; neither preset used to have its own."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=48, n_positions=16))

    def projected(preset: str) -> set[str]:
        rows = route(model, GaLoreConfig(rank=4, targets=[preset])).rows
        return {row.name.partition(".h.0.")[2] for row in rows if row.rule == "galore"}

    assert projected("attention") == {"attn.c_attn.weight", "attn.c_proj.weight"}
    assert projected("mlp") == {"mlp.c_fc.weight", "mlp.c_proj.weight"}


def test_the_table_of_a_model_with_an_empty_parameter():
    """A role without a single element used to be divided by."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 8, bias=False)})
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0)))
    assert "vector" in route(model, GaLoreConfig(rank=2)).table()


# Factors of LoRA -----------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen layer with two factors, named as peft names them, or as parameters of their own."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 12).requires_grad_(False)
        a, b = nn.Linear(16, 4, bias=False), nn.Linear(4, 12, bias=False)
        if style == "peft":
            self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})
        elif style == "embedding":
            self.lora_embedding_A = nn.ParameterDict({"default": a.weight})
            self.lora_embedding_B = nn.ParameterDict({"default": b.weight})
        elif style == "parameters":
            self.lora_A, self.lora_B = a.weight, b.weight
        else:
            self.lora_a, self.lora_b = a, b


@pytest.mark.parametrize("style", ["peft", "embedding", "parameters", "small letters"])
@pytest.mark.parametrize("name", METHODS)
def test_factors_of_lora_are_never_projected(name, style):
    """Low-rank methods without a gap, such as LDAdam, once projected them without a word."""
    model = nn.ModuleDict({"layer": Adapted(style)})
    config = METHODS[name]()
    if not isinstance(config, RankedConfig):
        assert len(route(model, config).rows) == 2
        return
    for make in (build, route):
        with pytest.raises(ValueError, match=rf"{name} would project gradients of LoRA's factors.*layer\.lora_\w*"):
            make(model, config)


@pytest.mark.parametrize(
    "config",
    [AdamWConfig(), MuonConfig(), AuONConfig(), MFACConfig(space="whole"), LDAdamConfig(rank=None)],
    ids=lambda config: config.name,
)
def test_what_steps_matrices_whole_steps_factors(config: MethodConfig):
    model = nn.ModuleDict({"layer": Adapted("peft")})
    optimizer = build(model, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_factors_beside_projected_weights_are_left_to_adamw_by_name():
    model = nn.ModuleDict({"layer": Adapted("peft"), "plain": nn.Linear(16, 12, bias=False)})
    with pytest.raises(ValueError, match=r"layer\.lora_A\.default\.weight, 2 in all\): exclude=\['lora_'\]"):
        build(model, GaLoreConfig(rank=4))
    rules = {row.name: row.rule for row in route(model, GaLoreConfig(rank=4, exclude=["lora_"])).rows}
    assert rules == {
        "layer.lora_A.default.weight": "adamw",
        "layer.lora_B.default.weight": "adamw",
        "plain.weight": "galore",
    }
    own = {"layer.lora_A.default.weight": None, "layer.lora_B.default.weight": None, "plain.weight": 4}
    assert len(route(model, GaLoreConfig(rank=4), ranks=own).rows) == 3


@pytest.mark.parametrize("style", ["peft", "parameters", "small letters"])
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().projects])
def test_a_weight_that_has_factors_is_not_projected(name, style):
    """With the factors left to AdamW it once was, so that a matrix had two updates of few directions."""
    model = nn.ModuleDict({"layer": Adapted(style), "plain": nn.Linear(16, 12, bias=False)})
    weight = model.get_parameter("layer.base_layer.weight").requires_grad_()
    method: Any = METHODS[name]
    config = method(rank=4, exclude=["lora_"])
    sentence = (
        rf"{name} together with LoRA on the same weight: both would move layer\.base_layer\.weight, which has "
        r"layer\.lora_\w.* beside it \(1 such weights in all\): freeze it"
    )
    for make in (build, route):
        with pytest.raises(ValueError, match=sentence):
            make(model, config)
    own = {"layer.base_layer.weight": None, "plain.weight": 4}
    assert len(route(model, config, ranks=own).rows) == 4  # stepped whole
    for factor in model.parameters():
        factor.requires_grad_(factor is weight)
    assert [row.name for row in route(model, method(rank=4)).rows] == ["layer.base_layer.weight"]


def test_a_weight_beside_its_own_factors_is_not_projected_either():
    """As torchtune and loralib name it: the wrapper has the weight and the factors."""
    layer = nn.Linear(16, 12, bias=False)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(12, 4))
    with pytest.raises(ValueError, match=r"both would move layer\.weight, which has layer\.lora_B beside it"):
        build(nn.ModuleDict({"layer": layer}), GaLoreConfig(rank=4, exclude=["lora_"]))
    with pytest.raises(ValueError, match=r"both would move weight, which has lora_B beside it"):
        build(layer, GaLoreConfig(rank=4, exclude=["lora_"]))
    assert {row.rule for row in route(layer, MuonConfig(exclude=["lora_"])).rows} == {"adamw", "muon"}


def test_a_name_that_only_looks_like_a_factor_is_projected():
    model = nn.ModuleDict({"explora_a": nn.Linear(16, 12, bias=False), "lora_alpha": nn.Linear(16, 12, bias=False)})
    assert {row.rule for row in route(model, GaLoreConfig(rank=4)).rows} == {"galore"}


# A total grouping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [build, route])
def test_a_parameter_that_no_rule_steps_is_an_error(make, monkeypatch):
    building = importlib.import_module("thinrank.optim.build")
    real = building.group_parameters

    def forgetful(*how: Any):
        routing = real(*how)
        for group in routing.groups:
            group["params"] = [(name, p) for name, p in group["params"] if name != "1.weight"]
        return routing

    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 4))
    monkeypatch.setattr(building, "group_parameters", forgetful)
    with pytest.raises(RuntimeError, match=r"no rule steps the trainable parameter 1\.weight \(1 in all\): freeze it"):
        make(model, GaLoreConfig(rank=2))
    model[1].weight.requires_grad_(False)
    make(model, GaLoreConfig(rank=2))
