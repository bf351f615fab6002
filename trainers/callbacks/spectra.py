"""Readings of the layers of a Lightning run: curves, histograms and pictures, and an alarm."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from typing_extensions import override

from thinrank.optim.monitors.alignment import BINS, LEVELS, REACH, Alignment, AlignmentAlarm, Verdict
from thinrank.optim.spectra import Layer, Spectra
from thinrank.trainers.charts import heat_map
from thinrank.trainers.errors import GuardStop, UserError
from thinrank.trainers.monitors import MonitorConfig

_log = logging.getLogger(__name__)

KEPT = 400
"""Readings that pictures show; with more, every second one of the older half goes."""

LOG_SCALE = ("sigma", "weight_rms", "input_max", "gain")
"""What pictures show by its logarithm."""


class SpectralMonitor(pl.Callback):
    """Reads the linear layers every so many optimizer steps and logs what it finds (`thinrank.optim.spectra`).

    | tag | what |
    | --- | --- |
    | `spectral/<metric>/<layer>` | the reading; metrics are `thinrank.optim.spectra.METRICS` |
    | `spectral/<metric>/_min`, `_median`, `_max` | over the layers |
    | `spectral/alignment/<layer>` | histogram of the inputs' alignments, in standard deviations of the null |
    | `spectral/<metric>` | a picture of all layers over time, at validations and at the end |
    | `spectral/collapsed`, `spectral/alarm` | share of one-sided layers; 0 healthy, 1 info, 2 warn, 3 alert |

    The first micro-batch of such a step is looked at, on every rank; between readings nothing is computed and no hook
    is on the model. Training is the same to the bit. Where ranks train apart (gossip) the first rank's weights are
    read.

    Args:
        config: what, of which layers, how often.
        warmup: steps in which the alarm says nothing.
        total_steps: of the run, for the alarm's baseline; None asks the Trainer.
        folder: where pictures go as PNG files; None: to TensorBoard alone.
        told: is called on the first rank with step, level and reason whenever the alarm's level changes.

    Attributes:
        verdict: the alarm's last one, or None.
        alarms: every change of the alarm's level: step, level, reason.

    Raises:
        UserError: at the start, for a layer that is none.
        GuardStop: with `alarm="stop"`, when the alarm's level is alert.
    """

    def __init__(
        self,
        config: MonitorConfig | None = None,
        *,
        warmup: int = 0,
        total_steps: int | None = None,
        folder: Path | None = None,
        told: Callable[[int, str, str], None] | None = None,
    ) -> None:
        self.config = config if config is not None else MonitorConfig()
        self.warmup, self.total_steps, self.folder, self._told = warmup, total_steps, folder, told
        self.verdict: Verdict | None = None
        self.alarms: list[dict[str, Any]] = []
        self._spectra: Spectra | None = None
        self._alarm: AlignmentAlarm | None = None
        self._saved: Mapping[str, Any] = {}
        self._names: list[str] = []
        self._history: dict[
            str, list[tuple[int, list[float]]]
        ] = {}  # by metric, step and layers' values of each reading
        self._begun = self._last = self._drawn = 0
        self._laid_out = False

    # --- when -----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.config.every:
            return
        found: Any = getattr(pl_module, "model", pl_module)
        model: nn.Module = found if isinstance(found, nn.Module) else pl_module
        config = self.config
        try:
            self._spectra = Spectra(
                model, trainer.optimizers[0], metrics=config.metrics, layers=config.layers, exclude=config.exclude
            )
        except ValueError as error:
            raise UserError(f"monitors.{error}") from error
        for name, cause in list(self._spectra.left_out.items())[:1]:
            _log.warning(
                "%d layers, %s among them, have no readings of weights: %s", len(self._spectra.left_out), name, cause
            )
        steps = self.total_steps if self.total_steps is not None else trainer.estimated_stepping_batches
        if config.alarm != "off":
            total = int(steps) if math.isfinite(steps) else 5000
            self._alarm = AlignmentAlarm(warmup=self.warmup, baseline=config.baseline(total))
        self._names = list(self._spectra.layers)
        self._restore()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        spectra, step = self._spectra, trainer.global_step + 1
        if spectra is None or spectra.reading or (step != 1 and step % self.config.every):
            return
        self._begun = step
        spectra.begin()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._spectra is not None and self._spectra.reading:
            self._spectra.look_at_gradients()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        spectra, step = self._spectra, trainer.global_step
        if spectra is None or not spectra.reading or step != self._begun:
            return  # nothing was begun, or further micro-batches belong to the step

        def reduce(x: Tensor, how: str) -> Tensor:
            found = trainer.strategy.reduce(x, reduce_op=how)
            assert isinstance(found, Tensor)
            return found

        layers = spectra.end(reduce)
        self._keep(step, layers)
        self._log_scalars(trainer, step, layers)
        if self._alarm is not None:
            self._judge(trainer, step, layers)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)
        self._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._draw(trainer)
        self._end()

    def _end(self) -> None:
        if self._spectra is not None:
            self._saved = self.state_dict()
            self._spectra.cancel()
            self._spectra = None

    # --- what is seen -----------------------------------------------------------------------------------------------

    def _keep(self, step: int, layers: Mapping[str, Layer]) -> None:
        self._last = step
        for metric in self.config.metrics:
            if not any(metric in layer.values for layer in layers.values()):
                continue  # nobody can see it here
            row = [layers[name].values.get(metric, math.nan) for name in self._names]
            kept = self._history.setdefault(metric, [])
            kept.append((step, row))
            if len(kept) > KEPT:
                del kept[0 : KEPT // 2 : 2]

    def _log_scalars(self, trainer: pl.Trainer, step: int, layers: Mapping[str, Layer]) -> None:
        found: dict[str, float] = {}
        for metric in self.config.metrics:
            values = {name: layer.values[metric] for name, layer in layers.items() if metric in layer.values}
            if self.config.each:
                found |= {f"spectral/{metric}/{name}": value for name, value in values.items()}
            finite = [value for value in values.values() if math.isfinite(value)]
            if finite:
                found[f"spectral/{metric}/_min"] = min(finite)
                found[f"spectral/{metric}/_median"] = statistics.median(finite)
                found[f"spectral/{metric}/_max"] = max(finite)
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)
        for events in _tensorboards(trainer):
            if not self._laid_out:
                events.add_custom_scalars(_layout(self._names, self.config.metrics, self.config.each))
            if self.config.histograms:
                for name, layer in layers.items():
                    if layer.alignment is not None:
                        _add_histogram(events, f"spectral/alignment/{name}", layer.alignment, step)
        self._laid_out = True

    def _judge(self, trainer: pl.Trainer, step: int, layers: Mapping[str, Layer]) -> None:
        assert self._alarm is not None
        keys = ("sign_diversity", "sigma", "sigma_gap")
        readings = {
            name: tuple(layer.values[key] for key in keys)
            for name, layer in layers.items()
            if all(key in layer.values for key in keys)
        }
        before = "healthy" if self.verdict is None else self.verdict.level
        self.verdict = verdict = self._alarm.update(step, readings)  # pyright: ignore[reportArgumentType]
        values = {"spectral/collapsed": verdict.collapsed, "spectral/alarm": float(LEVELS.index(verdict.level))}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if verdict.level != before:
            self.alarms.append({"step": step, "level": verdict.level, "reason": verdict.reason})
            if trainer.is_global_zero and self._told is not None:
                self._told(step, verdict.level, verdict.reason)
            if trainer.is_global_zero and LEVELS.index(verdict.level) >= LEVELS.index("warn"):
                some = ", ".join(verdict.layers[:4]) + (" …" if len(verdict.layers) > 4 else "")
                _log.warning("step %d: %s%s", step, verdict.reason, f" ({some})" if some else "")
        stop = self.config.alarm == "stop" and verdict.level == "alert"
        if self.config.alarm == "stop" and trainer.strategy.reduce_boolean_decision(stop, all=False):
            raise GuardStop(
                f"training stopped at step {step}: {verdict.reason or 'another rank found its layers one-sided'}; "
                "lower optimizer.lr, lengthen the warm-up, or use monitors.alarm=warn to go on"
            )

    # --- pictures -----------------------------------------------------------------------------------------------------

    def _draw(self, trainer: pl.Trainer) -> None:
        if not self.config.images or not trainer.is_global_zero or self._drawn == self._last:
            return
        self._drawn = self._last
        for metric, kept in self._history.items():
            values = np.array([row for _, row in kept], dtype=np.float64).T
            steps = [step for step, _ in kept]
            picture = heat_map(metric, self._names, steps, values, log=metric in LOG_SCALE)
            for events in _tensorboards(trainer):
                events.add_image(f"spectral/{metric}", picture, self._last, dataformats="HWC")
            if self.folder is not None:
                from PIL import Image

                self.folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(self.folder / f"{metric}.png")

    # --- state ------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._spectra is None:
            return dict(self._saved)
        return {
            "spectra": self._spectra.state_dict(),
            "alarm": None if self._alarm is None else self._alarm.state_dict(),
            "level": None if self.verdict is None else self.verdict.level,
            "alarms": list(self.alarms),
            "names": list(self._names),
            "last": self._last,
            "steps": {metric: [step for step, _ in kept] for metric, kept in self._history.items()},
            "history": {
                metric: torch.tensor([row for _, row in kept], dtype=torch.float64)
                for metric, kept in self._history.items()
            },
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _restore(self) -> None:
        """Lightning gives the state before the strategy has laid out the weights that it is about."""
        saved = self._saved
        if not saved or self._spectra is None:
            return
        self._spectra.load_state_dict(saved["spectra"])
        if self._alarm is not None and saved["alarm"] is not None:
            self._alarm.load_state_dict(saved["alarm"])
        self.alarms = list(saved["alarms"])
        self.verdict = None if saved["level"] is None else Verdict(saved["level"], 0.0)
        if saved["names"] == self._names:
            self._last = self._drawn = int(saved["last"])
            self._history = {
                metric: list(zip(saved["steps"][metric], rows.tolist(), strict=True))
                for metric, rows in saved["history"].items()
            }


def _tensorboards(trainer: pl.Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _add_histogram(events: Any, tag: str, alignment: Alignment, step: int) -> None:
    width = 2 * REACH / BINS
    limits = [-REACH + width * (i + 1) for i in range(BINS)]
    centres = [limit - width / 2 for limit in limits]
    pairs = list(zip(centres, alignment.histogram, strict=True))
    events.add_histogram_raw(
        tag,
        min=-REACH,
        max=REACH,
        num=alignment.tokens,
        sum=sum(centre * count for centre, count in pairs),
        sum_squares=sum(centre * centre * count for centre, count in pairs),
        bucket_limits=limits,
        bucket_counts=list(alignment.histogram),
        global_step=step,
    )


def _layout(names: Sequence[str], metrics: Sequence[str], each: bool) -> dict[str, dict[str, list[Any]]]:
    """Charts of many layers at once: for each metric the spread, and one for each kind of layer."""
    kinds = sorted({name.rpartition(".")[2] for name in names})
    found: dict[str, dict[str, list[Any]]] = {}
    for metric in metrics:
        tag = f"spectral/{metric}"
        found[metric] = {"all layers": ["Margin", [f"{tag}/_median", f"{tag}/_min", f"{tag}/_max"]]}
        for kind in kinds if each else ():
            own = [name for name in names if name.rpartition(".")[2] == kind]
            found[metric][kind] = ["Multiline", [f"{tag}/{name}" for name in own]]
    return found
