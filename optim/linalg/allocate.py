"""How many directions each matrix is given, from the spectra of all of them and one number.

WeLore (Jaiswal et al. 2024, arXiv 2407.11239) keeps, in every matrix, the singular values above one common threshold,
after each spectrum was stretched to [0, 1]. Matrices with a fast decay are then given few directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def stretched(spectrum: Tensor) -> Tensor:
    """`(s − min) / (max − min)`, WeLore's normalisation of a whole spectrum; a constant one becomes all ones."""
    low, high = spectrum.min(), spectrum.max()
    return (spectrum - low) / (high - low) if high > low else torch.ones_like(spectrum)


def relative(spectrum: Tensor) -> Tensor:
    """`s / max`, which needs the first values alone; a spectrum of zeros stays one."""
    high = spectrum.max()
    return spectrum / high if high > 0 else spectrum


def keep_counts(spectra: Sequence[Tensor], threshold: float) -> list[int]:
    """How many values of each (normalised) spectrum are at least `threshold`."""
    return [int((spectrum >= threshold).sum()) for spectrum in spectra]


def bounded_counts(
    spectra: Sequence[Tensor], threshold: float, *, minimum: int = 1, maximum: int | None = None, multiple: int = 1
) -> list[int]:
    """`keep_counts` rounded to the nearest `multiple`, at least `minimum`, at most `maximum` and what there is."""
    most = [len(spectrum) if maximum is None else min(maximum, len(spectrum)) for spectrum in spectra]
    rounded = [(2 * count + multiple) // (2 * multiple) * multiple for count in keep_counts(spectra, threshold)]
    return [min(max(count, minimum), each) for count, each in zip(rounded, most, strict=True)]


def global_threshold(spectra: Sequence[Tensor], reduction: float) -> float:
    """The threshold below which a share `reduction` of all values of the (normalised) `spectra` lies.

    The share is a staircase in the threshold that rises at each value, so bisection ends at one of them, which is taken
    from their sorted list at once; the authors search a grid of 0.005. Where values are equal the share is the largest
    that is not above `reduction`.

    Args:
        reduction: in [0, 1]; 1 gives infinity, above which nothing is.
    """
    if not 0.0 <= reduction <= 1.0:
        raise ValueError(f"reduction must be a share from 0 to 1, got {reduction!r}")
    values = torch.cat([spectrum.flatten() for spectrum in spectra]).sort().values
    below = math.floor(reduction * len(values) + 1e-9)  # 0.7 of 10 values are 7, also where 0.7 · 10 is rounded down
    return float(values[below]) if below < len(values) else math.inf


def allocate_ranks(
    spectra: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    budget: float,
    *,
    minimum: int = 1,
    maximum: int | None = None,
    multiple: int = 1,
) -> list[int]:
    """Ranks by one common threshold, as many as `Σ r (m + n) ≤ budget` allows.

    Each rank is its matrix's bounded count of (normalised) values at or above the threshold. All that is monotone in
    the threshold, so the smallest one within the budget is found by bisection. (Thresholds are WeLore's; the budget,
    for optimizers, is ours.)

    Args:
        spectra: of each matrix, normalised, in any order; the first values suffice where no more are to be given.
        sizes: `(m, n)` of each matrix.
        budget: numbers in all factors together.

    Raises:
        ValueError: when even the smallest ranks exceed the budget.
    """

    def ranks(threshold: float) -> list[int]:
        return bounded_counts(spectra, threshold, minimum=minimum, maximum=maximum, multiple=multiple)

    def cost(threshold: float) -> int:
        return sum(r * (m + n) for r, (m, n) in zip(ranks(threshold), sizes, strict=True))

    thresholds = [*torch.cat([spectrum.flatten() for spectrum in spectra]).unique().tolist(), math.inf]
    least = cost(math.inf)
    if least > budget:
        raise ValueError(f"budget must be at least {least} (every rank at its minimum), got {budget}: raise it")
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(thresholds[middle]) <= budget else (middle + 1, high)
    return ranks(thresholds[low])


def with_hysteresis(old: Sequence[int], new: Sequence[int], share: float = 0.25) -> list[int]:
    """The new ranks where they differ from the old ones by more than `share` of them; elsewhere the old.

    A rank that flutters costs a change of shapes each time. A budget that both kept may be exceeded, by less than
    `share` of it.
    """
    return [after if abs(after - before) > share * before else before for before, after in zip(old, new, strict=True)]
