"""What a study found, as a page of Markdown and a plot; every number in it is from the reports of the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study_file import Found, Outcome, Study, best_of, pace, shown

from thinrank.trainers import curves
from thinrank.trainers.files import replacing, write_text

Results = Sequence[Found]


def write_results(study: Study, results: Results, out: Path, *, command: str, failures: Sequence[str] = ()) -> None:
    """Writes the page `out` and, beside it, the plot, if there is something to draw and matplotlib to draw it with."""
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = out.with_suffix(".png")
    problem = plot(study, results, picture)
    write_text(out, page(study, results, command=command, failures=failures, picture=picture.name, problem=problem))


def page(
    study: Study,
    results: Results,
    *,
    command: str,
    failures: Sequence[str] = (),
    picture: str = "",
    problem: str | None = None,
) -> str:
    """The Markdown page.

    Args:
        study: what was compared.
        results: what was found.
        command: what gives it again.
        failures: one sentence for each run that failed.
        picture: name of the plot.
        problem: why there is none.
    """
    everything = [each.report for found in results for each in found.runs if each.report]
    parts = [f"# Study {study.name}", study.about, f"`{command}`", "\n".join(_facts(study, results, everything))]
    parts.append(_table(study, results))
    notes = _notes(study, results, failures)
    parts.append("\n".join(f"- {note}" for note in notes))
    parts.append(f"![{study.name}]({picture})" if problem is None else problem)
    sizes = _sizes_table(study, results)
    if sizes:
        parts += ["## Sizes", sizes, SIZES_NOTE]
    if any(pace(found.pace) for found in results):
        parts += ["## Equal time", _time_table(study, results), _time_note(study)]
    parts += ["## Every tuning run", "In the order in which they were chosen.", _tuning_table(study, results)]
    parts += ["## Every final run", _final_table(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(study: Study, results: Results, reports: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each fact; what differed between runs stands there with all its values."""
    machines = [report["machine"] for report in reports]
    versions = [report["versions"] for report in reports]
    finals = [each.report for found in results for each in found.final if each.report]
    base = " ".join(f"{key}={value}" for key, value in study.base.items())
    more = " ".join(f"{key}={value}" for key, value in study.tune_overrides.items())
    lines = [
        f"every run: `launch/{study.job}.py {base}`",
        f"tuning: {study.tune_runs} runs of each method, seed {study.tune_seed}{f', `{more}`' if more else ''}, judged "
        f"by bits per byte of the first held-out documents ({study.tuning_tokens:,} tokens at most)",
        f"final: the best setting of each with seeds {', '.join(map(str, study.final_seeds))}, judged by the held-out "
        "documents that no tuning run and no validation during training reads (`data.final_validation_unseen=true`)",
    ]
    if finals:
        tokens = _several(f"{report['training']['tokens']:,}" for report in finals)
        lines.append(f"training tokens of a final run: {tokens}")
    if reports:
        lines += [
            _several(f"processor: {m['cpu']}, {m['cores']} cores, threads of a run: {m['threads']}" for m in machines),
            *([f"GPU: {_several(', '.join(m['gpus']) for m in machines)}"] if any(m["gpus"] for m in machines) else []),
            _several(f"python {v['python']}, torch {v['torch']}, thinrank {v['thinrank']}" for v in versions),
            f"commit {_several(_commit(report['code']) for report in reports)}",
            f"data manifest {_several((report['data']['manifest_hash'] or '')[:12] for report in finals or reports)}"
            + (" (one for each seed)" if len(finals) > 1 else ""),
        ]
    return [f"- {line}" for line in lines]


def _table(study: Study, results: Results) -> str:
    rows = []
    for method, tuned, final in ((found.method, found.tune, found.final) for found in results):
        best, done = best_of(study, tuned), [each for each in final if each.state == "finished"]
        if best is None:
            continue
        setting = shown({**method.fixed, **method.setting(best.point)}) + (" †" if method.at_edge(best.point) else "")
        rows.append((_mean(each.score for each in final), method.name, setting, best, final, done))
    if not rows:
        return "No method is tuned yet."
    baseline = next((mean for mean, name, *_ in rows if name == study.baseline), math.nan)
    full = next((_state([e.report for e in (done or [best])]) for _, name, _, best, _, done in rows
                 if name == study.baseline), math.nan)  # fmt: skip
    head = ["method", "best setting", "runs", "tuning", *(f"seed {seed}" for seed in study.final_seeds), "mean",
            f"÷ {study.baseline}", "state, MiB", f"of {study.baseline}'s", "step, ms", "tokens/s",
            "captured energy"]  # fmt: skip
    lines = [_row(head), _row(["---", "---", *("---:" for _ in head[2:])])]
    for mean, name, setting, best, final, done in sorted(rows, key=lambda row: (not math.isfinite(row[0]), row[0])):
        reports = [each.report for each in (done or [best])]
        steps = [report["training"] for report in reports]
        lines.append(
            _row(
                [
                    name,
                    setting,
                    str(study.tune_runs),
                    _bits(best.score),
                    *(_verdict(final[i]) if i < len(final) else "–" for i in range(len(study.final_seeds))),
                    f"**{mean:.4f}**" if math.isfinite(mean) else "–",
                    _ratio(mean, baseline),
                    _number(_state(reports) / 2**20, ".2f"),
                    _number(100 * _state(reports) / full, ".0f", " %"),
                    _number(1000 * _mean(s.get("step_seconds_median") for s in steps), ".0f"),
                    _number(_mean(_speed(s) for s in steps), ",.0f"),
                    _number(_mean(r["metrics"].get("lowrank/captured_energy") for r in reports), ".3f"),
                ]
            )
        )
    return "\n".join(lines)


def _notes(study: Study, results: Results, failures: Sequence[str]) -> list[str]:
    notes = [
        "Bits per byte. Tuning and final are of different held-out documents, so their figures do not compare.",
        "State: all of the optimizer's tensors, as measured. Step: median of the readings. Tokens/s: training steps "
        "alone, renewals of a subspace included. Captured energy: mean over matrices, readings and seeds. All but bits "
        "per byte are means over the seeds.",
        "Times are of a machine that may have had other work, runs beside each other (`--jobs`) included.",
    ]
    edges = [
        f"{method.name} ({', '.join(key.removeprefix('optimizer.') for key in method.at_edge(best.point))})"
        for method, tuned in ((found.method, found.tune) for found in results)
        if (best := best_of(study, tuned)) and method.at_edge(best.point)
    ]
    if edges:
        notes.append(f"† at the edge of its grid, beyond which nothing was tried: {', '.join(edges)}.")
    for method, tuned, final in ((found.method, found.tune, found.final) for found in results):
        done = [each for each in tuned if each.state != "missing"]
        if len(done) < study.tune_runs:
            error = next((f" The next one ended with: {each.error}." for each in tuned[len(done) :] if each.error), "")
            notes.append(f"{method.name}: {len(done)} of {study.tune_runs} tuning runs are done.{error}")
            continue
        if best_of(study, tuned) is None:
            notes.append(f"{method.name}: every tuning run diverged.")
        notes += [
            f"{method.name}, seed {each.run.seed}: {f'failed, {each.error}' if each.error else 'not run yet'}."
            for each in final
            if each.state == "missing"
        ]
    differing = [
        f"{method.name} ({state['predicted_bytes']:,} predicted, {state['measured_bytes']:,} measured)"
        for method, final in ((found.method, found.final) for found in results)
        for state in [each.report["optimizer_state"] for each in final if each.report][:1]
        if state["predicted_bytes"] != state["measured_bytes"]
    ]
    if differing:
        notes.append(f"State bytes differ from the prediction: {', '.join(differing)}.")
    finished = [each.report for found in results for each in found.final if each.report]
    if len({report["training"]["tokens"] for report in finished}) > 1:
        notes.append("Final runs differ in training tokens, so their figures do not compare.")
    return [*notes, *study.left_out, *(f"Failed: {failure}." for failure in failures)]


SIZES_NOTE = (
    "Entries of the whole model. FLOPs: of the converted layers' forwards for one token, over the dense layers'. "
    "Training: weights, gradients and optimizer state of trained weights, as the parameters' sizes and the measured "
    "state give it. Peak: resident set of a run's process, libraries and data included."
)


def _sizes_table(study: Study, results: Results) -> str:
    """How large the models are that the methods train; empty where all are of one size."""
    rows: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = []
    for found in results:
        reports = [each.report for each in found.final if each.report]
        if reports:
            rows.append((found.method.name, reports[0]["model"], reports))
    if len({(model["parameters"], model["trained_parameters"]) for _, model, _ in rows}) < 2:
        return ""
    head = ["method", "parameters", "trained", "FLOPs", "state, MiB", "training, MiB", "peak, MiB", "tokens/s"]
    lines = [_row(head), _row(["---", *("---:" for _ in head[1:])])]
    for name, model, reports in rows:
        flops = model.get("reparam", {})
        training = 4 * (model["parameters"] + model["trained_parameters"]) + _state(reports)
        lines.append(
            _row(
                [
                    name,
                    f"{model['parameters']:,}",
                    f"{model['trained_parameters']:,}",
                    f"{flops['flops_after'] / flops['flops_before']:.2f}" if flops else "1.00",
                    _number(_state(reports) / 2**20, ".2f"),
                    _number(training / 2**20, ".1f"),
                    _number(_mean(r["memory"].get("peak_rss_mib") for r in reports), ",.0f"),
                    _number(_mean(_speed(r["training"]) for r in reports), ",.0f"),
                ]
            )
        )
    return "\n".join(lines)


TIME_NOTE = (
    "Step: mean of {steps} steps, renewals of a subspace included, of {runs}, with no other run of the study at the "
    "same time. Steps: how many fit the time of the baseline's final runs; learning-rate schedules end there. Bits per "
    "byte of the documents that the final runs are judged by."
)


def _time_note(study: Study) -> str:
    several = f"{study.pace_runs} runs of the best setting (their median; all methods in turns)"
    runs = several if study.pace_runs > 1 else "a run of the best setting"
    return TIME_NOTE.format(steps=study.pace_steps, runs=runs)


def _time_table(study: Study, results: Results) -> str:
    seconds = {found.method.name: pace(found.pace) for found in results}
    base = seconds.get(study.baseline) or math.nan
    means = {found.method.name: _mean(e.score for e in found.time if e.state != "missing") for found in results}
    head = ["method", "step, ms", f"÷ {study.baseline}", "steps", *(f"seed {seed}" for seed in study.final_seeds),
            "mean", f"÷ {study.baseline}"]  # fmt: skip
    lines = [_row(head), _row(["---", *("---:" for _ in head[1:])])]
    for found in sorted(
        results, key=lambda each: (not math.isfinite(means[each.method.name]), means[each.method.name])
    ):
        own, mean = seconds[found.method.name], means[found.method.name]
        if own is None:
            continue
        done = [each.report for each in found.time if each.report]
        bits = [_verdict(each) if each.state != "missing" else "–" for each in found.time]
        lines.append(
            _row(
                [
                    found.method.name,
                    _number(1000 * own, ".0f"),
                    _number(own / base, ".3f"),
                    f"{done[0]['training']['steps']:,}" if done else "–",
                    *(bits or ["–"] * len(study.final_seeds)),
                    f"**{mean:.4f}**" if math.isfinite(mean) else "–",
                    _ratio(mean, means.get(study.baseline, math.nan)),
                ]
            )
        )
    return "\n".join(lines)


def _tuning_table(study: Study, results: Results) -> str:
    lines = [_row(["method", "run", "setting", "bits per byte", "training, s"]), "| --- | ---: | --- | ---: | ---: |"]
    for method, tuned in ((found.method, found.tune) for found in results):
        done = [each for each in tuned if each.state != "missing"]
        best = min(done, key=lambda each: each.score, default=None)
        for number, each in enumerate(done, 1):
            bits = _verdict(each)
            lines.append(
                _row(
                    [
                        method.name,
                        str(number),
                        shown(each.run.setting),
                        f"**{bits}**" if each is best and math.isfinite(each.score) else bits,
                        _number(each.report["training"]["seconds"] if each.report else math.nan, ".0f"),
                    ]
                )
            )
    return "\n".join(lines) if len(lines) > 2 else "None yet."


def _final_table(results: Results) -> str:
    head = ["method", "seed", "bits per byte", "loss", "tokens", "training, s", "step, ms: median", "mean",
            "state, bytes: predicted", "measured", "peak RSS, MiB"]  # fmt: skip
    lines = [_row(head), _row(["---", *("---:" for _ in head[1:])])]
    for method, final in ((found.method, found.final) for found in results):
        for each in final:
            if each.report is None:
                continue
            report, training, state = each.report, each.report["training"], each.report["optimizer_state"]
            lines.append(
                _row(
                    [
                        method.name,
                        str(each.run.seed),
                        _verdict(each),
                        _bits(_mean([report["metrics"].get("test/loss")])),
                        f"{training['tokens']:,}",
                        f"{training['seconds']:.0f}",
                        _number(1000 * _mean([training.get("step_seconds_median")]), ".0f"),
                        _number(1000 * _mean([training.get("step_seconds_mean")]), ".0f"),
                        f"{state['predicted_bytes']:,}",
                        f"{state['measured_bytes']:,}",
                        f"{report['memory']['peak_rss_mib']:,.0f}",
                    ]
                )
            )
    return "\n".join(lines) if len(lines) > 2 else "None yet."


def plot(study: Study, results: Results, path: Path) -> str | None:
    """Draws loss over tokens, loss over time, and bits per byte over state.

    Of every method the final runs, or before there are any the best tuning run so far.

    Returns:
        None, or why nothing was drawn.
    """
    drawn = [(found.method.name, [each for each in found.final if each.state == "finished"]) for found in results]
    stage = "final runs" if any(runs for _, runs in drawn) else "tuning runs"  # their bits are of different text
    if stage == "tuning runs":
        drawn = [
            (found.method.name, [min(found.tune, key=lambda each: each.score)])
            for found in results
            if any(math.isfinite(each.score) for each in found.tune)
        ]
    drawn = [(name, runs) for name, runs in drawn if runs]
    if not drawn:
        return "No plot yet: no run has finished."
    try:
        # an extra of its own, which no other part needs, so that a checker may not find it
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return 'No plot: matplotlib is not installed (`pip install -e ".[study]"`, then `--stage report`).'
    palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f", "#9467bd",
               "#bcbd22", "#17becf", "#e377c2"]  # fmt: skip
    others = [name for name, _ in drawn if name != study.baseline]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(others)} | {study.baseline: "black"}
    rounds = ["-", "--", ":"]  # another kind of line for each time that the colours are through
    lines = {name: rounds[i // len(palette) % len(rounds)] for i, name in enumerate(others)} | {study.baseline: "-"}
    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    by_tokens, by_time, by_state = figure.subplots(1, 3)
    early, least, widest = [], [], 0.0
    for name, runs in drawn:
        curve = _mean_curve([each.curves for each in runs])
        if curve:
            tokens, minutes, loss = zip(*curve, strict=True)
            by_tokens.plot(tokens, loss, lines[name], color=colours[name], linewidth=1.4, label=name)
            by_time.plot(minutes, loss, lines[name], color=colours[name], linewidth=1.4)
            early.append(max(loss[int(0.15 * len(loss)) :]))
            least.append(min(loss))
        state = _mean(each.report["optimizer_state"]["measured_bytes"] for each in runs if each.report) / 2**20
        widest = max(widest, state)
        bits = [each.score for each in runs]
        by_state.plot([state] * len(bits), bits, "_", color=colours[name])
        by_state.plot([state], [_mean(bits)], "o", color=colours[name])
        by_state.annotate(name, (state, _mean(bits)), xytext=(6, 5), textcoords="offset points", fontsize=9)
    for axes, label in (
        (by_tokens, "training tokens, millions"),
        (by_time, "training time without validation, minutes"),
    ):
        axes.set_xlabel(label)
        axes.set_ylabel("training loss, nats per token")
        axes.set_xlim(left=0)
        if early:  # the first steep part would flatten all that follows
            axes.set_ylim(min(least) - 0.05 * (max(early) - min(least)), max(early))
    by_state.set_xlabel("optimizer state, MiB")
    by_state.set_ylabel("held-out bits per byte")
    by_state.margins(y=0.25)
    by_state.set_xlim(0, 1.3 * widest)  # room for the names
    for axes in (by_tokens, by_time, by_state):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{study.name}: {stage}; curves are means over the seeds, dashes are seeds", fontsize=11)
    figure.legend(loc="outside lower center", ncols=min(len(drawn), 8), frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return None


def _mean_curve(runs: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[float, float, float]]:
    """(millions of tokens, minutes of training, loss) at the steps that all runs have read, as means over the runs."""
    read = [
        (
            dict(curves.series(lines, "consumed_tokens")),
            dict(curves.step_seconds(lines)),
            dict(curves.series(lines, "train/loss")),
        )
        for lines in runs
    ]
    steps = set.intersection(*(set(values) for columns in read for values in columns))
    return [
        (
            _mean(tokens[step] for tokens, _, _ in read) / 1e6,
            _mean(seconds[step] for _, seconds, _ in read) / 60,
            _mean(loss[step] for _, _, loss in read),
        )
        for step in sorted(steps)
    ]


def _state(reports: Sequence[dict[str, Any]]) -> float:
    """Bytes of the optimizer's tensors, as a mean over runs."""
    return _mean(report["optimizer_state"]["measured_bytes"] for report in reports)


def _speed(training: dict[str, Any]) -> float | None:
    seconds = training.get("step_seconds_mean")
    return None if seconds is None else training["tokens"] / training["steps"] / seconds


def _mean(values: Iterable[float | None]) -> float:
    """NaN where there is no value."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else math.nan


def _verdict(each: Outcome) -> str:
    return each.state if each.state != "finished" else _bits(each.score)


def _bits(value: float) -> str:
    return _number(value, ".4f")


def _ratio(mean: float, baseline: float) -> str:
    """A dash where the baseline has diverged or is not complete."""
    return _number(mean / baseline if math.isfinite(baseline) else math.nan, ".4f")


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "–"


def _several(values: Iterable[str]) -> str:
    """The distinct values in their order."""
    return " / ".join(dict.fromkeys(values))


def _commit(code: dict[str, Any]) -> str:
    return f"{code['commit'][:12]}{' with local changes' if code['dirty'] else ''}" if code["commit"] else "unknown"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
