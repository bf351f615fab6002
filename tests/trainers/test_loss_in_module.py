"""The training module without logits: the same training under every strategy, and what it says where it cannot."""

import warnings
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_training import (
    TINY,
    VOCAB,
    PoolEnvironment,
    TinyData,
    adamw,
    lightning_warnings,
    rows,
    sgd,
    tiny_model,
    tiny_module,
    tiny_trainer,
)
from torch import nn

import thinrank.trainers  # noqa: F401 - registers the strategies
from thinrank import optim
from thinrank.optim import GaLoreConfig
from thinrank.trainers.adapters import LoraConfig, add_adapter
from thinrank.trainers.callbacks.metrics import TrainingMetrics
from thinrank.trainers.errors import UserError
from thinrank.trainers.loss.head import Unfit, head_loss, head_of
from thinrank.trainers.models import build_model
from thinrank.trainers.module import CausalLM
from thinrank.trainers.pretrain import PretrainConfig, TrainerConfig

pytestmark = lightning_warnings

MODELS = {
    "llama": TINY,
    "tied": replace(TINY, tie_word_embeddings=True),
    "granite": replace(TINY, architecture="granite", extra={"logits_scaling": 8.0}),
    "gemma2": replace(TINY, architecture="gemma2", attention="eager", extra={"final_logit_softcapping": 2.0}),
    "cohere": replace(TINY, architecture="cohere", rms_norm_eps=None, extra={"logit_scale": 0.25}),
    "opt": replace(TINY, architecture="opt", extra={"word_embed_proj_dim": 32, "dropout": 0.0}),
    "gptj": replace(
        TINY,
        architecture="gptj",
        extra={"rotary_dim": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        attention="eager",
    ),
}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = rows(3, seed=seed)
    labels = tokens[:, 1:].clone()
    labels[0, 2:5] = -100
    return tokens[:, :-1], labels


def losses(model: Any, backend: str) -> tuple[torch.Tensor, ...]:
    """In float64, so that nothing but the mathematics can differ: the loss, and the gradients that there are."""
    model = model.double()
    ids, labels = batch()
    if backend == "dense":
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    else:
        loss, _ = head_loss(model, head_of(model), ids, labels, backend=backend, chunk=5)
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss, *torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_has_the_loss_and_gradients_of_its_logits(name):
    """Rotary tables and some norms stay in float32, but for which both are the same numbers."""
    model = build_model(MODELS[name], VOCAB, seed=0)
    before = set(vars(model))
    for mine, theirs in zip(losses(model, "chunked"), losses(model, "dense"), strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm() + 1e-9
    assert set(vars(model)) == before  # its forward is its own again


def test_an_adapter_around_it_is_gone_through():
    model = add_adapter(tiny_model(), LoraConfig(rank=2, targets=["attention"]), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.1)
    found, expected = losses(model, "chunked"), losses(model, "dense")
    assert all(torch.allclose(*each, rtol=1e-6, atol=1e-9) for each in zip(found, expected, strict=True))


# ---- what cannot be left out


def test_who_does_more_than_a_product_is_found_out():
    with pytest.raises(Unfit, match="changes hidden states between its body and its output layer"):
        head_of(build_model(replace(TINY, architecture="minicpm3"), VOCAB, seed=0))
    shifted = tiny_model()
    forward = shifted.forward

    def plus(**given):
        found = forward(**given)
        found.logits = found.logits + 1e-3
        return found

    shifted.forward = plus
    with pytest.raises(Unfit, match="does more to its logits than to scale and to cap them"):
        head_of(shifted)
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(Unfit, match="its output layer is a Sequential, which is more than a product with one weight"):
        head_of(model)
    with pytest.raises(Unfit, match="no get_output_embeddings"):
        head_of(nn.Linear(2, 2))


def test_a_module_says_why_it_computes_logits_or_refuses():
    def factors() -> Any:
        model = tiny_model()
        return add_adapter(model, LoraConfig(rank=2, targets=["lm_head"]), seed=0)

    data = TinyData(rows(4))
    with pytest.warns(UserWarning, match=r"auto cannot leave logits out: its output layer is a Linear.*are computed"):
        tiny_trainer(1).fit(tiny_module(model=factors(), cross_entropy="auto"), data)
    with pytest.raises(UserError, match=r"chunked cannot leave logits out: .*; use cross_entropy=dense"):
        tiny_trainer(1).fit(tiny_module(model=factors(), cross_entropy="chunked"), data)
    with pytest.raises(UserError, match="cross_entropy=cce needs a CUDA device, got cpu"):
        tiny_trainer(1).fit(tiny_module(cross_entropy="cce"), data)
    with pytest.raises(UserError, match="a sequence of 40 tokens is longer than the model's 32"):
        tiny_trainer(1).fit(tiny_module(cross_entropy="chunked"), TinyData(rows(4, length=40)))


def test_settings_are_looked_at():
    with pytest.raises(ValueError, match=r"cross_entropy must be one of auto, dense, .*, got 'fast'"):
        CausalLM(tiny_model(), adamw, cross_entropy="fast")
    with pytest.raises(ValueError, match="z_loss must be at least 0, got -1"):
        CausalLM(tiny_model(), adamw, z_loss=-1)
    with pytest.raises(ValueError, match="cross_entropy must be one of auto, dense"):
        TrainerConfig(cross_entropy="fast")
    with pytest.raises(ValueError, match=r"z_loss must be at least 0, got -0\.1"):
        TrainerConfig(z_loss=-0.1)
    with pytest.raises(ValueError, match="cross_entropy=torch knows no z-loss: use chunked, or z_loss=0"):
        PretrainConfig(trainer=TrainerConfig(cross_entropy="torch", z_loss=1e-4))


# ---- training


class Reads(pl.Callback):
    """What is logged of log Z."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert isinstance(outputs, dict)
        self.found.append({key: float(outputs[key]) for key in outputs if "log_z" in key})


def trained(cross_entropy: str, z_loss: float = 0.0, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Weights after four steps of two micro-batches, and the module."""
    module = tiny_module(optimizer=sgd, clip_norm=0.5, cross_entropy=cross_entropy, z_loss=z_loss)
    callbacks = options.pop("callbacks", [])
    trainer = tiny_trainer(
        4, accumulate_grad_batches=2, limit_val_batches=1.0, log_every_n_steps=2, callbacks=callbacks, **options
    )
    trainer.fit(module, TinyData(rows(32), batch_size=4))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}, module


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_training_and_validation_are_those_with_logits(z_loss):
    (expected, dense), (found, module) = (trained(name, z_loss) for name in ("dense", "chunked"))
    for name in found:
        assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm()
    for key in ("val/loss", "train/loss"):
        mine, theirs = (each.trainer.callback_metrics[key] for each in (module, dense))
        assert float(mine) == pytest.approx(float(theirs), rel=1e-6)


def test_a_z_loss_is_trained_and_is_in_no_loss_that_is_shown():
    """It pulls log Z towards 0; the loss of the first step, of equal weights, is shown without it."""
    (plain, first), (pulled, second) = (trained("chunked", z_loss) for z_loss in (0.0, 0.1))
    assert any(not torch.equal(plain[name], pulled[name]) for name in plain)
    ids, _ = batch()
    with torch.no_grad():
        left = [each.model(input_ids=ids).logits.logsumexp(-1).square().mean() for each in (first, second)]
    assert left[1] < left[0]


def test_log_z_is_measured_in_steps_that_are_logged():
    reads = Reads()
    trained("chunked", 1e-4, callbacks=[reads])
    assert [bool(each) for each in reads.found] == [True, True, True, True, False, False, True, True]  # 1, 2, 4
    quiet = Reads()
    trained("chunked", callbacks=[quiet])
    assert not any(quiet.found)


class Kept(TrainingMetrics):
    """The values of the last step."""

    def _metrics(self, trainer, module):
        self.kept = super()._metrics(trainer, module)
        return self.kept


def _both_on_two_ranks(strategy: str) -> list[list[float]]:
    return [_on_two_ranks(strategy, name) for name in ("chunked", "dense")]


def _on_two_ranks(strategy: str, cross_entropy: str) -> list[float]:
    warnings.simplefilter("default")  # the marks of the test do not reach the ranks
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = GaLoreConfig(rank=4, svd="power", update_proj_gap=2, lr=0.05, eps=1e-3)
    module = tiny_module(optimizer=lambda m: optim.build(m, config), clip_norm=0.5, cross_entropy=cross_entropy)
    module.log_z = True
    metrics = Kept(1)
    trainer = tiny_trainer(
        3,
        strategy=strategy,
        devices=world,
        plugins=[PoolEnvironment()],
        accumulate_grad_batches=2,
        limit_val_batches=1.0,
        log_every_n_steps=1,
        callbacks=[metrics],
    )
    trainer.fit(module, TinyData(rows(24), batch_size=4, rank=rank, world=world))
    read = [metrics.kept[key] for key in ("train/loss", "train/log_z", "train/log_z_max")]
    return [float(trainer.callback_metrics["val/loss"]), *read]


@pytest.mark.parametrize("strategy", ["ddp", "thinrank_ddp", "thinrank_fsdp2", "thinrank_zero3", "thinrank_gossip"])
def test_every_strategy_trains_without_logits_as_with_them(ranks, strategy):
    for found, expected in ranks(2).run(_both_on_two_ranks, strategy, timeout=110):
        assert found == pytest.approx(expected, rel=1e-5)
