"""From the tails of layers' spectra to a multiplier for each layer: pure functions, for schedules to put together.

The exponent α of a matrix's spectrum (`tail.hill_alpha`, `farms.farms_alpha`) is small where the tail is heavy, which
is read as "has learnt much", and large where it is not. TempBalance (Zhou et al. 2023, arXiv 2312.00359), AlphaDecay
(He et al. 2025, arXiv 2506.14562) and LLR (arXiv 2605.22297) give layers with a larger α more: a larger learning rate,
or a larger weight decay. Theirs are the maps (`multipliers`), and who takes part (`eligible`); LLR's is the ramp.
Ours are the geometric mean of one, the limit of a change, and the pairing with a factorised weight's product. All of
it is empirical: an exponent says that layers differ, and not why; that changing their rates by it helps is what those
papers measured, on their models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAPS = ("linear", "sqrt", "log2", "rank", "sigmoid")
ENDS = ("drop", "keep")
EPS = 1e-6
"""Exponents that are apart by less are the same: a thousandth of what the sampling of windows does."""


def multipliers(alphas: Tensor, how: str = "linear", *, s1: float = 0.5, s2: float = 1.5) -> Tensor:
    """A multiplier for each of some layers, which rises with α; ones where all α are the same.

    `linear` (all three methods' own): s1 + (s2 − s1)(α − α_min)/(α_max − α_min). `rank`: the same of the places of the
    α in their order, equal ones sharing the mean of theirs. `sqrt`, `log2`: that of α over its mean. `sigmoid`:
    2/(1 + exp(−4z)), z being α less the mean over the standard deviation of the layers. The last three have no s1 and
    s2; all are in TempBalance's code.

    Args:
        alphas: (layers,), finite, and above 1, as Hill's estimate is.
        s1: multiplier of the smallest α.
        s2: of the largest.

    Returns:
        (layers,), float64.

    Raises:
        ValueError: for another map.
    """
    if how not in MAPS:
        raise ValueError(f"the map must be one of {', '.join(MAPS)}, got {how!r}")
    alphas = alphas.double()
    if alphas.numel() == 0 or float(alphas.max() - alphas.min()) < EPS:
        return torch.ones_like(alphas)
    if how in ("linear", "rank"):
        values = alphas if how == "linear" else _places(alphas)
        low, high = values.min(), values.max()
        return s1 + (s2 - s1) * (values - low) / (high - low)
    if how == "sigmoid":
        return 2.0 / (1.0 + torch.exp(-4.0 * (alphas - alphas.mean()) / alphas.std(correction=0)))
    values = alphas.sqrt() if how == "sqrt" else alphas.log2()
    return values / values.mean()


def _places(values: Tensor) -> Tensor:
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1)
    alike = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1)
    return below.double() + (alike.double() - 1.0) / 2.0


def eligible(evals: Sequence[int], *, min_evals: int = 50, ends: str = "drop") -> list[bool]:
    """Which of a model's matrices take part, from first to last.

    Args:
        evals: how many eigenvalues each has that are not zero by construction: its shorter side, or its factors' rank.
        min_evals: of fewer no tail can be told. The methods' code has 5 (TempBalance) and 50 (AlphaDecay).
        ends: `drop` leaves out the first and the last, as TempBalance and AlphaDecay do; `keep`.
    """
    last = len(evals) - 1
    return [count >= min_evals and (ends == "keep" or 0 < i < last) for i, count in enumerate(evals)]


def with_geometric_mean_one(factors: Tensor) -> Tensor:
    """`factors` (layers,), above 0, over their geometric mean: the rate that the user gave stays that of the model.

    Ours. LLR, whose multipliers go from 1 to 5, raises the rate of all with its own.
    """
    return factors if factors.numel() == 0 else factors / factors.log().mean().exp()


def limited(factors: Tensor, before: Tensor, most: float | None) -> Tensor:
    """`factors` no farther from what was `before` than by the factor `most`, either way (ours); None: as they are."""
    return factors if most is None else torch.minimum(torch.maximum(factors, before / most), before * most)


def ramped(before: float, target: float, done: int, steps: int) -> float:
    """On the straight line from `before` to `target`, `done` of `steps` steps on; there at once where `steps` is 0."""
    return target if done >= steps else before + (target - before) * (done / steps)


def product_evals(left: Tensor, right: Tensor) -> Tensor:
    """The eigenvalues of W Wᵀ for W = left · right that are not zero by construction: (r,) float32, falling.

    They are the squares of the singular values of R_l R_rᵀ, from thin factorisations left = Q_l R_l and
    rightᵀ = Q_r R_r, so that W is never made.

    Args:
        left: (out, r).
        right: (r, in).
    """
    cores = [torch.linalg.qr(side.detach().float(), mode="r").R for side in (left, right.mT)]
    return torch.linalg.svdvals(cores[0] @ cores[1].mT).square()


def spread(factors: Sequence[float]) -> tuple[float, float, float] | None:
    """The least, the geometric mean and the largest; None of nothing."""
    if not factors:
        return None
    return min(factors), math.exp(sum(map(math.log, factors)) / len(factors)), max(factors)
