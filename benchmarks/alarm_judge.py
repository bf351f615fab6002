"""Who warned first: signals of trainings as curves, thresholds fitted on some, leads and false alarms on others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alarm_runs import Run

from thinrank.optim.monitors.alignment import LEVELS, AlignmentAlarm

WINDOW = 5
"""Steps whose mean loss is looked at."""

NATS = 1.0
"""So far above its lowest a mean loss has exploded. Small models with a small vocabulary cannot rise by 3."""

HISTORY = 128
"""Losses by which the next one's z-score is taken, as OLMo's guard does."""


def exploded_at(losses: Sequence[float], nats: float = NATS) -> int | None:
    """The step (from 1) at which the mean of the last `WINDOW` losses is `nats` above its lowest so far, or a loss is
    no number; None where that never is."""
    lowest = math.inf
    for step in range(1, len(losses) + 1):
        if not math.isfinite(losses[step - 1]):
            return step
        if step < WINDOW:
            continue
        mean = statistics.fmean(losses[step - WINDOW : step])
        if mean > lowest + nats:
            return step
        lowest = min(lowest, mean)
    return None


def z_scores(losses: Sequence[float]) -> list[float]:
    """Of each loss among the `HISTORY` before it, 0 before half of these are there."""
    found = []
    for i, loss in enumerate(losses):
        before = losses[max(0, i - HISTORY) : i]
        if len(before) < HISTORY // 2:
            found.append(0.0)
            continue
        spread = statistics.pstdev(before)
        found.append((loss - statistics.fmean(before)) / spread if spread > 0 else 0.0)
    return found


@dataclass(frozen=True, slots=True)
class Signal:
    """A curve that alarms when it is too large.

    Attributes:
        relative: it is looked at in parts of its own beginning, since its size differs from model to model.
    """

    name: str
    relative: bool = True


SIGNALS = (
    Signal("one-sided layers (Spectral Alignment)", relative=False),
    Signal("loss of mean sign diversity (Spectral Alignment)"),
    Signal("largest σ1"),
    Signal("weight norm"),
    Signal("gradient norm"),
    Signal("largest activation"),
    Signal("largest attention logit (bound)"),
    Signal("loss z-score", relative=False),
)


def curves(run: Run, warmup: int, baseline: int) -> dict[str, list[float]]:
    """Each signal at each reading, larger being worse."""

    def largest(metric: str) -> list[float]:
        return [max(row) for row in run.layers[metric]]

    def between(values: Sequence[float]) -> list[float]:
        """The largest since the reading before."""
        found, before = [], 0
        for step in run.steps:
            found.append(max(values[before:step]))
            before = step
        return found

    alarm = AlignmentAlarm(warmup=warmup, baseline=baseline)
    shares = []
    diversity = [statistics.fmean(row) for row in run.layers["sign_diversity"]]
    for i, step in enumerate(run.steps):
        keys = ("sign_diversity", "sigma", "sigma_gap")
        rows = zip(*(run.layers[key][i] for key in keys), strict=True)
        shares.append(alarm.update(step, {str(n): row for n, row in enumerate(rows)}).collapsed)
    norms = [math.sqrt(sum(value * value for value in row)) for row in run.layers["weight_rms"]]
    values = (
        shares,
        [1 / max(value, 1e-3) for value in diversity],
        largest("sigma"),
        norms,
        between(run.norms),
        largest("input_max"),
        run.logits,
        between(z_scores(run.losses)),
    )
    found = {}
    for signal, curve in zip(SIGNALS, values, strict=True):
        scale = 1.0
        if signal.relative:
            begun = [value for step, value in zip(run.steps, curve, strict=True) if warmup < step <= warmup + baseline]
            scale = statistics.median(begun) if begun else math.nan
        found[signal.name] = [value / scale if scale > 0 else math.nan for value in curve]
    return found


def level_alarm(run: Run, warmup: int, baseline: int, level: str = "warn") -> list[bool]:
    """Whether `AlignmentAlarm` as it comes, with no threshold fitted, is at this level or above at each reading."""
    alarm, found = AlignmentAlarm(warmup=warmup, baseline=baseline), []
    for i, step in enumerate(run.steps):
        keys = ("sign_diversity", "sigma", "sigma_gap")
        rows = zip(*(run.layers[key][i] for key in keys), strict=True)
        verdict = alarm.update(step, {str(n): row for n, row in enumerate(rows)})
        found.append(LEVELS.index(verdict.level) >= LEVELS.index(level))
    return found


def fit(
    healthy: Sequence[Mapping[str, Sequence[float]]], steps: Sequence[Sequence[int]], start: int
) -> dict[str, float]:
    """For each signal the least threshold that no healthy run passes after its first `start` steps."""
    found = {}
    for signal in SIGNALS:
        found[signal.name] = max(
            value
            for own, at in zip(healthy, steps, strict=True)
            for step, value in zip(at, own[signal.name], strict=True)
            if step > start and math.isfinite(value)
        )
    return found


def alarmed(curve: Sequence[float], threshold: float) -> list[bool]:
    """Above the threshold, or no number."""
    return [not value <= threshold for value in curve]


def first_lasting(flags: Sequence[bool], steps: Sequence[int], start: int, until: int) -> int | None:
    """The first reading after `start` from which on all up to step `until` alarm; None where the last does not."""
    first = None
    for flag, step in zip(flags, steps, strict=True):
        if step > until:
            break
        if not flag or step <= start:
            first = None
        elif first is None:
            first = step
    return first


def false_alarms(flags: Sequence[bool], steps: Sequence[int], start: int) -> int:
    """How often a healthy run's signal begins to alarm after its first `start` steps."""
    found, before = 0, False
    for flag, step in zip(flags, steps, strict=True):
        if step > start:
            found += flag and not before
            before = flag
    return found
