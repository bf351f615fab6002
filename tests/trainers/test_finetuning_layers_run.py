"""Fine-tuning runs by layers that train few numbers: what is trained, exported, added to the loss and resumed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_finetune import IDS, VOCAB, config, write_all
from tiny_pretrain import signalled_at
from tiny_run import same
from transformers import AutoModelForCausalLM

from thinrank.optim.layers import CLOVER, SORSA, SVFT, QRLoRA, ReparamConfig, SpectralAdapter, SVFit
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.errors import UserError
from thinrank.trainers.finetune import finetune
from thinrank.trainers.models import load_model

KINDS: dict[str, ReparamConfig] = {
    "sorsa": SORSA(rank=4, lr=0.01),
    "svfit": SVFit(),
    "svft": SVFT(pattern="banded"),
    "spectral_adapter": SpectralAdapter(rank=4, mode="rotational"),
    "qr_lora": QRLoRA(),
    "clover": CLOVER(targets=["attention", "up_proj"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a corpus, a model, and a cache that all runs share."""
    return write_all(tmp_path_factory.mktemp("layers"))


def run(base, name: str, reparam: ReparamConfig, **settings: Any) -> Any:
    return finetune(replace(config(base, name, **settings), reparam=reparam))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_exports_dense_weights(base, kind):
    report = run(base, kind, KINDS[kind], max_steps=4)
    assert report["run"]["exit_code"] == 0
    assert report["metrics"]["test/loss"] < report["metrics"]["before/loss"]
    plain = load_model(str(base / "model"), VOCAB, key="model.path")
    assert report["model"]["trained_parameters"] < sum(p.numel() for p in plain.parameters()) / 2
    found = AutoModelForCausalLM.from_pretrained(base / kind / "export")
    assert [p.shape for p in found.parameters()] == [p.shape for p in plain.parameters()]
    assert not torch.equal(logits(found), logits(plain))


@pytest.mark.parametrize("kind", ["sorsa", "clover"])
def test_a_preempted_run_goes_on_bit_for_bit(base, kind):
    settings = {"max_steps": 4, "checkpoint_every": 3, "export": False}
    whole = run(base, f"{kind}-whole", KINDS[kind], **settings)
    undo = signalled_at(2, rank=0)
    first = run(base, f"{kind}-parts", KINDS[kind], **settings)
    undo()
    assert (first["run"]["exit_code"], first["training"]["steps"]) == (75, 2)
    second = run(base, f"{kind}-parts", KINDS[kind], **settings)
    assert second["metrics"] == whole["metrics"]
    states = [ckpt.load(base / f"{kind}-{name}" / "checkpoints" / "last.ckpt") for name in ("whole", "parts")]
    for key in ("state_dict", "optimizer_states"):
        same(states[0][key], states[1][key], key)


def test_what_does_not_fit_is_refused_with_the_key(base):
    with pytest.raises(UserError, match=r"reparam\.lr must be the optimizer's learning rate"):
        run(base, "refused", SORSA(rank=4))
