"""`benchmarks/strategy_overhead.py` trains the same model under every strategy, and its table compares the times."""

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # scripts that import each other by name
strategy_overhead = importlib.import_module("strategy_overhead")

from thinrank.trainers.models import ModelConfig  # noqa: E402

SMALL = ModelConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
INSTALLED = [
    name for name in strategy_overhead.STRATEGIES if "zero" not in name or importlib.util.find_spec("deepspeed")
]


def rows():
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing writes there
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    method = strategy_overhead.configured("galore")
    return strategy_overhead.measure(SMALL, method, INSTALLED, tokens, vocabulary=64, steps=2, rounds=2)


@pytest.mark.timeout(300)
def test_all_strategies_make_the_same_steps(ranks):
    (found,) = ranks(1).run(rows, timeout=280)
    assert list(found) == INSTALLED
    for row in found.values():
        assert len(row.times) == 4
        assert min(row.times) > 0
        assert row.loss == pytest.approx(found["none"].loss, rel=1e-5)


def test_the_table_has_medians_and_ratios_of_medians():
    times = {"none": [1.0, 2.0, 9.0], "ddp": [3.0, 4.0, 3.0]}
    found = {name: strategy_overhead.Row(times=each, loss=1.0) for name, each in times.items()}
    assert strategy_overhead.table(found) == ["| none | 2.00 | 1.000 | 1.00000 |", "| ddp | 3.00 | 1.500 | 1.00000 |"]
