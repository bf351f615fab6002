"""The curves of a run as lines of JSON in its folder, for whoever draws or compares runs without TensorBoard."""

from __future__ import annotations

import json
import os
import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from thinrank.trainers.files import append_json_line, read_json_lines, write_text

TAGS = (
    "train/loss",
    "val/loss",
    "val/bits_per_byte",
    "grad_norm",
    "lowrank/captured_energy",
    "lowrank/subspace_overlap",
    "lowrank/rank",
    "spectral/sign_diversity/_median",
    "spectral/sigma/_max",
    "spectral/stable_rank/_median",
    "spectral/collapsed",
    "time/step",
    "consumed_tokens",
)
"""What is kept: one number for the whole model. TensorBoard has the values of every parameter and group."""


class Curves(Logger):
    """Writes ``curves.jsonl``: ``{"step": 10, "train/loss": 4.2, …}``, the steps done and the `TAGS` read there.

    Values of one step may stand in several lines, a validation's apart from training's. A resumed run first drops what
    a killed process wrote after the step from which it goes on, so every reading stands there once.

    Args:
        path: the file.
        start: the optimizer step at which this process begins.
    """

    def __init__(self, path: str | os.PathLike, start: int = 0) -> None:
        super().__init__()
        self.path, self._start = Path(path), start
        self._begun = False

    @property
    def name(self) -> str | None:
        return None  # no folder of its own

    @property
    def version(self) -> str | None:
        return None

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        found = {tag: float(metrics[tag]) for tag in TAGS if tag in metrics}
        if not found or step is None:
            return
        if not self._begun:
            self._begun = True
            before = read_json_lines(self.path)
            kept = [line for line in before if line.get("step", 0) <= self._start]
            if len(kept) < len(before):
                write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        append_json_line(self.path, {"step": step, **found}, sync=False)


def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run folder's ``curves.jsonl``; [] where there is none."""
    return read_json_lines(Path(folder) / "curves.jsonl")


def series(lines: Sequence[Mapping[str, Any]], tag: str) -> list[tuple[int, float]]:
    """(step, value) of every finite reading of `tag`."""
    return [(line["step"], line[tag]) for line in lines if line.get(tag) is not None]


def step_seconds(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, seconds of training up to it), without validations; each reading of ``time/step`` is the mean since the
    reading before."""
    before, total, found = 0, 0.0, []
    for step, seconds in series(lines, "time/step"):
        total += (step - before) * seconds
        before = step
        found.append((step, total))
    return found


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What a report says of the curves; nothing where there is no reading.

    Returns:
        `training`: ``step_seconds_median``, the median of the readings, which knows no renewal and no hiccup, and
        ``step_seconds_mean``, that of all steps, with both. `metrics`: ``lowrank/captured_energy``, the mean of the
        readings.
    """
    found: dict[str, dict[str, float]] = {"training": {}, "metrics": {}}
    if total := step_seconds(lines):
        steps, seconds = total[-1]
        found["training"] = {
            "step_seconds_median": statistics.median(value for _, value in series(lines, "time/step")),
            "step_seconds_mean": seconds / steps,
        }
    if energy := [value for _, value in series(lines, "lowrank/captured_energy")]:
        found["metrics"]["lowrank/captured_energy"] = statistics.fmean(energy)
    return found
