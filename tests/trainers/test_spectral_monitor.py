"""Readings of a Lightning run: what is logged, that nothing is changed, and that the alarm and a resume are right."""

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import PoolEnvironment, TinyData, lightning_warnings, rows, tiny_module, tiny_trainer

from thinrank.optim import GaLoreConfig
from thinrank.optim.monitors.alignment import Verdict
from thinrank.optim.spectra import Layer
from thinrank.trainers.callbacks.spectra import KEPT, SpectralMonitor
from thinrank.trainers.charts import colours, heat_map, shortened
from thinrank.trainers.errors import GuardStop, UserError
from thinrank.trainers.monitors import MonitorConfig
from thinrank.trainers.strategies.fsdp2 import FSDP2Strategy
from thinrank.trainers.strategies.replicated import OwnedStrategy, ReplicatedStrategy

pytestmark = lightning_warnings


class Recorder(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.seen.setdefault(step, {}).update(metrics)


def monitored(steps, config, *, module=None, ckpt_path=None, trainer=tiny_trainer, **how):
    module = tiny_module() if module is None else module
    data = rows(4 * steps) if how.pop("fresh", True) else rows(4).repeat(steps, 1)
    monitor, recorder = SpectralMonitor(config, total_steps=steps, **how.pop("monitor", {})), Recorder()
    host = trainer(steps, callbacks=[monitor, *how.pop("callbacks", [])], logger=recorder, **how)
    host.fit(module, TinyData(data), ckpt_path=ckpt_path, weights_only=True)
    return module, monitor, recorder.seen, host


def test_training_is_the_same_to_the_bit_and_the_chance_of_others_too():
    torch.manual_seed(5)
    watched, *_ = monitored(6, MonitorConfig(every=2, alarm_baseline=1))
    after = torch.rand(1)
    torch.manual_seed(5)
    plain, *_ = monitored(6, MonitorConfig(every=0))
    assert torch.equal(after, torch.rand(1))
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_first_step_and_every_so_many_are_read_and_nothing_between():
    _, _, seen, _ = monitored(6, MonitorConfig(every=3, metrics=["sign_diversity", "sigma", "sigma_gap"]))
    spectral = {step: [tag for tag in tags if tag.startswith("spectral/")] for step, tags in seen.items()}
    assert sorted(step for step, tags in spectral.items() if tags) == [1, 3, 6]
    layers = 2 * 7  # blocks, linear layers of each
    assert len([tag for tag in spectral[3] if tag.startswith("spectral/sigma/")]) == layers + 3
    values = [seen[3][tag] for tag in spectral[3] if tag.startswith("spectral/sigma/") and "/_" not in tag]
    assert seen[3]["spectral/sigma/_max"] == max(values)
    assert seen[3]["spectral/sigma/_min"] == min(values)
    assert seen[3]["spectral/alarm"] == 0


def test_a_reading_is_of_the_weights_before_the_step():
    module = tiny_module()
    first = copy.deepcopy(module.state_dict())
    _, _, seen, _ = monitored(1, MonitorConfig(), module=module)
    name = "model.layers.1.mlp.up_proj"
    exact = float(torch.linalg.svdvals(first[f"model.{name}.weight"])[0])
    assert seen[1][f"spectral/sigma/{name}"] == pytest.approx(
        exact, rel=1e-2
    )  # chance weights have hardly a first direction
    assert math.isfinite(seen[1][f"spectral/drive/{name}"])


def test_accumulated_micro_batches_are_one_step():
    _, _, seen, _ = monitored(4, MonitorConfig(every=2), accumulate_grad_batches=2)
    assert sorted(step for step, tags in seen.items() if "spectral/sigma/_max" in tags) == [1, 2, 4]


STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "thinrank_ddp": ReplicatedStrategy,
    "thinrank_owned": OwnedStrategy,
    "thinrank_fsdp2": FSDP2Strategy,
}
SEEN = MonitorConfig(every=2, metrics=["sign_diversity", "sigma", "sigma_gap", "input_max", "drive"])
GALORE = GaLoreConfig(rank=4, lr=1e-2)


def on_ranks(steps):
    """What the first rank logs under each strategy."""
    warnings.simplefilter("default")  # the marks of the test do not reach the ranks
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for name, strategy in STRATEGIES.items():
        recorder, options = Recorder(), {"process_group_backend": "gloo"}
        if name == "thinrank_fsdp2":
            more = {"strategy": strategy(**options), "plugins": [PoolEnvironment()]}
        else:
            more = {"strategy": strategy(cluster_environment=PoolEnvironment(), **options)}
        callbacks = [SpectralMonitor(SEEN, total_steps=steps)]
        trainer = tiny_trainer(steps, devices=world, callbacks=callbacks, logger=recorder, **more)
        trainer.fit(tiny_module(optimizer=GALORE), TinyData(rows(4 * steps), rank=rank, world=world))
        found[name] = recorder.seen
    return found


@pytest.mark.timeout(300)
def test_ranks_read_what_one_process_with_all_the_data_reads(ranks):
    """Gradients are seen where there are whole ones: under DDP, and of pieces under FSDP2."""
    _, _, alone, _ = monitored(4, SEEN, module=tiny_module(optimizer=GALORE))
    together = ranks(2).run(on_ranks, 4, timeout=250)[0]
    for name, seen in together.items():
        for step in (1, 2, 4):
            expected = {tag: value for tag, value in alone[step].items() if tag.startswith("spectral/")}
            if name in ("thinrank_ddp", "thinrank_owned"):
                expected = {tag: value for tag, value in expected.items() if "/drive/" not in tag}
            assert {tag: seen[step][tag] for tag in expected} == pytest.approx(expected, rel=1e-2, abs=1e-3), name


class Save(Checkpoint):
    """One checkpoint, after the given step."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_goes_on_reading_where_it_was(tmp_path):
    config, path = MonitorConfig(every=2, alarm_baseline=2), tmp_path / "at.ckpt"
    _, whole, seen, _ = monitored(8, config, callbacks=[Save(path, 4)], enable_checkpointing=True, fresh=False)
    torch.load(path, weights_only=True)
    _, rest, after, _ = monitored(8, config, ckpt_path=path, fresh=False)
    for step in (6, 8):
        assert after[step] == seen[step]
    assert [step for step, _ in rest._history["sigma"]] == [1, 2, 4, 6, 8]
    assert rest._history == whole._history


def alarming(level):
    def update(self, step, readings):
        assert len(readings) == 14
        return Verdict(level if step >= 4 else "healthy", 0.5, ("a", "b"), "the inputs of 50% lie on one side")

    return update


def test_an_alert_stops_with_its_reason_or_is_told(monkeypatch, caplog):
    monkeypatch.setattr("thinrank.trainers.callbacks.spectra.AlignmentAlarm.update", alarming("alert"))
    with pytest.raises(GuardStop, match=r"training stopped at step 4: the inputs of 50% lie on one side; lower"):
        monitored(8, MonitorConfig(every=2, alarm="stop"))
    told = []
    _, monitor, seen, host = monitored(8, MonitorConfig(every=2), monitor={"told": lambda *event: told.append(event)})
    assert host.global_step == 8
    assert told == [(4, "alert", "the inputs of 50% lie on one side")]
    assert monitor.alarms == [{"step": 4, "level": "alert", "reason": "the inputs of 50% lie on one side"}]
    assert (seen[2]["spectral/alarm"], seen[4]["spectral/alarm"]) == (0, 3)
    assert "step 4: the inputs of 50% lie on one side (a, b)" in caplog.text


def test_tensorboard_has_scalars_histograms_pictures_and_one_chart_for_each_kind(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="events")
    monitor = SpectralMonitor(MonitorConfig(every=2), total_steps=4, folder=tmp_path / "pictures")
    tiny_trainer(4, callbacks=[monitor], logger=logger).fit(tiny_module(), TinyData(rows(16)))
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0})
    events.Reload()
    tags: Any = events.Tags()
    assert "spectral/sign_diversity/model.layers.0.self_attn.q_proj" in tags["scalars"]
    assert "spectral/alignment/model.layers.0.self_attn.q_proj" in tags["histograms"]
    histogram = events.Histograms("spectral/alignment/model.layers.0.self_attn.q_proj")[-1].histogram_value
    assert sum(histogram.bucket) == histogram.num == 4 * 8  # tokens of a batch
    assert "spectral/sigma" in tags["images"]
    assert any("custom_scalars" in tag for tag in tags["tensors"])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} >= {"sigma.png", "sign_diversity.png"}


def test_old_readings_are_thinned_and_never_the_last():
    monitor = SpectralMonitor(MonitorConfig())
    monitor._names = ["a"]
    for step in range(3 * KEPT):
        monitor._keep(step, {"a": Layer({"sigma": float(step)})})
    assert set(monitor._history) == {"sigma"}  # what nobody could see is not kept
    steps = [step for step, _ in monitor._history["sigma"]]
    assert len(steps) <= KEPT
    assert steps[-1] == 3 * KEPT - 1
    assert steps == sorted(set(steps))
    assert all(row == [float(step)] for step, row in monitor._history["sigma"])


def test_a_picture_has_a_row_for_each_layer_and_grey_where_nothing_was_read():
    values = np.array([[0.0, 1.0], [math.nan, 0.5], [0.25, math.inf]])
    shades = colours(values, 0, 1)
    assert tuple(shades[1, 0]) == tuple(shades[2, 1]) == (200, 200, 200)
    assert shades[0, 0].sum() < shades[2, 0].sum() < shades[1, 1].sum() < shades[0, 1].sum()
    picture = heat_map("σ", ["a.b.c", "a.b.d", "a.b.e"], [1, 50], values)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert heat_map("nothing", [], [], np.zeros((0, 0))).ndim == 3
    assert heat_map("log", ["a"], [1], np.array([[0.0]]), log=True).ndim == 3
    assert shortened(["m.l.0.q", "m.l.1.q"]) == ["0.q", "1.q"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": -1}, "every must be at least 0, got -1"),
        ({"metrics": ["sigmaa"]}, "'sigmaa' is none of .* \\(did you mean 'sigma'\\?\\)"),
        ({"metrics": []}, "metrics must name some"),
        ({"layers": []}, "layers must name some"),
        ({"alarm": "ring"}, "alarm must be one of off, warn, stop, got 'ring'"),
        ({"metrics": ["sigma"]}, "alarm=warn goes by sign_diversity, sigma_gap, which metrics leaves out"),
        ({"alarm_baseline": 0}, "alarm_baseline must be at least 1"),
    ],
)
def test_bad_settings_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        MonitorConfig(**changes)


def test_a_layer_that_is_none_is_named_before_the_first_step():
    module = tiny_module()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(UserError, match=r"monitors\.layers: 'q_porj' is no linear layer of the model"):
        monitored(2, MonitorConfig(layers=["q_porj"]), module=module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
