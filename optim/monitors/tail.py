"""How heavy the upper tail of a spectrum is: Hill's estimator, and power laws fitted as WeightWatcher fits them.

With eigenvalues x_1 ≤ … ≤ x_m and the tail from x_i on, of n = m − i + 1 values,

    α = 1 + n / Σ_{j ≥ i} ln(x_j / x_i)                    Hill 1975; the density is ∝ x^(−α) above x_i
    D = max_{j ≥ i} |1 − (x_j / x_i)^(1−α) − (j − i) / n|   the distance of Kolmogorov and Smirnov
    σ = (α − 1) / √n                                       the standard error of α, if there is a power law

n counts x_i itself, whose logarithm is zero: textbooks have n − 1, TempBalance, AlphaDecay, FARMS and WeightWatcher
have n, and so has this.

What they see: small α is a heavy tail, which goes with well-trained layers (Martin and Mahoney 2021). What they do not
see: whether there is a power law at all. A matrix of random numbers has an α as well, of the median 2.1 where it is
square, and 4.5 where one side is eight times the other, so that across shapes Hill's α measures shapes (`farms` does
not); scanned over every start, random matrices give anything from 3 to 18. D is what tells: α with a D of `RELIABLE_KS`
or more is a number without a power law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RELIABLE_KS = 0.1
"""A power law whose D is this or more is called unreliable; ours."""
FLOOR = 1e-5
"""Eigenvalues up to this are left out of fits, WeightWatcher's `evals > 1e-5`."""
OVER_TRAINED, UNDER_TRAINED = 2.0, 6.0
"""WeightWatcher's limits of α."""
STARTS = ("median", "fit", "peak")
_PEAK_BINS, _PEAK_RANGE = 100, (0.95, 1.5)
_SCANNED = 2**22  # entries of a block of distances: 32 MiB of float64


class Tail(NamedTuple):
    """A tail of each spectrum of a batch, (...,) each and float64 but for `size`.

    Attributes:
        alpha: α; no number where the tail has one value, or all alike, or zeros.
        ks: D.
        xmin: where the tail starts.
        size: n, values in the tail, int64.
    """

    alpha: Tensor
    ks: Tensor
    xmin: Tensor
    size: Tensor

    @property
    def sigma(self) -> Tensor:
        """The standard error of α."""
        return (self.alpha - 1) / self.size.double().sqrt()

    @property
    def reliable(self) -> Tensor:
        """Whether D is below `RELIABLE_KS`: (...,) bool."""
        return self.ks < RELIABLE_KS


def hill(evals: Tensor, xmin: str = "median", *, share: float = 2.0) -> Tail:
    """Hill's α of each spectrum.

    Args:
        evals: (..., m) non-negative, in any order, m at least 2.
        xmin: where the tail starts. `median`: the value of index ⌊m / share⌋, the larger half by default (TempBalance's
            `xmin_pos`). `fit`: every value is tried, and the one of least D wins (Clauset et al. 2009). `peak`: the
            same among values in [0.95, 1.5] times the place where the histogram of log10 of the eigenvalues (100 bins)
            is highest, "fix-finger" in TempBalance. Its code compares the eigenvalues with log10(0.95 peak), which
            bounds nothing; this is what is meant.
        share: of `median`.

    Raises:
        ValueError: an unknown `xmin`, or fewer than 2 values.
    """
    x = _sorted(evals)
    m = x.shape[-1]
    if xmin == "median":
        if not share > 1:
            raise ValueError(f"share must be above 1, got {share}: write 2 for the larger half")
        return tail_from(x, int(m // share))
    if xmin not in STARTS:
        raise ValueError(f"xmin must be one of {', '.join(STARTS)}, got {xmin!r}")
    return _best(x, _near_peak(x) if xmin == "peak" else torch.ones_like(x, dtype=torch.bool))


def hill_alpha(evals: Tensor, *, xmin: str = "median") -> Tensor:
    """The α of `hill`, (...,)."""
    return hill(evals, xmin).alpha


def tail_from(evals: Tensor, index: int) -> Tail:
    """The tail from the value of `index` (from 0, by rising size) on, of each spectrum (..., m)."""
    x = _sorted(evals)
    kept = x[..., index:]
    n = kept.shape[-1]
    if n < 1:
        raise ValueError(f"index must be below the {x.shape[-1]} eigenvalues, got {index}")
    logs = (kept / kept[..., :1]).log()
    alpha = _alpha(logs.sum(-1), n)
    place = torch.arange(n, device=x.device, dtype=x.dtype) / n
    ks = (1 - torch.exp((1 - alpha).unsqueeze(-1) * logs) - place).abs().amax(-1)
    return Tail(alpha, ks, kept[..., 0], torch.full(x.shape[:-1], n, device=x.device))


def scan(evals: Tensor) -> tuple[Tensor, Tensor]:
    """α and D of the tail from each value on but the last, (..., m − 1) each, without numbers where there is no tail.

    O(m²) time; memory in blocks.
    """
    x = _sorted(evals)
    m = x.shape[-1]
    logs = x.log()
    count = torch.arange(m, 0, -1, device=x.device, dtype=x.dtype)
    above = logs.flip(-1).cumsum(-1).flip(-1) - count * logs  # Σ ln(x_j / x_i)
    alpha = _alpha(above, count)[..., :-1]
    found = []
    rows = max(1, _SCANNED // max(1, x.numel()))
    for first in range(0, m - 1, rows):
        last = min(first + rows, m - 1)
        index = torch.arange(first, last, device=x.device)
        size = (m - index).unsqueeze(-1)
        place = torch.arange(first, m, device=x.device) - index.unsqueeze(-1)
        ratio = logs[..., None, first:] - logs[..., first:last, None]
        off = 1 - torch.exp((1 - alpha[..., first:last, None]) * ratio) - place / size
        found.append(off.abs_().masked_fill_(place < 0, 0.0).amax(-1))
    return alpha, torch.cat(found, -1)


def _best(x: Tensor, candidates: Tensor) -> Tail:
    alpha, ks = scan(x)
    worst = torch.where(torch.isfinite(ks) & candidates[..., :-1], ks, torch.full_like(ks, torch.inf))
    index = worst.argmin(-1, keepdim=True)
    alpha, ks, start = (values.gather(-1, index).squeeze(-1) for values in (alpha, ks, x))
    return Tail(alpha, ks, start, x.shape[-1] - index.squeeze(-1))


def _near_peak(x: Tensor) -> Tensor:
    """Which values a tail may start at in the mode `peak`: (..., m) bool."""
    rows = x.reshape(-1, x.shape[-1])
    near = torch.zeros_like(rows, dtype=torch.bool)
    for row, mark in zip(rows, near, strict=True):
        logs = row[row > 0].log10()
        if not len(logs):
            continue
        low, high = float(logs[0]), float(logs[-1])
        counts = torch.histc(logs, _PEAK_BINS, low, high)
        peak = 10 ** (low + (high - low) * int(counts.argmax()) / _PEAK_BINS)
        mark |= (row >= _PEAK_RANGE[0] * peak) & (row <= _PEAK_RANGE[1] * peak)
        mark[-1] = False
        if not mark.any():  # one value in the widest bin, and no other near it
            mark |= row >= _PEAK_RANGE[0] * peak
    return near.view_as(x)


def _alpha(total: Tensor, count: Tensor | int) -> Tensor:
    """α of a tail of `count` values whose logarithms above its start sum to `total`."""
    return torch.where(total > 0, 1 + count / total, torch.nan)


def _sorted(evals: Tensor) -> Tensor:
    if evals.ndim < 1 or evals.shape[-1] < 2:
        raise ValueError(f"a tail needs at least 2 eigenvalues, got {tuple(evals.shape)}: leave out that matrix")
    return evals.detach().double().sort(-1).values


# --- WeightWatcher's fit ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """A power law fitted to one spectrum, by WeightWatcher's names.

    Attributes:
        alpha: α, the density's exponent.
        D: the distance of Kolmogorov and Smirnov.
        sigma: the standard error of α.
        xmin, xmax: where the tail starts and ends.
        num_pl_spikes: values in the tail.
        num_fingers: values removed from the upper end before the fit.
        raw_alpha: α with nothing removed.
    """

    alpha: float
    D: float
    sigma: float
    xmin: float
    xmax: float
    num_pl_spikes: int
    num_fingers: int
    raw_alpha: float

    @property
    def reliable(self) -> bool:
        """Whether D is below `RELIABLE_KS`."""
        return self.D < RELIABLE_KS

    @property
    def warning(self) -> str:
        """WeightWatcher's word for α, `over-trained` below 2 and `under-trained` above 6; empty in between."""
        return "over-trained" if self.alpha < OVER_TRAINED else "under-trained" if self.alpha > UNDER_TRAINED else ""


def power_law(evals: Tensor, *, floor: float = FLOOR, max_fingers: int = 0, finger_thresh: float = 1.0) -> PowerLaw:
    """WeightWatcher's power law: each value is tried as the tail's start, and the least D wins.

    Of fewer than 20 values the package fits otherwise (a corrected α, and longer tails preferred); this does not, and
    such α say little either way.

    Args:
        evals: (m,), in any order.
        floor: eigenvalues up to it are left out.
        max_fingers: the package's `fix_fingers="clip_xmax"`, with its 10: the largest 2, 3, … values below that many
            are removed, and the first fit whose α is at least `finger_thresh` below that of all of them is taken; where
            α falls to 2 before, or never falls as much, nothing is removed. 0: nothing is tried. `num_fingers` is how
            many were removed; the package's is one less.
        finger_thresh: see there.

    Raises:
        ValueError: fewer than 2 eigenvalues above the floor, or all alike.
    """
    x = _sorted(evals)
    if x.ndim != 1:
        raise ValueError(f"power_law takes one spectrum, got {tuple(evals.shape)}: fit them one by one")
    x = x[x > floor]
    if len(x) < 2 or bool(x[0] == x[-1]):
        raise ValueError(f"no two different eigenvalues above {floor:g}: leave out that matrix")
    whole = kept = _best(x, torch.ones_like(x, dtype=torch.bool))
    removed = 0
    for fingers in range(2, max_fingers):
        if len(x) - fingers < 2:
            break
        fit = _best(x[:-fingers], torch.ones_like(x[:-fingers], dtype=torch.bool))
        if float(fit.alpha) + finger_thresh < float(whole.alpha):
            kept, removed = fit, fingers
            break
        if float(fit.alpha) <= OVER_TRAINED:
            break
    return PowerLaw(
        alpha=float(kept.alpha),
        D=float(kept.ks),
        sigma=float(kept.sigma),
        xmin=float(kept.xmin),
        xmax=float(x[len(x) - removed - 1]),
        num_pl_spikes=int(kept.size),
        num_fingers=removed,
        raw_alpha=float(whole.alpha),
    )


def alpha_weighted(alpha: float, largest: float) -> float:
    """α̂ = α log10(x_max), WeightWatcher's `alpha_weighted` (Martin, Peng, Mahoney 2021).

    It sees shape and size together, so that it compares layers of models of one kind, and not models whose weights are
    scaled otherwise.
    """
    return alpha * math.log10(largest) if largest > 0 else math.nan


def log_alpha_norm(evals: Tensor, alpha: float) -> float:
    """log10 Σ x^α, WeightWatcher's `log_alpha_norm`; by logarithms, so that x^α may be beyond float64."""
    x = evals.double()
    return float((alpha * x[x > 0].log()).logsumexp(-1)) / math.log(10)
