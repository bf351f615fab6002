"""The time of a step: micro-batches together, the time between steps left out."""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from thinrank.trainers.callbacks.steptime import StepTime


def test_a_step_is_its_micro_batches_and_nothing_between_steps(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    trainer, timer = cast("Any", SimpleNamespace(global_step=5)), StepTime()
    module = cast("Any", None)
    timer.on_train_start(trainer, module)
    for first, second in ((50.0, 50.0), (1.0, 2.0), (2.0, 2.0), (3.0, 9.0)):
        assert timer.median is None or trainer.global_step > 6
        timer.on_train_batch_start(trainer, module, None, 0)
        clock.now += first
        timer.on_train_batch_end(trainer, module, None, None, 0)  # a micro-batch without a step
        timer.on_train_batch_start(trainer, module, None, 1)
        clock.now += second
        trainer.global_step += 1
        timer.on_train_batch_end(trainer, module, None, None, 1)
        clock.now += 1000.0  # a validation
    assert timer.median == pytest.approx(4.0)  # of 3, 4 and 12; the first step warms up
