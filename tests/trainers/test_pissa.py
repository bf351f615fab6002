"""LoRA that begins with the weights' own singular triples: trained, saved for the model as it was, merged, resumed."""

from typing import Any

import peft
import pytest
import torch
from tiny_finetune import IDS, VOCAB, config, write_all, write_model
from tiny_pretrain import signalled_at
from tiny_run import same
from torch import nn
from transformers import AutoModelForCausalLM

from thinrank.optim import AdamWConfig
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.adapters import LoraConfig, add_adapter, merge_adapter, save_adapter
from thinrank.trainers.errors import UserError
from thinrank.trainers.finetune import finetune
from thinrank.trainers.models import load_model

# peft 0.21 asks transformers 5 for a property under its old name, here where a test itself calls peft
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["attention", r"layers\.1\.mlp\.down_proj"]
INITS = ["pissa", "pissa_niter_4"]
every = pytest.mark.parametrize("init", INITS)


def pissa(init: str = "pissa", **more: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 8.0, "targets": TARGETS, "init": init, **more})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a corpus, models, and a cache that all runs share."""
    folder = write_all(tmp_path_factory.mktemp("pissa"))
    gpt2 = {"architecture": "gpt2", "num_hidden_layers": 1}
    write_model(folder / "gpt2", **gpt2, extra={})
    return folder


def loaded(folder, dtype="float32") -> Any:
    return load_model(str(folder), VOCAB, key="model.path", dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def moved(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@every
@pytest.mark.parametrize("name", ["model", "gpt2"])
def test_the_function_is_the_same_at_first_and_the_triples_are_in_the_factors(base, init, name):
    targets = TARGETS if name == "model" else ["attention"]
    plain = loaded(base / name)
    model = add_adapter(loaded(base / name), pissa(init, targets=targets), seed=0)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    for where, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, f"lora_{x}")["default"].weight for x in "AB")
            weight = plain.get_submodule(where.removeprefix("base_model.model.")).weight
            weight = weight.mT if name == "gpt2" else weight
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            if init == "pissa":
                torch.testing.assert_close(2.0 * b @ a, (u[:, :4] * s[:4]) @ vt[:4], rtol=1e-4, atol=1e-6)
            else:  # nearly, which is hard where singular values hardly fall
                left = torch.linalg.matrix_norm((weight - 2.0 * b @ a).detach())
                assert float(left) < 1.1 * float(s[4:].detach().square().sum().sqrt())


@every
@pytest.mark.parametrize("name", ["model", "gpt2"])
def test_what_is_saved_fits_the_model_as_it_was(base, tmp_path, init, name):
    targets = TARGETS if name == "model" else ["attention"]
    model = moved(add_adapter(loaded(base / name), pissa(init, targets=targets), seed=0))
    expected = logits(model)
    assert not torch.allclose(expected, logits(loaded(base / name)), rtol=1e-2)
    save_adapter(model, tmp_path / "adapter", lambda: loaded(base / name))
    assert torch.equal(logits(model), expected), "saving leaves the model as it is"
    again = peft.PeftModel.from_pretrained(loaded(base / name), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    saved: Any = again.peft_config["default"]
    assert (saved.r, saved.lora_alpha, saved.init_lora_weights) == (8, 16.0, True)
    assert not (tmp_path / "adapter" / "README.md").exists()
    torch.testing.assert_close(logits(merge_adapter(model)), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_fits_another_model_is_noticed(base, tmp_path):
    model = moved(add_adapter(loaded(base / "model"), pissa(), seed=0))
    other = loaded(base / "model")
    other.model.layers[0].self_attn.q_proj.weight.data *= 2
    with pytest.raises(RuntimeError, match="the saved adapter differs from the trained one: its logits are off by"):
        save_adapter(model, tmp_path / "adapter", lambda: other)


@every
def test_a_run_trains_the_leading_triples_and_exports_them(base, init):
    folder = base / init
    report = finetune(config(base, init, optimizer=AdamWConfig(lr=0.01), adapter=pissa(init)))
    assert report["run"]["exit_code"] == 0
    assert report["metrics"]["test/loss"] < report["metrics"]["before/loss"]
    found = AutoModelForCausalLM.from_pretrained(folder / "export")
    again = peft.PeftModel.from_pretrained(loaded(base / "model"), folder / "adapter")
    torch.testing.assert_close(logits(again), logits(found), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(found), logits(loaded(base / "model")), rtol=1e-3)


@every
def test_a_preempted_run_goes_on_bit_for_bit_from_what_its_checkpoint_holds(base, init):
    settings = {"adapter": pissa(init), "max_steps": 4, "checkpoint_every": 3, "export": False}
    whole = finetune(config(base, f"{init}-whole", **settings))
    undo = signalled_at(2, rank=0)
    first = finetune(config(base, f"{init}-parts", **settings))
    undo()
    assert (first["run"]["exit_code"], first["training"]["steps"]) == (75, 2)
    second = finetune(config(base, f"{init}-parts", **settings))
    assert (second["run"]["resumed_from"], second["run"]["exit_code"]) == (2, 0)
    assert second["metrics"] == whole["metrics"]
    states = [ckpt.load(base / f"{init}-{name}" / "checkpoints" / "last.ckpt") for name in ("whole", "parts")]
    for key in ("state_dict", "optimizer_states"):
        same(states[0][key], states[1][key], key)
    assert any("base_layer" in name for name in states[0]["state_dict"]), "what is left of the weights is kept"


@every
def test_stored_bfloat16_weights_work_too(base, tmp_path, init):
    write_model(tmp_path / "half", dtype=torch.bfloat16)
    model = moved(add_adapter(loaded(tmp_path / "half", "stored"), pissa(init), seed=0))
    save_adapter(model, tmp_path / "adapter", lambda: loaded(tmp_path / "half", "stored"))
    assert merge_adapter(model).dtype == torch.bfloat16


def test_it_depends_on_the_seed_alone(base):
    first, second = (add_adapter(loaded(base / "model"), pissa("pissa_niter_4"), seed=3) for _ in range(2))
    same(dict(first.state_dict()), dict(second.state_dict()))


def test_planning_sees_the_same_shapes(base):
    real = add_adapter(loaded(base / "model"), pissa(), seed=0)
    planned = load_model(str(base / "model"), VOCAB, key="model.path", meta=True)
    planned = add_adapter(planned, pissa(), seed=0)
    shapes = [{name: (p.shape, p.requires_grad) for name, p in m.named_parameters()} for m in (real, planned)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("init", ["PiSSA", "pissa_niter_0", "pissa_niter_", "eva", "", None])
def test_other_starts_are_refused(init):
    with pytest.raises(ValueError, match=r"init must be lora, pissa, or pissa_niter_4 and the like, got"):
        pissa(init)


def test_what_cannot_be_right_is_refused_by_one_sentence(base):
    with pytest.raises(ValueError, match=r"dropout must be 0 with init=pissa, got 0\.1: it would drop"):
        pissa(dropout=0.1)
    with pytest.raises(UserError, match=r"adapter.rank: 17 is above the shorter side of model.*q_proj.weight"):
        add_adapter(loaded(base / "model"), pissa(rank=17), seed=0)
    with pytest.raises(UserError, match=r"adapter.targets: init=pissa takes something out of model.embed_tokens"):
        add_adapter(loaded(base / "model"), pissa(targets=["embed_tokens"]), seed=0)
    model = loaded(base / "model")
    model.model.layers[1].self_attn.k_proj.weight = model.model.layers[0].self_attn.k_proj.weight
    with pytest.raises(UserError, match=r"takes something out of .*k_proj.weight, which is .* shared: leave it out"):
        add_adapter(model, pissa(targets=["k_proj"]), seed=0)
    model = loaded(base / "model")
    model.model.layers[1].self_attn.k_proj.weight = nn.Parameter(torch.full((16, 16), float("nan")))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.weight has entries that are not finite"):
        add_adapter(model, pissa(), seed=0)
