"""Norms that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Axis


def frobenius(x: Tensor, axis: Axis = WHOLE) -> Tensor:
    """Frobenius norm of each matrix of the batch, over all ranks that hold rows of it: (...,)."""
    return axis.sum(x.square().sum((-2, -1))).sqrt()


def limit_growth(x: Tensor, previous: Tensor, limit: float, axis: Axis = WHOLE) -> tuple[Tensor, Tensor]:
    """Scales `x` down where its norm exceeds `limit` times the `previous` one (Fira's norm-growth limiter).

    Args:
        x: (batch, long, short).
        previous: (batch,) norms of the last limited x; 0 means there was none and nothing is limited.

    Returns:
        the limited x and its norms (batch,).
    """
    norm = frobenius(x, axis)
    allowed = torch.where(previous > 0, torch.minimum(norm, limit * previous), norm)
    factor = torch.where(norm > 0, allowed / norm.clamp(min=torch.finfo(norm.dtype).tiny), torch.ones_like(norm))
    return x * factor[..., None, None], allowed
