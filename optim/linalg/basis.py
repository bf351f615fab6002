"""Orthonormal bases of the dominant subspace of a matrix's short side.

Signs and order are a convention here, because Adam's moments are coordinates in the basis: columns are ordered by
falling singular value, and each column's entry of largest magnitude is positive. Only `svd_basis(signs="lapack")`
leaves the factorisation's own signs, which is what GaLore does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Asking, Axis
from thinrank.optim.linalg.norms import peak, reciprocal_peak
from thinrank.optim.linalg.orthogonal import householder_qr
from thinrank.optim.linalg.products import product


def positive_peaks(basis: Tensor) -> Tensor:
    """What makes each column's entry of largest magnitude in `basis` (..., short, r) positive: 1 or −1, (..., 1, r)."""
    strongest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return torch.where(strongest < 0, -1.0, 1.0).to(basis.dtype)


def fix_signs(basis: Tensor) -> Tensor:
    """Flips columns of `basis` (..., short, r) so that each one's entry of largest magnitude is positive."""
    return basis * positive_peaks(basis)


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


def subspace_iteration(
    x: Tensor,
    start: Tensor,
    rank: int,
    *,
    iterations: int = 1,
    dtype: torch.dtype | None = None,
    axis: Axis = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Block power iteration on `xᵀx` from `start`, then Rayleigh–Ritz: the top `rank` right singular vectors, nearly.

    Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1, on the short side, so that only (short, l) travels along the
    axis. The order within the subspace matters to per-coordinate moments, hence the small eigenproblem at the end; its
    vectors turn the last product into the coordinates of `x`, which then cost no product of their own.

    Args:
        x: (..., long, short); its rows may be spread along `axis`.
        start: (..., short, l) with l ≥ rank: independent columns, such as a previous basis, random ones, or both.
        rank: columns returned.
        iterations: products with `xᵀx`; each is followed by an orthonormalisation.
        dtype: of the products with `x`; None: its own. Factorisations keep that of `x`. Rounding in a product tilts the
            basis, and the energy it holds falls with the square of that: bfloat16 loses less than a thousandth.

    Returns:
        (..., short, rank), orthonormal, signs fixed, and (..., long, rank), the coordinates of `x` in it.
    """
    unit = reciprocal_peak(x, axis)  # products with xᵀx overflow float32 for entries of 1e19, and vanish for 1e-19
    low = x.to(dtype or x.dtype)

    def image(columns: Tensor) -> Tensor:
        return product(low, columns.to(low.dtype)).to(x.dtype).mul_(unit)

    q = start
    if not iterations:
        q = torch.linalg.qr(q).Q
    for _ in range(iterations):  # (yᵀ x)ᵀ: torch copies a transposed batch of bfloat16, so let it be the small one
        back = product(image(q).to(low.dtype).mT, low).to(x.dtype).mul_(unit)
        q = torch.linalg.qr(axis.sum(back).mT).Q
    last = image(q)  # (..., long, l)
    vectors = torch.linalg.eigh(axis.sum(product(last.mT, last))).eigenvectors.flip(-1)[..., :rank]  # eigenvalues rise
    basis = q @ vectors
    signs = positive_peaks(basis)
    return basis * signs, (last @ (vectors * signs)).div_(unit)


def momentum_iteration(x: Tensor, old: Tensor, momentum: Tensor, rho: float, *, axis: Axis = WHOLE) -> Asking[Tensor]:
    """One block power iteration, warm from `old`, on `b = ρ · momentum oldᵀ + (1−ρ) x`: `qr(bᵀ b old)`.

    (LDAdam, Robert et al. 2024, alg. 2.) `b` is never formed. Replicas with other `x`, and the same momentum, meet
    in the two small products.

    Args:
        x: (batch, long, short); its rows may be spread along `axis`.
        old: (batch, short, r), orthonormal.
        momentum: (batch, long, r), coordinates in `old`.
        rho: the share of the momentum, in [0, 1].

    Returns:
        (batch, short, r), orthonormal; `old` again where `b` is zero or no number.
    """
    image = (yield product(x, old)).mul_(1.0 - rho).add_(momentum, alpha=rho)  # b old: (batch, long, r)
    image = image * reciprocal_peak(image, axis)  # bᵀ b overflows float32 for entries of 1e19, and vanishes for 1e-19
    back = axis.sum(torch.cat([(yield product(x.mT, image)), product(momentum.mT, image)], -2))
    short = x.shape[-1]
    turned = (1.0 - rho) * back[:, :short] + rho * old @ back[:, short:]
    size = peak(turned)
    usable = torch.isfinite(size) & (size > 0)
    return householder_qr(torch.where(usable, turned, old), complete=True)


def random_columns(short: int, width: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(short, width) standard normal numbers that depend on `generator` (on the CPU) alone, on any device."""
    return torch.randn(short, width, generator=generator).to(device)


def captured_energy(x: Tensor, low: Tensor, axis: Axis = WHOLE) -> Tensor:
    """`‖low‖² / ‖x‖²` in [0, 1] for each matrix: what an orthonormal projection kept (0 for a zero matrix)."""
    unit = reciprocal_peak(x, axis)
    parts = [(part.float() * unit).square().sum((-2, -1)) for part in (low, x)]
    kept, total = axis.sum(torch.stack(parts))
    return torch.where(total > 0, kept / total, torch.zeros_like(total)).clamp_(0.0, 1.0)
