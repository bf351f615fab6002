"""The inverse of a damped empirical Fisher matrix, by a solve in the number of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-5
"""Share of the gradients' mean square that is added to the damping: inner products in float32 of parallel gradients
are off by a hundredth of that, and a matrix of them that should be singular may have eigenvalues below zero. What is
left is an error of about float32's precision over this."""


def fisher_coefficients(
    gram: Tensor, norms: Tensor, which: Tensor, *, damping: float, divisor: Tensor | float
) -> Tensor:
    """`c` such that `F⁻¹ g_j = Σ_i c_i g_i`, for `F = λI + (1/k) Σ_i g_i g_iᵀ` and one of its own gradients `g_j`.

    With the gradients as rows of G and `S = G Gᵀ`, `(λI + GᵀG/k)⁻¹ Gᵀ = Gᵀ (λI + S/k)⁻¹`: Woodbury's identity for a
    right-hand side in the span, without the difference `x − Gᵀ(…)x` of two nearly equal vectors that its usual form
    ends with. One m × m solve in float64. (M-FAC, Frantar et al. 2021, has the same inverse by recursion.)

    Args:
        gram: (..., m, m), inner products of the gradients divided by both of their `norms`; any vectors may be scaled
            so, as long as `gram_ij norms_i norms_j` is S. Scaled, they do not overflow.
        norms: (..., m); zero where there is no gradient.
        which: (...) int64, the place of `g_j`.
        damping: λ, to which `ROUNDING` times the mean square of the gradients is added.
        divisor: k, one or (...).

    Returns:
        (..., m) coefficients of the *scaled* gradients `g_i / norms_i`, in the dtype of `gram`.
    """
    size = norms.double()
    k = torch.as_tensor(divisor, dtype=torch.float64, device=gram.device).expand(which.shape)
    floor = damping + ROUNDING * size.square().sum(-1) / k
    system = gram.double() * size.unsqueeze(-1) * size.unsqueeze(-2) / k[..., None, None]
    system.diagonal(dim1=-2, dim2=-1).add_(floor.unsqueeze(-1))
    right = torch.zeros_like(size).scatter_(-1, which.unsqueeze(-1), 1.0)
    factor = torch.linalg.cholesky_ex(
        system
    ).L  # never indefinite, thanks to the floor; a check would make the host wait
    return (torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1) * size).to(gram.dtype)
