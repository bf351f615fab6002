"""How many directions activations use: of X (tokens, d), and batches (..., tokens, d) where that is said.

All measures but the matrix nuclear norm are those of the rows turned by any rotation, and do not know in which order
rows come. `matrix_entropy`, `vendi_score` and the nuclear norm divide each row by its length, and see directions alone;
the participation ratio sees lengths too, so that a few tokens of huge activation (attention sinks) can be most of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.monitors.spectrum import wide

MAX_ROWS = 10_000
"""Rows beyond which the authors of the diffusion entropy take a sample."""


def participation_ratio(x: Tensor, *, centre: bool = False, axis: Axis = WHOLE) -> Tensor:
    """(tr C)² / tr C² with C = XᵀX: one Gram matrix, no factorisation. From 1 to min(tokens, d).

    The cheapest rank of activations, and the one to watch: of rank-4 features it says 4 or less.

    Args:
        x: (..., tokens, d); tokens may be spread along `axis`, over which d × d numbers are then summed.
        centre: subtract the mean over tokens first, over all ranks. Without, a large mean counts as a direction.

    Returns:
        (...,) float64; 0 where X is zero.
    """
    y = wide(x)
    if centre:
        totals = torch.cat([y.sum(-2), y.new_full((*y.shape[:-2], 1), float(y.shape[-2]))], -1)
        totals = axis.sum(totals)
        y = y - (totals[..., :-1] / totals[..., -1:]).unsqueeze(-2)
    y = y.double()
    tokens, d = y.shape[-2:]
    gram = axis.sum(y.mT @ y) if not axis.whole or d <= tokens else y @ y.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = gram.square().sum((-2, -1))
    return torch.where(square > 0, trace.square() / square, 0.0)


def leading_share(x: Tensor) -> Tensor:
    """σ₁(X) / ‖X‖_F, (...,) float64, from 1/√min(tokens, d) to 1, the root of 1 / stable rank; 0 where X is zero.

    It grows where all rows come to point one way, which goes with the leading singular values of weights growing and
    with losses that blow up (arXiv 2602.01308 names the two together; the share is ours). Not centred: a common mean is
    a direction, and the one that is looked for.
    """
    y = wide(x).double()
    gram = y.mT @ y if y.shape[-1] <= y.shape[-2] else y @ y.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    largest = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0)
    return torch.where(trace > 0, largest / trace, 0.0).sqrt()


def matrix_entropy(x: Tensor) -> Tensor:
    """−Σ e ln e / ln d of the eigenvalues e of C / tr C, C = ZᵀZ, where Z is X minus its column means, rows of length
    one.

    The "matrix entropy" of language models, which arXiv 2410.10672 compares its norm with. It sees compression: 1 where
    directions are used alike, near 0 where a few are.

    Args:
        x: (..., tokens, d), d at least 2.

    Returns:
        (...,) float64; 0 where all rows are alike.
    """
    d = x.shape[-1]
    if d < 2:
        raise ValueError(f"the entropy of {d} feature is zero and has no scale: give at least 2")
    return _entropy(_unit_rows(_centred(x))) / math.log(d)


def matrix_nuclear_norm(x: Tensor) -> Tensor:
    """(1 / L) Σ_{j ≤ D} c_(j): the largest D = min(L, d) column norms of X, centred by columns, rows of length one, L
    tokens.

    The "Matrix Nuclear-Norm" of arXiv 2410.10672, with its division by L. It stands for the nuclear norm, of which it
    is an upper bound, equal only where columns are orthogonal.

    It hardly sees what it is meant to: features of rank 4 have 0.47 where independent ones have 0.50 (256 tokens, 64
    features; the nuclear norms by L are 0.12 and 0.48), and features that have collapsed but for a tiny noise have 0.50
    again. It depends on the basis. It is here to compare with what others report; use `participation_ratio` to watch.

    Args:
        x: (..., L, d).

    Returns:
        (...,) float64.
    """
    z = _unit_rows(_centred(x))
    length, d = z.shape[-2:]
    norms = z.square().sum(-2).sqrt().sort(-1, descending=True).values
    return norms[..., : min(length, d)].sum(-1) / length


def reference_bandwidth(x: Tensor, *, max_rows: int = 1024, seed: int = 0) -> float:
    """Half of the median distance between different rows of `x` (tokens, d): a bandwidth for `diffusion_entropy`.

    Take it once, of a batch early in training, and keep it: taken anew of each batch it grows and shrinks with the
    data, and features that have all but collapsed look as rich as any.

    Raises:
        ValueError: fewer than 2 rows, or half of the rows alike, so that there is no width.
    """
    y = _sample(wide(x), max_rows, seed).double()
    if y.ndim != 2 or len(y) < 2:
        raise ValueError(f"x must be (tokens, d) with 2 tokens at least, got {tuple(x.shape)}: flatten the batch")
    median = float(torch.pdist(y).median())
    if not median > 0:
        raise ValueError("the median distance between rows is zero and no bandwidth: take another batch as reference")
    return median / 2


def diffusion_entropy(
    x: Tensor, bandwidth: float, *, power: float = 1.0, max_rows: int = MAX_ROWS, seed: int = 0
) -> float:
    """Diffusion spectral entropy (Liao et al. 2023) in bits, from 0 to log2 of the rows.

        G_ij = exp(−‖x_i − x_j‖² / 2h²)      q_i = Σ_j G_ij      K = diag(q)^(−½) G diag(q)^(−½)
        e = |eigenvalues of K|^t, scaled to a sum of one         the entropy of e

    It sees how many clumps the rows form at the scale h: 0 where all lie within h of each other, log2 N where none do.
    The scale decides everything, so h is an argument without a default and to be kept (`reference_bandwidth`); the
    authors' is 10.

    Args:
        x: (tokens, d).
        bandwidth: h.
        power: t of the diffusion; the authors' is 1.
        max_rows: beyond so many a sample is taken. O(N² d + N³): 1024 is plenty.
        seed: of the sample, whose generator is its own.

    Raises:
        ValueError: a bandwidth or power that is not above 0.
    """
    if not bandwidth > 0 or not power > 0:
        raise ValueError(
            f"bandwidth and power must be above 0, got {bandwidth} and {power}: take reference_bandwidth of a batch"
        )
    return _diffusion(_sample(wide(x), max_rows, seed).double(), bandwidth, power)


def diffusion_information(
    x: Tensor, classes: Tensor, bandwidth: float, *, power: float = 1.0, max_rows: int = MAX_ROWS, seed: int = 0
) -> float:
    """What the rows say of `classes` (tokens,): the entropy of all minus the mean, by size, of that of each class, in
    bits."""
    y = wide(x).double()
    whole = diffusion_entropy(y, bandwidth, power=power, max_rows=max_rows, seed=seed)
    within = 0.0
    for label in classes.unique():
        some = y[classes == label]
        within += len(some) / len(y) * diffusion_entropy(some, bandwidth, power=power, max_rows=max_rows, seed=seed)
    return whole - within


def vendi_score(x: Tensor, q: float = 1.0) -> Tensor:
    """How many different rows there are: exp of Rényi's entropy of order `q` of the eigenvalues of K / n, K_ij the
    cosine of rows i and j (Friedman and Dieng, arXiv 2210.02410; orders: Pasarkar and Dieng 2023).

    Rows are not centred: a common direction in all rows counts, and with it everything is alike. Order 2 is the
    participation ratio of unit rows and needs no eigenvalues; higher orders see large groups, lower ones rare rows.

    Args:
        x: (..., tokens, d); the smaller of the two Gram matrices is used. Rows of zeros are like nothing and count
            nothing.
        q: above 0; 1 is Shannon's; infinity is 1 / the largest eigenvalue.

    Returns:
        (...,) float64, from 1 to min(tokens, d).
    """
    if not q > 0:
        raise ValueError(f"q must be above 0, got {q}: write 1")
    z = _unit_rows(wide(x).double())
    if q == 2:
        return participation_ratio(z)
    e = _shares(z)
    if q == 1:
        return torch.special.entr(e).sum(-1).exp()
    if math.isinf(q):
        return 1 / e.amax(-1)
    return (e.pow(q).sum(-1).log() / (1 - q)).exp()


def vendi_score_of(kernel: Tensor, q: float = 1.0) -> Tensor:
    """The same of any similarity `kernel` (..., n, n), symmetric, positive semidefinite, with ones on its diagonal."""
    e = torch.linalg.eigvalsh(kernel.double() / kernel.shape[-1]).clamp(min=0)
    if q == 1:
        return torch.special.entr(e).sum(-1).exp()
    return 1 / e.amax(-1) if math.isinf(q) else (e.pow(q).sum(-1).log() / (1 - q)).exp()


def _centred(x: Tensor) -> Tensor:
    y = wide(x).double()
    return y - y.mean(-2, keepdim=True)


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length one; those of zeros stay."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length > 0, x / length, torch.zeros_like(x))


def _shares(z: Tensor) -> Tensor:
    """Eigenvalues of ZᵀZ by their sum, (..., min(tokens, d)); zeros for a matrix of zeros."""
    gram = z.mT @ z if z.shape[-1] <= z.shape[-2] else z @ z.mT
    e = torch.linalg.eigvalsh(gram).clamp(min=0)
    total = e.sum(-1, keepdim=True)
    return torch.where(total > 0, e / total, torch.zeros_like(e))


def _entropy(z: Tensor) -> Tensor:
    return torch.special.entr(_shares(z)).sum(-1)


def _diffusion(y: Tensor, bandwidth: float, power: float) -> float:
    near = torch.exp(-torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * bandwidth**2))
    root = near.sum(-1).rsqrt()
    e = torch.linalg.eigvalsh(near * root[:, None] * root).abs().pow(power)
    return float(torch.special.entr(e / e.sum()).sum()) / math.log(2)


def _sample(x: Tensor, rows: int, seed: int) -> Tensor:
    if x.shape[-2] <= rows:
        return x
    generator = torch.Generator().manual_seed(seed)
    return x[..., torch.randperm(x.shape[-2], generator=generator)[:rows].to(x.device), :]
