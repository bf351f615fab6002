"""Does Spectral Alignment warn earlier than other signals? Trainings that diverge, and healthy ones.

    python benchmarks/alarms.py --out benchmarks/results/alarms.md

Small Llamas (AdamW unless a case says otherwise) on the source text of Python's standard library. What breaks a run
begins after 200 healthy steps, but for one case. Every signal but Spectral Alignment's share of one-sided layers and
the loss's z-score is looked at in parts of its own beginning (the median of the steps between the warm-up and 200). Its
threshold is the least that none of the healthy runs of another width and seed passes; then runs of the judged width and
seed say how many steps before the explosion the signal begins to alarm and stays so, and how often it alarms in healthy
ones. `AlignmentAlarm` as it comes, with no threshold fitted here, is a row of its own.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from alarm_judge import (
    SIGNALS,
    alarmed,
    curves,
    exploded_at,
    false_alarms,
    first_lasting,
    fit,
    level_alarm,
)
from alarm_runs import BROKEN, GUARDS, HEALTHY, LATER, Case, Run, Size, train
from machine import page, save

WARMUP = 40


@dataclass(frozen=True)
class Work:
    """A training to be done, or one that has been: it is kept in a file."""

    folder: Path
    case: Case
    size: Size
    guard: str = ""

    @property
    def path(self) -> Path:
        name = "".join(c if c.isalnum() else {"÷": "over", "×": "times"}.get(c, "-") for c in self.case.name)
        kind = f"-{self.guard}" if self.guard else ""
        return self.folder / f"w{self.size.width}-s{self.size.seed}-{self.size.steps}{kind}" / f"{name}.json"

    def done(self) -> Run:
        if not self.path.exists():
            torch.set_num_threads(1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            run = train(self.case, self.size, self.guard)
            run.save(self.path)
            what = f"w{self.size.width} {self.case.name} {self.guard}"
            print(f"{what}: {len(run.losses)} steps, last {run.losses[-1]:.3f}", flush=True)
        return Run.load(self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="of the models that are judged")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--other-width", type=int, default=32, help="of those by which thresholds are fitted")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the judged runs; the others have 1000 more")
    parser.add_argument("--cases", nargs="*", help="names of cases; all without")
    parser.add_argument("--guards", nargs="*", default=[], choices=tuple(GUARDS), help="train with these as well")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=Path("runs/alarms"), help="where finished trainings are kept")
    parser.add_argument("--out", type=Path, help="a page of Markdown")
    args = parser.parse_args()
    judged = Size(width=args.width, layers=args.layers, seed=args.seed, steps=args.steps)
    other = Size(width=args.other_width, layers=args.layers, seed=args.seed + 1000, steps=args.steps)
    healthy, broken = (
        [case for case in cases if not args.cases or case.name in args.cases] for cases in (HEALTHY, BROKEN)
    )
    guarded = [Work(args.work, case, judged, guard) for guard in args.guards for case in (*healthy, *broken)]
    work = [
        *(Work(args.work, case, other) for case in healthy),
        *(Work(args.work, case, judged) for case in (*healthy, *broken)),
        *guarded,
    ]
    with ProcessPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(Work.done, work))
    n = len(healthy)
    end = 2 * n + len(broken)
    lines = report(runs[:n], runs[n : 2 * n], runs[2 * n : end])
    if guarded:
        lines += saved(runs[n:end], runs[end:], args.guards)
    print("\n".join(lines))
    save(lines, args.out)


def report(fitted: Sequence[Run], healthy: Sequence[Run], broken: Sequence[Run]) -> list[str]:
    """The page: a table of signals, and one of cases."""
    baseline = LATER - WARMUP
    thresholds = fit([curves(run, WARMUP, baseline) for run in fitted], [run.steps for run in fitted], LATER)
    names = [signal.name for signal in SIGNALS]
    flags: dict[str, dict[str, list[bool]]] = {}
    for run in (*healthy, *broken):
        own = curves(run, WARMUP, baseline)
        flags[run.case.name] = {name: alarmed(own[name], thresholds[name]) for name in names}
        flags[run.case.name]["AlignmentAlarm"] = level_alarm(run, WARMUP, baseline)
    ends = {run.case.name: exploded_at(run.losses) for run in broken}
    exploded = [run for run in broken if ends[run.case.name] is not None]
    steps = sum(max(0, run.steps[-1] - LATER) for run in healthy)
    size = broken[0].size if broken else healthy[0].size
    facts = [
        f"judged: width {size.width}, {size.layers} layers, seed {size.seed}; thresholds: width "
        f"{fitted[0].size.width}, seed {fitted[0].size.seed}",
        f"{size.steps} steps of {size.rows * size.length:,} tokens, read every {size.every}",
        f"{len(broken)} runs with something that may break them, of which {len(exploded)} exploded (mean of 5 losses 1 "
        f"nat above its lowest, or no number); {len(healthy)} healthy runs, {steps:,} steps after the first {LATER}",
        "lead: steps from the first alarm that stays on to the explosion; missed: no alarm before it",
    ]
    head = ("signal", "threshold", "median lead", "least", "most", "missed", "false alarms", "per 10,000 steps")
    lines = page("Which signal warns first", facts, head)
    for name in (*names, "AlignmentAlarm"):
        leads = []
        for run in exploded:
            end = ends[run.case.name]
            assert end is not None
            start = LATER if run.case.begin else WARMUP
            first = first_lasting(flags[run.case.name][name], run.steps, start, end)
            if first is not None:
                leads.append(end - first)
        wrong = sum(false_alarms(flags[run.case.name][name], run.steps, LATER) for run in healthy)
        spread = (statistics.median(leads), min(leads), max(leads)) if leads else (math.nan,) * 3
        cells = [_shown(value) for value in (thresholds.get(name, math.nan), *spread)]
        cells += [f"{len(exploded) - len(leads)} of {len(exploded)}", str(wrong)]
        cells.append(_shown(1e4 * wrong / steps if steps else math.nan))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Each run: the step of its explosion, and the first alarm of each signal that stays on until then.",
        "",
    ]
    lines += ["| run | exploded | last loss | " + " | ".join((*names, "AlignmentAlarm")) + " |"]
    lines += ["| --- |" + " ---: |" * (len(names) + 3)]
    for run in broken:
        end = ends[run.case.name]
        cells = []
        for name in (*names, "AlignmentAlarm"):
            start = LATER if run.case.begin else WARMUP
            first = first_lasting(flags[run.case.name][name], run.steps, start, end or run.steps[-1])
            cells.append("–" if first is None else str(first))
        lines.append(f"| {run.case.name} | {end or '–'} | {run.losses[-1]:.2f} | " + " | ".join(cells) + " |")
    lines += ["", "Healthy runs: their last loss (mean of 20 steps), and the alarms of each signal.", ""]
    lines += ["| run | last loss | " + " | ".join((*names, "AlignmentAlarm")) + " |"]
    lines += ["| --- |" + " ---: |" * (len(names) + 2)]
    for run in healthy:
        cells = [str(false_alarms(flags[run.case.name][name], run.steps, LATER)) for name in (*names, "AlignmentAlarm")]
        lines.append(f"| {run.case.name} | {statistics.fmean(run.losses[-20:]):.3f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def saved(plain: Sequence[Run], guarded: Sequence[Run], guards: Sequence[str]) -> list[str]:
    """What guards made of the runs: last losses, and which no longer explode."""
    lines = ["With a guard: mean of the last 20 losses, in brackets the steps that were left out; ✗: it exploded.", ""]
    lines += ["| run | without | " + " | ".join(guards) + " |", "| --- |" + " ---: |" * (len(guards) + 1)]
    found = {(run.case.name, run.guard): run for run in (*plain, *guarded)}
    rescued: dict[str, int] = dict.fromkeys(guards, 0)
    cost: dict[str, list[float]] = {guard: [] for guard in guards}
    for run in plain:
        cells = []
        for guard in ("", *guards):
            other = found[run.case.name, guard]
            bad = exploded_at(other.losses) is not None
            skipped = f" ({other.skipped})" if other.skipped else ""
            cells.append(f"{statistics.fmean(other.losses[-20:]):.3f}{skipped}{' ✗' if bad else ''}")
            if guard and run.case.broken and exploded_at(run.losses) is not None and not bad:
                rescued[guard] += 1
            if guard and not run.case.broken:
                cost[guard].append(statistics.fmean(other.losses[-20:]) - statistics.fmean(run.losses[-20:]))
        lines.append(f"| {run.case.name} | " + " | ".join(cells) + " |")
    exploding = sum(exploded_at(run.losses) is not None for run in plain if run.case.broken)
    lines.append("")
    for guard in guards:
        lines.append(
            f"- {guard}: {rescued[guard]} of {exploding} exploding runs no longer do; healthy runs end "
            f"{statistics.fmean(cost[guard]):+.4f} nats away in the mean, {max(cost[guard]):+.4f} at most"
        )
    return [*lines, ""]


def _shown(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:.3g}" if value != int(value) else str(int(value))


if __name__ == "__main__":
    main()
