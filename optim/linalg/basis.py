"""Orthonormal bases of the dominant subspace of a matrix's short side.

Signs and order are a convention here, because Adam's moments are coordinates in the basis: columns are ordered by
falling singular value, and each column's entry of largest magnitude is positive. Only `svd_basis(signs="lapack")`
leaves the factorisation's own signs, which is what GaLore does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.linalg.norms import peak, reciprocal_peak
from thinrank.optim.linalg.orthogonal import householder_qr


def fix_signs(basis: Tensor) -> Tensor:
    """Flips columns of `basis` (..., short, r) so that each one's entry of largest magnitude is positive."""
    strongest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return basis * torch.where(strongest < 0, -1.0, 1.0).to(basis.dtype)


def svd_basis(x: Tensor, rank: int, *, transposed: bool = False, signs: str = "fixed") -> Tensor:
    """The first `rank` right singular vectors of `x`, exactly.

    Args:
        x: (..., long, short), whole on this rank.
        rank: at most min(long, short).
        transposed: factorise `xᵀ` instead, the way the weight is stored. The result differs in rounding and, with
            `signs="lapack"`, in signs.
        signs: `fixed` (this module's convention) or `lapack` (as the factorisation leaves them).

    Returns:
        (..., short, rank), orthonormal columns by falling singular value.
    """
    if transposed:
        basis = torch.linalg.svd(x.mT.contiguous(), full_matrices=False)[0][..., :, :rank]
    else:
        basis = torch.linalg.svd(x, full_matrices=False)[2][..., :rank, :].mT
    return basis.contiguous() if signs == "lapack" else fix_signs(basis)


def svd_bases(x: Tensor, rank: int, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Left (..., long, rank) and right (..., short, rank) singular vectors from one exact factorisation."""
    if transposed:
        right, _, left_t = torch.linalg.svd(x.mT.contiguous(), full_matrices=False)
        return left_t[..., :rank, :].mT.contiguous(), right[..., :, :rank].contiguous()
    left, _, right_t = torch.linalg.svd(x, full_matrices=False)
    return left[..., :, :rank].contiguous(), right_t[..., :rank, :].mT.contiguous()


def subspace_iteration(x: Tensor, start: Tensor, rank: int, *, iterations: int = 1, axis: Axis = WHOLE) -> Tensor:
    """Block power iteration on `xᵀx` from `start`, then Rayleigh–Ritz: the top `rank` right singular vectors, nearly.

    Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1, on the short side, so that only (short, l) travels along the
    axis. The order within the subspace matters to per-coordinate moments, hence the small eigenproblem at the end.

    Args:
        x: (..., long, short); its rows may be spread along `axis`.
        start: (..., short, l) with l ≥ rank: a previous basis, random columns, or both.
        rank: columns returned.
        iterations: products with `xᵀx`; each is followed by a re-orthonormalisation.

    Returns:
        (..., short, rank), orthonormal, signs fixed.
    """
    q = torch.linalg.qr(start).Q
    unit = reciprocal_peak(x, axis)  # products with xᵀx overflow float32 for entries of 1e19, and vanish for 1e-19
    for _ in range(iterations):
        q = torch.linalg.qr(axis.sum(x.mT @ (x @ q).mul_(unit)).mul_(unit)).Q
    image = (x @ q).mul_(unit)  # (..., long, l)
    _, vectors = torch.linalg.eigh(axis.sum(image.mT @ image))  # rising eigenvalues
    return fix_signs(q @ vectors.flip(-1)[..., :rank])


def momentum_iteration(x: Tensor, old: Tensor, momentum: Tensor, rho: float, *, axis: Axis = WHOLE) -> Tensor:
    """One block power iteration, warm from `old`, on `b = ρ · momentum oldᵀ + (1−ρ) x`: `qr(bᵀ b old)`.

    (LDAdam, Robert et al. 2024, alg. 2.) `b` is never formed. Where replicas hold other data, their mean is met in the
    two small products, so no gradient travels.

    Args:
        x: (batch, long, short); its rows may be spread along `axis`.
        old: (batch, short, r), orthonormal.
        momentum: (batch, long, r), coordinates in `old`.
        rho: the share of the momentum, in [0, 1].

    Returns:
        (batch, short, r), orthonormal; `old` again where `b` is zero or no number.
    """
    image = axis.mean(x @ old).mul_(1.0 - rho).add_(momentum, alpha=rho)  # b old: (batch, long, r)
    image = image * reciprocal_peak(image, axis)  # bᵀ b overflows float32 for entries of 1e19, and vanishes for 1e-19
    back = axis.sum(torch.cat([axis.mean(x.mT @ image), momentum.mT @ image], -2))
    short = x.shape[-1]
    product = (1.0 - rho) * back[:, :short] + rho * old @ back[:, short:]
    size = peak(product)
    usable = torch.isfinite(size) & (size > 0)
    return householder_qr(torch.where(usable, product, old), complete=True)


def random_columns(short: int, width: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(short, width) standard normal numbers that depend on `generator` (on the CPU) alone, on any device."""
    return torch.randn(short, width, generator=generator).to(device)


def captured_energy(x: Tensor, low: Tensor, axis: Axis = WHOLE) -> Tensor:
    """`‖low‖² / ‖x‖²` in [0, 1] for each matrix: what an orthonormal projection kept (0 for a zero matrix)."""
    unit = reciprocal_peak(x, axis)
    parts = [(part.float() * unit).square().sum((-2, -1)) for part in (low, x)]
    kept, total = axis.sum(torch.stack(parts))
    return torch.where(total > 0, kept / total, torch.zeros_like(total)).clamp_(0.0, 1.0)
