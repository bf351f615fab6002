"""Compare optimizers on the main job: tune each alike, train the best of each over several seeds, leave table and plot.

    make study                                                     # benchmarks/studies/pysource-2m.yaml
    make study ARGS="benchmarks/studies/pysource-9m.yaml --only adamw subspace_adamw --jobs 2"
    make study ARGS="--stage report"                               # run nothing, write what there is

Every run is `launch/pretrain.py` (or the file's `job`) in a process and a folder of its own; a finished one is never
run again and an interrupted one goes on from its checkpoint, so the same command after a kill goes on with the study.
docs/study.md says how tuning goes and what the table shows.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from study_file import Found, Method, Outcome, Point, Run, Study, best_of, load_study, outcome, pace
from study_report import write_results

from thinrank.configs.errors import ConfigError

HERE = Path(__file__).resolve().parent
LAUNCH = HERE.parent / "launch"
DEFAULT = HERE / "studies" / "pysource-2m.yaml"


def next_point(shape: Point, start: Point, scores: Mapping[Point, float]) -> Point | None:
    """The setting to try next: the untried one nearest to the best so far.

    Distance is the number of steps along the axes, so the neighbours of the best come first, one axis changed, and the
    search moves as soon as one of them is better; where all are worse, it widens. Ties go by the order of the axes,
    upwards first, unless nothing has converged yet.

    Args:
        shape: values on each axis.
        start: the first setting.
        scores: those tried, smaller is better, infinity for a run that diverged.

    Returns:
        None if everything was tried.
    """
    if not scores:
        return start
    best = min(scores, key=lambda point: scores[point])
    up = 1 if math.isfinite(scores[best]) else -1
    untried = (point for point in itertools.product(*map(range, shape)) if point not in scores)

    def order(point: Point) -> tuple[int, list[int], list[int]]:
        moves = [a - b for a, b in zip(point, best, strict=True)]
        return sum(map(abs, moves)), [-abs(move) for move in moves], [-up * move for move in moves]

    return min(untried, key=order, default=None)


def tuning(study: Study, method: Method) -> Generator[Run, None, list[Outcome]]:
    """The tuning runs of a method, each handed out when it is to be run; the search goes by what the folders say.

    Returns:
        The outcomes in order; the last one may be missing, and nothing is known of what would follow.
    """
    found: list[Outcome] = []
    while len(found) < study.tune_runs:
        point = next_point(method.shape, method.start, {each.point: each.score for each in found})
        assert point is not None  # a grid has at least as many settings as there are runs
        run = study.run("tune", method, point, study.tune_seed)
        if outcome(run, point).state == "missing":
            yield run
        found.append(outcome(run, point))
        if found[-1].state == "missing":
            break
    return found


def finals(study: Study, method: Method) -> Generator[Run, None, list[Outcome]]:
    """The final runs of a method: its best setting with every seed; none before its tuning is complete."""
    found: list[Outcome] = []
    best = best_of(study, peek(tuning(study, method)))
    if best is None:
        return found
    for seed in study.final_seeds:
        run = study.run("final", method, best.point, seed)
        if outcome(run, best.point).state == "missing":
            yield run
        found.append(outcome(run, best.point))
    return found


def pacing(study: Study, method: Method) -> Generator[Run, None, list[Outcome]]:
    """The runs that measure a step of a method's best setting; none where the study does not ask for them."""
    found: list[Outcome] = []
    best = best_of(study, peek(tuning(study, method)))
    if best is None or study.pace_steps is None:
        return found
    for seed in range(study.tune_seed, study.tune_seed + study.pace_runs):
        run = study.run("pace", method, best.point, seed)
        if outcome(run, best.point).state == "missing":
            yield run
        found.append(outcome(run, best.point))
    return found


def timed(study: Study, method: Method) -> Generator[Run, None, list[Outcome]]:
    """The best setting with every seed, for as many steps as fit the time of the baseline's final runs, whose own final
    runs these are; none before both are paced."""
    found: list[Outcome] = []
    if method.name == study.baseline:
        return peek(finals(study, method)) if pace(peek(pacing(study, method))) else found
    baseline = next((each for each in study.methods if each.name == study.baseline), None)
    mine = peek(pacing(study, method))
    own, theirs = pace(mine), pace(peek(pacing(study, baseline))) if baseline else None
    if own is None or theirs is None:
        return found
    point = mine[0].point
    steps = round(study.loaded("final", method, point).config.trainer.max_steps * theirs / own)
    for seed in study.final_seeds:
        run = study.run("time", method, point, seed, max(1, steps))
        if outcome(run, point).state == "missing":
            yield run
        found.append(outcome(run, point))
    return found


def peek(task: Generator[Run, None, list[Outcome]]) -> list[Outcome]:
    """What a task returns if nothing is run for it."""
    found: list[Outcome] = []

    def drain() -> Generator[Run, None, None]:
        found.extend((yield from task))

    for _ in drain():
        pass
    return found


class Handle(Protocol):
    """A run that was started, as `subprocess.Popen`."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


def launch(run: Run, threads: int) -> Handle:
    """Starts a run in a process of its own, which a signal to the study reaches through the study alone."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    count = str(threads)
    with open(log_of(run), "a") as log:
        return subprocess.Popen(
            [sys.executable, str(LAUNCH / f"{run.job}.py"), *run.words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count},
            start_new_session=True,
        )


def log_of(run: Run) -> Path:
    """What a run printed; beside its folder, which has to be empty where nothing was begun."""
    return run.folder.with_name(f"{run.folder.name}.log")


def execute(
    tasks: Iterable[Generator[Run, None, Any]],
    start: Callable[[Run], Handle],
    *,
    jobs: int = 1,
    deadline: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Runs what the tasks hand out, in turns, so that all are equally far whenever it ends.

    Args:
        tasks: hand out one run after the other; a task goes on when its run has ended.
        start: starts a run.
        jobs: runs at once.
        deadline: by `time.monotonic()`; no run is started after it, and those under way are waited for.
        say: told of every start and end.

    Returns:
        One sentence for each run that failed; its task is not asked again.
    """
    waiting, running, failures = deque(tasks), [], []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                if time.monotonic() > deadline:
                    continue
                run = next(task, None)
                if run is not None:
                    say(f"begins   {run}")
                    running.append((start(run), run, task, time.monotonic()))
            for entry in list(running):
                handle, run, task, begun = entry
                code = handle.poll()
                if code is None:
                    continue
                running.remove(entry)
                now = outcome(run, ())
                if now.state == "missing":
                    failures.append(f"{run} ended with code {code}: {now.error or last_line(log_of(run))}")
                    say(f"failed   {failures[-1]}")
                    continue
                bits = "diverged" if now.state == "diverged" else f"{now.score:.4f} bits per byte"
                say(f"{now.state:<9}{run}: {bits}, {time.monotonic() - begun:.0f} s")
                waiting.append(task)
            if running:
                time.sleep(0.05)
    finally:
        for handle, *_ in running:  # an interrupted study: its runs save and go on next time
            handle.terminate()
        for handle, *_ in running:
            handle.wait()
    return failures


def last_line(log: Path) -> str:
    """The last words of a run; for a refused one they are the sentence that says why."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


STAGES = {"tune": tuning, "final": finals, "pace": pacing, "time": timed}
"""The stages in their order, and what hands out a method's runs of each."""


def conduct(
    study: Study,
    start: Callable[[Run], Handle],
    *,
    stage: str = "all",
    only: Sequence[str] = (),
    jobs: int = 1,
    deadline: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Runs what a study still lacks.

    Args:
        study: what is compared.
        start: starts a run.
        stage: all, report (nothing runs), or one of tune, final, pace (one run at a time, whatever `jobs` says), time.
        only: names of the methods to run; all if empty.
        jobs: runs at once.
        deadline: see `execute`.
        say: told of every start and end.

    Returns:
        One sentence for each run that failed.
    """
    failures: list[str] = []
    chosen = [method for method in study.methods if not only or method.name in only]
    for name, make in STAGES.items():
        if stage in ("all", name):
            tasks = [make(study, method) for method in chosen]
            failures += execute(tasks, start, jobs=1 if name == "pace" else jobs, deadline=deadline, say=say)
    return failures


def results(study: Study) -> list[Found]:
    """What each method's runs have found, as far as they are there."""
    return [
        Found(method=method, **{name: peek(make(study, method)) for name, make in STAGES.items()})
        for method in study.methods
    ]


def _check_names(only: Sequence[str], study: Study) -> None:
    names = [method.name for method in study.methods]
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
            raise ConfigError(f"--only: the study {study.name} has no method {name} that can run: {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, default=DEFAULT, help="YAML file (default: pysource-2m)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="METHOD", help="run these methods; what others have is shown"
    )
    parser.add_argument("--stage", default="all", choices=["all", *STAGES, "report"], help="what to run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they slow each other, so times need 1")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of a run (default: cores / jobs)")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where the run folders lie")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file; the plot is beside it")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    try:
        study = load_study(args.study, root=args.runs)
        _check_names(args.only, study)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for sentence in study.left_out:
        print(sentence, flush=True)
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    deadline = time.monotonic() + 60 * args.budget_minutes
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        failures = conduct(
            study,
            lambda run: launch(run, threads),
            stage=args.stage,
            only=args.only,
            jobs=args.jobs,
            deadline=deadline,
            say=lambda text: print(text, flush=True),
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    out = args.out or HERE / "results" / f"study-{study.name}.md"
    command = f"python benchmarks/{shlex.join(['study.py', *(sys.argv[1:] if argv is None else argv)])}"
    write_results(study, results(study), out, command=command, failures=failures)
    print(f"table and plot: {out}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
