"""``launch/spectra.py``: the spectra of a trained model's weights, read from the disk, told, drawn and compared."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinrank.configs.arguments import Arguments
from thinrank.configs.errors import ConfigError

USAGE = """python launch/spectra.py CHECKPOINT|RUN-FOLDER|HF-FOLDER [--compare OTHER] [--out FOLDER]
                         [--layers REGEX] [--metrics NAME,NAME …]

Measures of the singular values of every weight: power laws, ranks, conditions, noise. Weights are read one at a time.

  --compare OTHER   the model that it was before: intruder dimensions, drift and relative change of each weight
  --out FOLDER      write report.md, spectra.json and, with matplotlib, pictures; else the table is printed alone
  --layers REGEX    only weights whose name contains it, such as 'mlp|q_proj'
  --metrics a,b     only these columns, and nothing that only others need; --metrics help lists them
  --help            this text

docs/spectral-report.md says how to read it.
"""
_VALUED = ("--compare", "--out", "--layers", "--metrics")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    path: str = ""
    compare: str | None = None
    out: Path | None = None
    layers: str = ""
    metrics: tuple[str, ...] = ()
    help: bool = False


def request(argv: Sequence[str]) -> Request:
    """Split the command line.

    Raises:
        ConfigError: with the remedy.
    """
    words, paths, values, asked = list(argv), [], dict[str, str](), False
    while words:
        option, equals, value = words.pop(0).partition("=")
        if option in ("--help", "-h"):
            asked = True
        elif option in _VALUED:
            if not equals and not words:
                raise ConfigError(f"{option} needs a value: see --help")
            values[option] = value if equals else words.pop(0)
        elif option.startswith("-"):
            near = difflib.get_close_matches(option, (*_VALUED, "--help"), n=1)
            raise ConfigError(f"unknown option {option}: {f'did you mean {near[0]}?' if near else 'see --help'}")
        else:
            paths.append(option + equals + value)
    if asked:
        return Request(help=True)
    if len(paths) != 1:
        got = "none" if not paths else " and ".join(paths)
        raise ConfigError(f"one model is looked at, got {got}: write launch/spectra.py PATH, and --compare OTHER")
    layers = values.get("--layers", "")
    try:
        re.compile(layers)
    except re.error as error:
        raise ConfigError(
            f"--layers must be a regular expression, got {layers!r} ({error}): write 'mlp|q_proj'"
        ) from None
    return Request(
        path=paths[0],
        compare=values.get("--compare"),
        out=Path(values["--out"]).expanduser() if "--out" in values else None,
        layers=layers,
        metrics=tuple(name.strip() for name in values.get("--metrics", "").split(",") if name.strip()),
    )


def answer(asked: Request) -> str:
    """The table as it is printed, with what was written where.

    Raises:
        ConfigError: an unknown column, or one of a comparison without another model.
        UserError: no model, or no such layer, with the remedy.
    """
    from thinrank.optim.monitors.report import COMPARED, METRICS, ReportConfig

    if "help" in asked.metrics:
        return f"columns: {', '.join(METRICS)}\nwith --compare: {', '.join(COMPARED)}"
    for name in asked.metrics:
        if name not in (*METRICS, *COMPARED):
            near = difflib.get_close_matches(name, (*METRICS, *COMPARED), n=1)
            raise ConfigError(
                f"unknown metric {name}: {f'did you mean {near[0]}?' if near else '--metrics help lists them'}"
            )
        if name in COMPARED and asked.compare is None:
            raise ConfigError(f"the metric {name} compares two models: add --compare OTHER")
    if asked.out is not None and asked.out.exists() and not asked.out.is_dir():
        raise ConfigError(f"--out must be a folder, and {asked.out} is a file: choose another")

    from thinrank.trainers.inspecting.look import look, text_table

    path, source, notes = _opened(asked.path)
    other: Any = None
    title = f"spectra of {path}"
    if asked.compare is not None:
        before, other, more = _opened(asked.compare)
        title += f", compared with {before}"
        notes += more
    config, written = ReportConfig(metrics=asked.metrics), asked.out is not None
    found = look(source, title=title, layers=asked.layers, config=config, other=other, all_columns=written)
    found.notes += notes
    printed = text_table(found)
    return printed if asked.out is None else f"{printed}\n\n{_written(found, asked.out)}"


def _opened(path: str) -> tuple[Path, Any, list[str]]:
    """The weights at `path`; of a run whose layers are factors, the model that its configuration builds, with them in
    it."""
    from thinrank.trainers.errors import UserError
    from thinrank.trainers.inspecting.stored import filled_in, open_weights

    opened = open_weights(path)
    config = opened.run / "config.yaml" if opened.run is not None else None
    if config is None or not config.is_file():
        return opened.path, opened.source, []
    try:
        model = _laid_out(config)
        if model is None:
            return opened.path, opened.source, []
        filled_in(model, _state(opened.source))
        absent = any(p.is_meta for p in model.parameters())
        note = "weights without values are frozen ones, which a checkpoint does not hold: look at the run's export"
        return opened.path, model, [note] if absent else []
    except (ConfigError, UserError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        note = f"the tensors are measured as they lie in the file, since {config} builds no model for them: {reason}"
        return opened.path, opened.source, [note]


def _laid_out(config: Path) -> Any:
    """The model of a run's configuration on the meta device, if some of its layers are factors; else None."""
    from thinrank.configs.dry_run import vocabulary
    from thinrank.configs.load import load
    from thinrank.configs.reader import read
    from thinrank.configs.schema import FINETUNE, PRETRAIN
    from thinrank.optim.layers import layers
    from thinrank.trainers.jobs import Finetuning, Pretraining

    tuned = "adapter" in read(config).values
    settings = load(FINETUNE if tuned else PRETRAIN, Arguments(files=(config,))).config
    if settings.reparam.name == "none":
        return None
    job = (Finetuning if tuned else Pretraining)(settings)
    model = job.build(vocabulary(settings.data), meta=True)
    return model if layers(model) else None


def _state(source: Any) -> Any:
    return source.state_dict() if hasattr(source, "state_dict") else source


def _written(found: Any, out: Path) -> str:
    from thinrank.trainers.errors import UserError
    from thinrank.trainers.files import write_json, write_text
    from thinrank.trainers.inspecting.look import markdown
    from thinrank.trainers.inspecting.plots import draw

    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures, without = draw(found, out)
        write_json(out / "spectra.json", found.plain())
        write_text(out / "report.md", markdown(found, pictures, without))
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror or error}): choose a writable folder") from error
    told = f"wrote {out / 'report.md'}, spectra.json and {len(pictures)} pictures"
    return f"{told}; {without}" if without else told
