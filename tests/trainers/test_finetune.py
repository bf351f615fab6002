"""Fine-tuning: whole, with LoRA and with GaLore; what is measured, exported, resumed and refused."""

import shutil
import sys
from dataclasses import fields
from typing import Any, cast

import peft
import pytest
import torch
from tiny_finetune import IDS, VOCAB, config, write_all, write_model
from tiny_pretrain import signalled_at
from tiny_run import read, same
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinrank.optim import METHODS, AdamWConfig, GaLoreConfig, MFACConfig, RankedConfig, build, route
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.adapters import AdapterConfig, LoraConfig, add_adapter, lora_modules, merge_adapter
from thinrank.trainers.data import TextData
from thinrank.trainers.errors import UserError
from thinrank.trainers.finetune import FinetuneConfig, ModelFolderConfig, finetune
from thinrank.trainers.jobs import Finetuning
from thinrank.trainers.models import load_model
from thinrank.trainers.module import token_nats

# peft 0.21 asks transformers 5 for a property under its old name, here where a test itself calls peft
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=["attention", r"layers\.1\.mlp\.down_proj"])
PATHS = {
    "adamw": (AdamWConfig(lr=0.01), AdapterConfig()),
    "galore": (GaLoreConfig(rank=4, update_proj_gap=2), AdapterConfig()),
    "lora": (AdamWConfig(lr=0.05), LORA),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a corpus, a model, and a cache that all runs share."""
    return write_all(tmp_path_factory.mktemp("finetune"))


def loaded(folder, dtype="float32") -> Any:
    return load_model(str(folder), VOCAB, key="model.path", dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def trained(chosen: FinetuneConfig, folder) -> Any:
    """The model of a run's last checkpoint, put together from base and checkpoint by hand."""
    model = Finetuning(chosen).build(VOCAB)
    weights = ckpt.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    unknown = model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()}, strict=False)
    assert unknown.unexpected_keys == []
    return model


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_run_measures_trains_and_exports(base, path, capsys):
    method, adapter = PATHS[path]
    chosen, folder = config(base, path, optimizer=method, adapter=adapter), base / path
    report = finetune(chosen)
    assert report["run"]["exit_code"] == 0
    assert report["metrics"]["test/loss"] < report["metrics"]["before/loss"] - 0.05
    assert report["optimizer_state"]["predicted_bytes"] == report["optimizer_state"]["measured_bytes"]
    whole = sum(p.numel() for p in loaded(base / "model").parameters())
    factors = 4 * (2 * 4 * (16 + 16) + (16 + 32)) if path == "lora" else 0
    assert report["model"]["parameters"] == whole + factors
    assert report["model"]["trained_parameters"] == (factors or whole)
    assert report["optimizer_state"]["adamw_bytes"] == route(loaded(base / "model"), AdamWConfig()).state_bytes()
    assert report["training"]["step_seconds_median"] > 0
    assert read(folder / "report.json")["metrics"] == report["metrics"]
    shown = capsys.readouterr().out
    assert "(before the first step" in shown
    assert (", of which" in shown) == (path == "lora")

    model = trained(chosen, folder)
    found = AutoModelForCausalLM.from_pretrained(folder / "export")
    if path == "lora":
        # W + BA is rounded once, W x + B A x at every step: a few units in the last place of float32
        torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-6)
        again = peft.PeftModel.from_pretrained(loaded(base / "model"), folder / "adapter")
        assert torch.equal(logits(again), logits(model))
        assert not (folder / "adapter" / "README.md").exists()
    else:
        assert torch.equal(logits(found), logits(model))
        assert not (folder / "adapter").exists()
    assert not torch.equal(logits(found), logits(loaded(base / "model")))
    text = "for value in self: é"
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    assert AutoTokenizer.from_pretrained(folder / "export").encode(text) == tokenizer.encode(text)


def test_what_is_measured_before_is_the_model_of_the_folder(base):
    report = finetune(config(base, "before", max_steps=1, export=False))
    data = TextData(config(base, "before").data)
    data.prepare_data()
    model, nats, count = loaded(base / "model"), 0.0, 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            found = token_nats(model(input_ids=batch["input_ids"]).logits, batch["labels"])
            nats, count = nats + float(found[0]), count + int(found[1])
    assert report["metrics"]["before/loss"] == pytest.approx(nats / count, rel=1e-5)
    bits = nats / count / torch.log(torch.tensor(2.0)).item() / data.test_bytes_per_token
    assert report["metrics"]["before/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("path", ["galore", "lora"])
def test_a_preempted_run_goes_on_bit_for_bit_and_keeps_its_first_measurement(base, path):
    method, adapter = PATHS[path]
    settings = {"optimizer": method, "adapter": adapter, "max_steps": 6, "checkpoint_every": 5, "export": False}
    whole = finetune(config(base, f"{path}-whole", **settings))
    undo = signalled_at(3, rank=0)
    first = finetune(config(base, f"{path}-parts", **settings))
    undo()
    assert (first["run"]["exit_code"], first["training"]["steps"]) == (75, 3)
    second = finetune(config(base, f"{path}-parts", **settings))
    assert (second["run"]["resumed_from"], second["run"]["exit_code"]) == (3, 0)
    assert second["metrics"] == whole["metrics"]
    states = [ckpt.load(base / f"{path}-{name}" / "checkpoints" / "last.ckpt") for name in ("whole", "parts")]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "TextData"):
        same(states[0][key], states[1][key], key)
    same(states[0]["thinrank"]["random"], states[1]["thinrank"]["random"])
    if path == "lora":
        assert all("lora_" in name for name in states[0]["state_dict"]), "frozen weights are in the base folder"


def test_a_checkpoint_belongs_to_its_model(base, tmp_path):
    shutil.copytree(base / "corpus", tmp_path / "corpus")
    write_model(tmp_path / "model")
    chosen = config(tmp_path, "run", adapter=LORA, max_steps=2, export=False)
    finetune(chosen)
    write_model(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match=r"made from another model .*: restore the one in model\.path"):
        finetune(config(tmp_path, "run", adapter=LORA, max_steps=4, export=False))
    write_model(tmp_path / "model")
    longer = finetune(config(tmp_path, "run", adapter=LORA, max_steps=4, export=False))
    assert longer["run"]["resumed_from"] == 2


def test_stored_weights_keep_their_precision(base, tmp_path):
    shutil.copytree(base / "corpus", tmp_path / "corpus")
    write_model(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded(tmp_path / "model").dtype == torch.float32
    half = {"model": {"dtype": "stored"}, "precision": "bf16-mixed", "max_steps": 2, "validate_every": 0}
    for name, (method, adapter) in {key: PATHS[key] for key in ("galore", "lora")}.items():
        report = finetune(config(tmp_path, name, optimizer=method, adapter=adapter, **half))
        assert report["metrics"]["test/loss"] < report["metrics"]["before/loss"]
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name / "export", dtype="auto")
        assert {p.dtype for p in found.parameters()} == {torch.bfloat16}


# Adapters ------------------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(base):
    plain = logits(loaded(base / "model"))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = add_adapter(loaded(base / "model"), LORA, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = add_adapter(loaded(base / "model"), LORA, seed=3)
    other = add_adapter(loaded(base / "model"), LORA, seed=4)
    assert torch.equal(logits(first), plain)
    same(dict(first.state_dict()), dict(second.state_dict()))
    name = next(name for name in first.state_dict() if "lora_A" in name)
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_merging_adds_the_scaled_product_and_touches_nothing_else(base):
    plain = loaded(base / "model")
    model = add_adapter(loaded(base / "model"), LORA, seed=0)
    generator = torch.Generator().manual_seed(0)
    factors = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
                factors[name.removeprefix("base_model.model.")] = p.clone()
    merged = merge_adapter(model)
    for name, weight in plain.state_dict().items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in factors:
            a, b = (factors[f"{stem}.lora_{letter}.default.weight"].double() for letter in "AB")
            expected = weight.double() + 8.0 / 4 * b @ a  # alpha / rank
            torch.testing.assert_close(merged.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(merged.state_dict()[name], weight), name
    assert len(factors) == 2 * 9


def test_a_wrong_merge_is_noticed(base, monkeypatch):
    model = add_adapter(loaded(base / "model"), LORA, seed=0)
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: loaded(base / "model").apply(_spoil), False)
    with pytest.raises(RuntimeError, match="the merged model differs from the trained one: its logits are off by"):
        merge_adapter(model)


def _spoil(module):
    if isinstance(module, torch.nn.Linear):
        module.weight.data *= 1.01


def test_targets_are_those_of_the_optimizers(base, tmp_path):
    model = loaded(base / "model")
    assert len(lora_modules(model, ["all-linear"])) == 2 * 7
    assert lora_modules(model, ["attention"])[0] == "model.layers.0.self_attn.q_proj"
    assert len(lora_modules(model, ["mlp"])) == 2 * 3
    assert lora_modules(model, ["lm_head"]) == ["lm_head"]
    old = {"architecture": "gpt2", "num_hidden_layers": 1}
    gpt2 = loaded(write_model(tmp_path / "gpt2", **old, extra={}))
    assert len(lora_modules(gpt2, ["all-linear"])) == 4  # Conv1D layers
    assert torch.equal(logits(add_adapter(gpt2, LoraConfig(), seed=0)), logits(loaded(tmp_path / "gpt2")))


def test_without_peft_one_sentence_says_how_to_get_it(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", cast("Any", None))
    with pytest.raises(UserError, match=r"adapter=lora needs the peft library .*pip install -e '\.\[finetune\]'"):
        finetune(config(base, "none", adapter=LORA))
    assert not (base / "none").exists()


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LoraConfig(rank=0), "rank must be a whole number of at least 1, got 0"),
        (lambda: LoraConfig(alpha=0.0), "alpha must be above 0, got 0"),
        (lambda: LoraConfig(dropout=1.0), r"dropout must be in \[0, 1\), got 1"),
        (lambda: LoraConfig(targets=[]), r"targets must be a list of at least one, got \[\]"),
        (lambda: ModelFolderConfig(path=""), "path must name a folder, got ''"),
        (lambda: ModelFolderConfig(dtype="half"), "dtype must be one of float32, stored, got 'half'"),
        (lambda: ModelFolderConfig(attention="fast"), "attention must be one of sdpa, eager, flash_attention_2"),
        (lambda: FinetuneConfig(model=ModelFolderConfig(path="x")), "data.tokenizer must be the model's own, x, got"),
        (
            lambda: FinetuneConfig(adapter=LoraConfig(), optimizer=GaLoreConfig()),
            r"optimizer=galore would project .* LoRA's factors, which have rank 8 already: use optimizer=adamw",
        ),
    ],
)
def test_bad_values_are_refused_by_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_projects_is_refused_beside_lora(base, name):
    """By the configuration before anything is read, and by `build` for those who come without one."""
    method = METHODS[name]()
    model = add_adapter(loaded(base / "model"), LORA, seed=0)
    if method.projects:
        with pytest.raises(ValueError, match=rf"optimizer={name} would project gradients of LoRA's factors"):
            FinetuneConfig(adapter=LORA, optimizer=method)
        with pytest.raises(ValueError, match=rf"{name} would project gradients of LoRA's factors.*lora_A"):
            build(model, method)
    else:
        FinetuneConfig(adapter=LORA, optimizer=method)
        build(model, method)
    assert method.projects == isinstance(method, RankedConfig)


def test_mfac_on_whole_factors_goes_with_lora(base):
    method = MFACConfig(space="whole", window=2, lr=0.01)
    report = finetune(config(base, "mfac", optimizer=method, adapter=LORA, max_steps=2, export=False))
    assert report["run"]["state"] == "finished"


def test_every_field_says_what_it_means():
    for cls in (AdapterConfig, LoraConfig, ModelFolderConfig, FinetuneConfig):
        assert [field.name for field in fields(cls) if not field.metadata.get("help")] == []
