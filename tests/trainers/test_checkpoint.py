"""Checkpoints: whole or absent, sealed, bit-exact to resume from."""

import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from tiny_run import forked, same, train

from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.errors import UserError
from thinrank.trainers.files import remove_temporary
from thinrank.trainers.rng import rng_state, seed_all, set_rng_state

# Lightning 2.6 asks torch 2.13 in a deprecated way whether a batch is nested; nothing of ours can change that.
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")

STATE = {"weight": torch.arange(1000.0), "nested": [1, (2.5, None), {"a": "b"}], "flag": True}


def test_round_trip_and_plain_torch_reads_it(tmp_path):
    path = tmp_path / "deep" / ckpt.checkpoint_name(7)
    ckpt.save(STATE, path)
    assert os.listdir(path.parent) == ["step-00000007.ckpt"]
    for state in (ckpt.load(path), ckpt.load(path, mmap=True), torch.load(path, weights_only=True)):
        same(state, STATE)
    assert ckpt.step_of(path) == 7


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -60, -200])
def test_any_truncation_is_found(tmp_path, keep):
    good, cut = tmp_path / ckpt.checkpoint_name(1), tmp_path / ckpt.checkpoint_name(2)
    ckpt.save(STATE, good)
    cut.write_bytes(good.read_bytes()[:keep])
    assert ckpt.defect(good) is None
    assert "truncated" in (ckpt.defect(cut, full=False) or "")
    with pytest.warns(UserWarning, match=r"step-00000002.ckpt is truncated .* skipped"):
        assert ckpt.newest(tmp_path) == good
    with pytest.raises(UserError, match=r"step-00000002.ckpt is truncated .*: name another checkpoint"):
        ckpt.load(cut)


def test_a_changed_byte_anywhere_is_found(tmp_path):
    path = tmp_path / ckpt.checkpoint_name(1)
    ckpt.save(STATE, path)
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        assert ckpt.defect(path) is not None, place


def test_a_checkpoint_without_seal_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="not written by this library"):
        ckpt.load(tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="does not exist"):
        ckpt.load(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), object()])
def test_values_that_would_not_load_are_refused_by_place(tmp_path, value):
    with pytest.raises(TypeError, match=r"checkpoint\['a'\].* which weights_only=True does not load"):
        ckpt.save({"a": value}, tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_in_the_middle_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / ckpt.checkpoint_name(1)
    ckpt.save({"old": 1}, path)

    def attempt():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(
            UserError, match=r"cannot write the checkpoint .*File too large.*older checkpoints are intact"
        ):
            ckpt.save({"big": torch.zeros(100_000)}, path)

    assert os.waitpid(forked(attempt), 0)[1] == 0
    assert ckpt.load(path) == {"old": 1}
    assert os.listdir(tmp_path) == [path.name]


def test_too_little_space_is_refused_before_the_first_write(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 2 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    ckpt.require_space(tmp_path, 2**29)
    with pytest.raises(UserError, match=r"has 2.00 GiB free, but 3 checkpoints of 1.00 GiB need 3.00 GiB: free some"):
        ckpt.require_space(tmp_path, 2**30)


def test_kill_during_a_save_leaves_only_whole_checkpoints(tmp_path):
    """The child saves without pause and is killed at many different moments."""
    state = {"big": torch.zeros(2_000_000)}

    def save_on_and_on():
        for step in range(1, 10_000):
            ckpt.save(state, tmp_path / ckpt.checkpoint_name(step))

    moments = random.Random(0)
    unfinished = 0
    for _ in range(8):
        child = forked(save_on_and_on)
        deadline = time.monotonic() + 20
        while not ckpt.listed(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += len(list(tmp_path.glob("*.tmp-*")))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ckpt.newest(tmp_path) is not None
        remove_temporary(tmp_path)
        for path in tmp_path.iterdir():
            assert ckpt.defect(path) is None
            path.unlink()
    assert unfinished > 0, "no kill hit a save: the test shows nothing"


def test_random_state_round_trip():
    seed_all(3, 1)
    state = rng_state()
    draws = [random.random(), np.random.rand(), torch.rand(3)]  # noqa: NPY002
    set_rng_state(state)
    same([random.random(), np.random.rand(), torch.rand(3)], draws)  # noqa: NPY002
    seed_all(3, 1)
    assert random.random() == draws[0]
    seed_all(3, 2)
    assert random.random() != draws[0]


def test_newest_and_best_are_kept_and_pointed_at(tmp_path):
    run = train(tmp_path, 12, every=3, validate=4)
    best = run.checkpointing.best_step
    assert best in (4, 8, 12)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last.ckpt", "best.ckpt", ckpt.checkpoint_name(12), ckpt.checkpoint_name(best)}
    assert os.readlink(tmp_path / "last.ckpt") == ckpt.checkpoint_name(12)
    assert ckpt.load(tmp_path / "best.ckpt")["thinrank"]["step"] == best


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [4, 5, 6, 8])
def test_resume_is_bit_exact(tmp_path, accumulate, stop):
    """12 steps at once, or stopped after `stop` and gone on with fresh objects: the same weights, states and numbers,
    and validations at the same steps. 4 and 8 are validation steps; dropout shows that random states go on too."""
    whole = train(tmp_path / "whole", 12, accumulate=accumulate)
    first = train(tmp_path / "parts", stop, accumulate=accumulate)
    second = train(tmp_path / "parts", 12, accumulate=accumulate, resume=ckpt.newest(tmp_path / "parts"))
    assert first.events + second.events == whole.events
    assert [step for kind, step, _ in whole.events if kind == "val"] == [4, 8, 12]
    same(second.state(), whole.state())
    left, right = (ckpt.load(tmp_path / name / ckpt.checkpoint_name(12)) for name in ("whole", "parts"))
    for state in (left, right):
        # a count of validation batches that Lightning forwards when it goes on, and that nothing reads
        del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        for callback in state["callbacks"].values():
            callback.pop("seconds", None)
    same(right, left)


def test_a_finished_run_resumes_to_nothing(tmp_path):
    train(tmp_path, 6)
    again = train(tmp_path, 6, resume=ckpt.newest(tmp_path))
    assert again.events == []
    assert again.trainer.global_step == 6


def test_another_accumulation_goes_on_at_the_same_sample_and_says_so(tmp_path):
    train(tmp_path, 5)
    with pytest.warns(UserWarning, match="not bit for bit the same"):
        run = train(tmp_path, 9, accumulate=2, resume=ckpt.newest(tmp_path))
    assert run.data.consumed == 72
    assert run.trainer.global_step == 9
    assert [step for kind, step, _ in run.events if kind == "val"] == [8]


def test_other_intervals_take_effect_on_resume(tmp_path):
    """The checkpoint was taken after a validation. Lightning counts logged steps differently when it goes on from there
    and the new interval has no validation at that step; they must stay the optimizer steps."""
    train(tmp_path, 8, every=8, validate=8)
    run = train(tmp_path, 12, every=2, validate=3, resume=ckpt.newest(tmp_path))
    assert [step for kind, step, _ in run.events if kind == "val"] == [9, 12]
    assert run.trainer.fit_loop.epoch_loop._batches_that_stepped == 12
