"""When a checkpoint is taken, which are kept, and how a resumed run goes on as if it had never stopped."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from thinrank.trainers.checkpoint import checkpoint_name, listed, step_of
from thinrank.trainers.files import point
from thinrank.trainers.rng import rng_state, seed_all, set_rng_state

_BATCHES = "epoch_loop.batch_progress"


class Checkpointing(Checkpoint):
    """Saves after every `every` optimizer steps, after a validation that improved, and after the last step.

    Where a validation is due at the same step, it runs first, so that a checkpoint is always what the uninterrupted
    run was after that step, and a resumed run validates and logs at the same steps. The newest and the best checkpoint
    are kept, and the links ``last.ckpt`` and ``best.ckpt`` point at them; older ones go once a new one is complete.

    For training by steps on one endless epoch. The random state of all ranks is kept and restored, so at an equal
    number of ranks, and with a resumable data module, a resumed run equals an uninterrupted one bit for bit.

    Args:
        folder: where checkpoints go; made if missing.
        every: optimizer steps between checkpoints.
        monitor: the metric whose smallest value is the best; without such a metric only the newest is kept.
        reach: steps from which one must be able to go back: of each step on, the newest checkpoint that is as old is
            kept beside the newest and the best, and those in between.
        header: plain values to keep in each checkpoint under ``thinrank``.
        saved: called on rank 0 after each complete checkpoint, with its path and step.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every: int,
        *,
        monitor: str = "val/loss",
        reach: int = 0,
        header: dict[str, Any] | None = None,
        saved: Callable[[Path, int], None] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.folder, self.every, self.monitor = Path(folder), every, monitor
        self.reach = reach
        self.header, self.saved = dict(header or {}), saved
        self.best_value, self.best_step = math.inf, -1
        self.newest: Path | None = None  # of this process
        self.last_step = -1  # the step of the newest checkpoint, saved or resumed from
        self._boundary = 0  # the last optimizer step that was seen
        self._pending = False  # to be saved after the validation of this step
        self._random: dict[str, Any] | None = None
        self._seconds, self._started = 0.0, None

    @property
    def seconds(self) -> float:
        """Training time in seconds up to now, over all starts of the run that led here."""
        return self._seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def save(self, trainer: pl.Trainer) -> Path:
        """Saves now; all ranks call it together, between two optimizer steps.

        Returns:
            The checkpoint's path.
        """
        step = trainer.global_step
        path = self.folder / checkpoint_name(step)
        self._pending, self.last_step = False, step  # before the save: they are part of no state
        trainer.save_checkpoint(path)
        self.newest = path
        if trainer.is_global_zero:
            point(self.folder / "last.ckpt", path.name)
            if self.best_step >= 0 and (self.folder / checkpoint_name(self.best_step)).exists():
                point(self.folder / "best.ckpt", checkpoint_name(self.best_step))
            for other in self._out_of_reach(step):
                if step_of(other) != self.best_step:
                    for part in (other, *self.folder.glob(f"{other.name}.rank*")):  # and those of ranks, if any
                        part.unlink(missing_ok=True)
            if self.saved is not None:
                self.saved(path, step)
        return path

    def _out_of_reach(self, step: int) -> list[Path]:
        """The checkpoints to which nobody would go back from a step after `step`."""
        found = {step_of(path) or 0: path for path in listed(self.folder)}
        oldest = max((each for each in found if each <= step + 1 - self.reach), default=0) if self.reach else step
        return [path for each, path in found.items() if not min(oldest, step) <= each <= step]

    def final(self, trainer: pl.Trainer) -> bool:
        """Whether no step follows."""
        return trainer.should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._boundary = trainer.global_step
        self._started = time.monotonic()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not in on_train_start: going on after a validation step makes Lightning build the validation loader, and
        # every new loader draws a number.
        if self._random is not None:
            set_rng_state(self._random)
            self._random = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._boundary:
            return  # in the middle of an accumulation
        self._boundary = step
        if step == self.last_step or not (step % self.every == 0 or self.final(trainer)):
            return
        if validation_due(trainer):
            self._pending = True
        else:
            self.save(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.monitor)
        improved = value is not None and float(value) < self.best_value
        improved = trainer.strategy.broadcast(improved)  # ranks must not disagree on whether to save together
        if improved and value is not None:
            self.best_value, self.best_step = float(value), trainer.global_step
        if improved or self._pending or self.final(trainer):
            self.save(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds, self._started = self.seconds, None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_step": self.best_step, "seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]
        self._seconds = state_dict["seconds"]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["thinrank"] = {
            **self.header,
            "step": trainer.global_step,
            "world": trainer.world_size,
            "accumulate": trainer.accumulate_grad_batches,
            "random": _gather(rng_state(), trainer),
        }
        # Lightning counts a batch as completed before its validation, and goes on differently from before and after.
        # One form for all checkpoints: the batch is processed and its validation, if one was due, is over.
        for part in ("total", "current"):
            batches = checkpoint["loops"]["fit_loop"][_BATCHES][part]
            batches["completed"] = batches["processed"] - 1

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        header = checkpoint.get("thinrank")
        if header is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self.last_step = header["step"]
        world, accumulate = header["world"], header["accumulate"]
        if (world, accumulate) == (trainer.world_size, trainer.accumulate_grad_batches):
            self._random = header["random"][trainer.global_rank]
            return
        if trainer.is_global_zero:
            warnings.warn(
                f"the checkpoint of step {header['step']} is of {world} rank(s) with {accumulate} micro-batch(es) a "
                f"step and goes on with {trainer.world_size} and {trainer.accumulate_grad_batches}: the same data in "
                "the same order, but sums in another, so not bit for bit the same",
                stacklevel=2,
            )
        if world == trainer.world_size:
            self._random = header["random"][trainer.global_rank]
        else:
            seed_all(header["step"], trainer.global_rank)
        _set_batches(checkpoint, header["step"] * trainer.accumulate_grad_batches)


def validation_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after the batch that just ended. Asked of the loop itself, because its rule depends
    on six settings and on whether a stop was requested."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _set_batches(checkpoint: dict[str, Any], count: int) -> None:
    """Puts the loop after `count` batches: with another accumulation, the same step is another number of batches."""
    for part in ("total", "current"):
        batches = checkpoint["loops"]["fit_loop"][_BATCHES][part]
        batches.update(ready=count, started=count, processed=count, completed=count - 1)


def _gather(value: Any, trainer: pl.Trainer) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
