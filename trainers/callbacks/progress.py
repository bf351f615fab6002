"""What a person sees while training runs: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from thinrank.trainers.callbacks.metrics import LossMean, TokenClock


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`, such as `1:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress(ProgressBar):
    """Steps, loss, tokens per second and the time left, from rank 0; it takes the place of Lightning's bar.

    The loss is the mean over all ranks and all steps since the last line.

    Args:
        every: optimizer steps between two lines, or between two readings of the loss beside the bar. The first and the
            last step are always shown.
        terminal: draw a bar; None asks whether standard error is a terminal.
    """

    def __init__(self, every: int = 10, *, terminal: bool | None = None) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}: set trainer.log_every to a number of steps")
        self.every = every
        self._terminal = terminal
        self._enabled = True
        self._bar: tqdm | None = None
        self._loss = LossMean()
        self._clock = TokenClock()
        self._seen = 0  # optimizer steps done when this callback last looked
        self._first = 0  # optimizer steps done when training started here
        self._started = 0.0

    def disable(self) -> None:
        self._enabled = False
        self._close()

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without breaking the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.clear()
        print(*args, **kwargs, flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = self._first = trainer.global_step
        self._started = time.perf_counter()
        self._clock.restart()
        terminal = sys.stderr.isatty() if self._terminal is None else self._terminal
        if self._enabled and terminal:
            self._bar = tqdm(
                total=_total_steps(trainer),
                initial=trainer.global_step,
                bar_format="step {n_fmt}/{total_fmt} |{bar:24}|{postfix}",
                file=sys.stderr,
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss.add(outputs, trainer.accumulate_grad_batches)
        self._clock.add(batch, trainer.world_size)
        step = trainer.global_step
        if step == self._seen:
            return  # a micro-batch without a step
        self._seen = step
        if self._bar is not None:
            self._bar.update(1)
        total = _total_steps(trainer)
        if step % self.every and step not in (self._first + 1, total):
            return
        loss = self._loss.take(trainer.strategy)  # on every rank, whether it shows anything or not
        tokens, seconds = self._clock.take()
        parts = [] if loss is None else [f"loss {loss:.4g}"]
        if tokens:
            parts.append(f"{tokens / seconds:,.0f} tok/s")
        if total is not None:
            elapsed = time.perf_counter() - self._started
            parts.append(f"eta {duration(elapsed / (step - self._first) * (total - step))}")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts))
        else:
            self.print("  ".join([_position(step, total), *parts]))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.resume()
        if not trainer.sanity_checking:
            self._show_evaluation(trainer, "val", "validation")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_evaluation(trainer, "test", "test")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show_evaluation(self, trainer: pl.Trainer, stage: str, word: str) -> None:
        values = trainer.callback_metrics
        parts = [
            f"{label} {float(values[f'{stage}/{key}']):.4g}"
            for key, label in (("loss", "loss"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte"))
            if f"{stage}/{key}" in values
        ]
        if parts:
            self.print("  ".join([_position(trainer.global_step, _total_steps(trainer)), word, *parts]))


def _total_steps(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of the whole run; None where it has no known end."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    total = trainer.estimated_stepping_batches if trainer.training else math.inf
    return int(total) if math.isfinite(total) else None


def _position(step: int, total: int | None) -> str:
    return f"step {step:,}" if total is None else f"step {step:,}/{total:,}"
