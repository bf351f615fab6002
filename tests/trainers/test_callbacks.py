"""The guard, the metrics and the progress of a training run."""

import copy
import logging
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import TinyData, adamw, ddp_trainer, lightning_warnings, rows, tiny_model, tiny_module, tiny_trainer

from thinrank import optim
from thinrank.trainers.callbacks.guard import NonFiniteGuard
from thinrank.trainers.callbacks.metrics import LossMean, TrainingMetrics, state_bytes
from thinrank.trainers.callbacks.progress import Progress, duration
from thinrank.trainers.errors import GuardStop, UserError
from thinrank.trainers.schedule import ScheduleConfig

pytestmark = lightning_warnings


class Poison(pl.Callback):
    """Makes one gradient NaN before the given optimizer steps, on one rank or on all."""

    def __init__(self, *steps: int, rank: int | None = None):
        self.steps = steps
        self.rank = rank

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step + 1 in self.steps and self.rank in (None, trainer.global_rank):
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient[0, 0] = math.nan


class Snapshots(pl.Callback):
    """Weights and optimizer state after every optimizer step."""

    def __init__(self) -> None:
        self.taken: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        states = trainer.optimizers[0].state_dict()["state"]
        self.taken.append(copy.deepcopy({"weights": dict(pl_module.state_dict()), "optimizer": states}))


def equal(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


# ---- guard


def test_a_skipped_step_changes_nothing_and_is_counted(caplog):
    guard, watch, data = NonFiniteGuard(), Snapshots(), TinyData(rows(20))
    with caplog.at_level(logging.WARNING, logger="thinrank"):
        tiny_trainer(5, callbacks=[Poison(2, 4), guard, watch]).fit(tiny_module(clip_norm=1.0), data)
    one, two, three, four, five = watch.taken
    assert equal(one, two)
    assert equal(three, four)
    assert not equal(two["weights"], three["weights"])
    assert not equal(four["optimizer"], five["optimizer"])
    assert (guard.skipped, guard.consecutive) == (2, 0)
    assert data.advanced == [4, 8, 12, 16, 20]  # the data goes on
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("thinrank")]
    assert messages == [
        "step 2 skipped: the gradient norm is nan (1 skipped so far, 1 in a row)",
        "step 4 skipped: the gradient norm is nan (2 skipped so far, 1 in a row)",
    ]


def test_a_skipped_step_leaves_a_low_rank_optimizer_alone_while_it_measures():
    guard, watch, seen = NonFiniteGuard(), Snapshots(), Recorder()
    config = optim.GaLoreConfig(rank=4, update_proj_gap=2, lr=1e-2)
    module = tiny_module(optimizer=config, clip_norm=1.0)
    callbacks = [Poison(3), guard, TrainingMetrics(every=1), watch]
    tiny_trainer(4, callbacks=callbacks, logger=seen).fit(module, TinyData(rows(16)))
    assert guard.skipped == 1
    assert equal(watch.taken[1], watch.taken[2])
    assert not equal(watch.taken[2]["weights"], watch.taken[3]["weights"])
    assert seen.logged[3]["guard/skipped_steps"] == 1
    assert math.isnan(seen.logged[3]["grad_norm"])
    energies = {tag for tag in seen.logged[4] if tag.startswith("lowrank/captured_energy/")}
    assert len(energies) == 2 * 7  # every projected matrix of both blocks
    assert "lowrank/captured_energy" not in seen.logged[3]
    assert 0 < seen.logged[4]["lowrank/captured_energy"] <= 1
    labels = {tag.removeprefix("opt/update_rms/") for tag in seen.logged[4] if tag.startswith("opt/update_rms/")}
    assert labels == {str(group["label"]) for group in optim.build(tiny_model(), config).param_groups}


def test_without_a_skip_the_guard_is_not_there():
    plain, guarded = tiny_module(clip_norm=1.0), tiny_module(clip_norm=1.0)
    tiny_trainer(3).fit(plain, TinyData(rows(12)))
    tiny_trainer(
        3, callbacks=[NonFiniteGuard(), TrainingMetrics(2), Progress(terminal=False)], enable_progress_bar=True
    ).fit(guarded, TinyData(rows(12)))
    assert equal(dict(plain.state_dict()), dict(guarded.state_dict()))


def test_a_loss_scaler_may_search_for_its_scale_longer_than_the_limit():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    guard, watch, module = NonFiniteGuard(limit=2), Snapshots(), tiny_module()
    callbacks = [Poison(2, 3, 4), guard, watch]
    tiny_trainer(5, callbacks=callbacks, plugins=[plugin]).fit(module, TinyData(rows(20)))
    assert (guard.skipped, guard.consecutive, scaler.get_scale()) == (3, 0, 1.0)
    assert equal(watch.taken[0], watch.taken[3])
    assert not equal(watch.taken[3]["weights"], watch.taken[4]["weights"])
    with pytest.raises(GuardStop, match=r"step 3: .* 2 times in a row"):
        tiny_trainer(5, callbacks=callbacks, plugins=[plugin]).fit(module, TinyData(rows(20)))


def test_too_many_in_a_row_stop_the_run_with_its_last_good_weights():
    guard, module = NonFiniteGuard(limit=2), tiny_module()
    watch = Snapshots()
    with pytest.raises(GuardStop, match=r"stopped at step 4: .* 2 times in a row; lower optimizer.lr") as caught:
        tiny_trainer(9, callbacks=[Poison(1, 3, 4), guard, watch]).fit(module, TinyData(rows(36)))
    assert isinstance(caught.value, UserError)
    assert equal(watch.taken[1]["weights"], dict(module.state_dict()))


def test_the_counts_survive_a_checkpoint():
    guard = NonFiniteGuard(limit=3)
    guard.skipped, guard.consecutive = 7, 2
    other = NonFiniteGuard(limit=3)
    other.load_state_dict(guard.state_dict())
    with pytest.raises(GuardStop, match="3 times in a row"):
        tiny_trainer(1, callbacks=[Poison(1), other]).fit(tiny_module(), TinyData(rows(4)))
    assert other.skipped == 8


class PlainModule(pl.LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["input_ids"].float()).square().mean()

    def configure_optimizers(self):
        return adamw(self)


def test_the_callbacks_serve_any_module(tmp_path):
    guard, watch = NonFiniteGuard(), Snapshots()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callbacks = [Poison(2), guard, TrainingMetrics(every=1), Progress(terminal=False), watch]
    tiny_trainer(3, callbacks=callbacks, logger=logger, enable_progress_bar=True, accumulate_grad_batches=2).fit(
        PlainModule(), TinyData(rows(24)).train_dataloader()
    )
    assert guard.skipped == 1
    assert equal(watch.taken[1]["weights"], watch.taken[3]["weights"])
    assert [event.step for event in curves(tmp_path)["train/loss"]] == [1, 2, 3]


def _skip_on_one_rank() -> tuple[int, bool, float]:
    warnings.simplefilter("default")  # the marks of the test do not reach the ranks
    rank = torch.distributed.get_rank()
    guard, watch, seen = NonFiniteGuard(), Snapshots(), Recorder()
    data = TinyData(rows(12), rank=rank, world=2)
    module = tiny_module()
    callbacks = [LocalNorm(), guard, TrainingMetrics(every=3), watch]
    ddp_trainer(3, callbacks=callbacks, logger=seen).fit(module, data)
    weights = next(module.parameters()).detach().clone()
    same = weights.clone()
    torch.distributed.broadcast(same, src=0)
    assert torch.equal(same, weights)
    return guard.skipped, equal(watch.taken[0], watch.taken[1]), seen.logged[3]["train/loss"]


class LocalNorm(pl.Callback):
    """Rank 1 alone sees a NaN at step 2, as under a strategy that leaves gradients local."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 1:
            pl_module._norm = torch.tensor(math.nan)


class Recorder(DummyLogger):
    """A logger that keeps what it is given, on every rank."""

    def __init__(self):
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None) -> None:
        self.logged.setdefault(step or 0, {}).update(metrics)


def test_all_ranks_skip_together_and_share_one_loss(ranks):
    results = ranks(2).run(_skip_on_one_rank)
    assert [result[:2] for result in results] == [(1, True)] * 2
    seen = Recorder()
    skip = Poison(2)
    tiny_trainer(3, callbacks=[skip, NonFiniteGuard(), TrainingMetrics(every=3)], logger=seen).fit(
        tiny_module(), TinyData(rows(12))
    )
    expected = seen.logged[3]["train/loss"]
    assert [loss for _, _, loss in results] == [pytest.approx(expected, rel=1e-5)] * 2


# ---- metrics


def curves(folder) -> dict[str, list]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


class SelfMeasuring(torch.optim.AdamW):
    """Measures itself when asked, as the low-rank optimizers do, and counts how often it was asked."""

    def __init__(self, model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "label": "matrix/galore", "lr": 1e-2},
            {"params": vectors, "label": "vector/adamw", "lr": 1e-3},
        ]
        super().__init__(groups)
        self.measure = False
        self.measured: dict[str, dict[str, float]] = {}
        self.asked = 0

    def step(self, closure=None):
        result = super().step(closure)
        if self.measure:
            self.asked += 1
            self.measure = False
            self.measured = {
                "captured_energy": {"layers.0.q": 0.5, "layers.1.q": 0.75},
                "update_rms": {"matrix/galore": 0.2},
                "effective_lr": {"matrix/galore": 0.25 * self.param_groups[0]["lr"]},
            }
        return result

    def state_bytes(self) -> int:
        return 3 * 2**20


def test_curves_are_written_for_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    schedule = ScheduleConfig(kind="linear", warmup_steps=0, min_lr_fraction=0.0)
    module = tiny_module(optimizer=SelfMeasuring, schedule=schedule, clip_norm=0.1)
    trainer = tiny_trainer(
        8, callbacks=[TrainingMetrics(every=4)], logger=logger, accumulate_grad_batches=2, val_check_interval=8,
        limit_val_batches=1.0,
    )  # fmt: skip
    losses = Losses()
    trainer.callbacks.append(losses)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit(module, TinyData(rows(64)))
    found = curves(tmp_path)
    steps = {tag: [event.step for event in events] for tag, events in found.items()}
    values = {tag: [event.value for event in events] for tag, events in found.items()}
    for tag in (
        "train/loss",
        "grad_norm",
        "lr/matrix/galore",
        "lr/vector/adamw",
        "opt/effective_lr/matrix/galore",
        "opt/update_rms/matrix/galore",
        "lowrank/captured_energy/layers.0.q",
        "lowrank/captured_energy",
        "tokens_per_sec",
        "time/step",
        "consumed_tokens",
        "memory/optimizer_state(MiB)",
        "memory/max_rss(GiB)",
    ):
        assert steps[tag] == [1, 4, 8], tag
    assert steps["val/loss"] == [4, 8]  # optimizer steps, like all other curves
    means = [sum(part) / len(part) for part in (losses.seen[:2], losses.seen[2:8], losses.seen[8:])]
    assert values["train/loss"] == pytest.approx(means, rel=1e-5)
    assert values["lr/matrix/galore"] == pytest.approx([1e-2 * (1 - step / 8) for step in (1, 4, 8)], abs=1e-9)
    assert values["lr/vector/adamw"] == pytest.approx([1e-3 * (1 - step / 8) for step in (1, 4, 8)], abs=1e-9)
    assert values["lowrank/captured_energy"] == pytest.approx([0.625] * 3)
    assert values["consumed_tokens"] == [64, 256, 512]
    assert values["memory/optimizer_state(MiB)"] == [3.0] * 3
    assert all(norm > 0.1 for norm in values["grad_norm"])  # before clipping
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, SelfMeasuring)
    assert (optimizer.asked, optimizer.measure) == (3, False)


class Losses(pl.Callback):
    """The mean loss of every micro-batch."""

    def __init__(self):
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        assert isinstance(outputs, dict)
        self.seen.append(float(outputs["nats"] / outputs["labels"]))


def test_metrics_do_not_change_training():
    plain, watched = tiny_module(), tiny_module()
    tiny_trainer(4).fit(plain, TinyData(rows(16)))
    tiny_trainer(4, callbacks=[TrainingMetrics(every=1)], logger=Recorder()).fit(watched, TinyData(rows(16)))
    assert equal(dict(plain.state_dict()), dict(watched.state_dict()))


def test_the_loss_mean_weighs_by_labels_and_undoes_lightnings_division():
    mean = LossMean()
    assert mean.take() is None
    mean.add({"loss": torch.tensor(9.0), "nats": torch.tensor(6.0), "labels": torch.tensor(2)}, accumulate=4)
    mean.add({"loss": torch.tensor(9.0), "nats": torch.tensor(3.0), "labels": torch.tensor(7)}, accumulate=4)
    assert mean.take() == pytest.approx(1.0)
    mean.add({"loss": torch.tensor(0.5)}, accumulate=4)
    mean.add({"loss": torch.tensor(1.0)}, accumulate=4)
    assert mean.take() == pytest.approx(3.0)
    assert mean.take() is None


def test_state_bytes_counts_the_tensors_of_any_optimizer():
    parameter = torch.nn.Parameter(torch.zeros(10, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 30 * 4 + 4  # both moments, and the step as a float32


# ---- progress


def test_plain_lines_outside_of_a_terminal(capsys):
    trainer = tiny_trainer(
        4, callbacks=[Progress(every=2, terminal=False)], enable_progress_bar=True, limit_val_batches=1.0,
        accumulate_grad_batches=2, val_check_interval=8,
    )  # fmt: skip
    trainer.fit(tiny_module(bytes_per_token=2.0), TinyData(rows(32)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 4/4", "step 4/4"]
    loss, speed, left = lines[1].split("  ")[1:]
    assert loss.startswith("loss ")
    assert speed.endswith(" tok/s")
    assert left == "eta 0:00"
    assert lines[3].split("  ")[1] == "validation"
    assert "bits per byte" in lines[3]


def test_a_bar_in_a_terminal(capsys):
    trainer = tiny_trainer(3, callbacks=[Progress(every=1, terminal=True)], enable_progress_bar=True)
    trainer.fit(tiny_module(), TinyData(rows(12)))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 3/3" in captured.err
    assert "tok/s" in captured.err


def test_progress_takes_the_place_of_lightnings_bar_and_can_be_silenced(capsys):
    progress = Progress(terminal=False)
    trainer = tiny_trainer(1, callbacks=[progress], enable_progress_bar=True)
    assert trainer.progress_bar_callback is progress
    progress.disable()
    trainer.fit(tiny_module(), TinyData(rows(4)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (7322, "2:02:02")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("build", [lambda: TrainingMetrics(every=0), lambda: Progress(every=0)])
def test_intervals_are_checked(build):
    with pytest.raises(ValueError, match=r"every must be at least 1, got 0: set trainer\.log_every"):
        build()


def test_the_limit_is_checked():
    with pytest.raises(ValueError, match=r"limit must be at least 1, got 0: set trainer\.nonfinite_limit"):
        NonFiniteGuard(limit=0)
