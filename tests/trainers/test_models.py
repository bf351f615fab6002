"""Models: sizes, seeded weights, and the sentences of what cannot be built."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from tiny_training import TINY, VOCAB, tiny_model

from thinrank.trainers.errors import UserError
from thinrank.trainers.models import PRESETS, ModelConfig, build_model


@pytest.mark.parametrize(
    ("name", "vocab", "millions"),
    [
        ("2m", 1024, 2.164),
        ("9m", 32000, 8.996),
        ("20m", 32000, 19.548),
        ("35m", 32000, 35.198),
        ("60m", 32000, 58.074),
        ("130m", 32000, 134.106),
        ("350m", 32000, 367.969),
        ("1b", 32000, 1339.083),
        ("7b", 32000, 6738.416),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, vocab, millions):
    model = build_model(PRESETS[name], vocab, seed=0, meta=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_model(TINY, VOCAB, seed=3).state_dict()
    torch.manual_seed(2)
    second = build_model(TINY, VOCAB, seed=3).state_dict()
    other = build_model(TINY, VOCAB, seed=4).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["lm_head.weight"].std() == pytest.approx(TINY.initializer_range, rel=0.1)


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_model(TINY, VOCAB, seed=0)
    build_model(TINY, VOCAB, seed=0, meta=True)
    with pytest.raises(UserError):
        build_model(replace(TINY, architecture="nothing"), VOCAB, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_config_reaches_the_model():
    config = replace(
        TINY, num_key_value_heads=1, rms_norm_eps=1e-3, rope_theta=500.0, tie_word_embeddings=True, attention="eager"
    )
    built = build_model(replace(config, extra={"attention_bias": True}), VOCAB, seed=0)
    hf = built.config
    assert (hf.vocab_size, hf.hidden_size, hf.num_hidden_layers, hf.num_key_value_heads) == (VOCAB, 32, 2, 1)
    assert (hf.rms_norm_eps, hf.rope_parameters["rope_theta"], hf._attn_implementation) == (1e-3, 500.0, "eager")
    assert built.model.embed_tokens.weight is built.lm_head.weight
    assert built.model.layers[0].self_attn.q_proj.bias is not None
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (None, None, None)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen3", "granite"])
def test_other_architectures_take_the_same_sizes(architecture):
    extra = {"word_embed_proj_dim": 32} if architecture == "opt" else {}
    built = build_model(replace(TINY, architecture=architecture, extra=extra), VOCAB, seed=0)
    assert built.config.model_type == architecture
    shapes = {tuple(parameter.shape) for parameter in built.parameters()}
    assert (48, 32) in shapes or (32, 48) in shapes  # the MLP has the width that was asked for
    assert built(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, VOCAB)


def test_a_folder_is_loaded(tmp_path):
    saved = tiny_model(seed=7)
    saved.save_pretrained(tmp_path)
    config = ModelConfig(pretrained=str(tmp_path))
    loaded = build_model(config, VOCAB, seed=0).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in saved.state_dict().items())
    planned = build_model(config, VOCAB, seed=0, meta=True)
    assert {name: value.shape for name, value in planned.state_dict().items()} == {
        name: value.shape for name, value in loaded.items()
    }
    with pytest.raises(UserError, match=rf"knows {VOCAB} tokens and the tokenizer has 65: set data.tokenizer"):
        build_model(config, VOCAB + 1, seed=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "lama"}, r"'lama' is no causal language model of transformers; did you mean llama"),
        ({"architecture": "gpt2", "rms_norm_eps": 1e-5}, r"gpt2 has no setting rms_norm_eps: .*set model.rms_norm_eps"),
        ({"extra": {"hiden_act": "gelu"}}, r"llama has no setting hiden_act: its nearest settings are hidden_act"),
        ({"extra": {"attention_bias": "perhaps"}}, r"transformers refuses these values for llama: "),
        ({"pretrained": "/nowhere"}, r"must be a folder that save_pretrained wrote, got '/nowhere'"),
        ({"attention": "flash_attention_2"}, r"model.attention 'flash_attention_2' cannot be used here: .*set it to"),
    ],
)
def test_what_cannot_be_built_is_said(changes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        build_model(replace(TINY, **changes), VOCAB, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be an integer of at least 1, got 1.5"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads, got 32 and 5"),
        ({"num_attention_heads": 32}, "an even number of dimensions per attention head"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads, got 3 and 2"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0, got 0.0"),
        ({"attention": "fast"}, "attention must be one of sdpa, eager, flash_attention_2, got 'fast'"),
        ({"extra": {"hidden_size": 3}}, "extra must not repeat a field of the model, got hidden_size"),
    ],
)
def test_bad_values_are_refused_by_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(replace(TINY, **changes), VOCAB, seed=0)


def test_a_vocabulary_must_have_tokens():
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        build_model(TINY, 0, seed=0)


def test_every_field_says_what_it_means():
    assert [f.name for f in fields(ModelConfig) if not f.metadata.get("help")] == []


def test_the_config_is_importable_without_torch_models():
    """`--help` reads these classes; transformers would add seconds to it."""
    code = (
        "import sys, types; sys.modules['thinrank.trainers'] = package = types.ModuleType('thinrank.trainers');"
        "import thinrank, os; package.__path__ = [os.path.join(p, 'trainers') for p in thinrank.__path__];"
        "import thinrank.trainers.models, thinrank.trainers.schedule;"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
