"""Attention heads as equal blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def head_norms(x: Tensor, heads: int) -> Tensor:
    """Frobenius norm of each of the `heads` equal blocks of rows of `x` (batch, long, short): (batch, heads), float64.

    In float64, because squares of 1e20 are no float32 and those of 1e-30 are nothing.
    """
    return torch.linalg.vector_norm(x.unflatten(-2, (heads, -1)), dim=(-2, -1), dtype=torch.float64)


def largest_heads(x: Tensor, heads: int, k: int) -> Tensor:
    """The `k` heads of largest norm (batch, k), the largest first; equal ones by the lower number."""
    return head_norms(x, heads).sort(dim=-1, descending=True, stable=True).indices[:, :k]


def take_heads(x: Tensor, heads: int, chosen: Tensor) -> Tensor:
    """The rows of the heads `chosen` (batch, k) of each matrix of `x`, one head below the other: a copy."""
    batch = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
    return x.unflatten(-2, (heads, -1))[batch, chosen].flatten(1, 2)
