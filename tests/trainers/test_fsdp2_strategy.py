"""`strategy=thinrank_fsdp2` in whole runs, and `Trainer(strategy="thinrank_fsdp2")` around users' own modules."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_finetune
import tiny_pieces
import torch
from test_pretrain import final, same
from tiny_pretrain import config, losses, signalled_at
from tiny_training import TINY, VOCAB, PoolEnvironment, TinyData, rows, tiny_module, tiny_trainer

from thinrank.configs.load import load
from thinrank.configs.schema import PRETRAIN
from thinrank.optim import MuonConfig
from thinrank.trainers import FSDP2Config, FSDP2Strategy, UserError
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.models import build_model
from thinrank.trainers.pretrain import Plan, pretrain
from thinrank.trainers.strategies import World
from thinrank.trainers.strategies.units import blocks, network

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALONE = {**tiny_pieces.PARTS, "optimizer": tiny_pieces.GALORE, "model": {"extra": {}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    tiny_finetune.write_all(folder)
    undo = signalled_at(3, rank=0)
    pretrain(config(folder, "back", **tiny_pieces.RELAY))
    undo()
    done = subprocess.run(
        [*COMMAND, tiny_pieces.__file__, str(folder)], capture_output=True, text=True, timeout=400, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (folder / "stdout").write_text(done.stdout)
    return folder


def weights(folder):
    return ckpt.load(folder / "checkpoints" / "last.ckpt")["state_dict"]


def apart(found, expected):
    """The largest difference of a tensor, by its norm, in units of the tensor's own."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


@pytest.fixture(scope="module")
def alone(base):
    pretrain(config(base, "alone", **ALONE))
    return base / "alone"


@pytest.mark.timeout(450)
@pytest.mark.slow
def test_two_ranks_are_one_process(base, alone):
    """Two micro-batches on each rank, clipping, renewals: losses, norms, captured energy, weights, final validation."""
    for tag in ("train/loss", "grad_norm", "lowrank/captured_energy", "opt/update_rms/matrix/galore"):
        one, two = losses(alone, tag), losses(base / "galore", tag)
        assert sorted(one) == sorted(two) == list(range(1, 21))
        for step, value in one.items():
            assert two[step] == pytest.approx(value, rel=1e-5), (tag, step)
    assert losses(alone)[20] < losses(alone)[1] - 0.1
    assert max(losses(alone, "grad_norm").values()) > 1  # so it was clipped
    assert apart(weights(base / "galore"), weights(alone)) <= 2e-6
    metrics = json.loads((base / "result.json").read_text())[1]["galore"]["metrics"]
    assert metrics["test/loss"] == pytest.approx(losses(alone, "test/loss")[20], rel=1e-5)


@pytest.mark.timeout(450)
@pytest.mark.slow
def test_the_export_is_the_model_and_the_report_tells_of_all_ranks(base):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base / "galore" / "export")
    same(dict(model.state_dict()), {k.removeprefix("model."): v for k, v in weights(base / "galore").items()})
    report = json.loads((base / "galore" / "report.json").read_text())
    assert report["sample"]["text"]
    state, sent = report["optimizer_state"], report["training"]["communication"]
    least, most = state["least_on_a_rank_bytes"], state["most_on_a_rank_bytes"]
    # bases of matrices that are stepped by rows, and counts of steps, are on both
    twice = sum(row["bases_bytes"] for row in report["routing"]) + 4 * len(report["routing"])
    assert state["predicted_bytes"] <= least + most == state["measured_bytes"] <= state["predicted_bytes"] + twice
    assert most < 0.6 * state["measured_bytes"]
    # of a matrix that is cut along its short side half lies on its owner; the other half goes there and comes back
    matrices = [row for row in report["routing"] if row["role"] == "matrix"]
    short = sum(row["elements"] for row in matrices if row["shape"][0] < row["shape"][1])
    assert sent["gradients"] == sent["updates"] == 4 * short / 2 / 2 > 0
    assert 0 < sent["sums"] < 4 * (sum(row["elements"] for row in matrices) - short) / 2  # less than the gradients
    assert "sent for a step by each rank, in the mean" in (base / "galore" / "report.md").read_text()
    assert losses(base / "galore", "comm/updates(MiB)")[20] > 0
    assert "exchange    rows of weights and gradients among 2 ranks; sums for matrices" in (base / "stdout").read_text()


@pytest.mark.timeout(450)
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_learns_as_in_one_process(base, precision):
    pretrain(config(base, f"alone {precision}", precision=precision, **ALONE))
    one, two = losses(base / f"alone {precision}"), losses(base / precision)
    for step, value in one.items():
        assert two[step] == pytest.approx(value, rel=1e-2), step
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {value.dtype for value in weights(base / precision).values()} == {dtype}


@pytest.mark.timeout(450)
@pytest.mark.slow
def test_a_preempted_run_goes_on_to_the_bit(base):
    states, facts, _ = json.loads((base / "result.json").read_text())
    assert states == ["preempted"] * 4
    assert facts["parts"]["run"]["resumed_from"] == 7
    same(final(base / "parts"), final(base / "whole"))


@pytest.mark.timeout(450)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the checkpoint of step .* goes on with:UserWarning")
def test_a_run_goes_on_under_any_strategy(base):
    """From two ranks to one process; and from one process to shards, to replicas, and to shards again."""
    pretrain(config(base, "unbroken", **tiny_pieces.RELAY))
    expected = weights(base / "unbroken")
    shutil.copytree(base / "there", base / "went on")
    report = pretrain(config(base, "went on", **tiny_pieces.RELAY))
    assert report["run"]["resumed_from"] == 6
    assert apart(weights(base / "went on"), expected) <= 2e-6
    starts = [json.loads(line) for line in (base / "back" / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["world"]) for line in starts if line["event"] == "start"] == [
        (0, 1), (3, 2), (6, 2), (9, 2)
    ]  # fmt: skip
    assert apart(weights(base / "back"), expected) <= 2e-6


@pytest.mark.timeout(450)
@pytest.mark.slow
def test_an_adapter_is_tuned_beside_a_frozen_model_in_pieces(base):
    from thinrank.trainers.adapters import LoraConfig
    from thinrank.trainers.finetune import finetune

    one = finetune(tiny_finetune.config(base, "lora alone", adapter=LoraConfig(rank=2)))
    two = json.loads((base / "result.json").read_text())[1]["lora"]
    for key in ("before/loss", "val/best_loss"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-2)  # dropout draws otherwise
    assert two["metrics"]["before/loss"] == pytest.approx(one["metrics"]["before/loss"], rel=1e-5)
    for name in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        assert (base / "lora" / name).is_file()


@pytest.mark.timeout(450)
@pytest.mark.slow
@pytest.mark.parametrize("name", list(tiny_pieces.OWN))
def test_modules_that_know_nothing_of_it(base, name):
    found = torch.load(base / "own.pt", weights_only=True)[name]
    cls, optimizer, settings = tiny_pieces.OWN[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_pieces, "OWN", {name: (cls, optimizer, settings)})
        expected = tiny_pieces.own_runs(devices=1)[name]
    assert found.pop("skipped") == expected.pop("skipped") == ("burst" in name)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(450)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("64-true", "thinrank_fsdp2 computes in 32-true, bf16-mixed, bf16-true, got precision='64-true'"),
        ("replicas", "replicas must divide the 2 processes, got 3: use 1"),
        ("shared", "blocks.0.0.weight and blocks.1.0.weight are one parameter in two blocks"),
        ("scalar", "gain has no dimension that could be cut: give it the shape (1,)"),
        ("frozen", "the model has no trainable parameter: unfreeze one"),
        ("meta", "was made on the meta device: make it on the CPU"),
        ("ranks", "share them out by weights before the model is sharded"),
    ],
)
def test_what_it_cannot_do_is_refused(base, case, sentence):
    assert sentence in json.loads((base / "result.json").read_text())[2][case]


# --- replicas of shards


def train(strategy, rank=0, world=1):
    module = tiny_module(optimizer=MuonConfig(lr=0.02), clip_norm=0.5)
    data = TinyData(rows(24), batch_size=8, rank=rank, world=world)
    trainer = tiny_trainer(3, strategy=strategy, devices=world)
    trainer.fit(module, data)
    assert data.advanced == [8, 16, 24]
    return trainer.strategy.lightning_module_state_dict()


def four():
    import torch.distributed as dist

    strategy = FSDP2Strategy(replicas=2, process_group_backend="gloo")
    strategy.cluster_environment = PoolEnvironment()
    found = train(strategy, dist.get_rank(), 4)
    return found, strategy.device_mesh.shape, strategy.distributed_sampler_kwargs


@pytest.mark.timeout(240)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_two_replicas_of_two_shards_are_one_process(ranks):
    answers = ranks(4).run(quiet, timeout=200)
    assert [shape for _, shape, _ in answers] == [(2, 2)] * 4
    assert [sampler["rank"] for *_, sampler in answers] == [0, 1, 2, 3]
    assert [bool(found) for found, *_ in answers] == [True, False, False, False]
    assert apart(answers[0][0], train("auto")) <= 2e-6


def quiet():
    import warnings

    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # the logits are a view of what the last product gives; nothing writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return four()


# --- what needs no ranks


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["trainer.in_backward=project", "optimizer=galore"], "leave in_backward out"),
        (["optimizer=galore", "optimizer.rank_allocation=gradient"], "leave it out, or use strategy=ddp"),
        (["optimizer=galore", "optimizer.rank_allocation=weight"], "leave it out, or use strategy=ddp"),
        (["trainer.precision=16-mixed"], "got trainer.precision=16-mixed: use one of them"),
        (["strategy.replicas=0"], "leave it out for one group"),
        (["strategy.reshard_after_forward=2"], "reshard_after_forward must be true or false"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_configurations_that_cannot_work_are_refused(arguments, remedy):
    with pytest.raises(Exception, match=remedy.replace(".", r"\.")) as caught:
        load(PRETRAIN, ["strategy=thinrank_fsdp2", *arguments])
    assert type(caught.value).__name__ == "ConfigError"


def test_replicas_that_the_processes_cannot_be_divided_into_are_refused(tmp_path):
    chosen = config(tmp_path, "run", strategy=FSDP2Config(replicas=3))
    with pytest.raises(UserError, match=r"strategy\.replicas must divide the 4 processes, got 3: leave it out"):
        Plan.of(chosen, World(size=4, local_size=4))


def test_a_dry_run_says_what_a_rank_holds():
    arguments = ["strategy=thinrank_fsdp2", "trainer.devices=2", "model=2m", "trainer.accelerator=cpu"]
    launch = Path(__file__).parents[2] / "launch" / "pretrain.py"
    done = subprocess.run(
        [sys.executable, str(launch), "--dry-run", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "MiB on each of 2 ranks" in done.stdout


def test_the_strategy_is_known_by_name():
    code = (
        "import thinrank.trainers, lightning.pytorch as pl; "
        "trainer = pl.Trainer(strategy='thinrank_fsdp2', accelerator='cpu', devices=1, logger=False, "
        "enable_checkpointing=False); print(type(trainer.strategy).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("FSDP2Strategy"), done.stderr[-2000:]


def test_settings_of_the_strategy_are_those_of_its_configuration():
    with pytest.raises(UserError, match="replicas must be a whole number of groups, at least 1, got 0"):
        FSDP2Strategy(replicas=0)
    names = {field.name for field in dataclasses.fields(FSDP2Config)}
    assert {"replicas", "reshard_after_forward"} <= names


def test_blocks_are_found_as_transformers_names_them_or_in_the_largest_list():
    model = build_model(TINY, VOCAB, seed=0)
    assert blocks(model) == list(model.model.layers)[::-1]
    module = tiny_pieces.InBlocks(None)
    assert network(module) is module.net
    assert blocks(module.net) == list(module.net.blocks)[::-1]
    several = tiny_pieces.Several(None)
    assert network(several) is several
    assert blocks(tiny_pieces.Own(None).net) == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_on_a_gpu():
    """Over NCCL, a validation in the middle and a checkpoint's weights included."""

    def trained(strategy):
        module = tiny_module(optimizer=MuonConfig(lr=0.02), clip_norm=0.5)
        trainer = tiny_trainer(3, strategy=strategy, accelerator="gpu", limit_val_batches=1, val_check_interval=2)
        trainer.fit(module, TinyData(rows(24), batch_size=8))
        return {name: value.cpu() for name, value in trainer.strategy.lightning_module_state_dict().items()}

    assert apart(trained("thinrank_fsdp2"), trained("auto")) <= 1e-4
