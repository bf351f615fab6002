"""`strategy=thinrank_fsdp2` in whole runs, and `Trainer(strategy="thinrank_fsdp2")` around users' own modules."""

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_finetune
import tiny_pieces
import torch
from test_pretrain import final, same
from tiny_pretrain import config, losses, signalled_at
from tiny_training import TINY, VOCAB, PoolEnvironment, TinyData, adamw, rows, tiny_model, tiny_module, tiny_trainer

from thinrank.configs.load import load
from thinrank.configs.schema import PRETRAIN
from thinrank.optim import AdamWConfig, GaLoreConfig, MuonConfig
from thinrank.trainers import FSDP2Config, FSDP2Strategy, NonFiniteGuard, UserError
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.introduction import _exchange
from thinrank.trainers.models import build_model
from thinrank.trainers.module import CausalLM
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


REPLICAS = {
    "clipped": {"optimizer": MuonConfig(lr=0.02), "clip_norm": 0.5},
    "coordinates": {"optimizer": GaLoreConfig(rank=4, svd="power", update_proj_gap=2, lr=0.02, eps=1e-3)},
}
"""Clipping is by the norm of what travels, which is that of one process where gradients do."""
STEPS = 4


class Rest(torch.utils.data.IterableDataset):
    """What a run that goes on is given: the batches from `start` on."""

    def __init__(self, batches, start):
        self.batches, self.start = batches, start

    def __iter__(self):
        return (self.batches[i] for i in range(self.start, len(self.batches)))


class Shares(TinyData):
    def __init__(self, rank, world, parts, start):
        super().__init__(rows(8 * STEPS), batch_size=8 // parts, rank=rank, world=world)
        self.start = start

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Rest(self.train, self.start), batch_size=None)


class Stumbles(CausalLM):
    """The gradient of the second step is no number on the last rank, or in one process."""

    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        bad = self.global_step == 1 and self.global_rank + 1 == self.trainer.world_size
        return {**found, "loss": found["loss"] * torch.nan} if bad else found


def train(
    name,
    strategy: Any = "auto",
    rank=0,
    world=1,
    parts=1,
    stumbles=False,
    until=STEPS,
    resume: Any = None,
    save=None,
    **options: Any,
) -> tuple[dict[str, Any], Any]:
    """Steps on this rank's share of eight rows each; the whole weights on the first rank, and the Trainer."""
    settings = {**REPLICAS[name], **options.pop("module", {}), "model": tiny_model(seed=0 if resume is None else 8)}
    module, guard = tiny_module(**settings), NonFiniteGuard()
    again: dict[str, Any] = {} if resume is None else {"ckpt_path": resume, "weights_only": True}
    if stumbles:
        module.__class__ = Stumbles
    trainer = tiny_trainer(
        until, strategy=strategy, devices=world, accumulate_grad_batches=parts, callbacks=[guard], **options
    )
    data = Shares(rank, world, parts, 0 if resume is None else STEPS // 2)
    trainer.fit(module, data, **again)
    assert guard.skipped == stumbles
    if save is not None:
        trainer.save_checkpoint(save)
    return trainer.strategy.lightning_module_state_dict(), trainer


def replicas(messages="auto", **settings):
    strategy = FSDP2Strategy(replicas=2, messages=messages, check_every=1, process_group_backend="gloo", **settings)
    strategy.cluster_environment = PoolEnvironment()
    return strategy


def four(folder):
    """What the first rank has in the end, by the run; what all say of their places; and what is refused."""
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # the logits are a view of what the last product gives; nothing writes into it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    half = f"{folder}/half.ckpt"
    ours: dict[str, Any] = {"rank": torch.distributed.get_rank(), "world": 4}
    found = {f"{name} full": train(name, replicas("full"), **ours)[0] for name in REPLICAS}
    found |= {f"{name} auto": train(name, replicas(), **ours)[0] for name in REPLICAS}
    found["mixed"], _ = train("coordinates", replicas(dtype="bfloat16"), **ours, precision="bf16-mixed")
    found["parts"], trainer = train("coordinates", replicas(), **ours, parts=2, stumbles=True)
    assert trainer.optimizers[0].wire.payload["coordinates"] > 0
    train("coordinates", replicas(), **ours, until=STEPS // 2, save=half)
    torch.distributed.barrier()
    found["resumed"], trainer = train("coordinates", replicas(), **ours, resume=half)
    about = trainer.strategy.device_mesh.shape, trainer.strategy.distributed_sampler_kwargs["rank"]
    by_value = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    said = refused(**ours, module={"optimizer": adamw}), refused(**ours, **by_value)
    return found, about, said


def refused(**options):
    with pytest.raises(UserError) as caught:
        train("coordinates", replicas(), **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def hybrid(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    return ranks(4).run(four, str(folder), timeout=350), folder


@pytest.mark.timeout(400)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_two_replicas_of_two_shards_are_one_process(hybrid):
    """Torch averages their gradients, or they exchange coordinates; in micro-batches, too, and when a rank stumbles."""
    answers, _ = hybrid
    assert [about for _, about, _ in answers] == [((2, 2), rank) for rank in range(4)]
    assert [bool(found["resumed"]) for found, *_ in answers] == [True, False, False, False]
    found = answers[0][0]
    for name in REPLICAS:
        expected, _ = train(name)
        assert apart(found[f"{name} full"], expected) <= 2e-6
        assert apart(found[f"{name} auto"], expected) <= 1e-5
        assert apart(found[f"{name} auto"], found[f"{name} full"]) <= 1e-5
    stumbled, _ = train("coordinates", stumbles=True)
    assert apart(found["parts"], stumbled) <= 1e-5
    assert apart(stumbled, found["coordinates full"]) > 1e-3
    mixed, _ = train("coordinates", precision="bf16-mixed")
    assert apart(found["mixed"], mixed) <= 1e-2


@pytest.mark.timeout(400)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_replicas_that_exchange_coordinates_go_on_from_one_file(hybrid):
    """To the bit with as many ranks; and in one process, up to rounding."""
    ((found, *_), *_), folder = hybrid
    same(found["resumed"], found["coordinates auto"])
    alone, _ = train("coordinates", resume=folder / "half.ckpt")
    assert apart(alone, found["resumed"]) <= 1e-5


@pytest.mark.slow
def test_what_replicas_that_exchange_coordinates_cannot_do_is_refused(hybrid):
    for *_, said in hybrid[0]:
        assert "AdamW is none: return thinrank.optim.build(self, config)" in said[0]
        assert "use 'norm', or messages='full'" in said[1]


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
        (["strategy.messages=auto"], "set replicas to 2 or more, or leave messages out"),
        (["strategy.messages=signs", "strategy.replicas=2"], "messages must be one of full, auto, got 'signs'"),
        (["strategy.dtype=bfloat16", "strategy.replicas=2"], "set messages=auto, or leave dtype out"),
        (["strategy.check_every=0"], "use null for never"),
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


@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        (tiny_pieces.GALORE, "coordinates of matrices that are stepped by rows; gradients of pieces at renewals"),
        (MuonConfig(), "whole gradients of pieces, because its step reads the gradient itself"),
        (AdamWConfig(), "whole gradients of pieces, because this method has no subspace"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_run_says_what_travels_between_replicas(tmp_path, optimizer, what):
    strategy = FSDP2Config(replicas=2, messages="auto")
    parts: Any = SimpleNamespace(config=config(tmp_path, "run", optimizer=optimizer, strategy=strategy), shards=2)
    said = _exchange(parts)
    assert said is not None
    assert said.startswith("rows of weights and gradients among 2 ranks")
    assert f"; between 2 replicas {what}" in said


def test_a_dry_run_says_what_a_rank_holds():
    arguments = ["strategy=thinrank_fsdp2", "trainer.devices=4", "model=2m", "trainer.accelerator=cpu"]
    arguments += ["strategy.replicas=2", "strategy.messages=auto", "optimizer=galore", "optimizer.svd=power"]
    launch = Path(__file__).parents[2] / "launch" / "pretrain.py"
    done = subprocess.run(
        [sys.executable, str(launch), "--dry-run", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "MiB on each of 2 ranks" in done.stdout
    assert "leave the one that sends most" in done.stdout


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
    with pytest.raises(UserError, match="messages=auto is for what replicas exchange, and replicas=1 is one group"):
        FSDP2Strategy(messages="auto")
    names = {field.name for field in dataclasses.fields(FSDP2Config)}
    assert {"replicas", "reshard_after_forward", "messages", "dtype", "check_every"} <= names


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
