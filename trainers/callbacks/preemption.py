"""Ends a run on its own terms: a signal or a time limit is noted, agreed on by all ranks, acted on between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from thinrank.trainers.callbacks.checkpointing import Checkpointing
from thinrank.trainers.files import write_json

_TIME_IS_UP = 1  # on the wire; every other value is the number of a signal, and 0 is nothing


class Preemption(pl.Callback):
    """Saves and stops at the end of the step in which a signal arrives or the time is up.

    The handler sets a flag and does nothing else. After each optimizer step all ranks agree (the largest of one number
    each), so that they save the same step whichever of them was signalled. After a signal rank 0 leaves a marker, a
    JSON file with step, signal, time and checkpoint, by which a batch script knows to queue the job again:
    exit codes do not come through torchrun.

    Handlers can only be installed in the main thread; elsewhere only the time limit works. They are put back at the
    end of training and of testing, or of a ``with`` block around both: a signal that comes after the last step then
    lets the rest go on, since everything is saved.

    Args:
        checkpointing: saves the checkpoint.
        marker: the marker's path, or None for no marker.
        signals: the signals that ask for an end.
        max_seconds: training time over all starts of the run after which it ends as finished, without a marker;
            None for no limit.
    """

    def __init__(
        self,
        checkpointing: Checkpointing,
        marker: str | os.PathLike | None = None,
        *,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1),
        max_seconds: float | None = None,
    ) -> None:
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"max_seconds must be above 0 or None for no limit, got {max_seconds}")
        self.checkpointing, self.marker = checkpointing, Path(marker) if marker is not None else None
        self.signals, self.max_seconds = tuple(signals), max_seconds
        self.received = 0  # the last signal that this rank got
        self.stopped_by: str | None = None  # "SIGTERM", "SIGUSR1", … or "max_time", the same on all ranks
        self._boundary = 0
        self._asked: tuple[torch.Tensor, torch.distributed.Work | None] | None = None  # of the last step, on its way
        self._previous: dict[int, Any] = {}
        self._held = False

    @property
    def preempted(self) -> bool:
        """Whether a signal ended the run."""
        return self.stopped_by not in (None, "max_time")

    def install(self) -> None:
        """Installs the handlers, in the main thread, also over those that others have put above ours."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.signals:
            current = signal.getsignal(number)
            if current != self._note:
                self._previous.setdefault(number, current)
                signal.signal(number, self._note)

    def restore(self) -> None:
        """Puts back the handlers that were there before the first `install`."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def __enter__(self) -> Preemption:
        """Keeps the handlers from here to the end of the block, over training and what follows it."""
        self._held = True
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self._held = False
        self.restore()

    def _note(self, number: int, frame: Any) -> None:
        self.received = number

    # Lightning installs a handler for SIGTERM, one that communicates from inside the handler, after the callbacks'
    # setup and before these hooks; it puts the ones that it found back after the last of the hooks below.
    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._boundary = trainer.global_step
        self.install()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        asked, self._asked = self._asked, None
        if asked is not None and asked[1] is not None:
            asked[1].wait()
        self._release()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.install()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if not self._held:
            self.restore()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._boundary:
            return  # in the middle of an accumulation
        self._boundary = trainer.global_step
        request = self._agree(trainer)
        if request == 0 or self.stopped_by is not None:
            return
        self.stopped_by = "max_time" if request == _TIME_IS_UP else signal.Signals(request).name
        # Not `should_stop`: that makes Lightning validate before it ends, at a step where the uninterrupted run would
        # not have. A validation that is due anyway still runs, after this save, and is then saved with.
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
        path = self.checkpointing.save(trainer)
        if self.preempted and self.marker is not None and trainer.is_global_zero:
            write_json(
                self.marker,
                {
                    "step": trainer.global_step,
                    "signal": self.stopped_by,
                    "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "checkpoint": str(path),
                },
            )

    def _agree(self, trainer: pl.Trainer) -> int:
        request = self.received
        if request == 0 and self.max_seconds is not None and self.checkpointing.seconds >= self.max_seconds:
            request = _TIME_IS_UP
        if trainer.world_size == 1:
            return request
        largest = torch.tensor([request], device=trainer.strategy.root_device)
        work = torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, async_op=True)
        asked = (largest, work)
        if getattr(trainer.strategy, "local_gradients", False):
            # Ranks that wait for neighbours alone must not wait for all: they know a step later.
            asked, self._asked = self._asked, asked
        if asked is None:
            return 0
        largest, work = asked
        if work is not None:
            work.wait()
        return int(largest.item())
