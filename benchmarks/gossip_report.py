"""What `gossip.py` has found, as a page of Markdown and a plot."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gossip_clocks import Round, Trace, replay
from gossip_methods import METHODS, Sizes
from gossip_train import Found

from thinrank.optim.gossip.cost import Network, all_reduce_bytes
from thinrank.trainers.files import replacing

WARMUP = 3  # steps that are in no time of a step: PowerSGD compresses from the third one on
CLAIM = ("allreduce", "allreduce-8", "dpsgd", "dcd-8")
"""What the paper compares: nothing, one of both, and both of compression and neighbours."""
FAR = 0.2  # a prediction that is worse is marked
Curve = list[tuple[float, float]]


@dataclass(frozen=True, order=True)
class Link:
    """Megabits a second that leave a rank, and milliseconds one way."""

    rate: float
    delay: float

    @property
    def network(self) -> Network:
        return Network(latency=self.delay / 1e3, bandwidth=self.rate * 125e3)

    def __str__(self) -> str:
        return f"{self.rate:g} Mbit/s, {self.delay:g} ms"


class Results:
    """The trainings of some methods on so many ranks, and their clocks.

    Args:
        found: by method.
        ranks: how many.
        sizes: of the model.
        compute: seconds of a step's own computation; None: medians of what was measured, over all methods that have
            the same optimizer.
    """

    def __init__(self, found: Mapping[str, Found], ranks: int, sizes: Sizes, compute: float | None = None) -> None:
        self.found, self.ranks, self.sizes = dict(found), ranks, sizes
        by_optimizer: dict[str, list[float]] = {}
        for name, each in found.items():
            by_optimizer.setdefault(METHODS[name].optimizer, []).append(each.compute)
        self._compute = {
            optimizer: statistics.median(seconds) if compute is None else compute
            for optimizer, seconds in by_optimizer.items()
        }

    def compute(self, name: str) -> float:
        return self._compute[METHODS[name].optimizer]

    def ends(self, name: str, link: Link, reduce: str = "ring", *, pieces: bool = True) -> list[float]:
        """Seconds at the end of each step.

        Args:
            reduce: how means over all ranks are found.
            pieces: an all-reduce in pieces is one; else as `reduce` says.
        """
        each, method = self.found[name], METHODS[name]
        in_turn = each.trace if pieces or method.among != "pieces" else summed(each.trace, self.ranks)
        return replay(
            in_turn,
            self.ranks,
            link.network,
            compute=self.compute(name),
            codec=each.codec,
            behind=method.behind,
            reduce=reduce,
        )

    def step(self, name: str, link: Link, reduce: str = "ring", *, pieces: bool = True) -> float:
        """Mean seconds of a step, the first ones left out."""
        ends = self.ends(name, link, reduce, pieces=pieces)
        first = min(WARMUP, len(ends) - 1)
        return (ends[-1] - ends[first - 1]) / (len(ends) - first) if first else ends[-1]

    def predicted(self, name: str, link: Link, reduce: str = "ring") -> float:
        """The same by the cost model."""
        return METHODS[name].seconds(
            self.sizes,
            self.ranks,
            link.network,
            compute=self.compute(name),
            codec=self.found[name].codec,
            reduce=reduce,
        )

    def curve(self, name: str, link: Link, reduce: str = "ring", *, pieces: bool = True) -> Curve:
        """(seconds, held-out loss)."""
        ends = self.ends(name, link, reduce, pieces=pieces)
        return [(ends[step - 1], loss) for step, loss in self.found[name].curve]


def summed(trace: Trace, ranks: int) -> Trace:
    """The same bytes, as a mean over all ranks in each step; of exchanges whose bytes an all-reduce would send."""
    found = Trace()
    for exchange in trace.exchanges():
        sent = sum(n for each in exchange for *_, n in each.sends) / ranks
        found.add((Round(mean=round(sent / all_reduce_bytes(ranks, 1.0))),))
    return found


def until(curve: Curve, target: float) -> float | None:
    """Seconds until a loss is reached, between readings on a straight line; None if never."""
    before: tuple[float, float] | None = None
    for when, loss in curve:
        if loss <= target:
            if before is None:
                return when
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (when - before[0])
        before = when, loss
    return None


def at(curve: Curve, seconds: float) -> float | None:
    """The loss after so many seconds, between readings on a straight line; None before the first one."""
    found: float | None = None
    before: tuple[float, float] | None = None
    for when, loss in curve:
        if when > seconds:
            if before is not None:
                found = before[1] + (seconds - before[0]) / (when - before[0]) * (loss - before[1])
            break
        found, before = loss, (when, loss)
    return found


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def head(names: Sequence[str], text: int = 1) -> list[str]:
    return [row(names), "|" + " --- |" * text + " ---: |" * (len(names) - text)]


def losses_table(results: Results) -> list[str]:
    """A row for each method: how well it has trained, what it has sent, what that has cost the processor."""
    whole = results.found["allreduce"].loss if "allreduce" in results.found else None
    lines = head(
        [
            "method",
            "held-out loss",
            "÷ all-reduce",
            "bits per byte",
            "ranks' own losses",
            "ranks apart",
            "bytes a step",
            "formula",
            "counted ÷ formula",
            "exchange, ms",
        ]
    )
    for name, each in results.found.items():
        formula, counted = METHODS[name].bytes(results.sizes, results.ranks), each.trace.bytes(results.ranks)
        lines.append(
            row(
                [
                    f"`{name}`",
                    f"{each.loss:.4f}",
                    "" if whole is None else f"{each.loss / whole:.4f}",
                    f"{each.bits:.4f}",
                    "the same" if each.local is None else f"{each.local:.4f}",
                    "0" if each.local is None else f"{each.apart:.1e}",
                    f"{counted:,.0f}",
                    f"{formula:,.0f}",
                    f"{counted / formula:.3f}" if formula else "",
                    f"{1e3 * each.codec:.0f}",
                ]
            )
        )
    return lines


def times_table(results: Results, links: Sequence[Link]) -> list[str]:
    """A row for each network, the seconds of a step of each method; with ! where the cost model is far off."""
    lines = head(["Mbit/s, ms", *results.found])
    for link in links:
        cells = []
        for name in results.found:
            seconds = results.step(name, link)
            mark = "" if abs(seconds / results.predicted(name, link) - 1) <= FAR else " !"
            cells.append(f"{seconds:.3f}{mark}")
        lines.append(row([f"{link.rate:g}, {link.delay:g}", *cells]))
    return lines


def predictions_table(results: Results, links: Sequence[Link]) -> list[str]:
    """A row for each method: the clocks over the cost model, from the least to the most of all networks."""
    lines = head(["method", "clock ÷ cost model, least", "most", "most on"])
    for name in results.found:
        ratios = [(results.step(name, link) / results.predicted(name, link), link) for link in links]
        least, most = min(ratios), max(ratios)
        mark = " !" if most[0] > 1 + FAR or least[0] < 1 - FAR else ""
        lines.append(row([f"`{name}`", f"{least[0]:.3f}", f"{most[0]:.3f}{mark}", str(most[1])]))
    return lines


@dataclass(frozen=True)
class Verdict:
    """On one network: seconds by method, of a step and until a loss."""

    link: Link
    step: dict[str, float]
    loss: dict[str, float]


def verdicts(results: Results, links: Sequence[Link], names: Sequence[str], *, ring: bool) -> list[Verdict]:
    """What each network says of some methods; the loss is one that all of them have reached.

    Args:
        ring: all-reduces go around a ring, the 8-bit one's, too; else each in its fastest form.
    """
    target, found = target_of(results, names), []
    for link in links:
        step, loss = {}, {}
        for name in names:
            forms = ("ring",) if ring else ("ring", "tree")
            form = min(forms, key=lambda how: results.step(name, link, how, pieces=not ring))
            step[name] = results.step(name, link, form, pieces=not ring)
            seconds = until(results.curve(name, link, form, pieces=not ring), target)
            assert seconds is not None, "each has reached the worst of all"
            loss[name] = seconds
        found.append(Verdict(link, step, loss))
    return found


def target_of(results: Results, names: Sequence[str]) -> float:
    return max(results.found[name].loss for name in names)


def claim(results: Results, links: Sequence[Link]) -> list[str]:
    """The paper's claim, network by network, and in a sentence."""
    missing = [name for name in CLAIM if name not in results.found]
    if missing:
        return [f"Not to be seen without {', '.join(missing)}.", ""]
    target = target_of(results, CLAIM)
    best, ring = (verdicts(results, links, CLAIM, ring=ring) for ring in (False, True))
    names = ["all-reduce", "8 bits", "D-PSGD", "DCD 8"]
    steps, losses = (f"step: {name}" for name in names), (f"to {target:.3f}: {name}" for name in names)
    lines = head(["Mbit/s, ms", *steps, "fastest", *losses, "fastest"])
    for each in best:
        cells = [f"{each.link.rate:g}, {each.link.delay:g}"]
        for seconds, form in ((each.step, ".3f"), (each.loss, ".1f")):
            cells += [*(f"{seconds[name]:{form}}" for name in CLAIM), f"`{fastest(seconds)}`"]
        lines.append(row(cells))
    fast = "With each all-reduce in its fastest form, as in the table (the 8-bit one in pieces):"
    lines = [
        ruling(best, ring),
        "",
        *lines,
        "",
        fast,
        "",
        *counts(best),
        "",
        "With both around a ring:",
        "",
        *counts(ring),
        "",
    ]
    everyone = verdicts(results, links, list(results.found), ring=False)
    winners = Counter(fastest(each.step) for each in everyone), Counter(fastest(each.loss) for each in everyone)
    told = [", ".join(f"`{name}` on {n}" for name, n in found.most_common()) for found in winners]
    reached = target_of(results, list(results.found))
    return [*lines, f"Of all methods here the fastest step: {told[0]}; to a loss of {reached:.3f}: {told[1]}.", ""]


def bad(found: Sequence[Verdict]) -> list[Verdict]:
    """On networks of which both the rate and the delay are bad."""
    return [each for each in found if each.link.rate <= 20 and each.link.delay >= 10]


def both(seconds: Mapping[str, float]) -> bool:
    """Whether quantised exchange with neighbours beats who quantises and who talks to neighbours."""
    return seconds["dcd-8"] < min(seconds["dpsgd"], seconds["allreduce-8"])


def ruling(best: Sequence[Verdict], ring: Sequence[Verdict]) -> str:
    """The claim in a sentence."""
    said = "That 8 bits and neighbours together are faster than either of the two where rate and delay are both bad"
    if not bad(best):
        return f"{said} was not looked at: no network has at most 20 Mbit/s and at least 10 ms."
    parts = []
    for what, found in (("all-reduces in their fastest form", bad(best)), ("all-reduces around a ring", bad(ring))):
        steps, losses = sum(both(each.step) for each in found), sum(both(each.loss) for each in found)
        share = (steps + losses) / (2 * len(found))
        verdict = "shown" if share > 0.9 else "refuted" if share < 0.1 else "true of some"
        parts.append(f"{verdict} with {what} ({steps} of {len(found)} networks by the step, {losses} by the loss)")
    return f"{said} is {', and '.join(parts)}."


def fastest(seconds: Mapping[str, float]) -> str:
    return min(seconds, key=lambda name: seconds[name])


def counts(found: Sequence[Verdict]) -> Iterator[str]:
    """On how many networks quantised exchange with neighbours beats both of its parents."""
    groups = {
        "all networks": found,
        "both bad (at most 20 Mbit/s and at least 10 ms)": bad(found),
        "both good (at least 100 Mbit/s and at most 1 ms)": [
            each for each in found if each.link.rate >= 100 and each.link.delay <= 1
        ],
    }
    for name, some in groups.items():
        if not some:
            continue
        parts = []
        for what, seconds in (("of a step", [each.step for each in some]), ("to the loss", [e.loss for e in some])):
            beats = [sum(s["dcd-8"] < s[other] for s in seconds) for other in CLAIM[:3]]
            wins = sum(both(s) for s in seconds)
            parts.append(
                f"by the seconds {what} `dcd-8` beats both parents on {wins} of {len(some)} (float32 all-reduce on "
                f"{beats[0]}, 8-bit all-reduce on {beats[1]}, D-PSGD on {beats[2]})"
            )
        yield f"- {name}: {'; '.join(parts)}"


def against_seconds(results: Results, link: Link, readings: int = 8) -> list[str]:
    """Losses after so many seconds, as far as the quickest and the baseline need."""
    curves = {name: results.curve(name, link) for name in results.found}
    longest = statistics.median(curve[-1][0] for curve in curves.values())
    lines = head(["seconds", *curves])
    for k in range(1, readings + 1):
        seconds = longest * k / readings
        losses = [at(curve, seconds) for curve in curves.values()]
        lines.append(row([f"{seconds:.0f}", *("" if loss is None else f"{loss:.3f}" for loss in losses)]))
    return lines


def section(results: Results, links: Sequence[Link], shown: Sequence[Link]) -> list[str]:
    """All tables of so many ranks."""
    compute = ", ".join(f"{1e3 * results.compute(name):.0f} ms of `{name}`" for name in optimizers(results))
    lines = [f"## {results.ranks} ranks", "", f"A step computes for {compute} on each rank.", ""]
    lines += [*losses_table(results), "", "### Seconds of a step", "", *times_table(results, links), ""]
    lines += [*predictions_table(results, links), ""]
    lines += ["### The paper's claim", "", *claim(results, links)]
    for link in shown:
        lines += [f"### Held-out loss by the seconds: {link} one way", "", *against_seconds(results, link), ""]
    return lines


def optimizers(results: Results) -> list[str]:
    """The first method with each optimizer."""
    first: dict[str, str] = {}
    for name in results.found:
        first.setdefault(METHODS[name].optimizer, name)
    return list(first.values())


def plot(everything: Sequence[Results], shown: Sequence[Link], path: Path) -> str | None:
    """Draws losses over seconds, a row for each number of ranks; or says why not."""
    try:
        # an extra of its own, which no other part needs, so that a checker may not find it
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return 'No plot: matplotlib is not installed (`pip install -e ".[study]"`).'
    figure = Figure(figsize=(5 * len(shown), 4 * len(everything)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(everything), len(shown), squeeze=False)
    for results, line in zip(everything, grid, strict=True):
        for link, axes in zip(shown, line, strict=True):
            for name in results.found:
                axes.plot(*zip(*results.curve(name, link), strict=True), label=name, linewidth=1.4)
            axes.set_xscale("log")
            axes.set_title(f"{results.ranks} ranks, {link}", fontsize=10)
            axes.set_xlabel("seconds")
            axes.set_ylabel("held-out loss, nats per token")
            axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return None
