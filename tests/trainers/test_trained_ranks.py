"""Ranks shared out in training: one key of the configuration, whole runs, exact resumes, processes that agree."""

import os
import signal
import warnings
from typing import Any

import pytest
import torch
from tiny_pretrain import config, losses, signalled_at, write_corpus
from tiny_run import forked, read, same
from tiny_training import TinyData, ddp_trainer, lightning_warnings, rows, tiny_module, tiny_trainer

from thinrank.configs.errors import ConfigError
from thinrank.configs.load import load
from thinrank.configs.schema import PRETRAIN
from thinrank.optim import GaLoreConfig, MatrixOptimizer, SubspaceAdamWConfig
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers import curves
from thinrank.trainers.callbacks.guard import NonFiniteGuard
from thinrank.trainers.pretrain import pretrain

pytestmark = lightning_warnings

METHODS = {
    "galore": GaLoreConfig(rank=4, update_proj_gap=2, lr=0.01, rank_allocation="gradient", rank_allocation_every=4),
    "subspace": SubspaceAdamWConfig(
        rank=4, update_proj_gap=2, lr=0.01, rank_allocation="gradient", rank_allocation_every=4
    ),
    "weight": GaLoreConfig(rank=4, update_proj_gap=2, lr=0.05, rank_allocation="weight", rank_allocation_every=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    return folder


def ranks_in(folder, step=None):
    path = ckpt.newest(folder / "checkpoints") if step is None else folder / "checkpoints" / ckpt.checkpoint_name(step)
    assert path is not None
    (groups,) = [s["param_groups"] for s in ckpt.load(path)["optimizer_states"]]
    return [group["ranks"] for group in groups]


def final(folder):
    path = ckpt.newest(folder / "checkpoints")
    assert path is not None
    state = ckpt.load(path)
    del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]  # counts validations again when it goes on
    for callback in state["callbacks"].values():
        callback.pop("seconds", None)
    return state


LONG = {"max_steps": 11, "checkpoint_every": 3, "validate_every": 0, "micro_batch_size": 2}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_bit_for_bit_with_the_ranks_that_it_had(base, name):
    """Killed after step 7, with a checkpoint of step 6: between the allocations of steps 4 and 8."""
    optimizer = METHODS[name]
    whole = pretrain(config(base, f"{name}-whole", optimizer=optimizer, **LONG))
    chosen = config(base, f"{name}-parts", optimizer=optimizer, **LONG)
    undo = signalled_at(7, rank=0, number=signal.SIGKILL)
    process = forked(lambda: pretrain(chosen))
    undo()
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    held = ranks_in(base / f"{name}-parts")
    result = pretrain(chosen)
    assert result["run"]["resumed_from"] == 6
    same(final(base / f"{name}-parts"), final(base / f"{name}-whole"))
    assert any(held), "no ranks were shared out: the test shows nothing"
    assert losses(base / f"{name}-parts") == losses(base / f"{name}-whole")
    for found in (whole, result):
        ranks = [row["rank"] for row in found["routing"] if row["rank"] is not None]
        assert len(ranks) == 14
        assert len(set(ranks)) > 1
        assert found["optimizer_state"]["predicted_bytes"] == found["optimizer_state"]["measured_bytes"]
    assert sum(r * sum(row["shape"]) for row in whole["routing"] if (r := row["rank"])) <= sum(
        4 * sum(row["shape"]) for row in whole["routing"] if row["rank"]
    )


def test_the_report_and_the_curves_say_the_ranks_in_force(base, capsys):
    result = pretrain(config(base, "report", optimizer=METHODS["galore"], max_steps=3, tensorboard=False))
    shown = capsys.readouterr().out
    assert "what that costs will be shared out by the spectra of the gradients (rank_allocation=gradient)" in shown
    ranks = sorted(row["rank"] for row in result["routing"] if row["rank"])
    spread = f"{ranks[0]} / {ranks[6]} / {ranks[-1]}"
    page = (base / "report" / "report.md").read_text()
    assert f"| ranks of subspaces, least / median / most | {spread} |" in page
    assert f"ranks: {spread} (least / median / most)" in page
    assert "will be shared out" not in page
    read_back = dict(curves.series(curves.read(base / "report"), "lowrank/rank"))
    assert read_back == pytest.approx(dict.fromkeys((1, 2, 3), sum(ranks) / len(ranks)))
    assert read(base / "report" / "report.json")["routing"][0].keys() >= {"rank"}


def test_the_first_ranks_are_of_all_micro_batches_together(base):
    """The gradient of the whole first step, however it is divided."""
    found = []
    for micro in (4, 2, 1):
        name = f"micro-{micro}"
        model = {"extra": {}}  # no dropout: the same sums
        chosen = config(base, name, optimizer=METHODS["galore"], model=model, max_steps=1, micro_batch_size=micro)
        pretrain(chosen)
        found.append(ranks_in(base / name))
    assert found[0] == found[1] == found[2]


def shared_out(trainer):
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, MatrixOptimizer)
    return optimizer.ranks()


def under_ddp() -> Any:
    warnings.simplefilter("default")  # the marks of the test do not reach the ranks
    rank = torch.distributed.get_rank()
    trainer = ddp_trainer(2)
    trainer.fit(tiny_module(optimizer=METHODS["galore"]), datamodule=TinyData(rows(8), rank=rank, world=2))
    return shared_out(trainer)


def test_processes_decide_alike_and_as_one_does(ranks):
    trainer = tiny_trainer(2)
    trainer.fit(tiny_module(optimizer=METHODS["galore"]), datamodule=TinyData(rows(8)))
    alone = shared_out(trainer)
    assert len(set(alone.values())) > 1
    assert ranks(2).run(under_ddp) == [alone, alone]


def test_a_skipped_first_step_leaves_the_decision_to_the_next():
    module = tiny_module(optimizer=METHODS["galore"])
    module.configure_model()
    assert module.model is not None
    seen: list[int] = []

    def spoil(grad):
        seen.append(len(shared_out(trainer)))
        return grad * float("nan") if len(seen) == 1 else grad

    module.model.get_parameter("model.layers.0.mlp.up_proj.weight").register_hook(spoil)
    trainer = tiny_trainer(3, callbacks=[NonFiniteGuard()])
    trainer.fit(module, datamodule=TinyData(rows(12)))
    assert seen == [0, 0, 14]


def test_one_line_of_the_command_does_it_and_mistakes_are_told():
    found: Any = load(PRETRAIN, ["optimizer=galore", "optimizer.rank_allocation=gradient"]).config.optimizer
    assert (found.rank_allocation, found.rank_allocation_every) == ("gradient", None)
    for argv, sentence in (
        (["optimizer=galore", "optimizer.rank_allocation=gradiant"], r"^optimizer\.rank_allocation must be one of"),
        (["optimizer=adamw", "optimizer.rank_allocation=weight"], r"unknown key optimizer\.rank_allocation"),
        (
            ["optimizer=galore", "optimizer.rank_allocation=gradient", "trainer.in_backward=step"],
            r"trainer\.in_backward=step keeps no whole gradients .*use optimizer\.rank_allocation=weight, or",
        ),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load(PRETRAIN, argv)
    load(PRETRAIN, ["optimizer=galore", "optimizer.rank_allocation=weight", "trainer.in_backward=project"])
