"""Matrices as sums of singular triples, and what training does to such sums: draw some, swap some, cut some off.

A weight is (out, in); its factors are `U` (out, k), `s` (k,) and `V` (in, k), so that the weight is `U diag(s) Vᵀ`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinrank.optim.linalg.basis import positive_peaks


def singular(weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The exact singular triples of `weight` in float32, or float64 for float64, by falling singular value.

    Each column of `U` has its entry of largest magnitude positive, so that equal matrices have equal factors.

    Args:
        weight: (out, in).
        rank: triples returned, the largest; None: all min(out, in).

    Returns:
        `U` (out, k), `s` (k,), `V` (in, k), contiguous.

    Raises:
        ValueError: where an entry is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("has entries that are not finite and no singular vectors: mend or leave out that weight")
    x = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    signs = positive_peaks(left)
    kept = slice(None, rank)
    return (
        (left * signs)[:, kept].contiguous(),
        s[kept].contiguous(),
        (right.mT * signs)[:, kept].contiguous(),
    )


def balanced(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`B = U sqrt(s)` (out, r) and `A = sqrt(s) Vᵀ` (r, in): the best approximation of `weight` by rank `rank`."""
    left, s, right = singular(weight, rank)
    root = s.sqrt()
    return left * root, (right * root).mT.contiguous()


def mixture(s: Tensor) -> Tensor:
    """`p_i = 1/2 (1/k + s_i / Σ s)` in float64: drawn half by chance, half by size (SST; Zhao et al. 2025).

    All singular values zero: by chance alone.
    """
    size = s.double().clamp(min=0)
    total = size.sum()
    uniform = torch.full_like(size, 1.0 / len(size))
    return torch.where(total > 0, 0.5 * (uniform + size / total), uniform)


def draw(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct indices by weights `probabilities`, in rising order; `generator` is on the CPU."""
    return torch.multinomial(probabilities.cpu(), count, replacement=False, generator=generator).sort().values


def exchange_of(order: Tensor, count: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Which places change so that `chosen` come to be the first `count` of `order`; the fewest there are.

    Args:
        order: (k,) int64, a permutation: place → index.
        count: places that are called active.
        chosen: (count,) distinct indices.

    Returns:
        places below `count`, and as many from `count` on (counted from 0 there), to be swapped pairwise.
    """
    wanted = torch.zeros(len(order), dtype=torch.bool)
    wanted[chosen.cpu()] = True
    held = wanted[order.cpu()]
    return (~held[:count]).nonzero()[:, 0], held[count:].nonzero()[:, 0]


def tails(squares: Tensor) -> Tensor:
    """What is left of a sum from each place on: `Σ_{j ≥ i} x_j` of (k,), (k,)."""
    return squares.flip(0).cumsum(0).flip(0)


def unit_columns(squares: Tensor) -> Tensor:
    """What each column is multiplied by to have length one, by the sums of its squares (r,) in float32 or float64.

    One that has length one but for rounding is left as it is, so that doing it twice is doing it once; a column of
    zeros, or of anything not finite, is left as well.
    """
    length = squares.sqrt()
    tolerance = 16 * torch.finfo(squares.dtype).eps
    usable = torch.isfinite(length) & (length > 0) & ((length - 1).abs() > tolerance)
    return torch.where(usable, 1 / length, torch.ones_like(length))


def riemannian_step(left: Tensor, right: Tensor, step_left: Tensor, step_right: Tensor) -> tuple[Tensor, Tensor]:
    """One step on the manifold of matrices of rank r, without forming one (LORO, Mo et al., ICLR 2025).

    `W = M Nᵀ`; where `step_left = η G N` and `step_right = η Gᵀ M` the result is the best approximation by rank r
    of `W − η P(G)`, with `P` the projection on the tangent space at `W`.

    Args:
        left: M, (m, r) of full column rank.
        right: N, (n, r), too.
        step_left: what a step by itself would take from M, (m, r).
        step_right: from N, (n, r).

    Returns:
        M and N of the new point, balanced: both have the square roots of its singular values.
    """
    rank = left.shape[1]
    u, rm = torch.linalg.qr(left)
    v, rn = torch.linalg.qr(right)
    p = torch.linalg.solve_triangular(rn, step_left, upper=True, left=False)  # η G V
    q = torch.linalg.solve_triangular(rm, step_right, upper=True, left=False)  # η Gᵀ U
    core = q.mT @ v  # η Uᵀ G V
    q1, k1 = torch.linalg.qr(q - v @ core.mT)
    q2, k2 = torch.linalg.qr(p - u @ (u.mT @ p))
    small = left.new_zeros(2 * rank, 2 * rank)
    small[:rank, :rank] = rm @ rn.mT - core
    small[:rank, rank:] = -k1.mT
    small[rank:, :rank] = -k2
    a, c, b = torch.linalg.svd(small)
    root = c[:rank].sqrt()
    return torch.cat([u, q2], 1) @ a[:, :rank] * root, torch.cat([v, q1], 1) @ b.mT[:, :rank] * root


def init_scale(rank: int, out: int, width: int) -> float:
    """Standard deviation of both factors' entries so that those of their product have variance 1/(out + in) (CoLA)."""
    return rank**-0.25 * (out + width) ** -0.25


def share_of(rank: int | float, short: int) -> int:
    """A rank as given, a number or a share of the short side, as a number of at least 1."""
    return rank if isinstance(rank, int) else max(1, math.floor(rank * short + 1e-9))
