"""A rank for each matrix, out of what one rank for all would cost: which spectra are looked at, and the sharing out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.linalg.allocate import allocate_ranks, relative, with_hysteresis
from thinrank.optim.linalg.basis import random_columns, subspace_iteration
from thinrank.optim.lowrank.subspace import width
from thinrank.optim.matrix import MatrixView
from thinrank.optim.rule import key_of, seed_of

_log = logging.getLogger(__name__)

OVERSAMPLE = 8
"""Random columns of a sketch beside the values that are asked for."""

SKETCH_ABOVE = 2048
"""Matrices whose short side is longer are sketched: an exact spectrum takes time in the cube of it."""

SKETCH_RANKS = 4
"""Values of such a sketch, in uniform ranks; a sketched matrix is given no more directions than that."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """When an optimizer shares ranks out.

    Attributes:
        spectra: whose singular values are looked at: `weight` or `gradient`.
        every: updates between two allocations; None: the first one stays.
    """

    spectra: str
    every: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A parameter that is given a rank, one for all the matrices that it is seen as.

    Attributes:
        name: of the parameter.
        views: how it is seen.
        source: whose singular values are looked at, of the parameter's shape: itself or its gradient; None: nothing.
        rank: its part of the budget, a count or a fraction of the short side.
        held: the rank it has now.
        seed: of sketches.
    """

    name: str
    views: tuple[MatrixView, ...]
    source: Tensor | None
    rank: int | float
    held: int | float
    seed: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """(m, n), such that a rank of r costs at most r (m + n) numbers: the sums of the long and the short sides."""
        long, short = (sum(view.blocks * view.shape[side] for view in self.views) for side in (0, 1))
        return long, short

    def directions(self, rank: int | float) -> int:
        """The most directions that one of its matrices has at `rank`."""
        return max(width(rank, (view.blocks, *view.shape)) for view in self.views)

    def cost(self, rank: int | float) -> int:
        """Numbers in its bases and projections at `rank`."""
        shapes = [(view.blocks, *view.shape) for view in self.views]
        return sum(shape[0] * width(rank, shape) * (shape[1] + shape[2]) for shape in shapes)

    def spectrum(self, sketch: int | None = None) -> Tensor:
        """Falling singular values of `source` over its largest entry, as `spectrum` finds them.

        Several matrices have the root mean square of theirs, place by place, where a shorter list goes on with zeros.
        """
        assert self.source is not None
        source = self.source.detach().float()
        peak = source.abs().max()
        source = source / torch.where(peak > 0, peak, torch.ones_like(peak))  # squares of 1e19 would overflow
        generator = torch.Generator().manual_seed(seed_of(self.seed, key_of(self.name), 0))
        found = [spectrum(x, sketch, generator) for view in self.views for x in view.of(source)]
        if len(found) == 1:
            return found[0]
        longest = max(len(values) for values in found)
        padded = [torch.cat([values, values.new_zeros(longest - len(values))]) for values in found]
        return torch.stack(padded).square().mean(0).sqrt()

    def known_spectrum(self) -> Tensor | None:
        """`spectrum` by the rule for large matrices (`SKETCH_ABOVE`); None where `source` has none to go by.

        That is: where it is missing, holds something that is no number, is zero (LoRA's first gradients of A are), or
        its factorisation does not converge.
        """
        if self.source is None or not bool(torch.isfinite(self.source).all()) or not bool(self.source.any()):
            return None
        large = max(min(view.shape) for view in self.views) > SKETCH_ABOVE
        try:
            return self.spectrum(SKETCH_RANKS * self.directions(self.rank) if large else None)
        except torch.linalg.LinAlgError:
            return None


def rank_spread(ranks: Iterable[int | None]) -> tuple[int, int, int] | None:
    """Least, (lower) median and most of the `ranks` that are numbers; None where none is."""
    found = sorted(rank for rank in ranks if rank is not None)
    return (found[0], found[(len(found) - 1) // 2], found[-1]) if found else None


def spectrum(x: Tensor, sketch: int | None, generator: torch.Generator) -> Tensor:
    """Falling singular values of `x` (long, short), on the CPU: all, or the first `sketch` of them, nearly.

    The sketch is randomized subspace iteration with two power steps: with none, the slow decay of trained weights
    is read off far too low (Pourkamali-Anaraki 2026, arXiv 2604.02659).
    """
    if sketch is None or sketch >= min(x.shape):
        return torch.linalg.svdvals(x).cpu()
    columns = min(sketch + OVERSAMPLE, *x.shape)
    start = random_columns(x.shape[-1], columns, generator, x.device)
    return torch.linalg.vector_norm(subspace_iteration(x, start, sketch, iterations=2)[1], dim=-2).cpu()


def step_of_ranks(matrices: Sequence[Matrix]) -> int:
    """The number that shared-out ranks are multiples of: the largest power of two up to an eighth of the least
    uniform rank, so that shapes stay few and even."""
    least = min(matrix.directions(matrix.rank) for matrix in matrices)
    return 2 ** max(0, math.floor(math.log2(least / 8)))


def share_out(matrices: Sequence[Matrix], *, steady: bool = False) -> dict[str, int | float]:
    """A rank for each of `matrices` by one threshold on their spectra, within what `rank` for each of them would cost.

    Spectra are divided by their largest value, and the threshold is the smallest for which `Σ r (m + n)` is within the
    budget (`linalg.allocate`). Ranks are multiples of `step_of_ranks`, and at least that. A matrix without a spectrum
    keeps its rank and what that costs.

    Args:
        steady: leave a rank that would change by a quarter or less (`with_hysteresis`), unless the ranks then cost more
            than the budget.

    Returns:
        Rank by name, of all matrices; nothing where none has a spectrum, or too little of the budget is left for them.
    """
    known: list[Matrix] = []
    spectra: list[Tensor] = []
    others: list[Matrix] = []
    for matrix in matrices:
        found = matrix.known_spectrum()
        if found is None:
            others.append(matrix)
        else:
            known.append(matrix)
            spectra.append(relative(found))
    if not known:
        return {}
    if others:
        _log.warning(
            "%s and %d others have no spectrum to go by (missing, zero or not finite) and keep their ranks",
            others[0].name,
            len(others) - 1,
        )
    ranks = {matrix.name: matrix.held for matrix in matrices}
    budget = sum(matrix.cost(matrix.rank) for matrix in matrices) - sum(matrix.cost(matrix.held) for matrix in others)
    sides, step = [matrix.sides for matrix in known], step_of_ranks(known)

    def cost(ranks: Sequence[int]) -> int:
        return sum(rank * sum(both) for rank, both in zip(ranks, sides, strict=True))

    if cost([min(step, len(values)) for values in spectra]) > budget:
        return {}
    new = allocate_ranks(spectra, sides, budget, minimum=step, multiple=step)
    if steady:
        kept = with_hysteresis([matrix.directions(matrix.held) for matrix in known], new)
        new = kept if cost(kept) <= budget else new
    return ranks | {matrix.name: rank for matrix, rank in zip(known, new, strict=True)}
