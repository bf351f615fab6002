"""Versions that thinrank has not been tested with are answered where they matter, in one sentence."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from thinrank.versions import TESTED, is_newer, is_older, requirement, untested

ROOT = Path(__file__).resolve().parent.parent
TORCH = rf"pip install '{re.escape(requirement('torch'))}'"
LIGHTNING = rf"pip install '{re.escape(requirement('Lightning'))}'"


def test_bounds_are_those_of_pyproject():
    given = re.findall(r'"((?:torch|lightning|deepspeed)>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert sorted(given) == sorted(map(requirement, TESTED))


@pytest.mark.parametrize(
    ("name", "version", "older", "newer"),
    [
        ("torch", "2.10.1", True, False),
        ("torch", "2.9.1+cu128", True, False),
        ("torch", "2.11.0a0+git1234", False, False),
        ("torch", "2.13.2+cpu", False, False),
        ("torch", "2.14.0.dev20260101", False, True),
        ("torch", "3.0.0", False, True),
        ("Lightning", "2.6.0.post1", False, False),
        ("DeepSpeed", "0.18.9", True, False),
        ("DeepSpeed", "1.0", False, True),
    ],
)
def test_versions_are_ordered_as_numbers(name, version, older, newer):
    assert (is_older(name, version), is_newer(name, version)) == (older, newer)
    assert (untested(name, version) is None) == (not older and not newer)


def test_an_old_torch_is_answered_by_the_first_import_and_by_launchers():
    """In a process of its own, before the imports that would fail with a name that an old torch has not."""
    code = (
        "import torch; torch.__version__ = '2.10.0'\n"
        "import thinrank.trainers\n"
        "try: import thinrank.optim\n"
        "except ImportError as error: print(error)\n"
        "from thinrank.configs.command import command\n"
        "raise SystemExit(command(['--cfg'], usage='', schema='PRETRAIN', start=print))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    sentence = f"torch 2.10.0 has not been tested with thinrank: pip install '{requirement('torch')}'"
    assert done.stdout == f"{sentence}\n"
    assert done.stderr == f"error: {sentence}\n"
    assert done.returncode == 2


@pytest.mark.parametrize("version", ["2.5.6", "2.7.0"])
@pytest.mark.parametrize("name", ["ReplicatedStrategy", "OwnedStrategy", "FSDP2Strategy", "ZeroStrategy"])
def test_another_lightning_is_refused_where_strategies_are_made(monkeypatch, name, version):
    import thinrank.trainers

    monkeypatch.setattr("lightning.__version__", version)
    with pytest.raises(thinrank.trainers.UserError, match=f"Lightning {version} has not been tested .*{LIGHTNING}"):
        getattr(thinrank.trainers, name)()


def test_another_lightning_is_refused_before_a_run_begins(monkeypatch, tmp_path, capsys):
    from thinrank.configs.command import command
    from thinrank.trainers.finetune import FinetuneConfig, finetune
    from thinrank.trainers.pretrain import pretrain

    monkeypatch.setattr("lightning.__version__", "2.7.0")
    monkeypatch.setitem(sys.modules, "thinrank.trainers.assembly", None)  # would not be found
    words = [f"run.dir={tmp_path / 'run'}", "strategy=ddp"]
    assert command(words, usage="", schema="PRETRAIN", start=lambda loaded: pretrain(loaded.config)) == 2
    assert re.fullmatch(
        f"error: Lightning 2.7.0 has not been tested with thinrank: {LIGHTNING}\n", capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(Exception, match="has not been tested with thinrank"):
        finetune(FinetuneConfig())


def test_a_newer_torch_is_warned_of_where_its_insides_are_read(monkeypatch):
    """And nowhere else."""
    from thinrank.optim import GaLore
    from thinrank.trainers import FSDP2Strategy, ReplicatedStrategy

    monkeypatch.setattr(torch, "__version__", "2.99.0")
    weight = torch.nn.Parameter(torch.ones(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReplicatedStrategy()
        optimizer = GaLore([weight], rank=2)
        weight.sum().backward()
        optimizer.step()
    with pytest.warns(UserWarning, match=f"torch 2.99.0 is newer than what thinrank_fsdp2 .*{TORCH}"):
        FSDP2Strategy()
    monkeypatch.setenv("RANK", "1")  # the first rank has said it
    FSDP2Strategy()


def test_deepspeed_is_looked_at_before_it_makes_an_engine(monkeypatch):
    deepspeed = pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    from thinrank.trainers import UserError, ZeroStrategy, zero

    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        with pytest.warns(UserWarning, match=f"newer than what ZeRO .*{TORCH}"):
            zero.load_deepspeed()
    for version in ("0.18.9", "0.20.0"):
        monkeypatch.setattr(deepspeed, "__version__", version)
        for ask in (zero.load_deepspeed, ZeroStrategy):
            with pytest.raises(UserError, match=rf"DeepSpeed {version} has not been .*'deepspeed>=0.19,<0.20'"):
                ask()
