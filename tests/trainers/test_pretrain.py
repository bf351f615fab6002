"""Whole runs: what they leave, how they go on after any end, and that two ranks equal one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pretrain
import torch
import yaml
from tiny_pretrain import config, losses, signalled_at, write_corpus
from tiny_run import forked, read, same

from thinrank.optim import AdamWConfig, DCTAdamWConfig, GaLoreConfig, SubspaceAdamWConfig
from thinrank.optim.linalg import products
from thinrank.trainers import assembly, curves
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.errors import GuardStop, UserError
from thinrank.trainers.pretrain import Plan, PretrainConfig, TrainerConfig, parse_duration, pretrain
from thinrank.trainers.run import RunFolder
from thinrank.trainers.strategies import StrategyConfig, World

pytestmark = [
    # Lightning 2.6 asks torch 2.13 in a deprecated way whether a batch is nested; nothing of ours can change that.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a corpus, and a cache that all runs share."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    return folder


def final(folder):
    """The newest checkpoint of a run, without what differs between any two runs."""
    state = ckpt.load(ckpt.newest(folder / "checkpoints"))  # pyright: ignore[reportArgumentType]
    del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]  # counts validations again when it goes on
    for callback in state["callbacks"].values():
        callback.pop("seconds", None)
    return state


@pytest.mark.parametrize(
    "optimizer",
    [AdamWConfig(lr=0.01), GaLoreConfig(rank=4), DCTAdamWConfig(rank=4), SubspaceAdamWConfig(rank=4)],
    ids=lambda method: method.name,
)
def test_a_run_leaves_what_it_promises(base, optimizer, capsys):
    chosen = config(base, f"method-{optimizer.name}", optimizer=optimizer, export=True)
    result = pretrain(chosen)
    folder = base / f"method-{optimizer.name}"
    assert (result["run"]["state"], result["run"]["exit_code"]) == ("finished", 0)
    assert result["optimizer_state"]["predicted_bytes"] == result["optimizer_state"]["measured_bytes"] > 0
    assert result["training"]["tokens"] == 6 * 4 * 16
    assert result["metrics"]["test/loss"] > 0
    assert len(result["data"]["manifest_hash"]) >= 16
    assert {row["role"] for row in result["routing"]} == {"matrix", "embedding", "head", "vector"}
    assert read(folder / "report.json")["metrics"] == result["metrics"]
    assert "Which rule steps which parameter" in (folder / "report.md").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["name"] == optimizer.name
    assert read(folder / "status.json")["state"] == "finished"
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert ckpt.newest(folder / "checkpoints") == folder / "checkpoints" / ckpt.checkpoint_name(6)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    weights = ckpt.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    same(dict(model.state_dict()), {key.removeprefix("model."): value for key, value in weights.items()})
    assert AutoTokenizer.from_pretrained(folder / "export").decode([100, 101]) == "de"
    shown = capsys.readouterr().out
    for text in ("validation loss", "perplexity", "bits per byte", "sample:\ndef ", "matrix", str(folder)):
        assert text in shown, text


@pytest.fixture(scope="module")
def whole(base):
    """A run that nothing interrupts."""
    pretrain(config(base, "whole", **LONG))
    return final(base / "whole")


LONG = {"max_steps": 60, "checkpoint_every": 10, "validate_every": 15, "tensorboard": False, "batch_size": 2}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGKILL"])
def test_whatever_ends_a_run_it_goes_on_bit_for_bit(base, whole, name):
    """Another process is signalled at no particular step; `resume=auto` then reaches the end of the uninterrupted run:
    weights, optimizer state, schedule, position, random state, all equal."""
    chosen, folder = config(base, name, **LONG), base / name

    def child():
        os._exit(pretrain(chosen)["run"]["exit_code"])

    process = forked(child)
    deadline = time.monotonic() + 60
    while not list((folder / "checkpoints").glob("step-*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process, signal.Signals[name])
    status = os.waitpid(process, 0)[1]
    newest = ckpt.newest(folder / "checkpoints")
    assert newest is not None
    step = ckpt.step_of(newest)
    assert step is not None
    assert step < 60, "the run was over before the signal: the test shows nothing"
    if name == "SIGKILL":
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert read(folder / "status.json")["state"] == "running"
    else:
        assert os.WEXITSTATUS(status) == 75
        marker = read(folder / "preempted")
        assert (marker["signal"], marker["step"], marker["checkpoint"]) == (name, step, str(newest))
        assert read(folder / "status.json")["exit_code"] == 75
        assert read(folder / "report.json")["run"]["stopped_by"] == name
    result = pretrain(chosen)
    assert result["run"]["resumed_from"] == step
    assert result["run"]["restarts"] == 1
    assert result["training"]["tokens"] == 60 * 2 * 16
    assert [step for step, _ in curves.series(curves.read(folder), "time/step")] == list(range(1, 61))
    assert result["training"]["step_seconds_median"] > 0
    assert 0 < result["metrics"]["lowrank/captured_energy"] <= 1.0 + 1e-5
    assert not (folder / "preempted").exists()
    same(final(folder), whole)


def test_killed_before_the_first_checkpoint_it_starts_again(base):
    chosen = config(base, "early", tensorboard=False)
    undo = signalled_at(2, rank=0, number=signal.SIGKILL)
    process = forked(lambda: pretrain(chosen))
    undo()
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    result = pretrain(chosen)
    assert (result["run"]["resumed_from"], result["run"]["restarts"]) == (None, 1)
    assert result["run"]["state"] == "finished"


def test_events_of_all_starts_lie_in_one_place_and_none_counts_twice(base):
    chosen = config(base, "events", max_steps=8, checkpoint_every=3)
    undo = signalled_at(5, rank=0, number=signal.SIGKILL)
    process = forked(lambda: pretrain(chosen))
    undo()
    os.waitpid(process, 0)
    pretrain(chosen)
    assert sorted(losses(base / "events")) == [1, 2, 3, 4, 5, 6, 7, 8]
    lines = curves.read(base / "events")
    assert [step for step, _ in curves.series(lines, "train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert dict(curves.series(lines, "train/loss")) == pytest.approx(losses(base / "events"))
    assert [step for step, _ in curves.series(lines, "val/loss")] == [4, 8]


def test_a_finished_run_can_be_reported_again_and_lengthened(base):
    short = config(base, "longer", max_steps=4, tensorboard=False)
    first = pretrain(short)
    again = pretrain(short)
    assert again["metrics"] == first["metrics"]
    assert [step for step, _ in curves.series(curves.read(base / "longer"), "train/loss")] == [1, 2, 3, 4]
    assert again["training"]["tokens"] == first["training"]["tokens"]
    longer = pretrain(config(base, "longer", max_steps=6, validate_every=2, tensorboard=False))
    assert (longer["run"]["resumed_from"], longer["training"]["steps"]) == (4, 6)


def test_another_method_or_model_in_the_same_folder_is_refused(base):
    pretrain(config(base, "taken", max_steps=2, tensorboard=False))
    before = {
        path: path.read_bytes() for path in (base / "taken").rglob("*") if path.is_file() and path.name != ".lock"
    }
    with pytest.raises(UserError, match=r"another configuration: .*optimizer.name \(galore → adamw\).*another run.dir"):
        pretrain(config(base, "taken", optimizer=AdamWConfig()))
    with pytest.raises(UserError, match=r"model.hidden_size \(16 → 32\)"):
        pretrain(config(base, "taken", model={"hidden_size": 32}))
    for path, content in before.items():
        assert path.read_bytes() == content
    started_over = config(
        base, "taken", optimizer=AdamWConfig(), run={"resume": "never", "overwrite": True}, max_steps=2
    )
    assert pretrain(started_over)["run"]["restarts"] == 0


def test_other_text_under_the_same_configuration_is_refused_and_costs_nothing(base, tmp_path):
    shutil.copytree(base / "corpus", tmp_path / "corpus")
    pretrain(config(tmp_path, "run", max_steps=4, tensorboard=False))
    saved = ckpt.newest(tmp_path / "run" / "checkpoints")
    text = (tmp_path / "corpus" / "3.txt").read_text()
    (tmp_path / "corpus" / "3.txt").write_text(text + " more")
    longer = config(tmp_path, "run", max_steps=6, tensorboard=False)
    with pytest.raises(UserError, match="made with other data"):
        pretrain(longer)
    assert ckpt.newest(tmp_path / "run" / "checkpoints") == saved
    (tmp_path / "corpus" / "3.txt").write_text(text)
    assert pretrain(longer)["run"]["resumed_from"] == 4


@pytest.mark.parametrize(("pays", "precision"), [(True, "32-true"), (False, "32-true"), (True, "bf16-mixed")])
def test_a_cpu_run_in_float32_takes_the_faster_library_and_puts_it_back(base, monkeypatch, pays, precision):
    setting, seen = torch.backends.mkldnn.matmul, []
    before = setting.fp32_precision

    def train(parts):
        seen.append(setting.fp32_precision)
        raise KeyboardInterrupt

    monkeypatch.setattr(products, "pays", lambda: pays)
    monkeypatch.setattr(assembly, "_train", train)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(base, f"products-{pays}-{precision}", precision=precision))
    assert seen == ["bf16" if pays and precision == "32-true" else before]
    assert setting.fp32_precision == before


def test_errors_before_the_start_leave_nothing(base, monkeypatch):
    with pytest.raises(UserError, match="matches no"):
        pretrain(config(base, "none", data={"train": [str(base / "nothing" / "*.txt")]}))
    with pytest.raises(UserError, match=r"optimizer.targets: .*q_prj"):
        pretrain(config(base, "none", optimizer=GaLoreConfig(rank=4, targets=["q_prj"])))
    (base / "file").write_text("")
    with pytest.raises(UserError, match=r"set run.dir to a folder that can"):
        pretrain(config(base, "file"))
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0.00 GiB free, but 3 checkpoints .*: free some space or set run.dir"):
        pretrain(config(base, "none"))
    assert not (base / "none").exists()


def test_a_folder_in_use_is_refused(base):
    owner = RunFolder(base / "owned")
    owner.open()
    with pytest.raises(UserError, match="in use by process"):
        pretrain(config(base, "owned"))
    assert (base / "owned" / ".lock").exists()
    owner.close()


def test_a_guard_that_stops_is_recorded(base):
    hopeless = config(base, "guard", optimizer=AdamWConfig(lr=1e30), clip_norm=None, max_steps=30, nonfinite_limit=2)
    with pytest.raises(GuardStop, match="not finite 2 times in a row"):
        pretrain(hopeless)
    assert (read(base / "guard" / "status.json")["state"], read(base / "guard" / "status.json")["exit_code"]) == (
        "failed",
        76,
    )
    assert RunFolder(base / "guard").history()[-1]["state"] == "failed"


def test_max_time_ends_a_run_as_finished(base):
    result = pretrain(
        config(base, "time", max_steps=100_000, max_time="1s", validate_every=0, tensorboard=False, log_every=500)
    )
    assert (result["run"]["state"], result["run"]["stopped_by"]) == ("finished", "max_time")
    step = result["training"]["steps"]
    assert 0 < step < 100_000
    assert ckpt.newest(base / "time" / "checkpoints") == base / "time" / "checkpoints" / ckpt.checkpoint_name(step)
    assert "val/best_loss" not in result["metrics"]
    assert result["metrics"]["test/loss"] > 0


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_two_ranks_equal_one_and_resume_bit_for_bit(base, tmp_path):
    shutil.copytree(base / "corpus", tmp_path / "corpus")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tiny_pretrain.__file__, str(tmp_path)], capture_output=True, text=True, timeout=180, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("preempted by SIGTERM") == 1

    pretrain(config(tmp_path, "single", model={"extra": {}}, max_steps=20, batch_size=8))
    one, two = losses(tmp_path / "single"), losses(tmp_path / "plain")
    assert sorted(one) == sorted(two) == list(range(1, 21))
    for step, value in one.items():
        assert two[step] == pytest.approx(value, abs=1e-5), step
    assert one[20] < one[1] - 0.1

    first, second = json.loads((tmp_path / "result.json").read_text())
    assert (first["state"], first["stopped_by"], second["state"], second["resumed_from"]) == (
        "preempted",
        "SIGTERM",
        "finished",
        7,
    )
    same(final(tmp_path / "parts"), final(tmp_path / "whole"))

    # and on one rank: said once, same data
    shutil.copytree(tmp_path / "plain", tmp_path / "fewer")
    with pytest.warns(UserWarning, match=r"is of 2 rank\(s\) .* not bit for bit the same"):
        result = pretrain(config(tmp_path, "fewer", model={"extra": {}}, max_steps=22, batch_size=8))
    assert result["training"]["tokens"] == 22 * 8 * 16


def test_plan_divides_the_batch():
    trainer = TrainerConfig(batch_size=24, micro_batch_size=3, max_steps=10)
    plan = Plan.of(PretrainConfig(trainer=trainer), World(size=4, local_size=4))
    assert (plan.accumulate, plan.micro_batch, plan.steps, plan.tokens_per_step) == (2, 3, 10, 24 * 256)
    tokens = Plan.of(PretrainConfig(trainer=replace(trainer, max_tokens=24 * 256 * 3 + 1)), World(size=4, local_size=4))
    assert tokens.steps == 4
    whole = Plan.of(PretrainConfig(trainer=TrainerConfig(max_steps=None, max_tokens=1)), World())
    assert (whole.steps, whole.accumulate) == (1, 1)


@pytest.mark.parametrize(
    ("trainer", "world", "sentence"),
    [
        ({"batch_size": 16}, World(size=3, local_size=3), "multiple of the 3 processes, got 16: set it to 15 or 18"),
        ({"batch_size": 2}, World(size=3, local_size=3), "got 2: set it to 3$"),
        ({"micro_batch_size": 3}, World(), "must divide the 16 sequences .*, got 3: set it to a divisor of 16"),
        ({"devices": 2}, World(), "start it with torchrun --standalone --nproc-per-node 2"),
        ({"num_nodes": 2}, World(), "torchrun --nnodes 2"),
        ({"devices": 4}, World(size=2, local_size=2), "trainer.devices must be what torchrun started, 2, got 4"),
        ({"num_nodes": 1}, World(size=4, local_size=2), "trainer.num_nodes must be what torchrun started, 2, got 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(trainer, world, sentence):
    with pytest.raises(UserError, match=sentence):
        Plan.of(PretrainConfig(trainer=TrainerConfig(**trainer)), world)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentences are about machines without a GPU")
@pytest.mark.parametrize("trainer", [{"accelerator": "gpu"}, {"accelerator": "cpu", "precision": "16-mixed"}])
def test_what_needs_a_gpu_is_refused_without_one(base, trainer):
    with pytest.raises(UserError, match=r"needs a (CUDA device|GPU)"):
        pretrain(config(base, "none", **trainer))
    assert not (base / "none").exists()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_steps": None}, "max_steps must be given"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"validate_every": -1}, "validate_every must be at least 0"),
        ({"devices": "two"}, "devices must be auto or at least 1, got 'two'"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"precision": "fp8"}, "precision must be one of auto, 32-true, .*got 'fp8'"),
        ({"accelerator": "tpu"}, "accelerator must be one of auto"),
        ({"max_time": "soon"}, "max_time must be a duration, but 'soon' is no duration: write it as"),
    ],
)
def test_bad_trainer_values_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainerConfig(**values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "zero"}, "name must be one of auto, ddp, got 'zero'"),
        ({"name": "thinrank_ddp"}, "or another strategy by strategy=NAME"),
        ({"backend": "mpi"}, "backend must be one of auto, gloo, nccl"),
        ({"timeout": 0}, "timeout must be above 0 seconds"),
    ],
)
def test_bad_strategy_values_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        StrategyConfig(**values)


def test_a_row_longer_than_the_model_is_refused(base):
    with pytest.raises(
        ValueError, match=r"data.sequence_length must be at most model.max_position_embeddings \(8\), got 16"
    ):
        config(base, "none", model={"max_position_embeddings": 8})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("1.5h", 5400), ("2d", 172_800), ("1:30:00", 5400), ("5:00", 300)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "1:2:3:4", "0s", "-5m", "1:5"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match=r"is no duration: write it as|is no time at all"):
        parse_duration(text)


def test_world_from_the_environment(monkeypatch):
    assert World.from_environment() == World()
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank, world.nodes, world.main) == (5, 8, 1, 2, False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(UserError, match="did not set LOCAL_WORLD_SIZE: start the processes with torchrun"):
        World.from_environment()


def test_every_field_is_explained():
    from dataclasses import fields, is_dataclass

    def check(cls):
        for item in fields(cls):
            assert item.metadata.get("help"), f"{cls.__name__}.{item.name}"
            value = item.default_factory() if callable(item.default_factory) else item.default
            if is_dataclass(value) and not isinstance(value, type):
                check(type(value))

    check(PretrainConfig)


def test_reading_a_configuration_is_cheap_for_the_public_names():
    from thinrank import trainers

    for name in trainers.__all__:
        assert getattr(trainers, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trainers.nothing  # noqa: B018
    assert Path(trainers.__file__).name == "__init__.py"
