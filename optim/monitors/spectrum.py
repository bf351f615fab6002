"""Singular values and eigenvalues as all measures here take them: in one order, and wide enough to be squared.

`s` are singular values by falling size, `evals = s²` the eigenvalues of `WᵀW` by rising size, (..., m) with
m = min(out, in), both float64. The factorisation itself is in float32, or in float64 for float64, whatever the dtype of
the weight: 16-bit entries are exact in float32. The Gram matrix is never formed, which would square the condition
number and with it lose the small end.
"""

from __future__ import annotations

import torch
from torch import Tensor

KERNEL_SIDE = 16
"""The largest last side by which a tensor of three dimensions without a module is taken for a convolution's kernel."""


def wide(x: Tensor) -> Tensor:
    """`x` without its graph, in float32 at least."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def singular_values(weight: Tensor) -> Tensor:
    """Of each matrix of `weight` (..., out, in), by falling size: (..., min(out, in)), float64, no graph.

    Raises:
        ValueError: an entry is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("has entries that are not finite and no singular values: mend or leave out that weight")
    return torch.linalg.svdvals(wide(weight)).double()


def eigenvalues(s: Tensor) -> Tensor:
    """Of `WᵀW`, the squares of the singular values `s` (..., m), by rising size: (..., m), float64."""
    return s.double().square().sort(-1).values


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Of `left @ right` by its factors, without the product: those of the core `R_left R_rightᵀ` of two thin QRs.

    The other min(out, in) − r singular values of the product are zero, and are not returned.

    Args:
        left: (..., out, r).
        right: (..., r, in); r is to be at most min(out, in), else the product itself is smaller.

    Returns:
        (..., r) by falling size, float64.

    Raises:
        ValueError: an entry is not finite.
    """
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise ValueError("has entries that are not finite and no singular values: mend or leave out that weight")
    cores = [torch.linalg.qr(wide(thin)).R for thin in (left, right.mT)]
    kind = torch.promote_types(cores[0].dtype, cores[1].dtype)
    return torch.linalg.svdvals(cores[0].to(kind) @ cores[1].to(kind).mT).double()


def kernel_matrices(weight: Tensor) -> Tensor:
    """A convolution's weight (out, in, *kernel) as a batch of matrices, one for each place of the kernel: (k, out, in).

    Scaled by √½, as WeightWatcher and TempBalance do, so that the pooled eigenvalues compare with theirs; no measure
    here but `alpha_weighted`, `log_alpha_norm` and the norms depends on it.
    """
    return weight.flatten(2).movedim(-1, 0) * 0.5**0.5


class Ties:
    """Which tensors have been seen, by the memory that they lie in."""

    def __init__(self) -> None:
        self._seen: set[tuple[object, ...]] = set()

    def new(self, x: Tensor) -> bool:
        """Whether no tensor of the same memory was asked for before; those without memory are all new."""
        if x.is_meta or not x.numel():
            return True
        place = (x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape), x.stride())
        if place in self._seen:
            return False
        self._seen.add(place)
        return True
