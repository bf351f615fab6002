"""The training module: losses that are exact, one step per global batch, and what is counted."""

import itertools
import math
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_training import (
    TINY,
    VOCAB,
    Batches,
    TinyData,
    adamw,
    ddp_trainer,
    lightning_warnings,
    rows,
    sgd,
    tiny_model,
    tiny_module,
    tiny_trainer,
)

from thinrank import optim
from thinrank.trainers.errors import UserError
from thinrank.trainers.models import ModelConfig
from thinrank.trainers.module import IGNORE, CausalLM, token_nats
from thinrank.trainers.schedule import ScheduleConfig, multiplier

pytestmark = lightning_warnings


def ragged(count: int, length: int = 8) -> torch.Tensor:
    """Places without a label (count, length): row i has its last i % length ones ignored."""
    keep = length - torch.arange(count) % length
    return torch.arange(length)[None] >= keep[:, None]


def exact_loss(model, tokens, ignore) -> float:
    """Mean nats per label in float64, one label at a time from the log-probabilities."""
    with torch.no_grad():
        logs = model(input_ids=tokens[:, :-1]).logits.double().log_softmax(-1)
    chosen = logs.gather(-1, tokens[:, 1:, None])[..., 0]
    return float(-chosen[~ignore].mean())


# ---- loss


def test_token_nats_sums_over_real_labels_in_float32():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[1, IGNORE, 4], [IGNORE, IGNORE, 0]])
    nats, count = token_nats(logits, labels)
    logs = logits.float().log_softmax(-1)
    assert nats.dtype == torch.float32
    assert count == 3
    assert float(nats) == pytest.approx(-float(logs[0, 0, 1] + logs[0, 2, 4] + logs[1, 2, 0]), rel=1e-6)


def test_a_batch_without_labels_has_no_gradient():
    module = tiny_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = TinyData(rows(4))
    data.train.batches[0]["labels"].fill_(IGNORE)
    tiny_trainer(1).fit(tiny_module(model=module.model, optimizer=sgd), data)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_validation_loss_is_exact_under_uneven_labels():
    held_out, ignore = rows(10, seed=3), ragged(10)
    data = TinyData(rows(4), held_out, batch_size=4, ignore=ignore)  # the last batch has two rows
    module = tiny_module(bytes_per_token={"val": 2.5, "test": 4.0})
    expected = exact_loss(module.model, held_out, ignore)
    (result,) = tiny_trainer(1, limit_val_batches=1.0).validate(module, data, verbose=False)
    assert result["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert result["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert result["val/bits_per_byte"] == pytest.approx(expected / math.log(2) / 2.5, rel=1e-6)
    (result,) = tiny_trainer(1).test(module, data, verbose=False)
    assert result["test/loss"] == pytest.approx(expected, rel=1e-6)
    assert result["test/bits_per_byte"] == pytest.approx(expected / math.log(2) / 4.0, rel=1e-6)


def test_bytes_per_token_come_from_the_data_and_are_not_invented():
    module, data = tiny_module(), TinyData(rows(4))
    trainer = tiny_trainer(1, limit_val_batches=1.0)
    (result,) = trainer.validate(module, data, verbose=False)
    assert "val/bits_per_byte" not in result
    data.validation_bytes_per_token = 3.0  # pyright: ignore[reportAttributeAccessIssue]
    (result,) = trainer.validate(module, data, verbose=False)
    assert result["val/bits_per_byte"] == pytest.approx(result["val/loss"] / math.log(2) / 3, rel=1e-6)


def test_a_validation_set_without_labels_is_refused():
    data = TinyData(rows(4), rows(4), ignore=torch.ones(4, 8, dtype=torch.bool))
    with pytest.raises(UserError, match="the evaluation set has no label"):
        tiny_trainer(1, limit_val_batches=1.0).validate(tiny_module(), data)


def _two_rank_losses() -> tuple[float, float, int]:
    warnings.simplefilter("default")  # the marks of the test do not reach the ranks
    held_out, ignore = rows(8, seed=3), ragged(8)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = TinyData(rows(8), held_out, ignore=ignore, rank=rank, world=world)
    module = tiny_module(optimizer=sgd)
    trainer = ddp_trainer(2, limit_val_batches=1.0)
    (result,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    return result["val/loss"], float(trainer.callback_metrics["val/loss"]), module.consumed_tokens


def test_two_ranks_train_and_evaluate_as_one(ranks):
    held_out, ignore = rows(8, seed=3), ragged(8)
    module, data = tiny_module(optimizer=sgd), TinyData(rows(8), held_out, ignore=ignore)
    before = exact_loss(module.model, held_out, ignore)
    trainer = tiny_trainer(2, limit_val_batches=1.0)
    trainer.fit(module, data)
    after = float(trainer.callback_metrics["val/loss"])
    assert after != pytest.approx(before, abs=1e-3)
    assert ranks(2).run(_two_rank_losses) == [(pytest.approx(before), pytest.approx(after), 64)] * 2


# ---- steps


def test_an_optimizer_that_was_not_given_all_of_the_model_is_refused():
    """A model of which a part stays as it was is most often a mistake, and no curve shows it."""
    module = tiny_module(optimizer=lambda model: torch.optim.SGD(list(model.parameters())[1:], lr=1.0))
    with pytest.raises(UserError, match=r"trainable parameter model\.embed_tokens\.weight \(1 in all\), .*freeze it"):
        tiny_trainer(1).fit(module, TinyData(rows(4)))
    next(iter(module.parameters())).requires_grad_(False)
    tiny_trainer(1).fit(module, TinyData(rows(4)))


def test_accumulation_equals_the_big_batch():
    tokens = rows(16)
    whole, parts = tiny_module(optimizer=sgd, clip_norm=0.5), tiny_module(optimizer=sgd, clip_norm=0.5)
    tiny_trainer(4).fit(whole, TinyData(tokens, batch_size=4))
    tiny_trainer(4, accumulate_grad_batches=2).fit(parts, TinyData(tokens, batch_size=2))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert whole.consumed_tokens == parts.consumed_tokens == 16 * 8


class PositionsAtBatchEnd(pl.Callback):
    """What a callback that saves a checkpoint at the end of a batch would find."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer, pl_module: Any, outputs, batch, batch_idx) -> None:
        advanced = trainer.datamodule.advanced  # pyright: ignore[reportAttributeAccessIssue]
        self.seen.append((advanced[-1] if advanced else 0, pl_module.consumed_tokens))


def test_the_position_advances_at_optimizer_steps_alone_and_before_callbacks_look():
    data, watch = TinyData(rows(24), batch_size=4), PositionsAtBatchEnd()
    tiny_trainer(2, accumulate_grad_batches=3, callbacks=[watch]).fit(tiny_module(), data)
    assert data.advanced == [12, 24]
    assert watch.seen == [(0, 0), (0, 0), (12, 96), (12, 96), (12, 96), (24, 192)]


class SelfAccumulating(SingleDeviceStrategy):
    """Is called for every micro-batch and accumulates by itself, as DeepSpeed's strategy does."""

    @property
    def handles_gradient_accumulation(self) -> bool:
        return True


def test_the_position_waits_for_a_strategy_that_accumulates_by_itself():
    data = TinyData(rows(24), batch_size=4)
    tiny_trainer(2, accumulate_grad_batches=3, strategy=SelfAccumulating(device="cpu")).fit(tiny_module(), data)
    assert data.advanced == [12, 24]


def test_a_data_module_that_counts_needs_positions():
    data = TinyData(rows(4))
    del data.train.batches[0]["position"]
    with pytest.raises(UserError, match="put `position` into its batches"):
        tiny_trainer(1).fit(tiny_module(), data)


def test_clipping_uses_the_norm_of_all_gradients():
    module = tiny_module(optimizer=sgd, clip_norm=0.01)
    before = {name: value.clone() for name, value in module.named_parameters()}
    tiny_trainer(1).fit(module, TinyData(rows(4)))
    moved = torch.stack([(value - before[name]).norm() for name, value in module.named_parameters()]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)  # learning rate 1


class CountNorms(pl.Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module: Any, optimizer) -> None:
        first, second = pl_module.gradient_norm(), pl_module.gradient_norm()
        assert first is second
        self.norms.append(float(first))


def test_the_norm_is_computed_once_and_anew_for_every_step():
    count = CountNorms()
    calls = []
    original = torch.nn.utils.get_total_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "get_total_norm", lambda *a, **k: calls.append(1) or original(*a, **k))
        tiny_trainer(3, callbacks=[count], accumulate_grad_batches=2).fit(
            tiny_module(clip_norm=1.0), TinyData(rows(24))
        )
    assert len(calls) == 3
    assert len(set(count.norms)) == 3


def test_the_trainer_can_clip_instead_and_both_are_refused():
    tiny_trainer(1, gradient_clip_val=0.1).fit(tiny_module(), TinyData(rows(4)))
    with pytest.raises(UserError, match=r"clipping is set twice, clip_norm=1 in the module and gradient_clip_val=0.1"):
        tiny_trainer(1, gradient_clip_val=0.1).fit(tiny_module(clip_norm=1.0), TinyData(rows(4)))


class LearningRates(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.values.append(optimizer.param_groups[0]["lr"])


def test_the_schedule_runs_over_optimizer_steps_up_to_the_trainers_end():
    schedule, rates = ScheduleConfig(kind="cosine", warmup_steps=2), LearningRates()
    tiny_trainer(6, accumulate_grad_batches=2, callbacks=[rates]).fit(
        tiny_module(schedule=schedule), TinyData(rows(48))
    )
    assert rates.values == pytest.approx([1e-2 * multiplier(step, 6, schedule) for step in range(6)])
    rates.values.clear()
    tiny_trainer(2, callbacks=[rates]).fit(tiny_module(schedule=schedule, total_steps=50), TinyData(rows(8)))
    assert rates.values == pytest.approx([1e-2 * multiplier(step, 50, schedule) for step in range(2)])


class Endless(torch.utils.data.IterableDataset):
    def __init__(self, start: int = 0):
        self.start = start

    def __iter__(self):
        batches = Batches(rows(24), 4).batches
        for index in itertools.count(self.start):
            yield batches[index % len(batches)]

    def state_dict(self):
        """Its presence tells Lightning that this stream knows where to go on."""
        return {}

    def load_state_dict(self, state):
        pass


class EndlessData(TinyData):
    def __init__(self, start: int = 0):
        super().__init__(rows(4))
        self.start = start

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Endless(self.start), batch_size=None)


def test_an_endless_stream_needs_a_number_of_steps():
    trainer = tiny_trainer(3)
    trainer.fit(tiny_module(), EndlessData())
    assert trainer.global_step == 3
    with pytest.raises(UserError, match="give the Trainer max_steps or the module total_steps"):
        tiny_trainer(-1).fit(tiny_module(), EndlessData())


# ---- construction


def test_a_model_config_is_built_by_the_trainer_like_the_model_itself():
    built, given = tiny_module(model=TINY, vocab_size=VOCAB), tiny_module()
    tiny_trainer(2).fit(built, TinyData(rows(8)))
    tiny_trainer(2).fit(given, TinyData(rows(8)))
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in given.state_dict().items())
    data = TinyData(rows(4))
    data.tokenizer = range(VOCAB)  # pyright: ignore[reportAttributeAccessIssue]
    tiny_trainer(1).fit(tiny_module(model=TINY), data)


def test_what_does_not_fit_together_is_said():
    with pytest.raises(UserError, match="the model's vocabulary is not known: pass vocab_size"):
        tiny_trainer(1).fit(tiny_module(model=TINY), TinyData(rows(4)))
    data = TinyData(rows(4))
    data.tokenizer = range(VOCAB + 1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="the tokenizer has 65 tokens and the model knows 64"):
        tiny_trainer(1).fit(tiny_module(), data)
    with pytest.raises(UserError, match="a sequence of 40 tokens is longer than the model's 32"):
        tiny_trainer(1).fit(tiny_module(), TinyData(rows(4, length=40)))
    with pytest.raises(UserError, match="the model is not built yet"):
        tiny_module(model=ModelConfig())(torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be above 0, got 0.0"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
    ],
)
def test_bad_values_are_refused_by_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_module(**changes)


@pytest.mark.parametrize(
    "method", [optim.GaLoreConfig, optim.DCTAdamWConfig, optim.SubspaceAdamWConfig, optim.AdamWConfig]
)
def test_a_method_config_is_built_over_the_model_with_the_projection_seed(method):
    config = method(lr=1e-2) if method is optim.AdamWConfig else method(lr=1e-2, rank=4)
    module = CausalLM(tiny_model(), optimizer=config, projection_seed=9, total_steps=30)
    tokens = rows(4)
    trainer = tiny_trainer(30, limit_val_batches=1.0)
    (before,) = trainer.validate(module, TinyData(tokens, tokens), verbose=False)
    trainer.fit(module, TinyData(tokens.repeat(30, 1), tokens))
    expected = optim.build(tiny_model(), config, seed=9)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is type(expected)
    assert [group["seed"] for group in optimizer.param_groups] == [group["seed"] for group in expected.param_groups]
    assert float(trainer.callback_metrics["val/loss"]) < 0.8 * before["val/loss"]


def test_bf16_mixed_trains_and_keeps_float32_weights():
    module = tiny_module(optimizer=adamw)
    trainer = tiny_trainer(30, precision="bf16-mixed", limit_val_batches=1.0)
    tokens = rows(4)
    (before,) = trainer.validate(module, TinyData(tokens, tokens), verbose=False)
    trainer.fit(module, TinyData(tokens.repeat(30, 1), tokens))
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert float(trainer.callback_metrics["val/loss"]) < 0.5 * before["val/loss"]


def test_resuming_counts_on(tmp_path):
    options = {"schedule": ScheduleConfig(), "total_steps": 6}
    whole = tiny_module(**options)
    tiny_trainer(6).fit(whole, EndlessData())
    trainer = tiny_trainer(3)
    trainer.fit(tiny_module(**options), EndlessData())
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    second = tiny_module(model=tiny_model(seed=8), **options)
    tiny_trainer(6).fit(second, EndlessData(start=3), ckpt_path=tmp_path / "three.ckpt", weights_only=True)
    assert second.consumed_tokens == whole.consumed_tokens == 24 * 8
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
