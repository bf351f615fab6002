"""`strategy=thinrank_ddp` in whole runs, and `Trainer(strategy="thinrank_ddp")` around a user's own module."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import tiny_replicas
import torch
from test_pretrain import final, same
from tiny_pretrain import config, losses, write_corpus

from thinrank.configs.load import load
from thinrank.configs.schema import PRETRAIN
from thinrank.optim import FiraConfig
from thinrank.trainers import NonFiniteGuard
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies import FSDP2Config, ReplicatedConfig, World, build_strategy


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tiny_replicas.__file__, str(folder)], capture_output=True, text=True, timeout=280, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [("galore", tiny_replicas.GALORE), ("fira", FiraConfig(rank=4, svd="power")), ("dion", tiny_replicas.DION)],
)
def test_two_ranks_have_the_losses_of_one_process(base, name, method):
    settings = {**tiny_replicas.PARTS, "model": {"extra": {}}, "optimizer": method}
    pretrain(config(base, f"{name} alone", **settings))
    one, two = losses(base / f"{name} alone"), losses(base / name)
    assert sorted(one) == sorted(two) == list(range(1, 21))
    for step, value in one.items():
        assert two[step] == pytest.approx(value, abs=1e-5), step
    assert one[20] < one[1] - 0.1


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_what_travels_is_said_logged_and_reported(base):
    said = (base / "stdout").read_text()
    assert "exchange    coordinates of matrices between renewals" in said
    assert "exchange    whole gradients, because its update is as large as the gradient" in said
    whole = json.loads((base / "fira" / "report.json").read_text())["training"]["communication"]
    assert whole["payload"] == pytest.approx(whole["whole gradients"], rel=0.01)
    less = json.loads((base / "galore" / "report.json").read_text())["training"]["communication"]
    # rank 4 of 16, in 17 steps of 20; three send gradients
    assert less["coordinates"] == pytest.approx(0.25 * 17 / 20 * (whole["gradients"]), rel=1e-6)
    assert less["renewals"] == pytest.approx(3 / 20 * whole["gradients"], rel=1e-6)
    assert "sent for a step by each rank" in (base / "galore" / "report.md").read_text()
    curve = losses(base / "galore", "comm/coordinates(MiB)")
    assert [step for step in range(1, 21) if not curve.get(step)] == [1, 8, 15]  # those that choose a subspace
    assert curve[2] == pytest.approx(0.25 * whole["gradients"] / 2**20, rel=1e-6)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_signs_of_what_the_subspace_misses_train_and_are_counted(base):
    """Nearly as gradients do; the bytes are those of the plan."""
    assert "exchange    coordinates and signs of matrices between renewals" in (base / "stdout").read_text()
    exact, found = losses(base / "fira"), losses(base / "signs")
    assert found == pytest.approx(exact, abs=0.05)
    assert found != pytest.approx(exact, abs=1e-4)
    report = json.loads((base / "signs" / "report.json").read_text())
    sent = report["training"]["communication"]
    assert 0 < sent["signs"] < sent["votes"] < sent["coordinates"]
    plan = report["plan"]
    assert plan["measured"]["sent_bytes"] == pytest.approx(plan["planned"]["sent_bytes"], rel=0.01)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_ranks_that_remember_apart_say_so_and_go_on_to_the_bit(base):
    """From where both runs were saved; the bytes are those of the plan."""
    assert "exchange    small factors of updates of matrices" in (base / "stdout").read_text()
    same(final(base / "apart parts"), final(base / "apart whole"))
    report = json.loads((base / "dion" / "report.json").read_text())
    sent, plan = report["training"]["communication"], report["plan"]
    assert 0 < sent["factors"] < sent["whole gradients"]
    assert "gradients" not in sent
    assert plan["measured"]["sent_bytes"] == pytest.approx(plan["planned"]["sent_bytes"], rel=0.01)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_preempted_run_goes_on_to_the_bit(base):
    first, second, _ = json.loads((base / "result.json").read_text())
    assert (first["state"], second["state"], second["resumed_from"]) == ("preempted", "finished", 7)
    same(final(base / "parts"), final(base / "whole"))


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_owners_have_the_losses_of_replicas_and_tell_directions(base):
    owned, replicas = losses(base / "owned"), losses(base / "galore")
    assert owned == pytest.approx(replicas, abs=1e-5)
    sent = json.loads((base / "owned" / "report.json").read_text())["training"]["communication"]
    assert sent["updates"] > 0
    assert sent["bases"] > 0
    held = json.loads((base / "owned" / "report.json").read_text())["optimizer_state"]
    assert held["measured_bytes"] >= held["predicted_bytes"]  # of all ranks, bases and small weights' on each
    assert held["most_on_a_rank_bytes"] < held["predicted_bytes"]  # embeddings as small as these are on both
    state = torch.load(base / "owned" / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    alike = torch.load(base / "galore" / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    assert {i: sorted(own) for i, own in state[0]["state"].items()} == {
        i: sorted(own) for i, own in alike[0]["state"].items()
    }


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_preempted_run_of_owners_goes_on_to_the_bit_and_as_replicas(base):
    same(final(base / "owned parts"), final(base / "owned whole"))
    for name, value in final(base / "another")["state_dict"].items():
        torch.testing.assert_close(final(base / "owned whole")["state_dict"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_module_that_knows_nothing_of_replicas(base):
    """Accumulation, and clipping by the Trainer, as in one process."""
    weights, clipped = torch.load(base / "own.pt", weights_only=True)
    alone = tiny_replicas.fit(tiny_replicas.own, accumulate=2).state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)

    alone = tiny_replicas.fit(tiny_replicas.own, gradient_clip_val=0.1).state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(clipped[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_module_under_owners_by_name(base):
    weights, _, facts = torch.load(base / "owners.pt", weights_only=True)
    assert facts["state on"] == 2
    for name, value in tiny_replicas.fit(tiny_replicas.own, accumulate=2).state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_the_guard_skips_on_all_ranks_what_one_cannot_take(base):
    """In a module of a user's own: the guard looked at `p.grad`, which had left, and let the step happen."""
    _, skipping, facts = torch.load(base / "owners.pt", weights_only=True)
    guard = NonFiniteGuard()
    alone = tiny_replicas.fit(tiny_replicas.own, kind=tiny_replicas.Broken, callbacks=[guard]).state_dict()
    assert guard.skipped == 1
    for strategy in ("replicas", "owners"):
        assert facts[strategy] == ([1, 1], [True, True])
        for name, value in alone.items():
            torch.testing.assert_close(skipping[strategy][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_what_it_cannot_do_is_refused(base):
    *_, said = json.loads((base / "result.json").read_text())
    assert "AdamW is none: return thinrank.optim.build(self, config)" in said["other optimizer"]
    assert "needs whole gradients, which thinrank_ddp does not send: use 'norm'" in said["by value"]
    assert "which thinrank_owned does not send: use 'norm'" in said["by value, owners"]


BOTH = [
    (["trainer.in_backward=project", "optimizer=galore"], "leave in_backward out"),
    (["optimizer=galore", "optimizer.rank_allocation=gradient"], "use optimizer.rank_allocation=weight"),
    (["trainer.precision=16-mixed"], "use trainer.precision=bf16-mixed or 32-true"),
    (["strategy.messages=small"], "messages must be one of auto, full"),
    (["strategy.dtype=float16"], "dtype must be one of auto, float32, bfloat16"),
    (["strategy.check_every=0"], "use null for never"),
]
LATER = ["optimizer=galore", "optimizer.rank_allocation=weight", "optimizer.rank_allocation_every=10"]


@pytest.mark.parametrize(
    ("name", "arguments", "remedy"),
    [
        *(("thinrank_ddp", *each) for each in BOTH),
        ("thinrank_ddp", ["optimizer=galore", "strategy.messages=signs"], "or a method such as fira"),
        ("thinrank_ddp", ["optimizer=adamw", "strategy.messages=majority"], "or a method such as fira"),
        *(("thinrank_owned", *each) for each in BOTH),
        ("thinrank_owned", ["optimizer=fira", "strategy.messages=signs"], "use messages='auto', or thinrank_ddp"),
        ("thinrank_owned", ["optimizer=fira", "strategy.messages=majority"], "use messages='auto', or thinrank_ddp"),
        ("thinrank_owned", LATER, "use optimizer.rank_allocation=weight without rank_allocation_every"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else value if value.startswith("thinrank") else "",
)
def test_configurations_that_cannot_work_are_refused(name, arguments, remedy):
    with pytest.raises(Exception, match=remedy.replace(".", r"\.")) as caught:
        load(PRETRAIN, [f"strategy={name}", *arguments])
    assert type(caught.value).__name__ == "ConfigError"


def test_replicas_may_share_ranks_out_later():
    """What owners cannot is theirs alone."""
    load(PRETRAIN, ["strategy=thinrank_ddp", *LATER])


def test_the_strategy_is_known_by_name_without_lightning_being_imported_first():
    code = (
        "import sys, thinrank.trainers; assert 'lightning' not in sys.modules; "
        "import importlib.util; importlib.util.find_spec('lightning.pytorch.strategies'); "  # to ask is not to import
        "import lightning.pytorch as pl; "
        "trainer = pl.Trainer(strategy='thinrank_ddp', accelerator='cpu', devices=1, logger=False, "
        "enable_checkpointing=False); print(type(trainer.strategy).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("ReplicatedStrategy"), done.stderr[-2000:]


@pytest.mark.parametrize("name", ["thinrank_ddp", "thinrank_fsdp2"])
def test_the_other_package_of_the_same_authors_is_answered(name):
    pytest.importorskip("pytorch_lightning", reason="comes with lightning, but need not")
    code = (
        "import thinrank.trainers, pytorch_lightning as pl\n"
        f"try: pl.Trainer(strategy='{name}', accelerator='cpu', devices=1)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "write `import lightning.pytorch as pl`" in done.stdout, done.stderr[-2000:]


def test_settings_of_the_strategy_are_those_of_its_configuration():
    from thinrank.trainers import OwnedStrategy, ReplicatedConfig, ReplicatedStrategy, UserError

    for kind in (ReplicatedStrategy, OwnedStrategy):
        with pytest.raises(UserError, match="dtype must be one of"):
            kind(dtype="half")
        with pytest.raises(UserError, match="check_every must be at least 1 step"):
            kind(check_every=0)
    ReplicatedStrategy(messages="signs")
    with pytest.raises(UserError, match="use messages='auto', or thinrank_ddp"):
        OwnedStrategy(messages="signs")
    names = {field.name for field in dataclasses.fields(ReplicatedConfig)}
    assert {"messages", "dtype", "overlap", "check_every"} <= names


def test_every_setting_of_a_configuration_reaches_the_strategy():
    """`norms=always` was counted in plans and lost on the way to runs."""
    given = {"messages": "full", "embeddings": "rows", "norms": "always", "overlap": False, "check_every": 7}
    strategy: Any = build_strategy(ReplicatedConfig(name="thinrank_ddp", **given), World())[0]
    assert {key: strategy._exchange[key] for key in given} == given
    pieces: Any = build_strategy(FSDP2Config(name="thinrank_fsdp2", norms="always", check_every=7), World())[0]
    assert (pieces._choice.norms, pieces._choice.check_every) == ("always", 7)
