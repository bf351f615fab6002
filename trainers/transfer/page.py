"""A transfer as a page of Markdown, a plot, numbers in JSON and scalars for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinrank.optim.scaling import ema_timescale
from thinrank.trainers.files import replacing, write_json, write_text
from thinrank.trainers.pretrain import PretrainConfig
from thinrank.trainers.report import machine
from thinrank.trainers.scaling import at_width
from thinrank.trainers.transfer.analysis import Advice, Verdict, as_plain, means
from thinrank.trainers.transfer.conduct import Record, widths_of
from thinrank.trainers.transfer.sweep import Sweep, plain


def page(
    sweep: Sweep,
    base: PretrainConfig,
    verdicts: Sequence[Verdict],
    advice: Advice | None,
    records: Sequence[Record],
    *,
    command: str,
    failures: Sequence[str] = (),
    plot: str | None = None,
) -> str:
    """The page.

    Args:
        command: that gives it again.
        failures: sentences of runs that failed.
        plot: why there is no plot; None where there is one beside it.
    """
    tokens = base.trainer.batch_size * base.data.sequence_length
    parts = [
        f"# From widths {', '.join(map(str, sweep.widths))} to {sweep.target}: {base.optimizer.name}",
        f"{base.model.name}, {base.model.num_hidden_layers} blocks; base width {sweep.base}; "
        f"{base.trainer.max_steps} steps of {tokens:,} tokens; design {sweep.design}; seeds "
        f"{', '.join(map(str, sweep.seeds))}. Rates and decays are those of the base: under a perfect rule the best "
        "one is the same at all widths.",
        _advice(sweep, base, advice),
        "## Where the best setting lies",
        _best(sweep, verdicts),
        "`moved` is in steps of the grid of rates, from the narrowest width, by the parabola through the best rate and "
        "its neighbours; `!` marks a best rate at an edge of the grid.",
        "" if plot else "![losses and singular values](transfer.png)",
        plot or "",
        *[_of_rule(sweep, verdict) for verdict in verdicts],
        "## All runs",
        _runs(sweep, records),
    ]
    if failures:
        parts += ["## Runs that failed", *[f"* {sentence}" for sentence in failures]]
    of = machine()
    parts += [
        f"Machine: {of.get('cpu') or 'unknown CPU'}, {of.get('cores', '?')} cores{_gpus(of)}.",
        f"```sh\n{command}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gpus(of: Mapping[str, Any]) -> str:
    found = of.get("gpus") or of.get("gpu")
    return f", {found}" if found else ""


def words(sweep: Sweep, base: PretrainConfig, advice: Advice) -> str:
    """What to give to launch/pretrain.py, beside what the proxies were given, at the target."""
    model = at_width(base.model, sweep.target, heads=base.scaling.heads)
    sizes = [f"model.hidden_size={model.hidden_size}", f"model.num_attention_heads={model.num_attention_heads}"]
    if model.intermediate_size is not None:
        sizes.append(f"model.intermediate_size={model.intermediate_size}")
    if model.num_key_value_heads is not None:
        sizes.append(f"model.num_key_value_heads={model.num_key_value_heads}")
    rule = [] if advice.rule == "none" else _rule_words(advice.rule, sweep, base)
    rates = [f"optimizer.lr={advice.rate:.3g}", f"optimizer.weight_decay={advice.decay:g}"]
    return " ".join([*sizes, *rule, *rates])


def _rule_words(rule: str, sweep: Sweep, base: PretrainConfig) -> list[str]:
    from thinrank.optim.scaling import PRESETS

    named = [f"scaling={rule}"] if rule in PRESETS else ["scaling=const", f"scaling.wd_width_exp={float(rule):g}"]
    depth = [f"scaling.base_depth={base.model.num_hidden_layers}"] if rule == "completep" else []
    return [*named, f"scaling.base_width={sweep.base}", *depth]


def _advice(sweep: Sweep, base: PretrainConfig, advice: Advice | None) -> str:
    if advice is None:
        return "**No recommendation yet**: no run has ended."
    doubts = "".join(f"\n* {doubt}" for doubt in advice.doubts)
    return (
        f"**Recommendation for width {sweep.target}** (confidence: {advice.confidence}): rule {advice.rule}, lr "
        f"{advice.rate:.3g} and weight decay {advice.decay:g} of the base, which are {advice.hidden_rate:.3g} and "
        f"{advice.hidden_decay:.3g} for hidden matrices there.\n\n"
        f"```sh\npython launch/pretrain.py {words(sweep, base, advice)}\n```"
        + _share(sweep, base, advice)
        + (f"\n\nWhat speaks against it:\n{doubts}" if doubts else "")
    )


def _share(sweep: Sweep, base: PretrainConfig, advice: Advice) -> str:
    """Over how much of a training the target's hidden matrices would average, and what keeps that elsewhere."""
    if not advice.hidden_decay or base.trainer.max_steps is None:
        return ""
    batch = base.trainer.batch_size * base.data.sequence_length
    tokens = batch * base.trainer.max_steps
    share = ema_timescale(batch, advice.hidden_rate, advice.hidden_decay, tokens)
    return (
        f"\n\nIn a training of {tokens:,} tokens its hidden matrices would average their updates over {share:.3g} of "
        f"it. For D tokens in batches of B, a decay times B/{batch:,} · {tokens:,}/D keeps that share."
    )


def _best(sweep: Sweep, verdicts: Sequence[Verdict]) -> str:
    head = ["rule", *[f"width {width}" for width in sweep.widths], "rate moved", "decay moved"]
    rows = []
    for verdict in verdicts:
        cells = []
        for width in sweep.widths:
            best = verdict.best.get(width)
            if best is None:
                cells.append("–")
                continue
            edge = "!" if best.edge else ""
            lr, decay = sweep.rates[best.place[0]], sweep.decays[best.place[1]]
            cells.append(f"{best.loss:.4f} at {lr:g}{edge}, {decay:g} ({best.step:+.1f})")
        rows.append([verdict.rule, *cells, *(_number(m, ".1f") for m in verdict.moved)])
    return table(head, rows)


def _of_rule(sweep: Sweep, verdict: Verdict) -> str:
    parts = [f"## Rule {verdict.rule}"]
    if verdict.place is not None:
        lr, decay = sweep.rates[verdict.place[0]], sweep.decays[verdict.place[1]]
        parts.append(f"Compared at lr {lr:g} and decay {decay:g}, at an equal age of Σηλ = {verdict.age:.3g}.")
    if verdict.fits:
        rows = []
        for kind, fit in verdict.fits.items():
            match, drifts = verdict.sigma[kind], verdict.drifts.get(kind)
            rows.append(
                [
                    kind,
                    *[_number(verdict.tops[kind].get(width, math.nan), ".3g") for width in sweep.widths],
                    f"{match.slope.value:+.2f} {match.verdict}",
                    f"{fit.p:.2f} ± {fit.error:.2f}",
                    f"{fit.r2:.3f}",
                    f"{fit.exponent:.2f} ± {fit.exponent_error:.2f}",
                    "–" if drifts is None else f"{drifts.slope.value:.2f}{' drift' if drifts.dominated else ''}",
                ]
            )
        head = [
            "σ_top",
            *[f"d={width}" for width in sweep.widths],
            "slope",
            "p̂",
            "R²",
            "decay exponent 2p̂−a",
            "η/λ slope",
        ]
        parts.append(table(head, rows))
    if verdict.gains:
        rows = [[name, f"{m.slope.value:+.2f} ± {m.slope.error:.2f}", m.verdict] for name, m in verdict.gains.items()]
        parts.append(table(["gain", "slope over width", ""], rows))
    if verdict.coordinates is not None:
        grown = [f"{name or 'model'} ({value:+.2f})" for name, value in list(verdict.coordinates.items())[:4]]
        parts.append(
            f"Coordinate check: {'growing: ' + ', '.join(grown) if grown else 'nothing grows with the width'}."
        )
    parts += [f"* {sentence}" for sentence in verdict.missing]
    return "\n\n".join(parts)


def _runs(sweep: Sweep, records: Sequence[Record]) -> str:
    by: dict[tuple[str, int], list[Record]] = {}
    for each in records:
        by.setdefault((each.trial.rule, each.trial.width), []).append(each)
    rows = []
    for (rule, width), runs in by.items():
        for (rate, decay), (loss, spread) in sorted(means(runs).items()):
            cell = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            rows.append(
                [
                    rule,
                    str(width),
                    f"{sweep.rates[rate]:g}",
                    f"{sweep.decays[decay]:g}",
                    cell + (f" ± {spread:.4f}" if spread else ""),
                ]
            )
    times = ", ".join(f"{sum(v) / len(v):.3g} s at {w}" for w, v in sorted(widths_of(records).items()))
    return table(["rule", "width", "lr", "decay", "held-out nats"], rows) + (f"\n\nA step: {times}." if times else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "–"


def draw(sweep: Sweep, verdicts: Sequence[Verdict], records: Sequence[Record], path: Path) -> str | None:
    """Losses over rates at each width, rule by rule, and σ_top over the width; returns why nothing was drawn."""
    if not records:
        return "No plot yet: no run has ended."
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return 'No plot: matplotlib is not installed (`pip install -e ".[study]"`, then the same command again).'
    palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f"]
    figure = Figure(figsize=(4.5 * len(verdicts), 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(verdicts), squeeze=False, sharey="row")
    for column, verdict in enumerate(verdicts):
        above, below = axes[0][column], axes[1][column]
        for i, width in enumerate(sweep.widths):
            runs = [r for r in records if (r.trial.rule, r.trial.width) == (verdict.rule, width)]
            line = {
                rate: loss
                for (rate, decay), (loss, _) in means(runs).items()
                if decay == sweep.middle and math.isfinite(loss)
            }
            rates = sorted(line)
            if rates:
                above.plot(
                    [sweep.rates[r] for r in rates],
                    [line[r] for r in rates],
                    "o-",
                    color=palette[i % 8],
                    label=f"{width}",
                )
        for i, (kind, tops) in enumerate(verdict.tops.items()):
            below.plot(list(tops), list(tops.values()), "o-", color=palette[i % 8], label=kind)
        above.set_title(verdict.rule)
        above.set_xlabel(f"lr of the base, decay {sweep.decays[sweep.middle]:g}")
        below.set_xlabel("width")
        above.set_xscale("log")
        below.set_xscale("log")
        if verdict.tops:
            below.set_yscale("log")
        for each in (above, below):
            each.grid(alpha=0.3)
            if each.get_legend_handles_labels()[0]:
                each.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("held-out loss, nats per token")
    axes[1][0].set_ylabel("largest singular value at equal age")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return None


def write(
    sweep: Sweep,
    base: PretrainConfig,
    verdicts: Sequence[Verdict],
    advice: Advice | None,
    records: Sequence[Record],
    root: Path,
    *,
    command: str,
    failures: Sequence[str] = (),
) -> Path:
    """Writes ``report.md``, ``transfer.json``, ``transfer.png`` and ``tensorboard/`` into `root`; returns the page."""
    plot = draw(sweep, verdicts, records, root / "transfer.png")
    text = page(sweep, base, verdicts, advice, records, command=command, failures=failures, plot=plot)
    write_text(root / "report.md", text)
    runs = [
        {
            "rule": r.trial.rule,
            "width": r.trial.width,
            "lr": sweep.rates[r.trial.rate],
            "weight_decay": sweep.decays[r.trial.decay],
            "seed": r.trial.seed,
            "loss": r.loss,
            "step_seconds": r.seconds,
        }
        for r in records
    ]
    facts = {
        "sweep": as_plain(plain(sweep)),
        "advice": as_plain(advice),
        "rules": as_plain(list(verdicts)),
        "runs": runs,
    }
    write_json(root / "transfer.json", facts)
    _scalars(sweep, verdicts, root / "tensorboard")
    return root / "report.md"


def _scalars(sweep: Sweep, verdicts: Sequence[Verdict], folder: Path) -> None:
    """By rule, with the width in the place of the step."""
    from torch.utils.tensorboard import SummaryWriter

    for stale in folder.glob("*") if folder.exists() else ():
        stale.unlink()
    with SummaryWriter(str(folder)) as writer:
        for verdict in verdicts:
            for width, best in verdict.best.items():
                writer.add_scalar(f"transfer/{verdict.rule}/best_loss", best.loss, width)
                writer.add_scalar(f"transfer/{verdict.rule}/best_lr", best.rate, width)
                writer.add_scalar(f"transfer/{verdict.rule}/best_decay", sweep.decays[best.place[1]], width)
            for kind, tops in verdict.tops.items():
                for width, top in tops.items():
                    writer.add_scalar(f"transfer/{verdict.rule}/sigma_top/{kind}", top, width)
