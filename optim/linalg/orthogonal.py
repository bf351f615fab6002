"""Nearest orthonormal matrices, by matrix products alone or by factorisations.

Singular values are moved towards one by an odd polynomial, `σ ← a σ + b σ³ + c σ⁵`, applied to the whole matrix. Which
coefficients, and how far from one they leave what, is the choice that names the sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

JORDAN: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5
"""Jordan et al. 2024 (Muon, and `torch.optim.Muon`): singular values above 3e-3 of the norm end in [0.68, 1.20]."""

YOU: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""You 2025: above 1e-2 of the norm in [0.978, 1.032], below slower than the others; for well-conditioned factors."""

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Amsel et al. 2025 (Polar Express), with a safety factor of 1.02: above 1e-3 of the norm in [0.85, 1.14]."""

SETS = {"jordan": JORDAN, "you": YOU, "polar_express": POLAR_EXPRESS}


def newton_schulz(
    x: Tensor, coefficients: tuple[Coefficients, ...] = JORDAN, *, dtype: torch.dtype | None = None, eps: float = 1e-7
) -> Tensor:
    """`U Vᵀ` for `x = U S Vᵀ`, nearly: the polynomials of `coefficients` one after the other (Jordan et al. 2024).

    Args:
        x: (..., long, short) in either orientation; a zero matrix stays zero.
        coefficients: one triple for each iteration.
        dtype: of the products; None: bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slow.
        eps: the Frobenius norm that divides `x` is at least this.

    Returns:
        (..., long, short), float32.
    """
    if dtype is None:
        dtype = torch.bfloat16 if x.is_cuda else torch.float32
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype)
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    y = y / norm.clamp(min=eps)
    for a, b, c in coefficients:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if tall else y).float()
