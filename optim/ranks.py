"""A rank for each matrix of a model, instead of one for all."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from thinrank.optim.build import build
from thinrank.optim.grouping import stepped_matrices
from thinrank.optim.linalg.allocate import allocate_ranks, bounded_counts, global_threshold, relative, stretched
from thinrank.optim.linalg.basis import random_columns, subspace_iteration
from thinrank.optim.lowrank.subspace import width
from thinrank.optim.matrix import matrix_views
from thinrank.optim.methods.config import RankedConfig, choice
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.rule import key_of

OVERSAMPLE = 8
"""Random columns of a sketch beside the values that are asked for."""


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
    seed: int = 0,
) -> dict[str, int | None]:
    """A rank for each matrix that `config` projects, for `build(model, config, ranks=…)`.

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
        roles: as in `build`.
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
    found: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, parameter in stepped_matrices(model, config, roles).items():
        source = parameter.grad if spectra == "gradient" else parameter
        if source is None:
            raise ValueError(f"{name} has no gradient: run one backward() first, or use spectra='weight'")
        if not bool(torch.isfinite(source).all()):
            raise ValueError(f"the {spectra} of {name} is not finite, so it has no spectrum: repair it first")
        (view,) = matrix_views(tuple(parameter.shape), getattr(config, "proj_type", "std"))
        sizes[name] = view.shape
        key = key_of(name) + (seed << 32)
        found[name] = spectrum(view.of(source.detach())[0].float(), sketch, torch.Generator().manual_seed(key))
    names = list(found)
    if not names:
        return {}
    if reduction is not None:
        values = [stretched(found[name]) for name in names]
        threshold = global_threshold(values, reduction)
        ranks = bounded_counts(values, threshold, minimum=minimum, maximum=maximum, multiple=multiple)
    else:
        if budget is None:
            assert config.rank is not None  # without a rank nothing is projected
            budget = sum(width(config.rank, (1, *size)) * sum(size) for size in sizes.values())
        ranks = allocate_ranks(
            [relative(found[name]) for name in names],
            [sizes[name] for name in names],
            budget,
            minimum=minimum,
            maximum=maximum,
            multiple=multiple,
        )
    limit = math.inf if dense_above is None else dense_above
    return {name: rank if rank <= limit * min(sizes[name]) else None for name, rank in zip(names, ranks, strict=True)}


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


@torch.no_grad()
def reallocate(
    optimizer: MatrixOptimizer,
    model: nn.Module,
    config: RankedConfig,
    ranks: Mapping[str, int | None],
    *,
    seed: int = 0,
    roles: Mapping[str, str] | None = None,
) -> MatrixOptimizer:
    """A new optimizer with other `ranks` that goes on where `optimizer` stands, with its learning rates.

    A smaller rank keeps the first directions (the strongest, where the method orders them) with their moments; a larger
    one adds directions orthogonal to them, or columns not yet chosen, with moments of zero. What else a matrix
    remembers is kept; a matrix that changes between projected and element by element starts anew. The old optimizer is
    left as it is. Learning-rate schedulers hold the optimizer they were made for: make them anew, too.

    With one step count for the whole matrix, new directions take up to (1−β1)/sqrt(1−β2) learning rates at first.

    Args:
        ranks: of all matrices, as for `build`; `with_hysteresis` spares changes that are too small to pay.
        seed, roles: as in `build`.
    """
    new = build(model, config, seed=seed, roles=roles, ranks=ranks)
    new.axis = optimizer.axis
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for group in new.param_groups:
        before = groups.get(group["params"][0], {})
        group.update({key: before[key] for key in ("lr", "initial_lr") if key in before})
    for parameter, state in new.state.items():
        old = optimizer.state.get(parameter, {})
        if set(old) != set(state):
            continue
        for key, value in state.items():
            kind = key.rpartition(".")[2]
            value.copy_(_RESIZED.get(kind, _common)(old[key], value))
    return new


def _common(old: Tensor, like: Tensor) -> Tensor:
    """`like` with what `old` has of it."""
    new = like.clone()
    part = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
    new[part] = old[part]
    return new


def _basis(old: Tensor, like: Tensor) -> Tensor:
    """The first columns of the orthonormal `old`, or all of them and some of their complement."""
    held, wanted = old.shape[-1], like.shape[-1]
    if wanted <= held:
        return old[..., :wanted]
    return torch.cat([old, torch.linalg.qr(old, mode="complete").Q[..., held:wanted]], -1)


def _columns(old: Tensor, like: Tensor) -> Tensor:
    """The first of the chosen columns, or all of them and the lowest of the others."""
    held, wanted = old.shape[-1], like.shape[-1]
    if wanted <= held:
        return old[..., :wanted]
    most = int(old.max()) + 1 + wanted  # the lowest free ones lie below, and below the short side
    member = torch.zeros(*old.shape[:-1], most, dtype=torch.bool, device=old.device).scatter_(-1, old.long(), True)
    free = torch.sort(member.to(torch.uint8), dim=-1, stable=True).indices[..., : wanted - held]
    return torch.cat([old, free.to(old.dtype)], -1)


_RESIZED = {"basis": _basis, "basis_long": _basis, "columns": _columns}
"""State that is not carried by copying what both sizes have."""
