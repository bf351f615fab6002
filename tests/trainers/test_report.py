"""The report: complete, strict JSON, one readable page, and an honest statement about the code's version."""

import json
import subprocess

import pytest

from thinrank.trainers import report


def facts(**more):
    return {
        "run": {"name": "try", "dir": "/tmp/try", "state": "finished", "stopped_by": None, "exit_code": 0},
        "config": {"optimizer": {"name": "galore"}},
        "config_hash": "0123456789abcdef",
        "seeds": {"init": 0, "data": 1, "projection": 2},
        "data": {"manifest_hash": "feed", "source": "pysource"},
        "routing": [{"name": "w", "shape": (4, 8), "role": "matrix", "rule": "galore", "state_bytes": 128}],
        "routing_table": "w  (4, 8)  galore",
        "optimizer_state": {"predicted_bytes": 2**20, "measured_bytes": 3 * 2**19},
        "training": {
            "steps": 400,
            "tokens": 1_638_400,
            "seconds": 3723.4,
            "tokens_per_second": 440.1,
            "skipped_steps": 0,
            "world": 2,
            "accumulate": 1,
        },
        "metrics": {"test/loss": 2.5, "test/perplexity": float("inf")},
        "history": [{"event": "start", "step": 0}, {"event": "start", "step": 200}],
        "artifacts": {"export": "/tmp/try/export"},
        "sample": {"prompt": "def ", "text": "f(x):\n    return `x`"},
        **more,
    }


def test_report_holds_every_fact_and_counts_restarts(tmp_path):
    collected = report.collect(**facts())
    assert collected["run"]["restarts"] == 1
    for key in ("python", "torch", "lightning", "transformers", "thinrank", "cuda", "nccl"):
        assert key in collected["versions"]
    assert collected["versions"]["torch"]
    assert collected["memory"]["peak_rss_mib"] > 10
    assert collected["machine"]["cpu"]
    report.write(collected, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["metrics"] == {"test/loss": 2.5, "test/perplexity": None}
    assert read["routing"][0]["shape"] == [4, 8]


def test_page_shows_what_a_reader_looks_for():
    page = report.page(report.collect(**facts()))
    for text in (
        "# Run try: finished",
        "| test/loss | 2.5000 |",
        "| test/perplexity | inf |",
        "| tokens | 1,638,400 |",
        "| time | 1:02:03 |",
        "| predicted | 1.00 |",
        "| measured | 1.50 |",
        "| restarts | 1 |",
        "2 × 1",
        "0123456789abcdef",
        "feed",
        "return `x`",
        "w  (4, 8)  galore",
        "`/tmp/try/export`",
    ):
        assert text in page, text


def test_the_curves_are_summed_up():
    """Step 1 took a second, the next nine 0.1 s each, and ten more, with a renewal, 0.3 s: 4.9 s for 20 steps."""
    curves = [
        {"step": 1, "time/step": 1.0, "lowrank/captured_energy": 0.5},
        {"step": 10, "time/step": 0.1, "lowrank/captured_energy": 0.9},
        {"step": 10, "val/loss": 3.0},
        {"step": 20, "time/step": 0.3, "lowrank/captured_energy": None},
    ]
    collected = report.collect(**facts(curves=curves))
    assert collected["training"]["step_seconds_median"] == 0.3
    assert collected["training"]["step_seconds_mean"] == pytest.approx(4.9 / 20)
    assert collected["metrics"]["lowrank/captured_energy"] == pytest.approx(0.7)
    page = report.page(collected)
    assert "| step, median of the readings, ms | 300.0 |" in page
    assert "| step, mean with renewals, ms | 245.0 |" in page
    without = report.collect(**facts())
    assert "step_seconds_mean" not in without["training"]
    assert "| step, mean with renewals, ms | – |" in report.page(without)


def test_page_of_a_preempted_run_says_by_what():
    run = {"name": "try", "state": "preempted", "stopped_by": "SIGUSR1"}
    page = report.page(report.collect(**facts(run=run, metrics={}, sample=None, history=())))
    assert page.startswith("# Run try: preempted by SIGUSR1\n")
    assert "Sample" not in page


@pytest.fixture
def checkout(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    return tmp_path, git("rev-parse", "HEAD")


def test_code_version_knows_commit_and_changes(checkout):
    folder, commit = checkout
    assert report.code_version(folder / "code.py") == {"commit": commit, "dirty": False}
    (folder / "code.py").write_text("2")
    assert report.code_version(folder / "code.py") == {"commit": commit, "dirty": True}


def test_code_version_is_not_that_of_a_repository_around_an_installed_package(checkout, tmp_path_factory):
    folder, _ = checkout
    (folder / "venv").mkdir()
    (folder / "venv" / "code.py").write_text("1")
    assert report.code_version(folder / "venv" / "code.py") == {"commit": None, "dirty": None}
    outside = tmp_path_factory.mktemp("outside") / "code.py"
    outside.write_text("1")
    assert report.code_version(outside) == {"commit": None, "dirty": None}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (360_000, "100:00:00"), (None, "–")])
def test_duration(seconds, text):
    assert report.duration(seconds) == text
