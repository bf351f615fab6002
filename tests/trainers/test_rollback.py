"""Back before a spike, in whole runs: in the same process, on all ranks, and through a kill at any moment."""

import dataclasses
import os
import signal
import warnings
import weakref
from typing import Any

import pytest
import torch
from tiny_pretrain import config, losses, signalled_at, write_corpus
from tiny_run import forked, read, same
from tiny_training import lightning_warnings

from thinrank.configs.errors import ConfigError
from thinrank.configs.load import load
from thinrank.configs.schema import FINETUNE, PRETRAIN
from thinrank.trainers import assembly, curves, rollback
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.data import TextData
from thinrank.trainers.data.batches import Layout, past
from thinrank.trainers.data.stream import StreamBatches, StreamPositions
from thinrank.trainers.errors import GuardStop
from thinrank.trainers.guards import GuardConfig, RollbackConfig
from thinrank.trainers.module import CausalLM
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.run import RunFolder
from thinrank.trainers.strategies import FSDP2Config, ReplicatedConfig, StrategyConfig, ZeroConfig

pytestmark = lightning_warnings

BATCH = 4
WINDOW = {"detector": "zscore", "window": 8}
BACK = GuardConfig(name="rollback", **WINDOW, action="rollback", rollback=RollbackConfig(back=3, skip=2))
LENGTH = {
    "max_steps": 14,
    "checkpoint_every": 3,
    "validate_every": 0,
    "clip_norm": None,
    "sample_tokens": 0,
    "tensorboard": False,
}


STRATEGIES = {
    "ddp": StrategyConfig(name="ddp"),
    "thinrank_ddp": ReplicatedConfig(),
    "thinrank_fsdp2": FSDP2Config(),
    "thinrank_zero2": ZeroConfig(name="thinrank_zero2"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollback")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def corrupted():
    """The batches that end at these positions have a loss a thousand times too large, as a bad shard would."""
    bad: set[int] = {10 * BATCH}
    seen: list[int] = []
    step_at = CausalLM.training_step

    def training_step(self, batch, batch_idx):
        found = step_at(self, batch, batch_idx)
        seen.append(batch["position"])
        return {**found, "loss": found["loss"] * 1000.0} if batch["position"] in bad else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLM, "training_step", training_step)
        yield bad, seen


@pytest.fixture(scope="module")
def whole(base, corrupted):
    """A run that went back and came to its end, with its report and the batches that it saw."""
    _, seen = corrupted
    seen.clear()
    assemble, modules = assembly._assemble, []

    def watched(*args, **kwargs):
        assert [module() for module in modules] == [None] * len(modules)  # no memory for two models is needed
        parts = assemble(*args, **kwargs)
        modules.append(weakref.ref(parts.module))
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "_assemble", watched)
        result = pretrain(guarded(base, "whole", tensorboard=True))
    assert len(modules) == 2
    return base / "whole", result, list(seen)


def guarded(base, name, guard=BACK, **changes):
    return dataclasses.replace(config(base, name, **{**LENGTH, **changes}), guard=guard)


def final(folder):
    path = ckpt.newest(folder / "checkpoints")
    assert path is not None
    state = ckpt.load(path)
    for callback in state["callbacks"].values():
        callback.pop("seconds", None)
    return state


class TestPlan:
    """Where to, and without what: closed forms."""

    def test_the_newest_checkpoint_that_is_old_enough(self):
        assert rollback.chosen([3, 6, 9], 10, 3) == 6
        assert rollback.chosen([3, 6, 9], 10, 1) == 9
        assert rollback.chosen([9, 6], 10, 100) == 6
        assert rollback.chosen([10, 12], 10, 1) is None
        assert rollback.chosen([], 10, 1) is None

    def test_the_batches_around_the_spike_or_palms_from_the_checkpoint_on(self):
        assert rollback.left_out(36, 24, 4, 1) == (36, 40)
        assert rollback.left_out(36, 24, 4, 2) == (32, 40)
        assert rollback.left_out(36, 24, 4, 5) == (28, 48)
        assert rollback.left_out(36, 24, 4, 100) == (24, 424)
        assert rollback.left_out(900, 100, 1, 200) == (800, 1000)  # a checkpoint 800 steps back is none of PaLM's
        assert rollback.left_out(900, 800, 1, 500) == (800, 1300)  # 100 steps back, 500 batches
        assert rollback.left_out(36, 32, 4, 1) == (36, 40)

    def test_positions_jump_over_what_is_left_out(self):
        ranges = [(8, 16), (16, 20), (40, 44)]
        assert [past(p, ranges) for p in (0, 4, 8, 12, 16, 20, 40, 44)] == [0, 4, 20, 20, 20, 20, 44, 44]

    def test_a_stream_reads_what_it_leaves_out(self):
        class Counting:
            def __init__(self):
                self.at = 0

            def rows(self, count):
                import numpy as np

                self.at += count
                return np.arange(self.at - count, self.at)[:, None].repeat(3, 1)

            def state(self):
                return {"at": self.at}

            def load(self, state):
                self.at = state["at"]

        positions, consumed = StreamPositions(), [0]

        def read_from(count):
            batches = StreamBatches(
                Layout(batch_size=4, micro_batches=2),
                lambda: consumed[0],
                Counting,  # pyright: ignore[reportArgumentType] - as much of a stream as is asked for
                positions,
                lambda position: past(position, [(4, 12)]),
            )
            return [next(each) for each in [iter(batches)] for _ in range(count)]

        whole = read_from(6)
        assert [batch["position"] for batch in whole] == [2, 4, 14, 16, 18, 20]
        assert [batch["input_ids"][0, 0].item() for batch in whole] == [0, 2, 12, 14, 16, 18]
        for begins, index in ((4, 2), (16, 4)):
            consumed[0] = begins
            (again,) = read_from(1)
            assert again["position"] == whole[index]["position"]
            assert torch.equal(again["input_ids"], whole[index]["input_ids"])


def test_a_run_goes_back_leaves_the_data_out_and_goes_on(whole):
    """Step 10 is bad; back=3 asks for a checkpoint of step 7 or before, which is that of step 6."""
    path, result, seen = whole
    folder = RunFolder(path)
    (entry,) = rollback.read(folder)
    assert (entry["step"], entry["to"], entry["samples"]) == (10, 6, [32, 40])
    assert [position // BATCH for position in seen] == [*range(1, 11), 7, 8, *range(11, 17)]
    assert (result["training"]["steps"], result["training"]["rollbacks"]) == (14, 1)
    assert (result["run"]["restarts"], result["run"]["resumed_from"]) == (0, None)
    assert result["training"]["spikes"] == 0  # of the way that was gone to the end
    events = [(line["event"], line.get("step")) for line in folder.history()]
    assert events == [("start", 0), ("rollback", 10), ("end", 14)]
    assert rollback.sentence(entry, 1, 3).endswith("; going on from step 6 without samples 32 to 39")
    page = (path / "report.md").read_text()
    assert "| rollbacks | 1 |" in page
    assert "| rollback | 10 | to step 6 |" in page
    steps = [step for step, _ in curves.series(curves.read(path), "train/loss")]
    assert steps == list(losses(path)) == list(range(1, 15))
    assert final(path)["TextData"]["left_out"] == [[32, 40]]
    again = RunFolder(path)
    assert rollback.restore(again, rollback.read(again)) is None  # nothing is left to do, and newer ones are there
    assert len(again.history()) == 3


@pytest.mark.parametrize("moment", ["decided", "later"])
def test_killed_at_any_moment_of_it_a_run_goes_on_as_if_nothing_had_been(base, whole, moment):
    """Right after the record is written, before anything is deleted; and four steps after it went on."""
    chosen = guarded(base, moment)
    if moment == "decided":
        undo = pytest.MonkeyPatch()
        undo.setattr(
            rollback, "restore", lambda folder, records: os.kill(os.getpid(), signal.SIGKILL) if records else None
        )
        process = forked(lambda: pretrain(chosen))
        undo.undo()
    else:
        process = forked(lambda: (signalled_at(12, rank=0, number=signal.SIGKILL), pretrain(chosen)))
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    stale = (base / moment / "checkpoints" / ckpt.checkpoint_name(9)).exists()
    assert stale  # of the way that was given up, or made again on the new one
    assert len(rollback.read(RunFolder(base / moment))) == 1
    result = pretrain(chosen)
    assert result["run"]["resumed_from"] == {"decided": 6, "later": 9}[moment]
    assert result["training"]["rollbacks"] == 1
    same(final(base / moment), final(base / "whole"))
    lines = [curves.series(curves.read(base / name), "train/loss") for name in (moment, "whole")]
    assert lines[0] == lines[1]
    events = [line["event"] for line in RunFolder(base / moment).history()]
    assert events.count("rollback") == 1


def test_after_so_many_times_the_next_spike_stops_the_run(base, corrupted):
    bad, _ = corrupted
    before = set(bad)
    bad |= set(range(10 * BATCH, 40 * BATCH, BATCH))
    few = dataclasses.replace(BACK, rollback=RollbackConfig(back=3, skip=2, limit=2))
    with pytest.raises(GuardStop, match=r"stopped before step 9 after 2 rollbacks: the loss"):
        pretrain(guarded(base, "limit", few))
    status = read(base / "limit" / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 76)
    assert [entry["to"] for entry in rollback.read(RunFolder(base / "limit"))] == [6, 6]
    with pytest.raises(GuardStop, match="after 2 rollbacks"):  # again, from the checkpoint that is left
        pretrain(guarded(base, "limit", few))
    bad.intersection_update(before)


def test_without_a_checkpoint_yet_the_step_is_skipped(base, corrupted, caplog):
    result = pretrain(guarded(base, "early", checkpoint_every=50, max_steps=11))
    assert (result["training"]["skipped_steps"], result["training"]["rollbacks"]) == (1, 0)
    assert "step 10 is a spike, and skipped, since there is no checkpoint yet to go back to" in caplog.text


def test_a_fresh_start_in_the_same_folder_forgets_what_was_gone_back_from(base, corrupted):
    again = guarded(base, "limit", max_steps=2)
    again = dataclasses.replace(again, run=dataclasses.replace(again.run, resume="never", overwrite=True))
    assert RunFolder(base / "limit").rollbacks.exists()
    assert pretrain(again)["training"]["rollbacks"] == 0
    assert not RunFolder(base / "limit").rollbacks.exists()


def test_a_killed_run_has_the_statistics_that_it_had(base, corrupted):
    """Killed after step 8, with a checkpoint of step 6: without its history nothing at step 10 would be a spike."""
    guard = GuardConfig(**WINDOW)
    complete = pretrain(guarded(base, "complete", guard, max_steps=11))
    process = forked(
        lambda: (
            signalled_at(8, rank=0, number=signal.SIGKILL),
            pretrain(guarded(base, "parts", guard, max_steps=11)),
        )
    )
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    result = pretrain(guarded(base, "parts", guard, max_steps=11))
    assert result["run"]["resumed_from"] == 6
    assert result["training"]["spikes"] == complete["training"]["spikes"] == 1
    assert result["training"]["skipped_steps"] == 1
    same(final(base / "parts"), final(base / "complete"))


def test_the_guard_may_be_chosen_when_a_run_goes_on(base, corrupted):
    pretrain(config(base, "chosen", **{**LENGTH, "max_steps": 3}))
    result = pretrain(guarded(base, "chosen", GuardConfig(**WINDOW), max_steps=11))
    assert result["run"]["resumed_from"] == 3
    assert result["training"]["spikes"] == 1


PLAIN: dict[str, Any] = {"max_steps": 11, "model": {"extra": {}}}  # no dropout


def on_two_ranks(folder, name) -> Any:
    """A run that goes back, in the processes of a pool as in torchrun's; rank 1 alone has a bad batch."""
    warnings.simplefilter("default")  # the marks of the test do not reach the ranks
    rank = torch.distributed.get_rank()
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHDYNAMO_DISABLE": 1}
    step_at = CausalLM.training_step

    def training_step(self, batch, batch_idx):
        found = step_at(self, batch, batch_idx)
        bad = batch["position"] == 10 * BATCH and rank == 1
        return {**found, "loss": found["loss"] * 1000.0} if bad else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLM, "training_step", training_step)
        for key, value in launched.items():
            patch.setenv(key, str(value))
        result = pretrain(guarded(folder, name, strategy=STRATEGIES[name], **PLAIN))
    return result["training"]["rollbacks"], result["metrics"]["test/loss"], result["plan"]


@pytest.fixture(scope="module")
def alone(base, corrupted):
    """The loss of one process after the same: the bad batch is not on the way that was gone to the end."""
    return pretrain(guarded(base, "alone", **PLAIN))["metrics"]["test/loss"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_go_back_together(base, ranks, alone, name):
    one, two = ranks(2).run(on_two_ranks, base, name, timeout=250)
    assert one[:2] == two[:2]
    (entry,) = rollback.read(RunFolder(base / name))
    assert (one[0], entry["step"], entry["to"], entry["samples"]) == (1, 10, 6, [32, 40])
    assert one[1] == pytest.approx(alone, rel=1e-4)
    if name == "thinrank_ddp":  # the guard has norms sent along, and a plan knows it
        assert one[2]["planned"]["sent_bytes"] == pytest.approx(one[2]["measured"]["sent_bytes"])
    assert [step for step, _ in curves.series(curves.read(base / name), "train/loss")] == list(range(1, 12))


class TestConfig:
    def test_one_line_of_the_command_chooses(self):
        for schema in (PRETRAIN, FINETUNE):
            assert load(schema, []).config.guard == GuardConfig()
            found = load(schema, ["guard=zclip", "guard.threshold=3"]).config.guard
            assert (found.name, found.detector, found.action, found.threshold) == ("zclip", "zclip", "clip", 3.0)
        found = load(PRETRAIN, ["guard=rollback", "guard.rollback.skip=200", "guard.rollback.back=100"]).config.guard
        assert (found.action, found.rollback) == ("rollback", RollbackConfig(back=100, skip=200))

    @pytest.mark.parametrize(
        ("argv", "sentence"),
        [
            (["guard.detector=zscores"], r"^guard\.detector must be one of"),
            (["guard.action=hope"], r"^guard\.action must be one of"),
            (["guard.action=stop"], r"action=stop needs a detector of spikes"),
            (["guard=zscore", "guard.action=clip"], r"needs a norm to clip to, and detector=zscore"),
            (["guard=nonfinite", "guard.threshold=3"], r"means nothing to detector=nonfinite"),
            (["guard=zclip", "guard.warmup=1"], r"^guard\.warmup must be at least 2"),
            (["guard=rollback", "guard.rollback.skip=0"], r"^guard\.rollback\.skip must be at least 1"),
            (["guard=zscore", "trainer.in_backward=step", "optimizer=galore"], r"has stepped each weight before guard"),
            (["guard=rollback", "strategy=gossip"], r"judge its own steps, and guard\.action=rollback"),
            (["guard=stable", "strategy=thinrank_ddp"], r"needs whole gradients beside second moments"),
        ],
    )
    def test_mistakes_are_told(self, argv, sentence):
        with pytest.raises(ConfigError, match=sentence):
            load(PRETRAIN, argv)

    def test_samples_to_leave_out_are_whole_batches(self):
        from thinrank.trainers.data import PySourceConfig

        data = TextData(PySourceConfig(), batch_size=4)
        with pytest.raises(ValueError, match="must be whole batches of 4, got 3 to 8"):
            data.leave_out([(3, 8)])
        data.leave_out([(8, 12), (0, 4)])
        assert data.next == 4
