"""Models measured and compared: the rows of a report, the spectra behind them, and the page that tells them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from thinrank.optim.monitors.report import COMPARED, ReportConfig, compared, measured
from thinrank.optim.monitors.weights import Weight, weights
from thinrank.trainers.errors import UserError

SHOWN = (
    "alpha",
    "D",
    "farms_alpha",
    "stable_rank",
    "effective_rank",
    "kappa_q",
    "num_outliers",
    "mp_softrank",
    "ERG_gap",
)
"""Columns of a table where none were asked for; files have all of them."""
DOUBTFUL = ("alpha", "alpha_weighted", "ERG_gap")
"""Columns that say nothing where there is no power law."""
DISTANT = ("intruders", "drift_js", "relative_change")


@dataclass
class Look:
    """What was found of a model.

    Attributes:
        title: what was looked at.
        rows: of the report, with `COMPARED` where there is another model.
        spectra: singular values by falling size, by name, of the rows that have some.
        shown: columns of the table.
        notes: sentences on the whole.
    """

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    spectra: dict[str, list[float]] = field(default_factory=dict)
    shown: tuple[str, ...] = SHOWN
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For JSON: the rows, each with its singular values to six digits."""
        rows = [
            {**row, "singular_values": [float(f"{s:.6g}") for s in self.spectra.get(row["name"], [])]}
            for row in self.rows
        ]
        return {"title": self.title, "notes": self.notes, "layers": rows}


def look(
    source: nn.Module | Mapping[str, Tensor],
    *,
    title: str,
    layers: str = "",
    config: ReportConfig,
    other: nn.Module | Mapping[str, Tensor] | None = None,
    all_columns: bool = True,
) -> Look:
    """Measures every weight, and compares each with the one of the same name in `other`.

    Args:
        source: a model, or its state dict.
        title: what the page is called.
        layers: a regular expression that a name must contain.
        config: what is measured; where it names no columns, all of them, of which the table shows `SHOWN`.
        other: the model that it was before.
        all_columns: False where nobody will see more than the table, so that nothing else is computed.

    Raises:
        UserError: no weight has such a name, or there is none at all.
    """
    found = Look(title)
    distant = () if other is None else COMPARED
    if config.metrics:
        distant = tuple(name for name in COMPARED if name in config.metrics)
        found.shown = tuple(name for name in (*config.columns, *distant) if name in config.metrics)
    else:
        found.shown += DISTANT if distant else ()
    wanted = config.metrics or (() if all_columns else found.shown)
    if {*DOUBTFUL} & {*wanted}:  # what is in brackets without it
        wanted = (*wanted, "reliable")
    config = replace(config, metrics=wanted)
    then = _ByName(other) if other is not None and distant else None
    if then is not None:
        then.require_some(source)
    alone: list[str] = []
    kept: list[Weight] = []

    def one_by_one() -> Any:
        for weight in weights(source, layers):
            kept[:] = [weight]
            yield weight

    for each in measured(one_by_one(), config):
        row = each.row
        if each.s is not None:
            found.spectra[row["name"]] = each.s.tolist()
        if then is not None:
            row |= dict.fromkeys(distant)
            if (before := then.get(row["name"])) is None:
                alone.append(row["name"])
            else:
                values, reason = compared(kept[0], before)
                row |= {name: value for name, value in values.items() if name in distant}
                row["warning"] = "; ".join(part for part in (row["warning"], reason) if part)
        row["warning"] = row.pop("warning")  # last again
        found.rows.append(row)
    if not found.rows:
        raise _nothing(source, layers)
    if alone:
        found.notes.append(
            f"{len(alone)} of {len(found.rows)} weights are not in the other model and were not compared: {alone[0]}, …"
        )
    return found


class _ByName:
    """The weights of a model by name; those of a state dict are read when they are asked for."""

    def __init__(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        self._source = source
        if isinstance(source, nn.Module):
            self._known = {weight.name: weight for weight in weights(source)}
            self.names = list(self._known)
        else:
            self._known = {}
            self.names = _stems(source)

    def require_some(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        """Raises UserError where no weight of `source` has a name that is known here."""
        mine = [weight.name for weight in weights(source)] if isinstance(source, nn.Module) else _stems(source)
        if not {*mine} & {*self.names}:
            raise UserError(
                f"the two models have no weight of one name ({', '.join(mine[:1])}, … and {', '.join(self.names[:1])}, "
                "…): compare a model with what it was before"
            )

    def get(self, name: str) -> Weight | None:
        if isinstance(self._source, nn.Module):
            return self._known.get(name)
        plain = name.partition("[")[0]
        keys = (plain, f"{plain}.weight", f"{plain}.A", f"{plain}.B")
        some = {key: self._source[key] for key in keys if key in self._source}
        return next((weight for weight in weights(some) if weight.name == name), None)


def _stems(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names that weights may have, without a look at the tensors."""
    stems = [re.sub(r"\.(weight|A|B)$", "", name) for name in tensors]
    return list(dict.fromkeys(stems))


def _nothing(source: nn.Module | Mapping[str, Tensor], layers: str) -> UserError:
    names = [weight.name for weight in weights(source)] if layers else []
    if names:
        return UserError(f"no weight has a name that contains {layers!r}: choose of such as {names[0]} and {names[-1]}")
    return UserError("there is no weight of two dimensions in it: give a model with matrices")


# --- the page ---------------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """A value as a table shows it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


def cells(row: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    """A line of the table: an α that is no power law's is in brackets."""
    line = [row["name"], f"{row['M']} × {row['N']}"]
    for name in shown:
        text = number(row.get(name))
        doubtful = name in DOUBTFUL and row.get("reliable", True) is False
        line.append(f"({text})" if doubtful and text != "–" else text)
    return [*line, row["warning"]]


def medians(rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> list[str]:
    """The last line of the table: medians of finite numbers, of α over the reliable ones alone."""
    line = ["median", ""]
    for name in shown:
        values = [
            float(row[name])
            for row in rows
            if isinstance(row.get(name), (int, float))
            and not isinstance(row[name], bool)
            and math.isfinite(row[name])
            and not (name in DOUBTFUL and row.get("reliable", True) is False)
        ]
        line.append(number(statistics.median(values)) if values else "–")
    return [*line, ""]


def text_table(found: Look) -> str:
    """The table as a console shows it."""
    head = ["layer", "M × N", *found.shown, "warning"]
    lines = [head, *(cells(row, found.shown) for row in found.rows), medians(found.rows, found.shown)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = [
        "  ".join(
            text.ljust(width) if i in (0, len(head) - 1) else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([found.title, "", *aligned, *(["", *found.notes] if found.notes else [])])


def markdown(found: Look, pictures: Sequence[tuple[str, str]], without: str = "") -> str:
    """The page ``report.md``: the table, the pictures, what to think of them.

    Args:
        pictures: file name and caption.
        without: the sentence in the place of pictures that could not be drawn.
    """
    head = ["layer", "M × N", *found.shown, "warning"]
    lines = [f"# {found.title}", ""]
    lines += [*found.notes, ""] if found.notes else []
    lines += [f"| {' | '.join(head)} |", f"| --- | {'---: | ' * (len(head) - 2)}--- |"]
    lines += [f"| {' | '.join(cells(row, found.shown))} |" for row in found.rows]
    lines += [f"| {' | '.join(medians(found.rows, found.shown))} |", ""]
    if "alpha" in found.shown:
        lines += ["An alpha in brackets is no power law's: its D is 0.1 or more. Medians leave it out.", ""]
    for name, caption in pictures:
        lines += [f"## {caption}", "", f"![{caption}]({name})", ""]
    lines += [without, ""] if without else []
    lines.append(
        "All columns and all singular values are in `spectra.json`; `docs/spectral-report.md` says how to read them."
    )
    return "\n".join(lines) + "\n"
