"""Every strategy by its name on the command line, on two ranks: the script ends well, and all end with one loss.

One start of torchrun and of two Pythons for all (`strategies_in_turn.py`): what a start of its own would add for each
strategy, the agent and a second import of the same packages, does not know of strategies.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import strategies_in_turn
from small_run import write_corpus
from submitting import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ZERO = [f"thinrank_zero{stage}" for stage in (1, 2, 3)] if importlib.util.find_spec("deepspeed") else []
STRATEGIES = ["thinrank_ddp", "thinrank_owned", "thinrank_fsdp2", *ZERO]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    write_corpus(folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, strategies_in_turn.__file__, str(folder), "ddp", *STRATEGIES, "gossip"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed compiles a function of Muon's: half a minute of imports
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        capture_output=True,
        text=True,
        timeout=580,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_by_name_ends_where_ddp_ends(base, name):
    status = json.loads((base / name / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("finished", 3, 0)
    assert f"| strategy | {name} |" in (base / name / "report.md").read_text()
    found, expected = report(base / name), report(base / "ddp")
    assert found["training"]["world"] == expected["training"]["world"] == 2
    assert found["metrics"]["test/loss"] == pytest.approx(expected["metrics"]["test/loss"], abs=1e-4)


def test_ranks_that_exchange_weights_by_name(base):
    """Another method, and so another loss than DDP's; near it after three steps."""
    status = json.loads((base / "gossip" / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("finished", 3, 0)
    found, expected = report(base / "gossip"), report(base / "ddp")
    assert found["training"]["communication"]["gossip"] > 0
    assert found["metrics"]["test/loss"] == pytest.approx(expected["metrics"]["test/loss"], rel=0.05)
