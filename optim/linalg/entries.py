"""A few entries of each matrix of a batch: which are largest, what they hold, and what stays when they change.

Places are counted in the matrix flattened row by row (`row · short + column`) and always rise: that is the convention
by which two choices are compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinrank.optim.update import memory_of, memory_places


def largest_entries(score: Tensor, k: int, *, floor: Tensor | None = None) -> Tensor:
    """Places of the `k` largest of each row of `score` (batch, n), which has no NaN; equal ones by the lower place.

    The choice among equals is made here and not by `topk`, which makes it differently on each device. On a CPU, whose
    `topk` takes as long as two products for a large matrix, only what is above some bound is looked at: `floor`, or the
    level that a sample suggests. A bound that fewer than `k` reach is found out and not used, so that the choice is
    exact. Elsewhere the host never waits.

    Args:
        floor: (batch, 1), a bound that at least `k` of each row are known to reach.

    Returns:
        (batch, k) int64, rising.
    """
    batch, n = score.shape
    if k == n:
        return torch.arange(n, device=score.device).repeat(batch, 1)
    if score.device.type == "cpu" and n >= LEAST_SIZE and n >= FEW * k:
        candidates = None if floor is None else _reaching(score, floor, k)
        if candidates is None:
            candidates = _reaching(score, _sampled_level(score, k), k)
        if candidates is not None:
            values, places = candidates
            return places.gather(-1, _largest(values, k))
    return _largest(score, k)


LEAST_SIZE = 1024
"""Of a row that is worth a sample."""

FEW = 8
"""How many times fewer than all entries make it worth looking for the bound of the largest first."""

STRIDES = (7, 61)
"""Of the sample: primes, so that it meets all columns of a matrix alike."""


def _sampled_level(score: Tensor, k: int) -> Tensor:
    """A level (batch, 1) that probably somewhat more than `k` of each row reach: by four standard deviations."""
    stride = STRIDES[1] if k >= 128 * STRIDES[1] else STRIDES[0]
    sample = score[:, ::stride]
    expected = k / stride
    wanted = min(sample.shape[-1], math.ceil(expected + 4.0 * expected**0.5 + 4.0))
    return sample.topk(wanted, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def _reaching(score: Tensor, level: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The entries that reach `level` (batch, 1), side by side: values (batch, c) with -∞ behind the last, and places,
    rising. None where one row has fewer than `k` of them, or so many that nothing is gained.
    """
    batch, n = score.shape
    hits = (score >= level).flatten().nonzero().flatten()
    row = hits // n
    counts = row.bincount(minlength=batch)
    fewest, most = (int(x) for x in counts.aminmax())
    if fewest < k or FEW * most > 2 * n:
        return None
    found = score.flatten()[hits]
    if batch == 1:
        return found.unsqueeze(0), hits.unsqueeze(0)
    slot = torch.arange(len(hits)) + (torch.arange(batch) * most - (counts.cumsum(0) - counts))[row]
    values = score.new_full((batch, most), -math.inf)
    places = hits.new_zeros(batch, most)
    values.view(-1)[slot] = found
    places.view(-1)[slot] = hits - row * n
    return values, places


def _largest(score: Tensor, k: int) -> Tensor:
    """What `largest_entries` returns, by all of the entries."""
    least = score.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = score > least, score == least
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].reshape(-1, k) if score.device.type == "cpu" else _places(chosen, k)


def _places(chosen: Tensor, k: int) -> Tensor:
    """Where `chosen` (batch, n) is true, k times a row: what `nonzero` finds, for which the host need not wait."""
    batch, n = chosen.shape
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, k)  # the others meet in a slot that is thrown away
    places = torch.arange(n, device=chosen.device).expand(batch, -1)
    return places.new_empty(batch, k + 1).scatter_(-1, slot, places)[:, :k]


def take_entries(x: Tensor, index: Tensor) -> Tensor:
    """The entries of `x` (batch, long, short) at `index` (batch, k); `x` may have any strides and is not copied."""
    return memory_of(x).gather(-1, memory_places(index, x))


def carry_entries(old: Tensor, new: Tensor, value: Tensor) -> Tensor:
    """`value` (batch, k) at the places `old`, rearranged for the places `new`; zero where a place was not held."""
    place = torch.searchsorted(old, new).clamp_(max=old.shape[-1] - 1)
    return value.gather(-1, place).masked_fill_(old.gather(-1, place) != new, 0.0)
