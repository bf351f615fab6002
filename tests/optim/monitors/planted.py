"""Matrices and spectra of which the answer is known."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed, dtype=torch.float64)).Q


def with_values(s: Tensor, out: int, wide: int, seed: int = 0) -> Tensor:
    """A matrix (out, wide) in float64 of the singular values `s`, in random directions."""
    left, right = orthonormal(out, len(s), seed), orthonormal(wide, len(s), seed + 1)
    return left @ torch.diag(s.double()) @ right.mT


def pareto(alpha: float, count: int, *, xmin: float = 1.0, seed: int = 0) -> Tensor:
    """Independent draws of a density ∝ x^(−alpha) above xmin, float64, by rising size."""
    u = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (xmin * (1 - u) ** (-1 / (alpha - 1))).sort().values


def pareto_quantiles(alpha: float, count: int, xmin: float = 1.0) -> Tensor:
    """The same without chance: the values at the shares (j + ½) / count."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return xmin * (1 - share) ** (-1 / (alpha - 1))
