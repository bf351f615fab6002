"""A few entries of each matrix of a batch: which are largest, what they hold, and what stays when they change.

Places are counted in the matrix flattened row by row (`row · short + column`) and always rise: that is the convention
by which two choices are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest_entries(score: Tensor, k: int) -> Tensor:
    """Places of the `k` largest of each row of `score` (batch, n), which has no NaN; equal ones by the lower place.

    The choice among equals is made here and not by `topk`, which makes it differently on each device.

    Returns:
        (batch, k) int64, rising.
    """
    n = score.shape[-1]
    if k == n:
        return torch.arange(n, device=score.device).repeat(score.shape[0], 1)
    least = score.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = score > least, score == least
    room = k - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))).nonzero()[:, 1].reshape(-1, k)


def take_entries(x: Tensor, index: Tensor) -> Tensor:
    """The entries of `x` (batch, long, short) at `index` (batch, k); `x` may have any strides and is not copied."""
    wide, short = index.long(), x.shape[-1]
    batch = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
    return x[batch, wide // short, wide % short]


def carry_entries(old: Tensor, new: Tensor, value: Tensor) -> Tensor:
    """`value` (batch, k) at the places `old`, rearranged for the places `new`; zero where a place was not held."""
    place = torch.searchsorted(old, new).clamp_(max=old.shape[-1] - 1)
    return value.gather(-1, place).masked_fill_(old.gather(-1, place) != new, 0.0)
