"""What the runs of a transfer say: where the best settings lie at each width, what stays, and what that advises."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinrank.optim.scaling import (
    DecayFit,
    Drift,
    Match,
    ParameterClass,
    ScalingConfig,
    drift,
    fit_wd_exponent,
    gain_slope,
    matrix_kind,
    multipliers,
    sigma_slope,
)
from thinrank.trainers.transfer.conduct import Record
from thinrank.trainers.transfer.sweep import Sweep

KIND_NAMES = ("qk", "vo", "mlp_in", "mlp_out")

Place = tuple[int, int]
"""A setting: index of the rate, index of the decay."""


@dataclass(frozen=True)
class Best:
    """The best setting of one rule at one width.

    Attributes:
        place: on the grid.
        loss: mean over seeds.
        spread: standard deviation over seeds; None with one seed.
        rate: the rate where a parabola through the best one and its neighbours has its lowest point, in units of the
            base; the grid's own at an edge.
        step: by how many steps of the grid of rates that is away from the best at the narrowest width.
        edge: the best rate is the lowest or the highest that was tried.
    """

    place: Place
    loss: float
    spread: float | None
    rate: float
    edge: bool
    step: float = 0.0


@dataclass
class Verdict:
    """What is known of one rule.

    Attributes:
        rule: its name.
        best: by width.
        moved: how far the best rate and the best decay moved, in steps of the grid, at most over the widths; the rate's
            by the parabola where there is one.
        place: the setting at which widths are compared, tried at all of them; None where there is none.
        age: Σηλ at which singular values are compared; 0 without decay.
        fits: exponent of σ_top by kind of matrix.
        sigma: how σ_top follows the width at equal age, by kind.
        gains: how gains follow the width, by kind of matrix (`linear …`) and by branch (`residual …`).
        drifts: whether weights of the widest proxy are in balance, by kind.
        tops: σ_top by kind and width, of which the fits are made.
        coordinates: exponents of the coordinate check by module, the first ones that grow; None where it was not made.
        missing: why something was not found.
    """

    rule: str
    best: dict[int, Best]
    moved: tuple[float, float]
    place: Place | None = None
    age: float = 0.0
    fits: dict[str, DecayFit] = field(default_factory=dict)
    sigma: dict[str, Match] = field(default_factory=dict)
    gains: dict[str, Match] = field(default_factory=dict)
    drifts: dict[str, Drift] = field(default_factory=dict)
    tops: dict[str, dict[int, float]] = field(default_factory=dict)
    coordinates: dict[str, float] | None = None
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Advice:
    """What to do at the target.

    Attributes:
        rule: the rule under which the best setting moved least.
        rate, decay: of the base, to be given to `optimizer`.
        hidden_rate, hidden_decay: what they become for hidden matrices at the target.
        confidence: high, medium or low.
        doubts: what speaks against it.
    """

    rule: str
    rate: float
    decay: float
    hidden_rate: float
    hidden_decay: float
    confidence: str
    doubts: tuple[str, ...]


def vertex(x: Sequence[float], y: Sequence[float]) -> float:
    """Where the parabola through three points has its lowest point, kept between the outer ones."""
    (a, b, c), (u, v, w) = x, y
    below = (b - a) * (v - w) - (b - c) * (v - u)
    if below == 0 or not math.isfinite(below):
        return b
    found = b - 0.5 * ((b - a) ** 2 * (v - w) - (b - c) ** 2 * (v - u)) / below
    return min(max(found, a), c)


def means(records: Iterable[Record]) -> dict[Place, tuple[float, float | None]]:
    """Mean loss and its standard deviation over seeds at each setting."""
    losses: dict[Place, list[float]] = {}
    for each in records:
        losses.setdefault((each.trial.rate, each.trial.decay), []).append(each.loss)
    return {
        place: (
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
        )
        for place, values in losses.items()
    }


def best_of(sweep: Sweep, records: Sequence[Record]) -> Best | None:
    """The best setting among the runs of one rule at one width; None where nothing has converged."""
    found = means(records)
    finite = {place: loss for place, (loss, _) in found.items() if math.isfinite(loss)}
    if not finite:
        return None
    place = min(finite, key=lambda each: finite[each])
    here = sum(decay == place[1] for _, decay in found)
    line = place[1] if here > 1 else sweep.middle  # `cross` has tried all rates at one decay alone
    tried = sorted(rate for rate, decay in found if decay == line)
    rate = sweep.rates[place[0]]
    around = [(i, line) for i in (place[0] - 1, place[0], place[0] + 1)]
    edge = place[0] in (tried[0], tried[-1])
    if not edge and all(each in finite for each in around):
        logs = [math.log(sweep.rates[i]) for i, _ in around]
        rate = math.exp(vertex(logs, [finite[each] for each in around]))
    return Best(place, finite[place], found[place][1], rate, edge)


def grid_step(rates: Sequence[float]) -> float:
    """The mean step of a grid of rates, in logarithms."""
    return math.log(rates[-1] / rates[0]) / (len(rates) - 1)


def moves(sweep: Sweep, best: Mapping[int, Best]) -> tuple[dict[int, Best], tuple[float, float]]:
    """The same with how far each is from the narrowest width's, and the largest moves of rate and decay."""
    if not best:
        return {}, (math.inf, math.inf)
    first = best[min(best)]
    unit = grid_step(sweep.rates)
    shown = {
        width: Best(b.place, b.loss, b.spread, b.rate, b.edge, math.log(b.rate / first.rate) / unit)
        for width, b in best.items()
    }
    rate = max(abs(b.step) for b in shown.values())
    decay = max(abs(b.place[1] - first.place[1]) for b in shown.values())
    return shown, (rate, float(decay))


def common_place(records: Mapping[int, Sequence[Record]]) -> Place | None:
    """The setting of the least mean loss among those that have converged at all widths."""
    losses = [{place: loss for place, (loss, _) in means(r).items() if math.isfinite(loss)} for r in records.values()]
    shared = set.intersection(*(set(each) for each in losses)) if losses else set()
    return min(shared, key=lambda place: (sum(each[place] for each in losses), place), default=None)


def ages(record: Record, kind: str) -> list[tuple[float, float]]:
    """(Σηλ, σ_top) of one kind at each reading, medians over layers."""
    found = []
    for row in record.probe.get("rows", ()):
        names = [name for name in row["sigma"] if matrix_kind(name) == kind]
        if names:
            clock = statistics.median(row["clock"].get(name, 0.0) for name in names)
            found.append((clock, statistics.median(row["sigma"][name] for name in names)))
    return found


def sigma_at(readings: Sequence[tuple[float, float]], age: float) -> float | None:
    """σ_top at an age between two readings, linear in between; None before the first one."""
    for (a, x), (b, y) in itertools.pairwise(readings):
        if a <= age <= b * (1 + 1e-9):
            return y if b == a else x + (y - x) * min(1.0, (age - a) / (b - a))
    return None


def gain_of(record: Record, sort: str, group: str) -> float | None:
    """The median gain of one kind of matrix, or of one branch."""
    of: Callable[[str], str | None] = matrix_kind if sort == "linear" else lambda name: name.rpartition(".")[2]
    values = [
        v for name, v in record.probe.get("gains", {}).get(sort, {}).items() if v is not None and of(name) == group
    ]
    return statistics.median(values) if values else None


def judge(sweep: Sweep, rule: str, scaling: ScalingConfig, records: Mapping[int, Sequence[Record]]) -> Verdict:
    """Everything that is known of one rule from its runs, by width."""
    best = {width: found for width, runs in records.items() if (found := best_of(sweep, runs)) is not None}
    shown, moved = moves(sweep, best)
    verdict = Verdict(rule, shown, moved)
    lacking = [width for width in sweep.widths if width not in best]
    if lacking:
        verdict.missing.append(f"nothing has converged at width {', '.join(map(str, lacking))}")
    have = {width: runs for width, runs in records.items() if width in best}
    verdict.place = place = common_place(have) if len(have) >= 3 else None
    if place is None:
        verdict.missing.append("no setting has converged at three widths, so singular values cannot be compared")
        return verdict
    here = {w: [r for r in runs if (r.trial.rate, r.trial.decay) == place] for w, runs in have.items()}
    for kind in KIND_NAMES:
        _compare(verdict, sweep, scaling, here, kind)
    branches = sorted(
        {n.rpartition(".")[2] for r in here[min(here)] for n in r.probe.get("gains", {}).get("residual", {})}
    )
    for sort, groups in (("linear", KIND_NAMES), ("residual", branches)):
        for group in groups:
            pairs = [(w, g) for w, runs in here.items() for r in runs if (g := gain_of(r, sort, group))]
            if len({w for w, _ in pairs}) >= 3:
                verdict.gains[f"{sort} {group}"] = gain_slope([w for w, _ in pairs], [g for _, g in pairs])
    widest = [r for r in have[max(have)] if r.trial.decay == sweep.middle and math.isfinite(r.loss)]
    for kind in KIND_NAMES:
        rows = [(*peak, found[-1][1]) for r in widest if (peak := peak_of(r, kind)) and (found := ages(r, kind))]
        if len({row[0] for row in rows}) >= 3 and all(row[1] > 0 for row in rows):
            verdict.drifts[kind] = drift(*zip(*rows, strict=True))
    return verdict


def peak_of(record: Record, kind: str) -> tuple[float, float] | None:
    """Peak rate and decay of one kind of matrix, as the optimizer had them."""
    found = [peak for name, peak in record.probe.get("peak", {}).items() if matrix_kind(name) == kind]
    return None if not found else (found[0][0], found[0][1])


def _compare(
    verdict: Verdict, sweep: Sweep, scaling: ScalingConfig, here: Mapping[int, Sequence[Record]], kind: str
) -> None:
    """Fit and slope of σ_top of one kind at equal age."""
    readings = {(w, r.trial.seed): ages(r, kind) for w, runs in here.items() for r in runs}
    readings = {key: rows for key, rows in readings.items() if rows}
    if len({w for w, _ in readings}) < 3:
        verdict.missing.append(f"no matrices of kind {kind} at three widths")
        return
    age = min(rows[-1][0] for rows in readings.values())
    if age <= 0:
        verdict.missing.append(f"{kind}: without decay there is no balance to compare")
        return
    verdict.age = age
    rows = []
    for (width, seed), found in readings.items():
        top = sigma_at(found, age)
        record = next(r for r in here[width] if r.trial.seed == seed)
        peak = peak_of(record, kind)
        if top is not None and peak is not None:
            rows.append((width, top, *peak))
    if len({row[0] for row in rows}) < 3:
        verdict.missing.append(f"{kind}: too few readings at an age of {age:.2g} that all widths have: raise --probes")
        return
    widths, tops, etas, lams = (list(column) for column in zip(*rows, strict=True))
    falls = scaling.lr_width_exp if scaling.active else 0.0
    verdict.fits[kind] = fit_wd_exponent(widths, tops, etas, lams, lr_width_exp=falls)
    verdict.sigma[kind] = sigma_slope(widths, tops, scaling.wd_width_exp if scaling.active else 0.0)
    verdict.tops[kind] = {w: statistics.median(t for v, t, *_ in rows if v == w) for w in sorted(set(widths))}


def advise(sweep: Sweep, verdicts: Sequence[Verdict], scalings: Mapping[str, ScalingConfig]) -> Advice | None:
    """The rule under which the best setting moved least, and its values for the target; None without any result."""
    usable = [v for v in verdicts if v.best]
    if not usable:
        return None
    widest = max(max(v.best) for v in usable)

    def order(verdict: Verdict) -> tuple[bool, float, float]:
        last = verdict.best.get(widest)
        unsettled = last is None or len(verdict.best) < len(sweep.widths)
        return unsettled, round(2 * sum(verdict.moved)) / 2, math.inf if last is None else last.loss

    chosen = min(usable, key=order)
    last = chosen.best[max(chosen.best)]
    config, ratio = scalings[chosen.rule], sweep.target / sweep.base
    of = multipliers(ParameterClass.HIDDEN, config, ratio)
    decay = sweep.decays[last.place[1]]
    doubts = _doubts(sweep, chosen, last)
    hard = chosen.moved[0] > 1 or chosen.moved[1] > 1 or last.edge or len(chosen.best) < len(sweep.widths)
    confidence = "low" if hard or len(doubts) > 3 else "medium" if doubts else "high"
    return Advice(chosen.rule, last.rate, decay, last.rate * of.lr, decay * of.weight_decay, confidence, tuple(doubts))


def _doubts(sweep: Sweep, verdict: Verdict, last: Best) -> list[str]:
    found = []
    rate, decay = verdict.moved
    if len(verdict.best) < len(sweep.widths):
        found.append("not all widths have a result")
    if rate > 0.5:
        found.append(f"the best rate moved by {rate:.1f} steps of the grid")
    if decay:
        found.append(f"the best decay moved by {decay:.0f} steps of the grid")
    if any(b.edge for b in verdict.best.values()):
        found.append("the best rate is at an edge of the grid: try more rates beyond it")
    if last.place[1] in (0, len(sweep.decays) - 1) and len(sweep.decays) > 1:
        found.append("the best decay is at an edge of the grid: try more decays beyond it")
    if last.spread is None:
        found.append("one seed says nothing of chance")
    if verdict.age < 1:
        found.append(f"weights still remember how they began (Σηλ = {verdict.age:.2g}, below 1): train longer")
    if any(not match.passes for match in verdict.sigma.values()):
        found.append("top singular values do not stay where they are under this rule")
    if sweep.target > 8 * max(sweep.widths):
        found.append(f"the target is {sweep.target / max(sweep.widths):.0f} times as wide as the widest proxy")
    if verdict.coordinates:
        found.append(f"activations grow in the coordinate check ({next(iter(verdict.coordinates))})")
    return found


def as_plain(value: Any) -> Any:
    """Dataclasses as dicts, for JSON."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_plain(getattr(value, name)) for name in value.__dataclass_fields__} | (
            {"verdict": value.verdict} if isinstance(value, Match) else {}
        )
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    return value
