"""One number for a whole spectrum: how many directions count, how large they are together, how unevenly.

Of singular values σ (..., m) by falling size, as `singular_values` gives them; each result is (...,). All ranks are
those of the same matrix scaled or rotated. A spectrum of zeros has rank 0 and no condition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from thinrank.optim.monitors.spectrum import Ties, singular_values

LARGEST_SIDE = 4096
"""KappaTune leaves out tensors with a larger side."""


def stable_rank(s: Tensor) -> Tensor:
    """‖W‖_F² / σ₁², from 1 to m (Rudelson and Vershynin 2007). Normal numbers, square: 0.25 m.

    Sees one direction that outgrows the others, and nothing of the small end. The cheapest alarm of a collapse.
    """
    squares = s.double().square()
    return _ratio(squares.sum(-1), squares.amax(-1))


def effective_rank(s: Tensor) -> Tensor:
    """exp(−Σ p ln p) with p = σ / Σσ, of σ and not of σ² (Roy and Vetterli 2007). Normal numbers, square: 0.80 m."""
    return _entropy_rank(s.double())


def entropy_rank(s: Tensor) -> Tensor:
    """The same with p = σ² / Σσ²: exp of von Neumann's entropy of WᵀW, and the Vendi score of a linear kernel. Normal
    numbers, square: 0.61 m. The small end counts less than in `effective_rank`."""
    return _entropy_rank(s.double().square())


def normalised_entropy(s: Tensor, shape: tuple[int, int]) -> Tensor:
    """−Σ p ln p / ln rank with p = σ² / Σσ², WeightWatcher's `entropy`, in [0, 1]; no number for rank 1.

    Args:
        shape: of the matrix; singular values up to σ₁ max(shape) ε of float32 do not count for the rank.
    """
    rank = matrix_rank(s, shape)
    return _ratio(entropy_rank(s).log(), rank.double().log(), torch.nan)


def matrix_rank(s: Tensor, shape: tuple[int, int]) -> Tensor:
    """Singular values above σ₁ max(shape) ε, with the ε of float32, in which they are found: (...,) int64."""
    tolerance = s.amax(-1, keepdim=True) * max(shape) * torch.finfo(torch.float32).eps
    return (s > tolerance).sum(-1)


def participation_ratio(s: Tensor) -> Tensor:
    """(Σσ²)² / Σσ⁴, Rényi's order 2 of `entropy_rank`, at most that. Normal numbers, square: 0.5 m.

    Needs no factorisation: `representation.participation_ratio` has it from one Gram matrix.
    """
    squares = s.double().square()
    squares = squares / squares.amax(-1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)
    return _ratio(squares.sum(-1).square(), squares.square().sum(-1))


def nuclear_norm(s: Tensor) -> Tensor:
    """Σσ."""
    return s.double().sum(-1)


def condition(s: Tensor) -> Tensor:
    """κ = σ₁ / σ_m; infinite for a matrix of deficient rank, no number for a zero one.

    Of random square matrices it scatters by factors of ten from one to the next, as the smallest singular value does,
    and it is bounded by the rounding of float32, about 1e7: use `condition_quantile` to compare or to watch.
    """
    return s[..., 0].double() / s[..., -1].double()


def condition_quantile(s: Tensor, q: float = 0.95) -> Tensor:
    """κ_q = σ₁ / σ_⌈q m⌉: the condition of what is left without the smallest 5 %; stable where κ is not."""
    if not 0 < q <= 1:
        raise ValueError(f"q must be in (0, 1], got {q}: write 0.95")
    return s[..., 0].double() / s[..., math.ceil(q * s.shape[-1]) - 1].double()


def log_volume(s: Tensor) -> Tensor:
    """Σ ln σ: the logarithm of the volume that the matrix gives the unit ball's image; −∞ for deficient rank."""
    return s.double().log().sum(-1)


def matrices(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of two dimensions of a model or a state dict by name, in its order; tied ones once, if in a
    `dict`."""
    ties = Ties() if isinstance(model, (nn.Module, dict)) else None
    for name, value in model.named_parameters() if isinstance(model, nn.Module) else model.items():
        usable = isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point() and not value.is_meta
        if usable and value.numel() and (ties is None or ties.new(value)):
            yield name, value


@torch.no_grad()
def select_by_condition(
    model: nn.Module | Mapping[str, Tensor],
    k: int,
    *,
    q: float = 1.0,
    largest_side: int = LARGEST_SIDE,
    include: str = "",
) -> list[tuple[str, float]]:
    """The `k` tensors of the smallest condition, which KappaTune fine-tunes while the rest is frozen (arXiv
    2506.16289).

    Its reason: a tensor of small condition has not specialised, so that changing it forgets less. Rules of the paper's
    code: tensors of two dimensions, and none with a side beyond `largest_side` (embeddings, heads).

    Args:
        model: a model, or a state dict.
        k: how many; fewer are returned where there are fewer.
        q: 1 for the paper's κ, which scatters for square matrices; 0.95 for `condition_quantile` (ours).
        largest_side: see above.
        include: a regular expression that a name must contain.

    Returns:
        (name, condition), smallest first; of equal conditions the earlier in the model. Tensors without a finite
        condition are left out.

    Raises:
        ValueError: k below 1, or a pattern that is none.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}: write how many tensors are to be trained")
    try:
        pattern = re.compile(include)
    except re.error as error:
        raise ValueError(f"include must be a regular expression, got {include!r} ({error})") from error
    found = []
    for name, value in matrices(model):
        if max(value.shape) > largest_side or not pattern.search(name) or not bool(torch.isfinite(value).all()):
            continue
        kappa = float(condition_quantile(singular_values(value), q))
        if math.isfinite(kappa):
            found.append((name, kappa))
    return sorted(found, key=lambda pair: pair[1])[:k]


def _entropy_rank(weights: Tensor) -> Tensor:
    """exp of Shannon's entropy of `weights` (..., m) scaled to a sum of one; 0 where all are zero."""
    total = weights.sum(-1, keepdim=True)
    p = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def _ratio(top: Tensor, bottom: Tensor, otherwise: float = 0.0) -> Tensor:
    return torch.where(bottom > 0, top / bottom, torch.full_like(top, otherwise))
