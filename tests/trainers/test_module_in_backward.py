"""Gradients that are taken in backward, under Lightning: the same training, with accumulation and clipping."""

import pytest
import torch
from tiny_training import TinyData, adamw, ddp_trainer, lightning_warnings, rows, tiny_module, tiny_trainer

from thinrank.optim import GaLoreConfig, SubspaceAdamWConfig
from thinrank.trainers.callbacks.guard import NonFiniteGuard
from thinrank.trainers.errors import UserError

pytestmark = lightning_warnings
GALORE = GaLoreConfig(rank=8, scale=1.0, svd="power")


def trained(mode, optimizer=GALORE, steps=6, callbacks=(), **changes):
    accumulate = changes.pop("accumulate_grad_batches", 1)
    module = tiny_module(optimizer=optimizer, in_backward=mode, **changes)
    trainer = tiny_trainer(steps, accumulate_grad_batches=accumulate, callbacks=list(callbacks))
    trainer.fit(module, datamodule=TinyData(rows(4 * steps * accumulate)))
    return module


def close(found, expected):
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["project", "step"])
def test_the_training_is_the_same(mode):
    close(trained(mode), trained("off"))


def test_full_rank_clips_and_accumulates_as_ever():
    """Coordinates at full rank have the gradient's norm, and no gap ends within the run.

    With a large eps, since some of all directions have no gradient but rounding, of which Adam would make whole steps.
    """
    options = {"optimizer": GaLoreConfig(rank=1.0, scale=1.0, svd="power", eps=0.1, lr=0.5), "clip_norm": 0.5}
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(tiny_module().parameters(), trained("off", **options).parameters(), strict=True)
    ]
    assert max(moved) > 0.01
    close(trained("project", **options), trained("off", **options))


def test_stepping_waits_for_the_last_micro_batch():
    options = {"optimizer": SubspaceAdamWConfig(rank=8), "accumulate_grad_batches": 3, "steps": 4}
    close(trained("step", **options), trained("off", **options))


def test_a_skipped_step_forgets_its_coordinates():
    module = tiny_module(optimizer=GALORE, in_backward="project")
    trainer = tiny_trainer(4, callbacks=[NonFiniteGuard()])
    module.configure_model()
    assert module.model is not None
    seen = []

    def spoil(grad):
        seen.append(1)
        return grad * float("nan") if len(seen) == 2 else grad

    module.model.get_parameter("model.layers.0.mlp.up_proj.weight").register_hook(spoil)
    trainer.fit(module, datamodule=TinyData(rows(16)))
    guard = next(c for c in trainer.callbacks if isinstance(c, NonFiniteGuard))
    assert guard.skipped == 1
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    optimizer = trainer.optimizers[0]
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer": adamw, "in_backward": "step"}, "needs an optimizer of thinrank"),
        (
            {"optimizer": SubspaceAdamWConfig(rank=8), "in_backward": "project"},
            "needs whole gradients.*use mode 'step'",
        ),
        ({"optimizer": GALORE, "in_backward": "projects"}, "mode must be one of off, project, step"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny_trainer(1).fit(tiny_module(**options), datamodule=TinyData(rows(4)))


def under_ddp():
    try:
        ddp_trainer(1).fit(tiny_module(optimizer=GALORE, in_backward="project"), datamodule=TinyData(rows(8)))
    except UserError as error:
        return str(error)
    return ""


def test_ddp_is_refused(ranks):
    for sentence in ranks(2).run(under_ddp):
        assert "which those of several processes are not" in sentence
