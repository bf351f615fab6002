"""The examples run, and do what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

from thinrank.trainers import ModelConfig, PySourceConfig

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_own_loop_learns():
    first, last = load("own_loop").main()
    assert last < 0.1 * first


def test_groups_by_hand_resume_to_the_bit():
    assert load("groups_by_hand").main()


def test_lightning_user():
    tiny = ModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    data = PySourceConfig(sequence_length=64, validation_tokens=2048, tokenizer="bytes")
    bits = load("lightning_user").main(3, tiny, data)
    assert 2.0 < bits < 8.5  # bytes at random cost 8 bits


def test_replicas():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, EXAMPLES / "replicas.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(line.split("loss ")[1]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    # a quarter, an eighth for norms (1021 of 8192 entries; far less of larger weights), renewals, and biases whole
    assert "0.39 of what gradients would have been" in done.stdout


def test_hyperbolic_links():
    example = load("hyperbolic_links")
    table = example.compare(nodes=120, steps=20, seeds=(0,), rates=(1e-2,))[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[:2] for row in cells] == [[space, name] for space in example.SPACES for name in example.METHODS]
    trained = {row[1]: int(row[2].replace(",", "")) for row in cells if row[0] == "hyperbolic"}
    assert max(trained["SST"], trained["factors"], trained["LoRA"]) < 0.6 * trained["dense"]
    assert min(float(row[5]) for row in cells) > 0.55  # chance is 0.5


def test_areas_under_curves_are_counted():
    auc = load("hyperbolic_links").auc
    assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0])) == 1.0
    assert auc(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == (0.5 + 0 + 1 + 1) / 4


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "own_loop",
        "groups_by_hand",
        "lightning_user",
        "replicas",
        "hyperbolic_links",
    }
