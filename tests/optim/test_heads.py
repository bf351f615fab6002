"""Where heads lie is checked against the models: with all heads but one silent, see whose gradients are left."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from thinrank.optim import GaLoreConfig, GaLorePlusConfig, HeadLayout, attention_layouts, build, route

HEADS, KV, WIDTH = 4, 2, 32
COMMON = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS, "vocab_size": 48,
    "intermediate_size": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}  # fmt: skip


def config(name, **values):
    return getattr(hf, name)(**{**COMMON, "attn_implementation": "eager", **values})


ALL: dict[str, Any] = {"cross_heads": ["q", "k", "v", "o"]}
MODELS = {
    # the model, its attention's output weight, the attention weights' names, heads of q and of k and v
    "llama": ("LlamaModel", lambda: config("LlamaConfig", num_key_value_heads=KV), "o_proj", KV),
    "wide heads": ("LlamaModel", lambda: config("LlamaConfig", num_key_value_heads=KV, head_dim=16), "o_proj", KV),
    "opt": (
        "OPTModel", lambda: config("OPTConfig", ffn_dim=64, dropout=0.0, word_embed_proj_dim=WIDTH), "out_proj", HEADS
    ),
    "bert": (
        "BertModel",
        lambda: config("BertConfig", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0),
        "attention.output.dense", HEADS,
    ),
    "phi3": ("Phi3Model", lambda: config("Phi3Config", num_key_value_heads=KV, pad_token_id=0), "o_proj", KV),
    "gpt2": (
        "GPT2Model", lambda: config("GPT2Config", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), "attn.c_proj", HEADS
    ),
    "mpt": (
        "MptModel", lambda: hf.MptConfig(d_model=WIDTH, n_heads=HEADS, n_layers=1, vocab_size=48), "out_proj", HEADS
    ),
    "modernbert": ("ModernBertModel", lambda: config("ModernBertConfig", pad_token_id=0), "attn.Wo", HEADS),
    "gpt_neox": ("GPTNeoXModel", lambda: config("GPTNeoXConfig"), "attention.dense", HEADS),
    "bloom": ("BloomModel", lambda: config("BloomConfig", n_layer=1, n_head=HEADS), "self_attention.dense", HEADS),
    "persimmon": ("PersimmonModel", lambda: config("PersimmonConfig", pad_token_id=0), "self_attn.dense", HEADS),
    "falcon": (
        "FalconModel", lambda: config("FalconConfig", multi_query=False, parallel_attn=False, bias=False),
        "self_attention.dense", HEADS,
    ),
    "falcon, one key": ("FalconModel", lambda: config("FalconConfig", multi_query=True), "self_attention.dense", 1),
    "falcon, groups": (
        "FalconModel", lambda: config("FalconConfig", new_decoder_architecture=True, num_kv_heads=KV),
        "self_attention.dense", KV,
    ),
}  # fmt: skip


def blocks(tensor, layout):
    """The heads of every section of a weight, one below the other."""
    heads_first = tensor if layout.side == "right" else tensor.T
    parts = heads_first.split(list(layout.sections or [len(heads_first)]))
    return [part.unflatten(0, (count, -1)) for part, count in zip(parts, layout.counts, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_heads_lie_where_the_model_has_them(name):
    """With the output weight silent for all heads but one, only that head's queries, keys and values have gradients."""
    cls, make, output, kv = MODELS[name]
    torch.manual_seed(0)
    model = getattr(hf, cls)(make()).eval()
    found = attention_layouts(model)
    (out,) = [name for name, p in model.named_parameters() if f"{output}.weight" in name and p.ndim == 2]
    weights = {name: layout for name, layout in found.items() if name != out}
    assert sorted("".join("".join(layout.roles) for layout in weights.values())) == ["k", "q", "v"]
    inputs_first = name == "gpt2"  # its layers are stored the other way round
    if out in found:
        assert found[out] == HeadLayout(heads=HEADS, side="right" if inputs_first else "left", roles=("o",))
    tokens = torch.arange(12).remainder(7).view(2, 6)
    for head in range(HEADS):
        twin = getattr(hf, cls)(make()).eval()
        twin.load_state_dict(model.state_dict())
        weight = twin.get_parameter(out)
        with torch.no_grad():
            inputs = weight if inputs_first else weight.T
            silent = torch.arange(HEADS).repeat_interleave(inputs.shape[0] // HEADS) != head
            inputs[silent] = 0.0
        twin(tokens).last_hidden_state.square().sin().sum().backward()
        for each, layout in weights.items():
            for count, role, part in zip(
                layout.counts, layout.roles, blocks(twin.get_parameter(each).grad, layout), strict=True
            ):
                assert count == (HEADS if role == "q" else kv)
                loud = part.flatten(1).abs().amax(-1)
                mine = head * count // HEADS
                assert float(loud[mine]) > 1e-7
                loud[mine] = 0.0
                assert float(loud.max()) == 0.0, (each, role)


def test_the_attention_of_torch_itself():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    assert attention_layouts(model) == {
        "attention.in_proj_weight": HeadLayout(
            heads=(2, 2, 2), side="right", sections=(16, 16, 16), roles=("q", "k", "v")
        ),
        "attention.out_proj.weight": HeadLayout(heads=2, side="left", roles=("o",)),
    }


def llama(**values):
    return hf.LlamaForCausalLM(config("LlamaConfig", num_key_value_heads=KV, num_hidden_layers=2, **values))


def group_of(optimizer, name):
    (found,) = [group for group in optimizer.param_groups if name in group["param_names"]]
    return found


def test_each_layout_has_a_group_and_other_methods_have_none():
    optimizer = build(llama(), GaLorePlusConfig(rank=4, **ALL))
    expected = {"q": ("right", HEADS), "k": ("right", KV), "v": ("right", KV), "o": ("left", HEADS)}
    for layer in (0, 1):
        for role, (side, heads) in expected.items():
            group = group_of(optimizer, f"model.layers.{layer}.self_attn.{role}_proj.weight")
            assert (group["proj_type"], group["heads"], group["sections"]) == (side, heads, None)
            assert group["label"] == "matrix/galore_plus"
    rest = group_of(optimizer, "model.layers.0.mlp.up_proj.weight")
    assert (rest["proj_type"], rest["heads"]) == ("std", 1)
    matrix_groups = [group for group in optimizer.param_groups if group["role"] == "matrix"]
    assert len(matrix_groups) == 4  # q; k and v; o; the rest
    default = build(llama(), GaLorePlusConfig(rank=4))  # q and k
    assert group_of(default, "model.layers.0.self_attn.v_proj.weight")["heads"] == 1
    assert group_of(default, "model.layers.0.self_attn.k_proj.weight")["heads"] == KV
    for other in (GaLoreConfig(rank=4), GaLorePlusConfig(rank=4, cross_heads=[])):
        groups = build(llama(), other).param_groups
        assert [group["role"] for group in groups] == ["embedding", "matrix", "vector", "head"]


def test_of_a_fused_weight_only_the_sections_asked_for_share():
    model = hf.Phi3Model(config("Phi3Config", num_key_value_heads=KV, pad_token_id=0))
    group = group_of(build(model, GaLorePlusConfig(rank=4)), "layers.0.self_attn.qkv_proj.weight")
    assert (group["heads"], group["sections"], group["proj_type"]) == ((HEADS, KV, 1), (32, 16, 16), "right")


@pytest.mark.parametrize(("cls", "name"), [("GPT2Config", "GPT2Model"), ("Phi3Config", "Phi3Model")])
def test_models_with_fused_weights_train(cls, name):
    torch.manual_seed(0)
    values = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if name == "GPT2Model" else {"pad_token_id": 0}
    model = getattr(hf, name)(config(cls, **values))
    optimizer = build(model, GaLorePlusConfig(rank=4, warmup=2, update_proj_gap=3, scale=1.0, **ALL))
    tokens = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(tokens).last_hidden_state - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


def test_heads_held_together_are_shared_together_or_not_at_all():
    model = hf.GPTNeoXModel(config("GPTNeoXConfig"))
    name = "layers.0.attention.query_key_value.weight"
    with pytest.raises(ValueError, match=rf"{name} holds q, k, v of a head together.*name all of them, or pass heads="):
        build(model, GaLorePlusConfig(rank=4))
    group = group_of(build(model, GaLorePlusConfig(rank=4, cross_heads=["q", "k", "v"])), name)
    assert (group["proj_type"], group["heads"]) == ("right", HEADS)
    assert group_of(build(model, GaLorePlusConfig(rank=4, cross_heads=["o"])), name)["heads"] == 1


class Attention(nn.Module):
    """Layers of an attention with names alone, and one that is none."""

    def __init__(self, **layers: int) -> None:
        super().__init__()
        for name, rows in {"up": 32, **layers}.items():
            self.add_module(name, nn.Linear(16, rows, bias=False))


class Named(nn.Module):
    def __init__(self, attention, **values):
        super().__init__()
        self.attention = attention
        self.config = hf.PretrainedConfig(**values)


CODEGEN = hf.CodeGenConfig(
    vocab_size=48, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, bos_token_id=None, eos_token_id=None
)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Attention(q_proj=16), r"q_proj\.weight looks like .*neither its module nor model\.config says num_attention"),
        (Named(Attention(q_proj=24), num_attention_heads=4, head_dim=4), r"its 24 outputs are not 4 heads of 4"),
        (Named(Attention(Wqkv=48), num_attention_heads=4), r"how this model packs q, k and v into one is not known"),
        (Attention(qkv_proj=48), r"how this model packs q, k and v into one is not known here: pass heads="),
        (hf.CodeGenModel(CODEGEN), r"qkv_proj\.weight .*how a model of type 'codegen' packs"),
    ],
    ids=["no config", "gated", "other type", "no type", "codegen"],
)
def test_what_is_not_known_is_refused_with_the_remedies(model, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        build(model, GaLorePlusConfig(rank=2))
    for remedy in ("heads={pattern: HeadLayout(...)}", "exclude these weights", "cross_heads=[]"):
        assert remedy in str(caught.value)
    build(model, GaLorePlusConfig(rank=2, cross_heads=[]))
    name = next(n for n, _ in model.named_parameters() if "q" in n)
    build(model, GaLorePlusConfig(rank=2, exclude=[name]))
    told = {"qkv|q_proj": HeadLayout(heads=2, side="right")}
    assert group_of(build(model, GaLorePlusConfig(rank=2), heads=told), name)["heads"] == 2


def test_given_layouts_win_and_must_match():
    told = {r"layers\.0.*q_proj": HeadLayout(heads=2, side="right")}
    optimizer = build(llama(), GaLorePlusConfig(rank=4), heads=told)
    counts = [group_of(optimizer, f"model.layers.{i}.self_attn.q_proj.weight")["heads"] for i in (0, 1)]
    assert counts == [2, HEADS]
    assert route(llama(), GaLorePlusConfig(rank=4), heads=told).state_bytes() == optimizer.state_bytes()
    with pytest.raises(ValueError, match=r"the heads pattern 'w_proj' matches no projected matrix"):
        build(llama(), GaLorePlusConfig(rank=4), heads={"w_proj": HeadLayout(heads=2, side="right")})
    for other in (GaLoreConfig(rank=4), GaLorePlusConfig(rank=4, cross_heads=[])):
        with pytest.raises(ValueError, match=r"heads is given, but galore.* has .*: leave it out"):
            build(llama(), other, heads=told)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"heads": 2, "side": "std"}, r"side must be right .* or left .*, got 'std'"),
        ({"heads": 0, "side": "left"}, r"heads must be at least 1, got 0"),
        ({"heads": (2, 2), "side": "right"}, r"heads must be one number for each of the 1 sections"),
        ({"heads": 2, "side": "right", "roles": ("x",)}, r"roles must be letters of q, k, v, o"),
        ({"heads": 2, "side": "right", "sections": (8, 8), "roles": ("q",)}, r"roles must be .* of the 2 sections"),
    ],
)
def test_layouts_refuse(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        HeadLayout(**values)


def test_an_output_projection_that_belongs_to_no_attention_is_a_matrix_like_others():
    """Mamba's layers are called `out_proj` too."""
    model = nn.ModuleDict({"mixer": Attention(in_proj=32, out_proj=16)})
    assert attention_layouts(model) == {}
