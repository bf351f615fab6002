"""Resident memory of a process, and the peak of it that a run on a CPU reports beside its plan."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tiny_pretrain import config, write_corpus

from thinrank.optim import AdamWConfig
from thinrank.trainers import resident
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.resident import Resident

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone says what is resident")
SIZE = 2**26


def fill(size=SIZE):
    """So many bytes that are there for a moment: the allocator gives blocks of this size back at once."""
    torch.ones(size // 4)


def test_what_was_there_for_a_moment_is_seen_and_what_was_before_is_not():
    fill(4 * SIZE)
    seen = Resident()
    if seen._earlier is not None:
        pytest.skip("this kernel does not let a process forget its peak")
    fill()
    peak = seen.peak()
    assert peak is not None
    assert 0.95 * SIZE <= peak < 2 * SIZE  # the kernel counts pages of each thread now and then


def test_a_peak_from_before_hides_a_smaller_one(monkeypatch):
    """Where the kernel does not forget: nothing is said, until there is a higher one."""
    monkeypatch.setattr(resident, "_forget_peak", lambda: False)
    fill(4 * SIZE)
    seen = Resident()
    fill(SIZE)
    assert seen.peak() is None
    fill(8 * SIZE)
    assert 6 * SIZE <= (seen.peak() or 0) < 16 * SIZE


def test_without_a_kernel_that_says_it_nothing_is_said(monkeypatch):
    monkeypatch.setattr(resident, "_STATUS", Path("/nowhere/status"))
    monkeypatch.setattr(resident, "_CLEAR", Path("/nowhere/clear_refs"))
    assert Resident().peak() is None


def ten_million(folder):
    """The report of a run of 10 million weights."""
    model = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "extra": {}}
    return pretrain(
        config(folder, "run", optimizer=AdamWConfig(), model=model, max_steps=2, validate_every=0, clip_norm=None)
    )


def test_a_run_reports_it_beside_the_plan(tmp_path):
    """What is planned for the tensors, and what libraries bring along; in a process that has no memory to use again."""
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        report = fresh.submit(ten_million, tmp_path).result()
    planned, measured = report["plan"]["planned"], report["plan"]["measured"]
    assert "peak_bytes" not in planned | measured
    assert planned["resident_bytes"] > 4 * planned["weights_bytes"] > 2**27  # weights, gradients and two moments
    assert planned["resident_bytes"] * 0.9 <= measured["resident_bytes"] <= planned["resident_bytes"] * 1.5 + 2**28
    page = (tmp_path / "run" / "report.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| peak of resident memory"))
    assert all(float(cell) > 100 for cell in row.strip("| ").split(" | ")[1:])
