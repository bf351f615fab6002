"""`strategy=thinrank_zero1|2|3` in whole runs, and `Trainer(strategy="thinrank_zero2")` around a user's own module."""

import json
import math
import os
import subprocess
import sys

import pytest
import tiny_replicas
import tiny_zero
import torch
from test_pretrain import final, same
from tiny_pretrain import config, losses, write_corpus

from thinrank.configs.load import load
from thinrank.configs.schema import PRETRAIN
from thinrank.trainers import UserError, ZeroStrategy
from thinrank.trainers.checkpoint import load as load_checkpoint
from thinrank.trainers.pretrain import pretrain

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tiny_zero.__file__, str(folder)], capture_output=True, text=True, timeout=580, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_process(base):
    """Accumulated, clipped, validated and measured alike under all three stages."""
    pretrain(config(base, "alone", optimizer=tiny_zero.GALORE, **tiny_zero.PARTS))
    tags = {"train/loss": 1e-5, "grad_norm": 1e-4, "val/loss": 1e-5, "lowrank/captured_energy": 1e-4}
    for stage in (1, 2, 3):
        for tag, bound in tags.items():
            one, two = losses(base / "alone", tag), losses(base / f"galore {stage}", tag)
            assert one.keys() == two.keys()
            assert two == {step: pytest.approx(value, rel=bound) for step, value in one.items()}, (stage, tag)
        one, two = (json.loads((base / n / "report.json").read_text()) for n in ("alone", f"galore {stage}"))
        assert two["metrics"] == {key: pytest.approx(value, rel=1e-5) for key, value in one["metrics"].items()}
        held, predicted = two["optimizer_state"], one["optimizer_state"]["predicted_bytes"]
        counts = 4 * len(two["routing"])  # of steps, on both ranks
        bases = sum(row["bases_bytes"] for row in two["routing"]) if stage == 3 else 0  # whole where rows are cut
        assert predicted <= held["measured_bytes"] <= predicted + counts + bases
        assert held["most_on_a_rank_bytes"] < 0.6 * predicted
        assert final(base / f"galore {stage}").keys() == final(base / "alone").keys()
    norms = losses(base / "alone", "grad_norm")
    assert max(norms.values()) > 0.5  # it did clip


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_bfloat16_trains_nearly_the_same(base):
    one, two = losses(base / "galore 2"), losses(base / "half")
    assert two == {step: pytest.approx(value, abs=0.05) for step, value in one.items()}
    saved = load_checkpoint(base / "half" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.dtype is torch.float32 for value in saved.values())


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_preempted_run_goes_on_to_the_bit(base, stage):
    ended, *_ = json.loads((base / "result.json").read_text())
    first, second = ended[(stage - 2) * 2 : (stage - 1) * 2]
    assert (first["state"], second["state"], second["resumed_from"]) == ("preempted", "finished", 7)
    same(final(base / f"parts {stage}"), final(base / f"whole {stage}"))


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_gradient_that_is_no_number_is_skipped_by_all(base):
    *_, skipped = json.loads((base / "result.json").read_text())
    assert [each["skipped_steps"] for each in skipped] == [1, 1]
    for stage in (2, 3):
        norms, saved = losses(base / f"skips {stage}", "grad_norm"), final(base / f"skips {stage}")["state_dict"]
        assert [step for step in range(1, 7) if not math.isfinite(norms[step])] == [4]
        assert all(value.isfinite().all() for value in saved.values())


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_run_moves_between_strategies(base):
    """ZeRO-1, ZeRO-3 and DDP on two ranks, then one process: the losses of a run that never moved."""
    with pytest.warns(UserWarning, match="goes on with 1"):
        pretrain(config(base, "moves", **tiny_zero.MOVES))
    for steps in (3, 6, 9, 12):  # rates are those of a run so long
        pretrain(config(base, "stays", **{**tiny_zero.MOVES, "max_steps": steps}))
    one, two = curve(base / "stays"), curve(base / "moves")
    assert two == {step: pytest.approx(value, abs=1e-5) for step, value in one.items()}
    assert sorted(two) == list(range(1, 13))


def curve(folder):
    """Losses by the run's own file: TensorBoard takes event files of one second in the order of their names."""
    lines = map(json.loads, (folder / "curves.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_module_that_knows_nothing_of_zero(base):
    """Accumulation, and clipping by the Trainer."""
    alone = tiny_replicas.fit(tiny_replicas.own, accumulate=2, gradient_clip_val=0.1).state_dict()
    by_name = torch.load(base / "own.pt", weights_only=True)
    assert sorted(by_name) == [1, 2, 3]
    for found in by_name.values():
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_what_it_cannot_do_is_refused(base):
    _, said, _ = json.loads((base / "result.json").read_text())
    assert "configure_optimizers gave AdamW: return thinrank.optim.build(self, config)" in said["other optimizer"]
    assert "use gradient_clip_algorithm='norm'" in said["by value"]
    assert "use '32-true', 'bf16-mixed', 'bf16-true'" in said["half"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["trainer.in_backward=project", "optimizer=galore"], "leave in_backward out"),
        (["optimizer=galore", "optimizer.rank_allocation=gradient"], "use optimizer.rank_allocation=weight"),
        (["trainer.precision=16-mixed"], "use bf16-mixed, bf16-true or 32-true"),
        (["strategy.bucket=0"], "bucket must be at least 1 entry"),
        (["strategy.check_every=0"], "use null for never"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_configurations_that_cannot_work_are_refused(arguments, remedy):
    with pytest.raises(Exception, match=remedy.replace(".", r"\.")) as caught:
        load(PRETRAIN, ["strategy=thinrank_zero2", *arguments])
    assert type(caught.value).__name__ == "ConfigError"


@pytest.mark.parametrize(
    "asked",
    [
        {"offload_optimizer": {"device": "cpu"}},
        {"offload_param": {"device": "nvme", "nvme_path": "/nvme"}},
        {"cpu_offload": True},
        {"cpu_offload_param": True},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_offload_is_refused_at_construction(asked):
    with pytest.raises(UserError, match=rf"offload is not supported, because .* leave .*{next(iter(asked))}") as caught:
        ZeroStrategy(3, config={"zero_optimization": asked})
    assert "zero_force_ds_cpu_optimizer" not in str(caught.value)


def test_no_offload_is_none():
    none = {"offload_optimizer": {"device": "none"}, "offload_param": {}, "cpu_offload": False}
    config = ZeroStrategy(3, config={"zero_optimization": none}).config
    assert config is not None
    assert config["zero_optimization"]["stage"] == 3


def test_options_that_lightning_would_ignore_are_refused():
    with pytest.raises(UserError, match=r"offload_optimizer is none of ZeroStrategy's options.* without offload"):
        ZeroStrategy(offload_optimizer=True)


def test_strategies_are_known_by_name():
    code = (
        "import thinrank.trainers, lightning.pytorch as pl\n"
        "for stage in (1, 2, 3):\n"
        "    trainer = pl.Trainer(strategy=f'thinrank_zero{stage}', accelerator='cpu', devices=1, logger=False, "
        "enable_checkpointing=False)\n"
        "    print(type(trainer.strategy).__name__, trainer.strategy.config['zero_optimization']['stage'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.stdout.split("\n")[-4:-1] == [f"ZeroStrategy {stage}" for stage in (1, 2, 3)], done.stderr[-2000:]


def test_a_run_alone_leaves_no_trace_in_the_environment(tmp_path):
    """DeepSpeed would leave the variables of a launcher behind, which a later run in this process would misread."""
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    script = (
        "import os, sys; from tiny_pretrain import config; from tiny_zero import GALORE, zero\n"
        "from thinrank.trainers.pretrain import pretrain\n"
        "report = pretrain(config(sys.argv[1], 'run', optimizer=GALORE, strategy=zero(3), export=True))\n"
        "pretrain(config(sys.argv[1], 'other', optimizer=GALORE))\n"
        "assert not {'RANK', 'WORLD_SIZE'} & set(os.environ)\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(os.path.join(sys.argv[1], 'run', 'export'))\n"
        "print(report['run']['state'])"
    )
    path = os.pathsep.join([os.path.dirname(tiny_zero.__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("finished")
