"""Signals, the time limit, and kill -9: what is left is enough to go on."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_run import At, forked, read, same, train

from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.callbacks.checkpointing import Checkpointing
from thinrank.trainers.callbacks.preemption import Preemption

# Lightning 2.6 asks torch 2.13 in a deprecated way whether a batch is nested; nothing of ours can change that.
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_marks_and_stops_and_the_resumed_run_is_bit_exact(tmp_path, name, step, accumulate):
    """At step 4 a validation is due as well: it belongs to the run and is not repeated."""
    number = signal.Signals[name]
    before = signal.getsignal(number)
    whole = train(tmp_path / "whole", 9, accumulate=accumulate)
    first = train(
        tmp_path / "parts",
        9,
        accumulate=accumulate,
        marker=tmp_path / "preempted",
        callbacks=[At(step, lambda: os.kill(os.getpid(), number))],
    )
    assert first.trainer.global_step == step
    assert first.preemption.preempted
    assert first.preemption.stopped_by == name
    assert signal.getsignal(number) == before
    marker = read(tmp_path / "preempted")
    assert (marker["step"], marker["signal"]) == (step, name)
    assert ckpt.newest(tmp_path / "parts") == tmp_path / "parts" / ckpt.checkpoint_name(step)
    second = train(tmp_path / "parts", 9, accumulate=accumulate, resume=marker["checkpoint"])
    assert first.events + second.events == whole.events
    same(second.state(), whole.state())


def test_a_signal_in_the_middle_of_an_accumulation_waits_for_the_step(tmp_path):
    class InFirstHalf(At):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    run = train(tmp_path, 9, accumulate=2, callbacks=[InFirstHalf(0, None)])
    assert run.trainer.global_step == 3
    assert run.data.consumed == 24


def test_the_time_limit_counts_over_restarts_and_is_no_preemption(tmp_path):
    def wait():
        time.sleep(0.3)

    first = train(tmp_path, 5, marker=tmp_path / "preempted", callbacks=[At(2, wait)], max_seconds=30)
    assert first.preemption.stopped_by is None
    second = train(
        tmp_path,
        50,
        marker=tmp_path / "preempted",
        resume=ckpt.newest(tmp_path),
        max_seconds=0.3,
    )
    assert second.preemption.stopped_by == "max_time"
    assert second.trainer.global_step == 6
    assert not second.preemption.preempted
    assert not (tmp_path / "preempted").exists()
    assert ckpt.newest(tmp_path) == tmp_path / ckpt.checkpoint_name(6)


def test_outside_the_main_thread_training_works_without_handlers(tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(tmp_path, 2)))
    thread.start()
    thread.join(60)
    assert runs[0].trainer.global_step == 2


@pytest.mark.parametrize("value", [0, -1])
def test_a_time_limit_must_be_positive(tmp_path, value):
    with pytest.raises(ValueError, match="max_seconds must be above 0"):
        Preemption(Checkpointing(tmp_path, 1), max_seconds=value)


def test_kill_during_training_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path):
    whole = train(tmp_path / "whole", 12)
    child = forked(
        lambda: train(tmp_path / "parts", 12, callbacks=[At(8, lambda: os.kill(os.getpid(), signal.SIGKILL))])
    )
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    newest = ckpt.newest(tmp_path / "parts")
    assert newest is not None
    assert newest.name == ckpt.checkpoint_name(5)
    second = train(tmp_path / "parts", 12, resume=newest)
    same(second.state(), whole.state())
    assert second.events == [event for event in whole.events if event[1] >= 5]


def _agree(received):
    checkpointing = SimpleNamespace(seconds=0.0)
    preemption = Preemption(checkpointing)  # pyright: ignore[reportArgumentType]
    preemption.received = received if torch.distributed.get_rank() == 1 else 0
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    return preemption._agree(trainer)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("received", [0, signal.SIGTERM])
def test_all_ranks_agree_when_one_was_signalled(ranks, received):
    assert ranks(2).run(_agree, received) == [received, received]
