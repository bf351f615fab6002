"""How long an optimizer step takes."""

from __future__ import annotations

import statistics
import time
from array import array
from typing import Any

import lightning.pytorch as pl


class StepTime(pl.Callback):
    """Seconds of every optimizer step, from its first micro-batch to the end of the step.

    Validation, checkpoints and waiting for data lie between steps and do not count. `NonFiniteGuard` reads the norm of
    the gradients in every step and so waits for the device: a step's own time is what it takes on a GPU too.
    """

    def __init__(self) -> None:
        self._times = array("d")
        self._started: float | None = None
        self._seen = 0

    @property
    def median(self) -> float | None:
        """Median seconds of a step since this start, its first one (which warms up) left out; None before two steps."""
        return statistics.median(self._times[1:]) if len(self._times) > 1 else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen, self._started = trainer.global_step, None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen or self._started is None:
            return  # in the middle of an accumulation
        self._times.append(time.perf_counter() - self._started)
        self._seen, self._started = trainer.global_step, None
