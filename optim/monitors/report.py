"""A row for every weight of a model: all measures of spectra, by WeightWatcher's names where it has one.

`spectral_report(model)` is the whole of it. What each column can and cannot see stands with the function that it comes
from: `tail` (alpha), `bulk`, `erg`, `farms`, `summaries`, `intruders` and `drift`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.monitors.bulk import bulk, correlation_trap, fitted_bulk, kurtosis
from thinrank.optim.monitors.drift import jensen_shannon_drift, l1_drift
from thinrank.optim.monitors.erg import erg_count
from thinrank.optim.monitors.farms import farms_tail, square_blocks
from thinrank.optim.monitors.intruders import LIKE, TOP, intruders
from thinrank.optim.monitors.spectrum import eigenvalues, wide
from thinrank.optim.monitors.summaries import (
    condition,
    condition_quantile,
    effective_rank,
    entropy_rank,
    log_volume,
    matrix_rank,
    normalised_entropy,
    nuclear_norm,
    participation_ratio,
    stable_rank,
)
from thinrank.optim.monitors.tail import FLOOR, RELIABLE_KS, alpha_weighted, hill, log_alpha_norm, power_law
from thinrank.optim.monitors.weights import Source, Weight, weights

WHO = ("layer_id", "name", "kind", "M", "N", "Q", "num_evals")
GROUPS: dict[str, tuple[str, ...]] = {
    "size": (
        "norm",
        "log_norm",
        "spectral_norm",
        "log_spectral_norm",
        "sv_max",
        "sv_min",
        "matrix_rank",
        "stable_rank",
        "effective_rank",
        "entropy_rank",
        "participation_ratio",
        "entropy",
        "nuclear_norm",
        "kappa",
        "kappa_q",
        "log_volume",
    ),
    "tail": (
        "alpha",
        "D",
        "sigma",
        "xmin",
        "xmax",
        "num_pl_spikes",
        "reliable",
        "alpha_weighted",
        "log_alpha_norm",
        "num_fingers",
        "raw_alpha",
        "hill_alpha",
        "hill_D",
    ),
    "erg": ("detX_num", "num_ERG_spikes", "ERG_gap"),
    "bulk": ("sigma_mp", "bulk_min", "bulk_max", "num_spikes", "mp_softrank", "num_outliers"),
    "farms": ("farms_alpha", "farms_D"),
    "trap": ("kurtosis", "num_traps"),
}
"""Columns that are found together, by what they cost."""
NEARLY_FULL = 0.95
"""Share of the singular values from which on a rank is not called deficient: the smallest of a large square matrix are
below the rounding of float32 without any defect."""
COMPARED = ("intruders", "least_similarity", "drift_l1", "drift_js", "relative_change")
"""Columns of a comparison with another model."""
METRICS = tuple(name for group in GROUPS.values() for name in group)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a report measures.

    Defaults: WeightWatcher's are max_evals=15000 and max_fingers=0 (10 with its `fix_fingers`); min_evals=50 is
    AlphaDecay's; rows=128 and per_side=5 of FARMS, seed=0 and metrics=() are ours.

    Attributes:
        metrics: columns wanted, of `METRICS`; () for all. What no wanted column needs is not computed.
        min_evals: fewer eigenvalues above the floor have no α.
        max_evals: weights with more are left out: the time of a factorisation grows with the third power.
        max_fingers: see `power_law`.
        rows, per_side: FARMS's windows, see `pooled_eigenvalues`.
        seed: of the shuffling of `num_traps`.
    """

    metrics: tuple[str, ...] = ()
    min_evals: int = 50
    max_evals: int = 15000
    max_fingers: int = 0
    rows: int = 128
    per_side: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in (*METRICS, *COMPARED):
                raise ValueError(f"metrics must be of the report's columns, got {name!r}: write such as {METRICS[16]}")
        for name, least in (("min_evals", 2), ("max_evals", 2), ("max_fingers", 0), ("rows", 2), ("per_side", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}: raise it")

    def wants(self, group: str) -> bool:
        """Whether a column of the group is wanted."""
        needed = {*self.metrics} & {*GROUPS[group]} or (group == "tail" and "ERG_gap" in self.metrics)
        return not self.metrics or bool(needed)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of each row, in this order, `warning` last."""
        return (*WHO, *(name for name in METRICS if not self.metrics or name in self.metrics), "warning")


DEFAULT = ReportConfig()


@dataclass(frozen=True)
class Measured:
    """A row, and the singular values behind it: (num_evals,) by falling size, float64; None where there are none."""

    row: dict[str, Any]
    s: Tensor | None


def spectral_report(source: Source, *, layers: str = "", config: ReportConfig = DEFAULT) -> list[dict[str, Any]]:
    """A row for every weight of two dimensions or more.

    Rows have the columns of `config`: WeightWatcher's where it has them, `layer_id` counting rows from 0 and `name`
    being the whole name; ours beside them. Ints, floats, strings and, for `reliable`, a bool. None stands where a
    measure makes no sense for a weight, and `warning` says why; also that an α is no power law's (D of 0.1 or more,
    `reliable` false), and else the package's words over-trained and under-trained. Weights of zeros, of deficient rank,
    of one row, with entries that are not finite: a row each, never an error.

    Of a layer of factors the spectrum is its product's, zeros included in the counts; fits use what is above zero.

    Args:
        source: a model, or its state dict.
        layers: a regular expression that a name must contain.
        config: what is measured.

    Returns:
        The rows, [] for a model without matrices.

    Raises:
        ValueError: a pattern that is none.
    """
    return [each.row for each in measured(weights(source, layers), config)]


def measured(found: Iterable[Weight], config: ReportConfig = DEFAULT) -> Iterator[Measured]:
    """The rows of `spectral_report` one at a time, with singular values."""
    for index, weight in enumerate(found):
        yield measure(weight, index, config)


@torch.no_grad()
def measure(weight: Weight, index: int = 0, config: ReportConfig = DEFAULT) -> Measured:
    """The row of one weight."""
    M, N = sorted(weight.shape)
    row: dict[str, Any] = dict.fromkeys(config.columns)
    row |= {"layer_id": index, "name": weight.name, "kind": weight.kind, "M": M, "N": N, "Q": N / M if M else None}
    row["num_evals"] = 0
    row["warning"] = reason = unmeasurable(weight, config)
    if reason:
        return Measured(row, None)
    s = weight.singular_values()
    row["num_evals"] = len(s)
    if not float(s[0]) > 0:
        row["warning"] = "all zeros"
        return Measured(row, s)
    notes: list[str] = []
    values = _sizes(s, weight.shape, notes) if config.wants("size") else {}
    evals = eigenvalues(s)
    if M < 2:
        notes.append("one singular value: no spectrum")
    else:
        rank = int(matrix_rank(s, weight.shape))
        kept = eigenvalues(s[:rank])
        if config.wants("tail"):
            values |= _tail(kept, rank, notes, config)
        if config.wants("erg"):
            count = int(erg_count(evals))
            values |= {"detX_num": count, "num_ERG_spikes": count}
            if values.get("num_pl_spikes") is not None:
                values["ERG_gap"] = count - values["num_pl_spikes"]
        if config.wants("bulk") and rank >= NEARLY_FULL * len(s):  # else the zeros are the bulk
            values |= _bulk(evals, weight.shape)
        if rank >= 2:
            values |= _of_entries(weight, rank, config)
    values["warning"] = "; ".join(notes)
    row |= {name: value for name, value in values.items() if name in row}
    return Measured(row, s)


def unmeasurable(weight: Weight, config: ReportConfig = DEFAULT) -> str:
    """Why a weight has no spectrum, or none that is to be found; empty where it has."""
    if weight.missing:
        return weight.missing
    if not all(weight.shape):
        return "empty"
    if min(weight.shape) > config.max_evals:
        return f"more than {config.max_evals} eigenvalues: left out"
    if coded := [x.dtype for x in weight.parts if x.element_size() < 2]:
        return f"codes of {str(coded[0]).removeprefix('torch.')}, whose scales are stored apart"
    if any(x.is_meta for x in weight.parts):
        return "no values (meta device)"
    wrong = sum(int((~torch.isfinite(x)).sum()) for x in weight.parts)
    return f"{wrong:,} entries are not finite" if wrong else ""


def _sizes(s: Tensor, shape: tuple[int, int], notes: list[str]) -> dict[str, Any]:
    rank, largest, total = int(matrix_rank(s, shape)), float(s[0]) ** 2, float(s.square().sum())
    full = rank >= NEARLY_FULL * len(s)
    if not full:
        notes.append(f"rank {rank} of {len(s)}")
    return {
        "norm": total,
        "log_norm": math.log10(total) if total else None,
        "spectral_norm": largest,
        "log_spectral_norm": math.log10(largest) if largest else None,
        "sv_max": float(s[0]),
        "sv_min": float(s[-1]),
        "matrix_rank": rank,
        "stable_rank": float(stable_rank(s)),
        "effective_rank": float(effective_rank(s)),
        "entropy_rank": float(entropy_rank(s)),
        "participation_ratio": float(participation_ratio(s)),
        "entropy": _number(normalised_entropy(s, shape)),
        "nuclear_norm": float(nuclear_norm(s)),
        "kappa": float(condition(s)) if full else math.inf,
        "kappa_q": float(condition_quantile(s)) if full else math.inf,
        "log_volume": float(log_volume(s)) if full else -math.inf,
    }


def _tail(kept: Tensor, rank: int, notes: list[str], config: ReportConfig) -> dict[str, Any]:
    """Fits to the eigenvalues that are not zero."""
    if rank < config.min_evals:
        notes.append(f"no alpha: {rank} eigenvalues, fewer than {config.min_evals}")
        return {}
    median = hill(kept)
    values: dict[str, Any] = {"hill_alpha": _number(median.alpha), "hill_D": _number(median.ks)}
    above = int((kept > FLOOR).sum())
    if above < config.min_evals:
        notes.append(f"no alpha: {above} eigenvalues above {FLOOR:g}, fewer than {config.min_evals}")
        return values
    if bool(kept[0] == kept[-1]):
        notes.append("no alpha: all eigenvalues alike")
        return values
    fit = power_law(kept, max_fingers=config.max_fingers)
    if not fit.reliable:
        notes.append(f"alpha unreliable: D is not below {RELIABLE_KS:g}")
    elif fit.warning:
        notes.append(fit.warning)
    largest = float(kept[-1])
    return values | {
        **vars(fit),
        "reliable": fit.reliable,
        "alpha_weighted": alpha_weighted(fit.alpha, largest),
        "log_alpha_norm": log_alpha_norm(kept, fit.alpha),
    }


def _bulk(evals: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    values: dict[str, Any] = {"num_outliers": int(bulk(evals, shape).spikes)}
    try:
        fit = fitted_bulk(evals, shape)
    except ValueError:
        return values
    return values | {
        "sigma_mp": float(fit.sigma),
        "bulk_min": float(fit.low),
        "bulk_max": float(fit.high),
        "num_spikes": int(fit.spikes),
        "mp_softrank": float(fit.softrank),
    }


def _of_entries(weight: Weight, rank: int, config: ReportConfig) -> dict[str, Any]:
    """What needs more than the spectrum: the matrix itself, made whole where it is a product."""
    values: dict[str, Any] = {}
    farms = config.wants("farms") and rank >= config.min_evals
    trap = config.wants("trap")
    if not farms and not trap:
        return values
    matrix = weight.make()
    if farms and weight.kind != "factors":  # windows of a product of rank r have its rank, and no tail of their own
        blocks = square_blocks(matrix) if weight.kind == "conv" else matrix
        if min(blocks.shape[-2:]) >= 2:
            tail = farms_tail(blocks, rows=config.rows, per_side=config.per_side)
            values |= {"farms_alpha": _number(tail.alpha), "farms_D": _number(tail.ks)}
    if trap:
        flat = matrix.reshape(-1, matrix.shape[-1])
        values["kurtosis"] = _number(kurtosis(flat))
        if weight.kind == "dense":
            values["num_traps"] = int(correlation_trap(matrix, seed=config.seed).spikes)
    return values


@torch.no_grad()
def compared(now: Weight, then: Weight, *, k: int = TOP, threshold: float = LIKE) -> tuple[dict[str, Any], str]:
    """`COMPARED` of one weight of two models: intruder dimensions, drift, and ‖W − W₀‖ / ‖W₀‖; and why not, if not.

    `least_similarity` is the smallest of the k leading directions. Convolutions are compared as one matrix for each
    place of the kernel, whose intruders are summed.
    """
    if now.shape != then.shape:
        return {}, f"shapes differ: {_times(now.shape)} and {_times(then.shape)}"
    for which, each in (("this", now), ("the other", then)):
        if reason := unmeasurable(each):
            return {}, f"{which}: {reason}"
    mine, other = wide(now.make()), wide(then.make())
    if mine.shape != other.shape:
        return {}, "kernels differ"
    (u, s, _), (u0, s0, _) = (torch.linalg.svd(x, full_matrices=False) for x in (mine, other))
    values: dict[str, Any] = {}
    size, before = (float(torch.linalg.vector_norm(x.double())) for x in (mine, other))
    if before > 0:
        values["relative_change"] = float(torch.linalg.vector_norm((mine - other.to(mine.dtype)).double())) / before
    if not size > 0 or not before > 0:
        return values, "all zeros"
    # directions without a singular value are nobody's: rounding alone chooses them
    floor = max(now.shape) * torch.finfo(torch.float32).eps
    ours = s[..., :k] > floor * s[..., :1]
    theirs = s0 > floor * s0[..., :1]
    found = intruders(u[..., : ours.shape[-1]], u0 * theirs.unsqueeze(-2), threshold=threshold)
    values["intruders"] = int(((found.similarity < threshold) & ours).sum())
    values["least_similarity"] = float(found.similarity[ours].min())
    pooled = [x.double().flatten() for x in (s, s0)]
    values["drift_l1"] = float(l1_drift(*pooled))
    values["drift_js"] = float(jensen_shannon_drift(*pooled))
    return values, ""


def _number(x: Tensor) -> float | None:
    value = float(x)
    return value if math.isfinite(value) else None


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
