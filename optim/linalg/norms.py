"""Norms that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Axis


def frobenius(x: Tensor, axis: Axis = WHOLE) -> Tensor:
    """Frobenius norm of each matrix of the batch, over all ranks that hold rows of it: (...,)."""
    return axis.sum(x.square().sum((-2, -1))).sqrt()


PART_BYTES = 2**20
"""Of a matrix that is squared at a time on a CPU: what its cache holds."""


def row_norms(x: Tensor) -> Tensor:
    """The length of each row of `x` (..., long, short), of any strides: (..., long, 1), float32 at least.

    torch's norm over a dimension that is not the last takes a CPU fifteen times longer than over the last, so that a
    matrix that lies transposed is squared and summed, part by part.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu" or x.shape[-1] < 2 or x.stride(-1) == 1:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    total = torch.zeros(x.shape[:-1], dtype=wide)
    columns = max(1, PART_BYTES // (4 * max(1, total.numel())))
    for part in x.split(columns, -1):
        total.add_(part.to(wide).square().sum(-1))
    return total.sqrt_().unsqueeze(-1)


def peak(x: Tensor, axis: Axis = WHOLE) -> Tensor:
    """The largest magnitude of each matrix of `x` (..., 1, 1): where rows are shared, the sum of the ranks' largest,
    which is as good a measure of size. No number where `x` holds something that is none.
    """
    empty = 0 in x.shape[-2:]  # a rank without rows; a maximum of nothing is refused by torch
    if empty:
        return axis.sum(x.new_zeros(*x.shape[:-2], 1, 1))
    # torch's norm of order infinity, or magnitudes in between, take a CPU ten times longer than these two passes
    return axis.sum(torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True)))


def reciprocal_peak(x: Tensor, axis: Axis = WHOLE) -> Tensor:
    """What to multiply each matrix of `x` by to have its entries near one: (..., 1, 1)."""
    size = peak(x, axis)
    return size.clamp(min=torch.finfo(size.dtype).tiny).reciprocal()


def growth_limit(norm: Tensor, previous: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """How much to scale something down so that its norm is at most `limit` times the `previous` one (Fira's limiter).

    Args:
        norm: (batch,) Frobenius norms now.
        previous: (batch,) norms of what was let through last; 0 means nothing was, and nothing is limited.

    Returns:
        factors in [0, 1] and the norms that remain, (batch,) each.
    """
    allowed = torch.where(previous > 0, torch.minimum(norm, limit * previous), norm)
    factor = torch.where(norm > 0, allowed / norm.clamp(min=torch.finfo(norm.dtype).tiny), torch.ones_like(norm))
    return factor, allowed


def cosh_rms(x: Tensor, axis: Axis = WHOLE) -> Tensor:
    """sqrt(mean(cosh²(x))) of each matrix of the batch, over all ranks that hold rows of it: (...,), at least one.

    Computed as 1 + sinh², which keeps the digits of what is above one. Entries beyond 30, whose squares overflow, count
    as 30.
    """
    count = axis.sum(x.new_full((), float(x.shape[-2] * x.shape[-1])))
    total = axis.sum(x.clamp(-30.0, 30.0).sinh().square().sum((-2, -1)))
    return (1.0 + total / count).sqrt()


def all_finite(x: Tensor, axis: Axis = WHOLE) -> Tensor:
    """Which matrices of `x` (..., long, short) hold finite numbers alone, on every rank: (..., 1, 1) bool."""
    return torch.isfinite(peak(x, axis))  # a maximum passes on what is no number


SKETCH = 1021
"""Sums of a sketch. A prime, so that no side of a matrix is a multiple of it, and no sum is of one column."""


def signed_sums(x: Tensor, width: int, seed: int) -> Tensor:
    """A sketch of `x` (any shape): the sums of its entries, with random signs, over every `width`-th place; float32.

    Linear in `x`, and its squared norm is on average that of `x`, with a standard deviation of about sqrt(2/width) of
    that or less, where no few entries hold most of it (AMS: Alon, Matias, Szegedy 1996; the even hash is ours, and so
    are signs that are products of a row's and a column's, which cost a pass instead of a random number for each entry,
    and leave the mean exact). Where `x` has no more than `width` entries its norm is exact.

    Args:
        seed: of the signs; two devices of one kind have the same.

    Returns:
        (min(width, entries),).
    """
    x = x.detach()
    if x.numel() <= width:
        return x.reshape(-1).float()
    rows = x.reshape(len(x), -1)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    signs = torch.randint(0, 2, (sum(rows.shape),), generator=generator, device=x.device, dtype=torch.int8)
    signs = signs.mul_(2).sub_(1).to(x.dtype)
    columns = rows.shape[1]
    some = len(rows) if x.is_cuda else max(1, PART_BYTES // (4 * columns))  # what a cache holds: 4 times as fast
    found = torch.zeros(width, dtype=torch.float32, device=x.device)
    for start in range(0, len(rows), some):
        signed = (rows[start : start + some] * signs[start : min(start + some, len(x)), None]).mul_(signs[len(x) :])
        signed = signed.view(-1)
        even = signed.numel() // width * width
        sums = signed[:even].view(-1, width).sum(0, dtype=torch.float32)
        sums[: signed.numel() - even] += signed[even:]
        found += sums.roll(start * columns % width)
    return found


def unit_columns(x: Tensor) -> Tensor:
    """The columns of `x` (..., n, r), each divided by its length, whatever its size; zero columns stay zero."""
    tiny = torch.finfo(x.dtype).tiny
    y = x / x.abs().amax(-2, keepdim=True).clamp(min=tiny)
    return y / torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp(min=tiny)
