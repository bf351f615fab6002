"""Ranks of one's own for the matrices of a model, by a budget, a share or a threshold that one chooses oneself."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from thinrank.optim.allocation import Matrix
from thinrank.optim.grouping import group_parameters
from thinrank.optim.heads import HeadLayout
from thinrank.optim.linalg.allocate import allocate_ranks, bounded_counts, global_threshold, relative, stretched
from thinrank.optim.matrix import matrix_views
from thinrank.optim.methods.config import RankedConfig, choice


def allocated_ranks(
    model: nn.Module,
    config: RankedConfig,
    spectra: str = "weight",
    *,
    reduction: float | None = None,
    budget: float | None = None,
    minimum: int = 1,
    maximum: int | None = None,
    multiple: int = 1,
    dense_above: float | None = None,
    sketch: int | None = None,
    roles: Mapping[str, str] | None = None,
    heads: Mapping[str, HeadLayout] | None = None,
    seed: int = 0,
) -> dict[str, int | None]:
    """A rank for each matrix that `config` projects, for `build(model, config, ranks=…)` or `optimizer.reallocate`.

    For those who want another budget or rule than `config.rank_allocation`, which does without a call.

    With `reduction`, WeLore's rule: spectra stretched to [0, 1] and one threshold, below which that share of all
    singular values lies. Otherwise spectra are divided by their largest value, and the threshold is the smallest for
    which `Σ r (m + n)` is within `budget`.

    Args:
        spectra: whose singular values are looked at: `weight`, or `gradient` (what `backward()` left in `.grad`).
        reduction: share of the directions of all matrices together that are given up.
        budget: numbers in bases and projections together; None, and no `reduction`: what `config.rank` for all would
            cost.
        minimum, maximum, multiple: of each rank.
        dense_above: matrices given more than this share of their short side get None: they are stepped element by
            element. WeLore's share is 0.5, where two factors of a square matrix are as large as it is. What they cost
            then is not in the budget.
        sketch: compute only so many singular values, by randomized subspace iteration, instead of all of them: for
            matrices of thousands. Needs a budget.
        roles, heads: as in `build`.
        seed: of the sketches.

    Raises:
        ValueError: for bad values, a budget below the smallest ranks, a missing gradient, or what is not finite.
    """
    choice("spectra", spectra, ("weight", "gradient"))
    if reduction is not None and (budget is not None or sketch is not None):
        raise ValueError("reduction needs all singular values and no budget: leave out budget and sketch, or reduction")
    for key, value in (("minimum", minimum), ("multiple", multiple), ("maximum", maximum), ("sketch", sketch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{key} must be at least 1, got {value!r}")
    matrices = {matrix.name: matrix for matrix in _matrices(model, config, spectra, roles, heads, seed)}
    found: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        if matrix.source is None:
            raise ValueError(f"{name} has no gradient: run one backward() first, or use spectra='weight'")
        if not bool(torch.isfinite(matrix.source).all()):
            raise ValueError(f"the {spectra} of {name} is not finite, so it has no spectrum: repair it first")
        found[name] = matrix.spectrum(sketch)
    names = list(found)
    if not names:
        return {}
    if reduction is not None:
        values = [stretched(found[name]) for name in names]
        threshold = global_threshold(values, reduction)
        ranks = bounded_counts(values, threshold, minimum=minimum, maximum=maximum, multiple=multiple)
    else:
        if budget is None:
            budget = sum(matrix.cost(matrix.rank) for matrix in matrices.values())
        ranks = allocate_ranks(
            [relative(found[name]) for name in names],
            [matrices[name].sides for name in names],
            budget,
            minimum=minimum,
            maximum=maximum,
            multiple=multiple,
        )
    limit = math.inf if dense_above is None else dense_above
    whole = {name: limit * matrix.directions(1.0) for name, matrix in matrices.items()}
    return {name: rank if rank <= whole[name] else None for name, rank in zip(names, ranks, strict=True)}


def _matrices(
    model: nn.Module,
    config: RankedConfig,
    spectra: str,
    roles: Mapping[str, str] | None,
    heads: Mapping[str, HeadLayout] | None,
    seed: int,
) -> list[Matrix]:
    """What `config` projects, in the model's order, seen as the optimizer of `config` sees it."""
    if config.rank is None:
        return []
    found: dict[str, Matrix] = {}
    for group in group_parameters(model, config, roles, heads=heads).groups:
        for name, parameter in group["params"]:
            if group["elementwise"]:
                continue
            views = matrix_views(
                tuple(parameter.shape),
                group.get("proj_type", "std"),
                sections=group.get("sections"),
                along=group.get("sections_along", "rows"),
            )
            source = parameter.grad if spectra == "gradient" else parameter
            found[name] = Matrix(name=name, views=views, source=source, rank=config.rank, held=config.rank, seed=seed)
    return [found[name] for name, _ in model.named_parameters() if name in found]
