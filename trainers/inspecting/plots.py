"""Pictures of a look at a model: spectra with their tails, and measures by depth."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinrank.trainers.files import replacing
from thinrank.trainers.inspecting.look import Look

PER_PAGE = 12
_BINS = 40
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
_MARKERS = "os^vDPX*"
NOISE = 2.1
"""The α of random numbers in square windows."""
_DEPTH = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
INSTALL = 'no pictures: matplotlib is not installed (`pip install -e ".[study]"`)'


def draw(found: Look, folder: Path) -> tuple[list[tuple[str, str]], str]:
    """Draws what there is to draw into `folder`.

    Returns:
        file names with their captions; and a sentence where matplotlib is not installed, else an empty one.
    """
    try:
        # an extra of its own, which no other part needs, so that a checker may not find it
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return [], INSTALL

    def figure(width: float, height: float) -> Any:
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        return made

    pictures: list[tuple[str, str]] = []

    def keep(made: Any, name: str, caption: str) -> None:
        with replacing(folder / name) as file:
            made.savefig(file, format="png", dpi=110)
        pictures.append((name, caption))

    drawn = [row for row in found.rows if _has_density(found.spectra.get(row["name"], []))]
    pages = math.ceil(len(drawn) / PER_PAGE)
    for page in range(pages):
        rows = drawn[page * PER_PAGE : (page + 1) * PER_PAGE]
        of = f" ({page + 1} of {pages})" if pages > 1 else ""
        keep(_densities(figure, found, rows), f"spectra-{page + 1:02}.png", f"Eigenvalues of WᵀW and fitted tails{of}")
    for name, caption, panels in (
        ("alpha.png", "Alpha by depth", (("alpha", None, "alpha"), ("farms_alpha", None, "alpha of FARMS"))),
        (
            "rank.png",
            "Ranks by depth",
            (
                ("stable_rank", "M", "stable rank, share of the shorter side"),
                ("effective_rank", "M", "effective rank, share of the shorter side"),
            ),
        ),
        (
            "compared.png",
            "Distance from the other model by depth",
            (
                ("intruders", None, "intruder dimensions of the leading 10"),
                ("drift_js", None, "drift of the spectrum, bits"),
            ),
        ),
    ):
        there = [panel for panel in panels if any(_finite(row.get(panel[0])) for row in found.rows)]
        if there:
            keep(_by_depth(figure, found.rows, there), name, caption)
    return pictures, ""


def _densities(figure: Callable[..., Any], found: Look, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Log-log histograms, one panel for each weight, with the fitted power law and its start."""
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    made = figure(3.4 * columns + 0.3, 2.6 * lines + 0.5)
    grid = made.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(grid.flat, rows, strict=False):
        evals = _positive(found.spectra[row["name"]])
        low, high = _range(evals)
        edges = [low * (high / low) ** (i / _BINS) for i in range(_BINS + 1)]
        counts = [0] * _BINS
        step = math.log(high / low) / _BINS
        for x in evals:
            if x >= low:
                counts[min(_BINS - 1, int(math.log(x / low) / step))] += 1
        total = len(evals)
        density = [count / total / (b - a) for count, a, b in zip(counts, edges, edges[1:], strict=False)]
        points = [(math.sqrt(a * b), y) for a, b, y in zip(edges, edges[1:], density, strict=False) if y > 0]
        axes.plot(*zip(*points, strict=True), "o", markersize=3, color=_PALETTE[0])
        alpha, start, end = row.get("alpha"), row.get("xmin"), row.get("xmax")
        if alpha and start and end and end > start:
            sure = row.get("reliable")
            share = row["num_pl_spikes"] / total
            line = [start * (end / start) ** (i / 30) for i in range(31)]
            law = [share * (alpha - 1) / start * (x / start) ** -alpha for x in line]
            axes.plot(line, law, "-" if sure else "--", color=_PALETTE[1], linewidth=1.6)
            axes.axvline(start, color=_PALETTE[1], linewidth=0.8, linestyle=":")
        if edge := row.get("bulk_max"):
            axes.axvline(edge, color=_PALETTE[7], linewidth=0.8, linestyle="-.")
        axes.set_xscale("log")
        axes.set_yscale("log")
        ys = [y for _, y in points]
        axes.set_ylim(min(ys) / 3, max(ys) * 3)
        axes.set_xlim(edges[0] / 1.5, edges[-1] * 2.5)
        axes.set_title(_short(row["name"]), fontsize=8)
        label = "no fit" if alpha is None else f"α {alpha:.2f}\nD {row['D']:.2f}"
        axes.text(0.04, 0.06, label, transform=axes.transAxes, fontsize=8, color=_PALETTE[1])
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    made.supxlabel("eigenvalue", fontsize=9)
    made.supylabel("density", fontsize=9)
    made.suptitle(
        "dots: density   line: fitted power law, dashed where D ≥ 0.1   dotted: its start   "
        "dash-dot: edge of the bulk   (smallest 5 % left out)",
        fontsize=8,
    )
    return made


def _by_depth(
    figure: Callable[..., Any], rows: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str | None, str]]
) -> Any:
    """A panel for each measure: its values by depth, a line for each kind of layer."""
    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for row in rows:
        kind, depth = place(row["name"])
        if depth is None:
            continue
        kinds.setdefault(kind, []).append((depth, row))
    deep = bool(kinds)
    if not deep:  # no numbers in names: the order is all there is
        kinds = {"": list(enumerate(rows))}
    made = figure(5.6 * len(panels) + 0.4, 4.4)
    for axes, (name, by, label) in zip(made.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for order, (kind, placed) in enumerate(kinds.items()):
            points = [
                (depth, float(row[name]) / (float(row[by]) if by else 1.0), row.get("reliable", True) is not False)
                for depth, row in sorted(placed, key=lambda pair: pair[0])
                if _finite(row.get(name))
            ]
            if not points:
                continue
            x, y, sure = zip(*points, strict=True)
            colour, marker = _PALETTE[order % len(_PALETTE)], _MARKERS[order // len(_PALETTE) % len(_MARKERS)]
            axes.plot(x, y, "-", color=colour, linewidth=1.0, alpha=0.7)
            filled = [name != "alpha" or each for each in sure]
            for mask, face in ((True, colour), (False, "white")):
                some = [(a, b) for a, b, f in zip(x, y, filled, strict=True) if f is mask]
                if some:
                    axes.plot(*zip(*some, strict=True), marker, color=colour, markerfacecolor=face, markersize=5)
            axes.plot([], [], f"{marker}-", color=colour, markersize=5, label=kind or "weights")
        if name == "alpha":
            values = sorted(float(row["alpha"]) for row in rows if _finite(row.get("alpha")))
            axes.axhspan(2, 6, color=_PALETTE[7], alpha=0.12, linewidth=0)
            if values[-1] > 12:  # scans of noise give anything, and would flatten what is to be seen
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
            label += ", hollow where D ≥ 0.1; band: 2 to 6"
        elif name == "farms_alpha":
            values = [float(row[name]) for placed in kinds.values() for _, row in placed if _finite(row.get(name))]
            middle = (min(*values, NOISE) + max(*values, NOISE)) / 2
            half = max(0.25, 0.55 * (max(*values, NOISE) - min(*values, NOISE)))  # no axis that makes much of little
            axes.set_ylim(middle - half, middle + half)
            axes.axhline(NOISE, color=_PALETTE[7], linewidth=1.0, linestyle="--")
            label += " (dashed: of noise)"
        elif by:
            axes.set_ylim(0, 1.08 * axes.dataLim.y1)
        axes.set_xlabel("block" if deep else "weight, by order")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    handles, names = made.axes[0].get_legend_handles_labels()
    if deep:
        made.legend(handles, names, loc="outside lower center", ncols=min(len(names), 8), frameon=False, fontsize=9)
    return made


def place(name: str) -> tuple[str, int | None]:
    """What kind of layer a name is of, and in which block: `model.layers.3.mlp.up_proj` is (`mlp.up_proj`, 3)."""
    match = _DEPTH.search(name)
    if match is None:
        return name, None
    return name[match.end() :] or name[: match.start()], int(match[1])


def _positive(s: Sequence[float]) -> list[float]:
    """Eigenvalues that are not zero to rounding."""
    return [x * x for x in s if x > 1e-6 * s[0]] if len(s) else []


def _range(evals: Sequence[float]) -> tuple[float, float]:
    """From where to where they are drawn: without the small end, which would squeeze all else to the right."""
    return sorted(evals)[len(evals) // 20], max(evals)


def _has_density(s: Sequence[float]) -> bool:
    """Whether there is something to draw: some eigenvalues, and not all alike."""
    evals = _positive(s)
    return len(evals) >= 8 and _range(evals)[1] > 1.001 * _range(evals)[0]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"…{name[-33:]}"
