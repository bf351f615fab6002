"""What of a spectrum is noise: the bulk of Marchenko and Pastur, and what stands out of it.

The eigenvalues of WᵀW / N, for W (N, M) with N ≥ M, Q = N / M and independent entries of variance σ², lie for large
matrices between σ²(1 − 1/√Q)² and σ²(1 + 1/√Q)² with the density

    p(x) = Q √((b − x)(x − a)) / (2π σ² x)                                       Marchenko and Pastur 1967

What this sees: directions that stick out of noise of equal variance. What it does not see: a heavy tail is no bulk with
spikes, and a fit to it means little; and entries of unequal variance widen the bulk without any structure between them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from thinrank.optim.monitors.spectrum import eigenvalues, singular_values, wide

_GRID = 4096
TW_WIDTHS = 3.0
"""Widths of the largest eigenvalue's own scatter above the edge from which on one counts as a spike (`bulk`). Of 3000
matrices of normal numbers each, 1.3 % of 32 × 32 and 0.3 % of 100 × 400 have one there: the median scatters, too."""


class Bulk(NamedTuple):
    """The noise in a spectrum; each (...,), in the units of the eigenvalues it was found in.

    Attributes:
        sigma: √ of the bulk's variance, where the mean of all eigenvalues is one: 1 for noise alone.
        low, high: edges of the bulk.
        spikes: eigenvalues that stand out, int64.
        softrank: high / largest eigenvalue, WeightWatcher's `mp_softrank`: 1 for noise, near 0 for a strong signal.
    """

    sigma: Tensor
    low: Tensor
    high: Tensor
    spikes: Tensor
    softrank: Tensor


@lru_cache(maxsize=256)
def marchenko_pastur_quantile(p: float, Q: float) -> float:
    """The x below which the share `p` of eigenvalues lies, for σ = 1.

    With x = 1 + 1/Q + 2/√Q cos θ the density becomes 2 sin²θ / (π x) dθ, which has no edges to stumble over.

    Args:
        p: in (0, 1).
        Q: N / M, at least 1.
    """
    if not Q >= 1:
        raise ValueError(f"Q is the longer side by the shorter and at least 1, got {Q}: turn the matrix")
    theta = torch.linspace(math.pi, 0, _GRID + 1, dtype=torch.float64)
    x = 1 + 1 / Q + 2 / Q**0.5 * theta.cos()
    density = torch.where(x > 1e-12, 2 * theta.sin().square() / (math.pi * x.clamp(min=1e-300)), 2 / math.pi)
    mass = torch.cumulative_trapezoid(density, -theta)
    after = int(torch.searchsorted(mass, p * mass[-1]))
    below = 0.0 if after == 0 else float(mass[after - 1])
    share = (p * float(mass[-1]) - below) / (float(mass[after]) - below)
    return float(x[after] + share * (x[after + 1] - x[after]))


def bulk(evals: Tensor, shape: tuple[int, int]) -> Bulk:
    """The bulk by its median: σ² is the median eigenvalue by the median of Marchenko and Pastur's law. Batched; ours.

    Half of the spectrum would have to be signal to move it. A spike is an eigenvalue that exceeds the upper edge by
    more than `TW_WIDTHS` times the scatter of noise's largest one (Tracy and Widom's law, scaled as in Johnstone 2001).

    Args:
        evals: (..., M), all of them, zeros included; those of several matrices of the shape may be pooled.
        shape: of the matrices, in any order; M is the smaller.
    """
    M, N = sorted(shape)
    x = evals.detach().double()
    _check(x, M, shape)
    Q = N / M
    variance = x.quantile(0.5, -1) / marchenko_pastur_quantile(0.5, Q)
    low, high = (variance * (1 + sign / Q**0.5) ** 2 for sign in (-1, 1))
    width = (M**-0.5 + N**-0.5) ** (1 / 3) / (M**0.5 + N**0.5)
    largest = x.amax(-1)
    return Bulk(
        sigma=(variance / x.mean(-1)).sqrt(),
        low=low,
        high=high,
        spikes=(x > (high * (1 + TW_WIDTHS * width)).unsqueeze(-1)).sum(-1),
        softrank=high / largest,
    )


def fitted_bulk(evals: Tensor, shape: tuple[int, int], *, bandwidth: float = 0.1) -> Bulk:
    """The bulk by the density, WeightWatcher's `mp_fit`: σ of the least squares between the law and a smoothed
    histogram.

    Eigenvalues are scaled to a mean of one and smoothed with a triangle of `bandwidth`; σ is tried in [0.05, 2] times
    that by which the largest eigenvalue would be the edge, and refined. Spikes are above the edge by √TW,
    TW = Q^(−1/2) edge^(2/3) M^(−2/3), as in the package. For square matrices singular values are fitted to the quarter
    circle √(4σ² − s²) / (πσ²); the package's has 4 − s² in its place, and differs where σ is not one.

    Where the largest eigenvalue is some hundred times the mean, the thousand points of the histogram no longer resolve
    the bulk; `bulk` does.

    Args:
        evals: (M,), all of them, or those of several matrices, pooled.
        shape: of the matrix, in any order.

    Raises:
        ValueError: another number of eigenvalues, or none but one that stands out.
    """
    M, N = sorted(shape)
    x = evals.detach().double()
    if x.ndim != 1:
        raise ValueError(f"fitted_bulk takes one spectrum, got {tuple(x.shape)}: fit them one by one")
    _check(x, M, shape)
    Q = N / M
    mean = x.mean()
    x = x / mean
    largest = float(x.max())
    values = x.sqrt() if N == M else x
    points = torch.linspace(0, float(values.max()) + 0.5, 1000, dtype=torch.float64, device=x.device)
    density = torch.zeros_like(points)
    for some in values.split(1024):
        density += (1 - (points - some[:, None]).abs() / bandwidth).clamp_(min=0).sum(0)
    density /= bandwidth * len(values)
    points, density = points[density > 0.01], density[density > 0.01]
    if not len(points):
        raise ValueError("no histogram of these eigenvalues has a bulk: one of them is all there is")
    middle = points[density.argmax()]

    def misfit(sigma: Tensor) -> Tensor:
        column = sigma[:, None]
        a, b = ((column * (1 + sign / Q**0.5)).square() for sign in (-1, 1))
        if N == M:
            law = (4 * column.square() - points.square()).clamp(min=0).sqrt() / (math.pi * column.square())
            return (law - density).square().sum(-1)
        law = Q * ((b - points) * (points - a)).clamp(min=0).sqrt() / (2 * math.pi * column.square() * points)
        off = (law.nan_to_num(0.0) - density).square().sum(-1)
        misplaced = (b < middle) | (b > points.max()) | (a > middle)
        return torch.where(misplaced.squeeze(-1), torch.full_like(off, 1e6 * len(points)), off)

    edge = largest**0.5 / (1 + 1 / Q**0.5)
    step = 0.01 * edge
    sigmas = torch.arange(0.05 * edge, 2 * edge, step, dtype=torch.float64, device=x.device)
    sigma = sigmas[misfit(sigmas).argmin()]
    sigmas = sigma + torch.linspace(-step, step, 81, dtype=torch.float64, device=x.device)
    sigma = sigmas[misfit(sigmas).argmin()]
    low, high = ((sigma * (1 + sign / Q**0.5)) ** 2 for sign in (-1, 1))
    scatter = Q**-0.5 * high ** (2 / 3) * M ** (-2 / 3)
    return Bulk(
        sigma=sigma,
        low=low * mean,
        high=high * mean,
        spikes=(x > high + scatter.sqrt()).sum(),
        softrank=high / largest,
    )


def _check(evals: Tensor, M: int, shape: tuple[int, int]) -> None:
    if not evals.shape[-1] or evals.shape[-1] % M:
        raise ValueError(f"a matrix of {tuple(shape)} has {M} eigenvalues, got {evals.shape[-1]}: give all of them")


def kurtosis(weight: Tensor) -> Tensor:
    """Of the entries of each matrix of `weight` (..., out, in): mean fourth power by squared mean square, about the
    mean.

    3 for normal numbers. Large values are outlier entries, which alone may make spikes in a spectrum; a cheap sign of
    what `correlation_trap` looks for. (...,) float64; no number where all entries are equal.
    """
    x = wide(weight).double().flatten(-2)
    x = x - x.mean(-1, keepdim=True)
    return x.pow(4).mean(-1) / x.square().mean(-1).square()


def correlation_trap(weight: Tensor, *, seed: int = 0) -> Bulk:
    """The bulk of the matrix with its entries shuffled (WeightWatcher's `randomize=True`): spikes there are outlier
    entries.

    Shuffling leaves the entries and takes all that is between them. A spike that survives is not structure but an
    entry, or some, of extraordinary size: a "correlation trap" in the package's words. The package draws entries with
    replacement; here they are permuted, so that each is there once.

    Args:
        weight: (out, in), finite.
        seed: of the permutation, whose generator is its own.
    """
    generator = torch.Generator().manual_seed(seed)
    entries = weight.detach().flatten()
    order = torch.randperm(len(entries), generator=generator).to(entries.device)
    shuffled = entries[order].view_as(weight)
    shape = (weight.shape[0], weight.shape[1])
    return bulk(eigenvalues(singular_values(shuffled)), shape)
