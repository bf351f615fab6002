"""`trainer.precision=auto`: what it comes to on which machine, and that a run keeps it; errors that all ranks share."""

import platform

import pytest
import torch
import torch.distributed as dist
import yaml
from tiny_pretrain import config, losses, write_corpus

from thinrank.configs.planning import answer, request
from thinrank.trainers.errors import GuardStop, PreflightError, RankLost, UserError
from thinrank.trainers.plan.precision import emulated, fitting
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies import FSDP2Config, World, together


def processor(monkeypatch, machine, capability):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.fixture
def base(tmp_path):
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    return tmp_path


@pytest.mark.parametrize(
    ("machine", "capability", "found"),
    [
        ("x86_64", "AVX512", "bf16-mixed"),
        ("x86_64", "AVX2", "32-true"),
        ("AMD64", "DEFAULT", "32-true"),
        ("aarch64", "DEFAULT", "bf16-mixed"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, machine, capability, found):
    processor(monkeypatch, machine, capability)
    assert fitting(cuda=False) == found
    assert not emulated(found, cuda=False)


@pytest.mark.parametrize(("native", "found"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_on_a_gpu_does_not_ask_the_processor(monkeypatch, native, found):
    processor(monkeypatch, "x86_64", "AVX2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert fitting(cuda=True) == found


def test_a_run_keeps_what_auto_came_to_wherever_it_goes_on(base, monkeypatch, capsys):
    folder = base / "moved"
    processor(monkeypatch, "x86_64", "AVX2")
    pretrain(config(base, "moved", precision="auto", max_steps=2))
    assert "precision   32-true\n" in capsys.readouterr().out
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["precision"] == "32-true"
    processor(monkeypatch, "x86_64", "AVX512")
    report = pretrain(config(base, "moved", precision="auto", max_steps=4))
    assert "precision   32-true\n" in capsys.readouterr().out
    assert report["run"]["resumed_from"] == 2
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    pretrain(config(base, "moved", precision="32-true", max_steps=5))  # what it is, said aloud
    with pytest.raises(UserError, match=r"trainer.precision \(32-true → bf16-mixed\)"):
        pretrain(config(base, "moved", precision="bf16-mixed", max_steps=6))


def test_auto_follows_a_run_that_chose_for_itself(base, monkeypatch, capsys):
    processor(monkeypatch, "x86_64", "AVX2")
    pretrain(config(base, "chosen", precision="bf16-mixed", max_steps=1))
    assert "precision   bf16-mixed, slow on this processor" in capsys.readouterr().out
    pretrain(config(base, "chosen", precision="auto", max_steps=2))
    assert "precision   bf16-mixed, slow on this processor" in capsys.readouterr().out
    assert yaml.safe_load((base / "chosen/config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"


def test_a_kept_precision_that_no_longer_fits_is_one_sentence(base):
    pretrain(config(base, "odd", precision="64-true", max_steps=1))
    with pytest.raises(
        UserError, match=r"was trained with trainer.precision=64-true: strategy=thinrank_fsdp2 computes in"
    ):
        pretrain(config(base, "odd", precision="auto", max_steps=2, strategy=FSDP2Config()))


@pytest.mark.parametrize(("words", "found"), [([], "bf16-mixed"), (["trainer.accelerator=cpu"], "32-true")])
def test_a_plan_is_for_the_machines_that_will_run_it(monkeypatch, words, found):
    processor(monkeypatch, "x86_64", "AVX2")
    assert f"2 processes, {found}, " in answer(request(["model=2m", "data.tokenizer=bytes", "--world", "2", *words]))


def fails(kind):
    def function():
        if dist.get_rank() == 1:
            raise kind("the second rank says so")

    world = World(rank=dist.get_rank(), size=2, local_size=2, local_rank=dist.get_rank())
    try:
        together(world, function)
    except UserError as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("kind", [UserError, GuardStop, PreflightError, RankLost])
def test_what_stops_one_rank_stops_all_with_the_same_exit_code(ranks, kind):
    said = (kind.__name__, "the second rank says so")
    assert ranks(2).run(fails, kind) == [said, said]
