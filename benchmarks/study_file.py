"""A study's file: what is compared, over which settings; the runs that follow from it, and what became of them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinrank.configs.compose import Schema
from thinrank.configs.errors import ConfigError
from thinrank.configs.load import Loaded, load
from thinrank.configs.reader import read
from thinrank.configs.schema import FINETUNE, PRETRAIN
from thinrank.trainers import curves

Point = tuple[int, ...]
"""A setting of a grid: the index on each axis."""

JOBS = {"pretrain": PRETRAIN, "finetune": FINETUNE}
"""What a run may be: launch/NAME.py, and what that configures."""

OWN = (
    "run", "trainer.seed", "trainer.projection_seed", "data.seed", "data.final_validation_unseen", "trainer.max_time",
    "trainer.tensorboard", "trainer.export", "trainer.sample_tokens",
)  # fmt: skip
"""What the study sets itself, or what would make runs unequal."""

QUIET = {"trainer.tensorboard": False, "trainer.export": False, "trainer.sample_tokens": 0}

OF_A_METHOD = (
    "optimizer", "optimizer.", "adapter", "adapter.", "reparam", "reparam.", "trainer.schedule.", "trainer.clip_norm",
)  # fmt: skip
"""What methods may differ in; anything else is the same for all of them."""


STOPPED = 76
"""The exit code of a run that a guard stopped: it diverged, and would again."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method with the settings that tuning may try."""

    name: str
    overrides: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    start: Point

    @property
    def shape(self) -> Point:
        return tuple(len(values) for values in self.grid.values())

    def setting(self, point: Point) -> dict[str, Any]:
        """The values of a point of the grid."""
        return {key: values[i] for (key, values), i in zip(self.grid.items(), point, strict=True)}

    @property
    def fixed(self) -> dict[str, Any]:
        """What it gives beside the grid, its name apart."""
        return {key: value for key, value in self.overrides.items() if key != "optimizer" or value != self.name}

    def at_edge(self, point: Point) -> list[str]:
        """Axes of at least three values at whose end the point lies: the best value may lie beyond."""
        return [
            key
            for key, size, i in zip(self.grid, self.shape, point, strict=True)
            if size > 2 and i in (0, size - 1) and not isinstance(self.grid[key][i], str)
        ]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of launch/JOB.py."""

    job: str
    stage: str
    method: str
    setting: Mapping[str, Any]
    seed: int
    words: tuple[str, ...]
    """The command line, `run.dir` included."""
    folder: Path

    def __str__(self) -> str:
        return f"{self.stage} {self.method} {shown(self.setting)} seed={self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study's file says."""

    name: str
    about: str
    base: Mapping[str, Any]
    baseline: str
    tune_runs: int
    tune_seed: int
    tune_overrides: Mapping[str, Any]
    tuning_tokens: int
    """Held-out tokens that tuning reads, data.validation_tokens; the final figure is of the rest."""
    final_seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    job: str = "pretrain"
    pace_steps: int | None = None
    """Steps of a run that measures how long a step is; None: methods are not compared at equal time."""
    pace_runs: int = 1
    """How many such runs each method has; the median counts."""
    left_out: tuple[str, ...] = ()
    """One sentence for each method that this version does not have."""
    root: Path = field(default=Path("runs/study"))

    @property
    def schema(self) -> Schema:
        return JOBS[self.job]

    def run(self, stage: str, method: Method, point: Point, seed: int, steps: int | None = None) -> Run:
        """The run of a setting, of so many `steps` where the stage is `time`. Its folder is named by the whole resolved
        configuration, so a run is found again if nothing of it has changed, and only then."""
        setting = method.setting(point)
        values = self._values(stage, method, setting, seed)
        words = _words(values if steps is None else {**values, "trainer.max_steps": steps})
        tree = {key: value for key, value in load(self.schema, words).tree.items() if key != "run"}
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]
        slug = re.sub(r"[^\w.+-]+", "-", "_".join(f"{_short(k)}-{v}" for k, v in setting.items())) or "as-given"
        folder = self.root / self.name / stage / method.name / f"{slug}_seed-{seed}_{digest}"
        return Run(
            job=self.job,
            stage=stage,
            method=method.name,
            setting=setting,
            seed=seed,
            words=(*words, f"run.name={self.name}/{stage}/{method.name}", f"run.dir={folder}"),
            folder=folder,
        )

    def loaded(self, stage: str, method: Method, point: Point) -> Loaded:
        """The checked configuration of a setting."""
        return load(self.schema, _words(self._values(stage, method, method.setting(point), 0)))

    def _values(self, stage: str, method: Method, setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
        values = {**self.base, **method.overrides, **setting, **QUIET}
        values |= {"trainer.seed": seed, "data.seed": seed, "trainer.projection_seed": seed}
        if stage in ("final", "time"):
            return {**values, "data.final_validation_unseen": True}
        values |= self.tune_overrides if stage == "tune" else {"trainer.max_steps": self.pace_steps}
        # Tuning never looks further than the part of the held-out text that the final figure leaves out.
        return {**values, "data.final_validation_tokens": self.tuning_tokens}


def shown(setting: Mapping[str, Any]) -> str:
    """A setting in few words, such as ``lr=0.001 embedding_lr=0.005``."""
    return " ".join(f"{_short(key)}={_text(value)}" for key, value in setting.items()) or "as given"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run."""

    run: Run
    point: Point
    state: str
    """finished, diverged, or missing (not begun, interrupted or failed: the next start goes on)."""
    report: dict[str, Any] | None = None
    error: str | None = None
    """Of a failed run, in one sentence."""

    @property
    def score(self) -> float:
        """Bits per byte; infinite for a run that diverged."""
        bits = None if self.report is None else self.report["metrics"].get("test/bits_per_byte")
        return math.inf if bits is None else float(bits)

    @property
    def curves(self) -> list[dict[str, Any]]:
        return curves.read(self.run.folder)


def outcome(run: Run, point: Point) -> Outcome:
    """What a run's folder says."""
    status, report = _json(run.folder / "status.json"), _json(run.folder / "report.json")
    if report is not None and report["run"]["state"] == "finished":
        bits = report["metrics"].get("test/bits_per_byte")
        return Outcome(run=run, point=point, state="diverged" if bits is None else "finished", report=report)
    if status is not None and status.get("exit_code") == STOPPED:
        return Outcome(run=run, point=point, state="diverged", error=status.get("error"))
    return Outcome(run=run, point=point, state="missing", error=None if status is None else status.get("error"))


def best_of(study: Study, tuned: Sequence[Outcome]) -> Outcome | None:
    """The best run of a complete tuning; None if it is not complete, or nothing in it converged."""
    done = [each for each in tuned if each.state != "missing"]
    if len(done) < study.tune_runs:
        return None
    best = min(done, key=lambda each: each.score)
    return best if math.isfinite(best.score) else None


def pace(paced: Sequence[Outcome]) -> float | None:
    """Seconds of a step, renewals of a subspace included: the median of the runs that measure it, if all are there."""
    found = [each.report["training"].get("step_seconds_mean") for each in paced if each.report is not None]
    measured = [seconds for seconds in found if seconds is not None]
    return statistics.median(measured) if measured and len(measured) == len(paced) else None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method's runs have found, by stage."""

    method: Method
    tune: Sequence[Outcome]
    final: Sequence[Outcome]
    pace: Sequence[Outcome]
    time: Sequence[Outcome]
    """Of as many steps as take the baseline's time."""

    @property
    def runs(self) -> list[Outcome]:
        return [*self.tune, *self.final, *self.pace, *self.time]


def load_study(path: Path, *, root: Path = Path("runs/study")) -> Study:
    """Reads and checks a study's file; every value of every grid is checked before anything runs.

    Args:
        path: the YAML file.
        root: where the runs' folders are made.

    Raises:
        ConfigError: one sentence that names what is wrong and the remedy.
    """
    top = _section(
        path,
        "",
        read(path).values,
        required=("name", "base", "tune", "final", "methods"),
        optional=("about", "baseline", "job", "time"),
    )
    _require(_is_name(top["name"]), path, f"name must consist of letters, digits, dots and dashes, got {top['name']!r}")
    job = top.get("job", "pretrain")
    _require(job in JOBS, path, f"job must be one of {', '.join(JOBS)}, got {job!r}")
    base = _overrides(path, "base", top["base"])
    tune, seeds, paced = _stages(path, top)
    methods, left_out, names = _methods(path, JOBS[job], top["methods"])
    baseline = str(top.get("baseline", names[0]))
    _require(baseline in names, path, f"baseline must be one of the methods, got {baseline}: {', '.join(names)}")
    try:
        tuning_tokens = load(JOBS[job], _words(base)).config.data.validation_tokens
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from error
    study = Study(
        name=top["name"],
        about=str(top.get("about") or ""),
        base=base,
        baseline=baseline,
        tune_runs=tune["runs"],
        tune_seed=tune["seed"],
        tune_overrides=tune["overrides"],
        tuning_tokens=tuning_tokens,
        final_seeds=seeds,
        methods=methods,
        job=job,
        pace_steps=paced["steps"] if paced else None,
        pace_runs=paced["runs"] if paced else 1,
        left_out=left_out,
        root=root,
    )
    _check(path, study)
    return study


def _stages(path: Path, top: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...], dict[str, int] | None]:
    tune = {"seed": 0, "overrides": {}, **_section(path, "tune", top["tune"], ("runs",), ("seed", "overrides"))}
    tune["overrides"] = _overrides(path, "tune.overrides", tune["overrides"], allowed=("trainer.",))
    runs, seed, seeds = tune["runs"], tune["seed"], _section(path, "final", top["final"], ("seeds",))["seeds"]
    _require(_whole(runs) and runs >= 1, path, f"tune.runs must be a number of at least 1, got {runs!r}")
    _require(_whole(seed), path, f"tune.seed must be a number of at least 0, got {seed!r}")
    _require(
        isinstance(seeds, list) and len(seeds) >= 2 and all(map(_whole, seeds)) and len(set(seeds)) == len(seeds),
        path,
        f"final.seeds must be a list of at least two different seeds, got {seeds!r}: write seeds: [1, 2]",
    )
    _require(
        seed not in seeds,
        path,
        f"final.seeds must leave out the seed of tuning ({seed}), got {seeds}: the setting was chosen by its luck",
    )
    pace = (
        None if top.get("time") is None else {"runs": 1, **_section(path, "time", top["time"], ("steps",), ("runs",))}
    )
    for key, value in (pace or {}).items():
        _require(_whole(value) and value >= 1, path,
                 f"time.{key} must be a number of at least 1, got {value!r}")  # fmt: skip
    return tune, tuple(seeds), pace


def _methods(path: Path, schema: Schema, entries: Any) -> tuple[tuple[Method, ...], tuple[str, ...], list[str]]:
    """The methods that this version has, a sentence for each that it lacks, and the names of all."""
    _require(isinstance(entries, list) and entries, path, "methods must be a list of methods, each with name and grid")
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    for name in names:
        _require(_is_name(name), path, f"every method needs a name of letters, digits, dots and dashes, got {name!r}")
        _require(names.count(name) == 1, path, f"the method {name} stands there twice: give each a name of its own")
    known = schema.choices("optimizer")
    methods, left_out = [], []
    for method in (_method(path, entry) for entry in entries):
        chosen = str(method.overrides["optimizer"])
        if chosen in known or chosen.endswith((".yaml", ".yml")):
            methods.append(method)
        else:
            left_out.append(f"{method.name} is left out: this version has no optimizer={chosen}.")
    return tuple(methods), tuple(left_out), [method for method in names if method is not None]


def _method(path: Path, entry: dict[str, Any]) -> Method:
    name = entry["name"]
    entry = _section(path, f"the method {name}", entry, required=("name", "grid"), optional=("overrides", "start"))
    overrides = _overrides(path, f"overrides of {name}", entry.get("overrides", {}), allowed=OF_A_METHOD)
    overrides = {"optimizer": name, **overrides}
    grid = entry["grid"] if entry["grid"] is not None else {}
    _require(isinstance(grid, dict), path, f"the grid of {name} must give a list of values for each key")
    _overrides(path, f"grid of {name}", grid, allowed=OF_A_METHOD)
    for key, values in grid.items():
        _require(isinstance(values, list) and values, path,
                 f"the grid of {name} must give a list of values for {key}, got {values!r}")  # fmt: skip
    start = entry.get("start")
    if start is None:
        point = tuple((len(values) - 1) // 2 for values in grid.values())
    else:
        _require(isinstance(start, dict) and set(start) == set(grid), path,
                 f"start of {name} must give a value for each key of its grid: {', '.join(grid)}")  # fmt: skip
        for key, value in start.items():
            _require(value in grid[key], path, f"start of {name} must be in its grid, and {key}={value} is not")
        point = tuple(values.index(start[key]) for key, values in grid.items())
    return Method(name=name, overrides=overrides, grid=grid, start=point)


def _check(path: Path, study: Study) -> None:
    """Every value of every axis once, without the cost of every combination; and that all methods get equal runs."""
    for method in study.methods:
        settings = math.prod(method.shape)
        _require(
            settings >= study.tune_runs,
            path,
            f"the grid of {method.name} must have at least the {study.tune_runs} settings of tune.runs, so that all "
            f"methods are tuned alike, got {settings}: add values or lower tune.runs",
        )
        points = {method.start} | {
            (*method.start[:axis], i, *method.start[axis + 1 :])
            for axis, size in enumerate(method.shape)
            for i in range(size)
        }
        for point in sorted(points):
            _load(path, study, "tune", method, point)
        _load(path, study, "final", method, method.start)


def _load(path: Path, study: Study, stage: str, method: Method, point: Point) -> None:
    try:
        study.loaded(stage, method, point)
    except ConfigError as error:
        raise ConfigError(f"{path}: {method.name} with {shown(method.setting(point))}: {error}") from error


def _overrides(path: Path, where: str, values: Any, allowed: Sequence[str] | None = None) -> dict[str, Any]:
    _require(isinstance(values, dict), path, f"{where} must be keys and values of its launch script, got {values!r}")
    for key in values:
        _require(not key.startswith(OWN), path, f"{where} must not give {key}: the study sets it itself or forbids it")
        if allowed is not None:
            _require(
                key in allowed or key.startswith(tuple(start for start in allowed if start.endswith("."))),
                path,
                f"{where} must not give {key}: only {', '.join(allowed)} may differ, so that runs stay comparable",
            )
    return dict(values)


def _section(
    path: Path, where: str, values: Any, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    _require(isinstance(values, dict), path, f"{where or 'the file'} must hold {', '.join(required)}, got {values!r}")
    keys, within = (*required, *optional), f" in {where}" if where else ""
    for key in values:
        _require(key in keys, path, f"unknown key {key}{within}: it has {', '.join(keys)}")
    for key in required:
        _require(key in values, path, f"{key} is missing{within}: add it")
    return dict(values)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _require(condition: Any, path: Path, sentence: str) -> None:
    if not condition:
        raise ConfigError(f"{path}: {sentence}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _words(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)  # JSON is YAML


def _short(key: str) -> str:
    return key.removeprefix("optimizer.")
