"""``launch/transfer.py``: sweeps of small models, told as what to do with a large one."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinrank.configs.arguments import parse
from thinrank.configs.errors import ConfigError

USAGE = """python launch/transfer.py --widths 64,128,256 --target 1024 --lr 1e-3,2e-3,4e-3 --decay 0.1,0.2 [key=value …]

Train models of several widths under one or several rules of scale, and say what they mean for a wider one. The keys are
those of launch/pretrain.py; model sizes are those of any width of the kind. A finished run is never done again.

  --widths W,W,W    hidden sizes of the proxies, at least three
  --target W        the width that is wanted, above all proxies
  --lr X,X,X        rates of the matrices at the base, at least three, rising
  --decay X,X       weight decays at the base, rising (default: 0.1)
  --rules R,R       none, const, sqrt_wd, linear_wd, completep, or exponents of the decay, such as 0.7
                    (default: const,sqrt_wd,linear_wd)
  --seeds N,N       (default: 0)
  --base W          width at which rates and decays are what they are called (default: the smallest proxy)
  --design D        cross (rates at the middle decay, then decays at the best rate; default), or grid
  --probes N        readings of singular values in a run (default: 8)
  --steps N         of every run (in the place of trainer.max_steps)
  --coordinates N   steps of the coordinate check; 0: none (default: 4)
  --dir FOLDER      (default: runs/transfer)
  --jobs N          runs at once, each in a process of its own; 1: in this process (default: 1)
  --threads N       CPU threads of a run with --jobs above 1 (default: cores / jobs)
  --minutes N       begin no run after this time
  --report          run nothing, write what there is
  --config FILE, --config-dir FOLDER, --help as in launch/pretrain.py
"""

_LISTS = {"--widths": int, "--lr": float, "--decay": float, "--rules": str, "--seeds": int}
_NUMBERS = {"--target": int, "--base": int, "--probes": int, "--steps": int, "--coordinates": int, "--jobs": int,
            "--threads": int, "--minutes": float}  # fmt: skip
_WORDS = ("--design", "--dir", "--one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    values: dict[str, Any]
    """By option, without its dashes."""
    rest: tuple[str, ...] = ()
    """For the configuration."""
    report: bool = False
    help: bool = False


def request(argv: Sequence[str]) -> Request:
    """Split the command line.

    Raises:
        ConfigError: with the remedy.
    """
    values: dict[str, Any] = {}
    rest: list[str] = []
    report = asked = False
    words = list(argv)
    while words:
        option, equals, value = (word := words.pop(0)).partition("=")
        if option in _LISTS or option in _NUMBERS or option in _WORDS:
            if not equals:
                if not words or words[0].startswith("--"):
                    raise ConfigError(f"{option} needs a value: see --help")
                value = words.pop(0)
            values[option.removeprefix("--")] = _value(option, value)
        elif option == "--report":
            report = True
        elif option in ("--help", "-h"):
            asked = True
        elif option in ("--config", "--config-dir") and not equals and words:
            rest += [option, words.pop(0)]
        elif option in ("--cfg", "--dry-run"):
            raise ConfigError(f"{option} belongs to launch/pretrain.py: leave it out here")
        else:
            rest.append(word)
    return Request(values=values, rest=tuple(rest), report=report, help=asked)


def _value(option: str, text: str) -> Any:
    kind: Any = _LISTS.get(option) or _NUMBERS.get(option) or str
    try:
        if option in _LISTS:
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        return kind(text)
    except ValueError:
        what = "numbers separated by commas" if option in _LISTS else "a number"
        raise ConfigError(f"{option} takes {what}, got {text!r}: see --help") from None


def answer(asked: Request, argv: Sequence[str]) -> str:
    """Do what was asked for, and say where it stands.

    Raises:
        ConfigError, UserError: with the remedy.
    """
    from thinrank.configs.load import load
    from thinrank.configs.schema import PRETRAIN

    values = dict(asked.values)
    if "one" in values:
        return _one(Path(values["one"]), values.get("probes", 8))
    for name in ("widths", "target", "lr"):
        if name not in values:
            raise ConfigError(f"--{name} must be given: see --help for an example")
    steps = [] if "steps" not in values else [f"trainer.max_steps={values['steps']}"]
    base = load(PRETRAIN, parse([*asked.rest, *steps])).config
    from thinrank.trainers.transfer.analysis import advise, judge
    from thinrank.trainers.transfer.conduct import conduct, coordinates, known
    from thinrank.trainers.transfer.page import words, write
    from thinrank.trainers.transfer.sweep import Sweep, check, scaling_at

    try:
        sweep = Sweep(
            widths=tuple(sorted(values["widths"])),
            rates=values["lr"],
            decays=values.get("decay", (0.1,)),
            target=values["target"],
            base_width=values.get("base"),
            **{key: values[key] for key in ("rules", "seeds", "design", "probes") if key in values},
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    jobs = values.get("jobs", 1)
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}: leave it out to run one after the other")
    check(sweep, base)
    root = Path(values.get("dir", "runs/transfer")).expanduser()
    _same_base(root, base)
    failures: list[str] = []
    if not asked.report:
        threads = values.get("threads", max(1, (os.cpu_count() or 1) // jobs))
        failures = conduct(
            sweep,
            base,
            root,
            start=None if jobs == 1 else lambda each: _start(each, threads, sweep.probes),
            jobs=jobs,
            deadline=time.monotonic() + 60 * values["minutes"] if "minutes" in values else float("inf"),
            say=lambda text: print(text, flush=True),
        )
    records = known(sweep, base, root)
    scalings = {rule: scaling_at(sweep, base, rule) for rule in sweep.rules}
    verdicts = []
    for rule in sweep.rules:
        mine = [r for r in records if r.trial.rule == rule]
        verdict = judge(sweep, rule, scalings[rule], {w: [r for r in mine if r.trial.width == w] for w in sweep.widths})
        if (checked := values.get("coordinates", 4)) and mine and not asked.report:
            found = coordinates(sweep, base, rule, steps=checked, vocab=256)
            (root / rule).mkdir(exist_ok=True)
            (root / rule / "coordinates.txt").write_text(found.table() + "\n")
            verdict.coordinates = found.growing()
        verdicts.append(verdict)
    advice = advise(sweep, verdicts, scalings)
    command = f"python launch/transfer.py {shlex.join(argv)}"
    path = write(sweep, base, verdicts, advice, records, root, command=command, failures=failures)
    lines = [f"report      {path}", f"runs        {len(records)} have ended, {len(failures)} failed"]
    if advice is not None:
        lines += [
            f"for {sweep.target:<7} rule {advice.rule}, confidence {advice.confidence}",
            f"            {words(sweep, base, advice)}",
        ]
    return "\n".join(lines)


def _same_base(root: Path, base: Any) -> None:
    """Refuses a folder whose runs were made with other settings, and notes those of a new one.

    Raises:
        ConfigError: with what differs.
    """
    from thinrank.trainers.files import write_json
    from thinrank.trainers.run import config_tree

    tree = json.loads(json.dumps({key: value for key, value in config_tree(base).items() if key != "run"}))
    path = root / "base.json"
    if not path.is_file():
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, tree)
        return
    before, now = _flat(json.loads(path.read_text())), _flat(tree)
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{root} holds runs with {key}={before.get(key)}, and now it is {now.get(key)}: set it back, or set --dir "
            "to another folder"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {key: value for name, item in tree.items() for key, value in _flat(item, f"{prefix}{name}.").items()}


def _start(trial: Any, threads: int, probes: int) -> subprocess.Popen[bytes]:
    """Starts a run in a process of its own, from its configuration as a file."""
    from thinrank.configs.reader import write
    from thinrank.trainers.run import config_tree

    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    beside = trial.folder.with_name(f"{trial.folder.name}.yaml")
    beside.write_text(write(config_tree(trial.config)))
    script = Path(sys.argv[0]).resolve()
    with open(trial.folder.with_name(f"{trial.folder.name}.log"), "a") as log:
        return subprocess.Popen(
            [sys.executable, str(script), "--one", str(beside), "--probes", str(probes)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            start_new_session=True,
        )


def _one(file: Path, probes: int) -> str:
    """One run of a sweep, by its file."""
    from thinrank.configs.load import load
    from thinrank.configs.schema import PRETRAIN
    from thinrank.trainers.transfer.conduct import run_one

    config = load(PRETRAIN, parse(["--config", str(file)])).config
    run_one(config, probes)
    return f"ended       {config.run.dir}"
