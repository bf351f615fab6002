"""Runs what a transfer still lacks; a finished run is never done again, and an interrupted one goes on."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from thinrank.trainers.errors import GuardStop, UserError
from thinrank.trainers.files import write_json
from thinrank.trainers.pretrain import Plan, PretrainConfig
from thinrank.trainers.strategies.world import World
from thinrank.trainers.transfer.probe import FILE, Probed
from thinrank.trainers.transfer.sweep import Sweep, Trial, trial

DIVERGED = "diverged.json"


@dataclass(frozen=True)
class Record:
    """What became of a run.

    Attributes:
        trial: the run.
        loss: nats per token on the whole held-out text; infinite where training diverged.
        probe: what `Probe` has written; {} where training diverged.
        seconds: of a step in the mean; None where nobody knows.
    """

    trial: Trial
    loss: float
    probe: dict[str, Any]
    seconds: float | None = None


def record(trial: Trial) -> Record | None:
    """What a run's folder says; None where it has not ended, or is that of another configuration."""
    try:
        if (trial.folder / DIVERGED).is_file():
            return Record(trial, math.inf, {})
        report = json.loads((trial.folder / "report.json").read_text())
        if report["run"]["state"] != "finished":
            return None
        probe = json.loads((trial.folder / FILE).read_text())
    except (OSError, ValueError, KeyError):
        return None
    loss = report["metrics"].get("test/loss")
    return Record(
        trial,
        math.inf if loss is None or not math.isfinite(loss) else loss,
        probe,
        report.get("training", {}).get("step_seconds_mean"),
    )


def trials(
    sweep: Sweep, base: PretrainConfig, root: Path, rule: str, width: int
) -> Generator[Trial, None, list[Record]]:
    """The runs at one width under one rule, each handed out when it is to be run; `cross` goes by what it finds.

    Returns:
        What all of them have found; short of those that failed.
    """
    found: list[Record] = []

    def at(rate: int, decay: int) -> Generator[Trial, None, float]:
        losses = []
        for seed in sweep.seeds:
            each = trial(sweep, base, root, rule, width, rate, decay, seed)
            if record(each) is None:
                yield each
            known = record(each)
            if known is not None:
                found.append(known)
                losses.append(known.loss)
        return sum(losses) / len(losses) if losses else math.inf

    rates, decays = range(len(sweep.rates)), range(len(sweep.decays))
    if sweep.design == "grid":
        for rate in rates:
            for decay in decays:
                yield from at(rate, decay)
        return found
    line = {}
    for rate in rates:
        line[rate] = yield from at(rate, sweep.middle)
    best = min(line, key=lambda rate: line[rate])
    for decay in decays:
        if decay != sweep.middle:
            yield from at(best, decay)
    return found


def known(sweep: Sweep, base: PretrainConfig, root: Path) -> list[Record]:
    """What there is of all runs, without running any."""
    found: list[Record] = []

    def drain() -> Generator[Trial, None, None]:
        for rule in sweep.rules:
            for width in sweep.widths:
                found.extend((yield from trials(sweep, base, root, rule, width)))

    for _ in drain():
        pass
    return found


def run_one(config: PretrainConfig, probes: int) -> bool:
    """Trains and measures one run in this process. Divergence is a result, and noted as one; what the run prints goes
    into a file beside its folder.

    Returns:
        Whether it came to an end; not where it was told to stop, and has saved what it had.

    Raises:
        UserError: as `pretrain`.
    """
    from thinrank.trainers.assembly import run

    folder = Path(config.run.dir)
    steps = Plan.of(config, World()).steps
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside its folder, which has to be empty where nothing was begun
    with open(folder.with_name(f"{folder.name}.log"), "a") as log, redirect_stdout(log):
        try:
            report = run(Probed(config, steps=steps, probes=probes))
            if report["run"]["state"] != "finished":
                return False
        except GuardStop as error:
            write_json(folder / DIVERGED, {"reason": str(error)})
    if record_ended(folder):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # hundreds of runs, of which numbers are wanted
    return True


def record_ended(folder: Path) -> bool:
    """Whether a run needs its checkpoints no more."""
    return (folder / DIVERGED).is_file() or (folder / FILE).is_file()


def last_line(folder: Path) -> str:
    """The last words of a run."""
    log = folder.with_name(f"{folder.name}.log")
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


class Handle(Protocol):
    """A process that was started, as `subprocess.Popen`."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


def conduct(
    sweep: Sweep,
    base: PretrainConfig,
    root: Path,
    *,
    start: Callable[[Trial], Handle] | None = None,
    jobs: int = 1,
    deadline: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Runs what is missing, narrow models first.

    Args:
        start: starts a run in a process of its own; None: one after the other in this process.
        jobs: runs at once, with `start`.
        deadline: by `time.monotonic()`; no run is begun after it.
        say: told of every start and end.

    Returns:
        One sentence for each run that failed.
    """
    waiting = deque(trials(sweep, base, root, rule, width) for width in sorted(sweep.widths) for rule in sweep.rules)
    running: list[tuple[Handle, Trial, Generator[Trial, None, list[Record]], float]] = []
    failures: list[str] = []
    busy: set[Path] = set()

    def ended(each: Trial, task: Generator[Trial, None, list[Record]], begun: float, why: str) -> None:
        busy.discard(each.folder)
        result = record(each)
        if result is None:
            failures.append(f"{each}: {why}")
            say(f"failed    {failures[-1]}")
            return
        verdict = f"{result.loss:.4f} nats" if math.isfinite(result.loss) else "diverged"
        say(f"ended     {each}: {verdict}, {time.monotonic() - begun:.0f} s")
        waiting.appendleft(task)

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                if time.monotonic() > deadline or (each := next(task, None)) is None:
                    continue
                if each.folder in busy:  # the same run for another rule: it will be there later
                    waiting.append(trials(sweep, base, root, each.rule, each.width))
                    break
                say(f"begins    {each}")
                begun = time.monotonic()
                if start is None:
                    why = "it was interrupted: start the same command again, and it goes on"
                    try:
                        if not run_one(each.config, sweep.probes):
                            waiting.clear()  # who stops one of a sequence in one process means all
                    except UserError as error:
                        why = str(error)
                    ended(each, task, begun, why)
                    continue
                busy.add(each.folder)
                running.append((start(each), each, task, begun))
            for entry in list(running):
                handle, each, task, begun = entry
                if (code := handle.poll()) is not None:
                    running.remove(entry)
                    ended(each, task, begun, f"it ended with code {code}: {last_line(each.folder)}")
            if running:
                time.sleep(0.05)
    finally:
        for handle, *_ in running:
            handle.terminate()
        for handle, *_ in running:
            handle.wait()
    return failures


def coordinates(sweep: Sweep, base: PretrainConfig, rule: str, *, steps: int, vocab: int) -> Any:
    """The coordinate check of the proxies under a rule, at the sweep's largest rate, on one batch of drawn tokens."""
    import torch

    from thinrank.optim import build
    from thinrank.optim.scaling import coordinate_check
    from thinrank.trainers.module import token_nats

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (2, min(64, base.data.sequence_length) + 1), generator=draw)

    def make(width: int) -> tuple[torch.nn.Module, Callable[[], None]]:
        each = trial(sweep, base, Path(), rule, width, len(sweep.rates) - 1, 0, sweep.seeds[0])
        job = Probed(each.config, steps=1, probes=2)
        model = job.build(vocab)
        optimizer = build(model, each.config.optimizer, scaling=job.scaling(model))

        def step() -> None:
            nats, count = token_nats(model(input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:])
            (nats / count).backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, step

    return coordinate_check(make, sweep.widths, steps=steps)


def widths_of(records: Sequence[Record]) -> dict[int, list[float]]:
    """Seconds of a step by width, for who wants to know what more runs would cost."""
    found: dict[int, list[float]] = {}
    for each in records:
        if each.seconds is not None:
            found.setdefault(each.trial.width, []).append(each.seconds)
    return found
