"""Rules of scale in whole runs: sizes of one kind, Granite's factors, classes in checkpoints, nothing at the base."""

from dataclasses import replace

import pytest
import tiny_finetune
import torch
from tiny_pretrain import config, write_corpus

from thinrank.optim import AdamWConfig, GaLorePlusConfig, build
from thinrank.optim.layers import SST
from thinrank.optim.scaling import PRESETS, Scaling, ScalingConfig
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.adapters import LoraConfig
from thinrank.trainers.errors import UserError
from thinrank.trainers.jobs import Finetuning, Pretraining
from thinrank.trainers.models import ModelConfig, transformers_config
from thinrank.trainers.module import token_nats
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.run import config_tree, differences, identity_json
from thinrank.trainers.scaling import at_width, refuse_other_classes, resized, sizes_at, with_forward

BASE = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32
)


def rule(name="linear_wd", **values):
    return ScalingConfig(**{**PRESETS[name], "base_width": 32, "base_depth": 2, **values})


@pytest.fixture
def base(tmp_path):
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    return tmp_path


def newest(folder):
    found = ckpt.newest(folder / "checkpoints")
    assert found is not None
    return found


def ruled(asked, model) -> Scaling:
    found = asked.scaling(model)
    assert found is not None
    return found


def job(model, scaling, **values):
    settings = config("unused", "x", optimizer=AdamWConfig(lr=0.01, weight_decay=0.1), **values)
    return Pretraining(replace(settings, model=model, scaling=scaling))


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_heads_keep_their_size_or_their_count():
    kind = {"hidden": 128, "heads": 4, "key_value_heads": 2, "intermediate": 344}
    wide = sizes_at(512, **kind, keep="size")
    assert wide == {
        "hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 1376
    }  # fmt: skip
    wide = sizes_at(512, **kind, keep="count")
    assert (wide["num_attention_heads"], wide["num_key_value_heads"]) == (4, 2)
    single = sizes_at(512, **{**kind, "key_value_heads": 1}, keep="size")
    assert single["num_key_value_heads"] == 1
    for width, keep, words in ((48, "size", "multiple of the head size 32"), (130, "count", "multiple of the 4 heads")):
        with pytest.raises(ValueError, match=words):
            sizes_at(width, **kind, keep=keep)
    with pytest.raises(ValueError, match=r"0\.5 key/value heads"):
        sizes_at(32, **kind, keep="size")


@pytest.mark.parametrize("architecture", ["llama", "granite", "qwen3", "opt", "gpt2"])
def test_architectures_are_resized_and_classed(architecture):
    """A model config and one of transformers grow alike; every matrix of a block is hidden."""
    model = replace(BASE, architecture=architecture, rms_norm_eps=None)
    hf = transformers_config(at_width(model, 64), 50)
    again = resized(transformers_config(model, 50), 64, 2, heads="size")
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        assert getattr(hf, name) == getattr(again, name)
    scaled = job(at_width(model, 64), rule("const"))
    members = ruled(scaled, scaled.build(50, meta=True)).classes()
    blocks = {kind for name, kind in members.items() if ".0." in name and name.endswith("proj.weight")}
    assert blocks <= {"hidden"}
    assert "input" in members.values()
    assert "readout" in members.values()


# --- factors in the forward -------------------------------------------------------------------------------------------


def test_granite_carries_the_factors():
    model = at_width(replace(BASE, architecture="granite", extra={"attention_multiplier": 0.5}), 128, depth=4)
    extra = with_forward(model, rule("completep")).extra
    assert extra == {"attention_multiplier": 0.5, "logits_scaling": 4.0, "residual_multiplier": 0.5}
    grown = at_width(replace(BASE, architecture="granite", extra={"attention_multiplier": 0.5}), 128, heads="count")
    assert with_forward(grown, rule("const", heads="count")).extra["attention_multiplier"] == 0.125
    half = rule("const", heads="count", attention_width_exp=0.5)
    assert with_forward(grown, half).extra["attention_multiplier"] == 0.25
    assert with_forward(BASE, rule("const")) == BASE


@pytest.mark.parametrize(
    ("model", "scaling", "words"),
    [
        ({"tie_word_embeddings": True}, rule("const"), "architecture=granite, which divides its logits"),
        ({}, rule("completep"), "multiplies the branches of blocks"),
        ({"hidden_size": 64}, rule("const", heads="count"), "attention_width_exp=0.5, or model.architecture=granite"),
        ({"hidden_size": 64}, rule("const", base_width=12), "multiple of the head size 16"),
        ({}, rule("const", overrides={"nobody": "fixed"}), "'nobody' matches no parameter"),
    ],
    ids=["tied", "depth", "growing heads", "uneven heads", "override"],
)
def test_what_cannot_be_scaled_is_refused_in_a_sentence(model, scaling, words):
    asked = job(replace(BASE, **model), scaling)
    with pytest.raises(UserError, match=words):
        asked.scaling(asked.build(50))


def test_tied_embeddings_are_fine_where_logits_are_divided():
    asked = job(replace(at_width(BASE, 64), architecture="granite", tie_word_embeddings=True), rule("const"))
    found = ruled(asked, model := asked.build(50))
    assert model.config.logits_scaling == 2.0
    assert found.classes()["model.embed_tokens.weight"] == "input"
    assert not found.folded


def test_llama_folded_trains_as_granite_divided():
    """Equal models but for the place of the readout's factor; AdamW without clipping, eps large enough to matter."""
    losses = {}
    attention = {"attention_multiplier": 16**-0.5}  # what Llama has
    wide = at_width(replace(BASE, hidden_size=64, num_attention_heads=4, intermediate_size=96), 128)
    for architecture, extra in (("llama", {}), ("granite", attention)):
        asked = job(replace(wide, architecture=architecture, extra=extra), rule("linear_wd"))
        model = asked.build(50).double()
        scaling = ruled(asked, model)
        assert scaling.folded == (architecture == "llama")
        optimizer = build(model, AdamWConfig(lr=0.02, weight_decay=0.3, eps=1e-4), scaling=scaling)
        ids = torch.randint(50, (4, 13), generator=torch.Generator().manual_seed(1))
        rows = losses.setdefault(architecture, [])
        for _ in range(6):
            nats, count = token_nats(model(input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:])
            (nats / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            rows.append(float(nats.detach() / count))
    assert losses["llama"] == pytest.approx(losses["granite"], rel=1e-5)  # the loss and rotary tables are float32
    assert losses["llama"][-1] < losses["llama"][0] - 0.1


def test_factors_inherit_the_scaled_weights():
    """SST is made of the dense weights after they were scaled, and its factors have the rates of their fan-in."""
    narrow, wide = job(at_width(BASE, 64), rule("const")), job(at_width(BASE, 64), rule("const"), reparam=SST(rank=4))
    dense, made = narrow.build(50), wide.build(50)
    name = "model.layers.0.mlp.up_proj"
    assert torch.allclose(made.get_submodule(name).weight(), dense.get_parameter(f"{name}.weight"), atol=1e-5)
    of = ruled(wide, made).multipliers()
    assert (of[f"{name}.V"].lr, of[f"{name}.U"].lr) == (0.5, 1.0)


def test_fine_tuning_scales_rates_and_leaves_trained_weights_alone(tmp_path):
    """Of a whole model, and of LoRA's factors, by their fan-in."""
    tiny_finetune.write_model(tmp_path / "model")
    scaling = ScalingConfig(**PRESETS["const"], base_width=8)
    for adapter, rates in (
        (None, {"layers.0.mlp.up_proj.weight": 0.5, "embed_tokens.weight": 1.0}),
        (LoraConfig(rank=2), {"layers.0.mlp.up_proj.lora_A.default.weight": 0.5, "up_proj.lora_B.default.weight": 1.0}),
    ):
        settings = replace(tiny_finetune.config(tmp_path, "x", adapter=adapter), scaling=scaling)
        asked, plain = Finetuning(settings), Finetuning(replace(settings, scaling=ScalingConfig()))
        model, same = asked.build(tiny_finetune.VOCAB), plain.build(tiny_finetune.VOCAB)
        for one, other in zip(model.parameters(), same.parameters(), strict=True):
            assert torch.equal(one, other)
        of = ruled(asked, model).multipliers()
        for name, lr in rates.items():
            assert {m.lr for key, m in of.items() if name in key} == {lr}
        assert plain.scaling(same) is None


# --- runs -------------------------------------------------------------------------------------------------------------


def test_at_the_base_a_run_is_bit_for_bit_what_it_was(base):
    method = GaLorePlusConfig(rank=4, update_proj_gap=3, lr=0.01, weight_decay=0.1)
    plain = config(base, "plain", optimizer=method, model={"extra": {}})
    ruled = replace(
        config(base, "ruled", optimizer=method, model={"extra": {}}),
        scaling=ScalingConfig(**PRESETS["linear_wd"], base_width=16),
    )
    reports = [pretrain(plain), pretrain(ruled)]
    assert reports[0]["metrics"]["test/loss"] == reports[1]["metrics"]["test/loss"]
    states = [ckpt.load(newest(base / name))["state_dict"] for name in ("plain", "ruled")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_scaled_run_resumes_and_keeps_its_classes(base):
    scaling = ScalingConfig(**PRESETS["sqrt_wd"], base_width=8)
    method = AdamWConfig(lr=0.01, weight_decay=0.1)
    whole = pretrain(replace(config(base, "whole", optimizer=method), scaling=scaling))
    assert "scaling sqrt_wd: width × 2 (base 8)" in whole["routing_table"]
    last = newest(base / "whole")
    saved = ckpt.load(last)
    assert saved["thinrank"]["classes"]["model.layers.0.self_attn.q_proj.weight"] == "hidden"
    groups = {g["label"]: g for g in saved["optimizer_states"][0]["param_groups"]}
    assert groups["matrix:hidden/adamw"]["initial_lr"] == pytest.approx(0.005)
    assert groups["matrix:hidden/adamw"]["weight_decay"] == pytest.approx(0.1 * 2**0.5)
    assert groups["head:readout/adamw"]["weight_decay"] == 0.0
    last.unlink()  # the one before is of step 4, where it was validated
    again = pretrain(replace(config(base, "whole", optimizer=method), scaling=scaling))
    assert again["run"]["resumed_from"] == 4
    assert again["metrics"]["test/loss"] == whole["metrics"]["test/loss"]
    other = {**saved["thinrank"]["classes"], "model.norm.weight": "fixed"}
    with pytest.raises(UserError, match=r"made with model\.norm\.weight as vector and it is fixed now"):
        refuse_other_classes(newest(base / "whole"), other)


def test_a_rule_that_does_nothing_leaves_older_checkpoints_alone():
    tree = config_tree(config("unused", "x"))
    old = {key: value for key, value in tree.items() if key != "scaling"}
    assert differences(identity_json(old), identity_json(tree)) == []
    changed = config_tree(replace(config("unused", "x"), scaling=rule("const")))
    assert any("scaling.name" in row for row in differences(identity_json(old), identity_json(changed)))
