"""Exponents from measurements: how top singular values and gains follow the width, and what decay would keep them.

In balance σ_top ∝ √(η/λ) d^p (`thinrank.optim.scaling.equilibrium`). With η ∝ d^(−a), σ_top stays where it is if
λ ∝ d^(2p − a). Fan et al. 2025 (arXiv:2510.15262) measured p = ¾ for AdamW in Llama models, so √d with a = 1. Derived
here: p = 1 − q/2 where the top direction's share of the updates' energy falls as d^(−q). Noise and orthogonalised
updates have q = 1; updates in a fixed number of directions have q = 0, so that a decay ∝ d is to be expected of methods
of fixed rank. The fit is to decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slope:
    """A power law y = exp(intercept) x^value, fitted by least squares in logarithms.

    Attributes:
        value: the exponent.
        error: its standard error; infinite for two points, which leave nothing to judge by.
        r2: share of the variance of log y that the law explains; 1 where y does not vary at all.
        intercept: log y at x = 1.
        points: how many went in.
    """

    value: float
    error: float
    r2: float
    intercept: float
    points: int


def power_slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """The exponent of y ∝ x^s.

    Raises:
        ValueError: for sequences of different lengths, fewer than two different x, or what has no logarithm.
    """
    if len(x) != len(y):
        raise ValueError(f"there must be a value for each place, got {len(x)} and {len(y)}: give pairs")
    if len(set(x)) < 2:
        raise ValueError(f"a slope needs at least two different places, got {sorted(set(x))}: measure at another one")
    for value in (*x, *y):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"a power law needs finite values above 0, got {value!r}: leave that measurement out")
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    n, mean_u, mean_v = len(u), math.fsum(u) / len(u), math.fsum(v) / len(v)
    spread = math.fsum((a - mean_u) ** 2 for a in u)
    slope = math.fsum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    intercept = mean_v - slope * mean_u
    left = math.fsum((b - intercept - slope * a) ** 2 for a, b in zip(u, v, strict=True))
    total = math.fsum((b - mean_v) ** 2 for b in v)
    error = math.sqrt(left / (n - 2) / spread) if n > 2 else math.inf
    r2 = 1.0 if total <= 1e-24 * max(1.0, mean_v**2) else 1 - left / total
    return Slope(slope, error, r2, intercept, n)


@dataclass(frozen=True)
class DecayFit:
    """How σ_top/√(η/λ) follows the width, and the decay that follows from it.

    Attributes:
        p: the exponent p̂.
        error: its standard error.
        r2: share of the variance that the law explains.
        exponent: of the width in the decay that would keep σ_top, 2p̂ − a.
        exponent_error: twice the error of p̂.
        widths: how many different ones went in.
    """

    p: float
    error: float
    r2: float
    exponent: float
    exponent_error: float
    widths: int


def decay_exponent(p: float, lr_width_exp: float = 1.0) -> float:
    """The exponent of the width in the decay that keeps σ_top ∝ √(η/λ) d^p where it is, with η ∝ d^(−a): 2p − a."""
    return 2 * p - lr_width_exp


def fit_wd_exponent(
    widths: Sequence[float],
    sigma_top: Sequence[float],
    eta: float | Sequence[float],
    lam: float | Sequence[float],
    *,
    lr_width_exp: float = 1.0,
) -> DecayFit:
    """The exponent of the width in weight decay that would keep the top singular values of one class of matrices.

    It is of use once weights have forgotten how they began (`decay_clock` above 1, better 3), and where they are in
    balance rather than drifting (`drift`). Values of one width and several seeds may all be given.

    Args:
        widths: d of each measurement; at least three different ones.
        sigma_top: of one class, such as the median over layers of all q and k.
        eta, lam: rate and decay (torch's AdamW) that these matrices had, one for all or one each.
        lr_width_exp: a in η ∝ d^(−a), by the rule that the recommendation is for.

    Raises:
        ValueError: for fewer than three widths, and as `power_slope`.
    """
    count = len(set(widths))
    if count < 3:
        raise ValueError(f"fitting an exponent needs at least 3 widths, got {count}: train proxies of other widths too")
    etas, lams = _each("eta", eta, len(widths)), _each("lam", lam, len(widths))
    for value in (*etas, *lams):
        if not value > 0:
            raise ValueError(f"rates and decays must be above 0, got {value!r}: without decay there is no balance")
    scale = [math.sqrt(a / b) for a, b in zip(etas, lams, strict=True)]
    found = power_slope(widths, [s / unit for s, unit in zip(sigma_top, scale, strict=True)])
    exponent = decay_exponent(found.value, lr_width_exp)
    return DecayFit(found.value, found.error, found.r2, exponent, 2 * found.error, count)


def _each(name: str, value: float | Sequence[float], count: int) -> list[float]:
    if isinstance(value, (int, float)):
        return [float(value)] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one number or {count}, got {len(value)}: give one for each width")
    return [float(each) for each in value]


@dataclass(frozen=True)
class Drift:
    """Whether weights are in balance: the slope of log σ over log(η/λ), ½ in balance, 0 where updates persist."""

    slope: Slope

    @property
    def dominated(self) -> bool:
        """Whether what persists in the updates decides on σ, so that √(η/λ) says nothing here; ours: below ¼."""
        return self.slope.value < 0.25


def drift(eta: Sequence[float], lam: Sequence[float], sigma_top: Sequence[float]) -> Drift:
    """Over runs of one width with different rates at one decay.

    Raises:
        ValueError: as `power_slope`.
    """
    return Drift(power_slope([a / b for a, b in zip(eta, lam, strict=True)], sigma_top))


@dataclass(frozen=True)
class Match:
    """Whether something stays where it is as the width grows.

    Attributes:
        slope: of its logarithm over that of the width.
        passes: |slope| is below the tolerance.
        corrected: the exponent of decay that would make it stay; None for what does not depend on decay so simply.
    """

    slope: Slope
    passes: bool
    corrected: float | None = None

    @property
    def verdict(self) -> str:
        return "PASS" if self.passes else "WARN"


def sigma_slope(
    widths: Sequence[float], sigma_top: Sequence[float], wd_width_exp: float, *, tolerance: float = 0.1
) -> Match:
    """How top singular values follow the width under a rule whose decay has the exponent `wd_width_exp`.

    Since σ ∝ λ^(−½), the exponent that would make them stay is larger by twice the slope. To be measured after some
    three times 1/(ηλ) steps, at equal Σηλ. The tolerance is ours.

    Raises:
        ValueError: as `power_slope`.
    """
    found = power_slope(widths, sigma_top)
    return Match(found, abs(found.value) < tolerance, wd_width_exp + 2 * found.value)


def gain_slope(widths: Sequence[float], gains: Sequence[float], *, tolerance: float = 0.1) -> Match:
    """How gains (`measure_gains`) follow the width.

    Raises:
        ValueError: as `power_slope`.
    """
    found = power_slope(widths, gains)
    return Match(found, abs(found.value) < tolerance)
