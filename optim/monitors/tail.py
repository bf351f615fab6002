"""The tail of a spectrum as one number: Hill's estimate of a power law's exponent."""

from __future__ import annotations

from torch import Tensor


def hill_alpha(evals: Tensor, *, xmin: str = "median") -> Tensor:
    """The exponent α of a power law λ^(−α) that the largest eigenvalues would follow (scalar, of `evals`' dtype).

    With n eigenvalues from the median x on, α = 1 + n / (Σ ln λ − n ln x); x itself counts in n, as in the code of
    TempBalance (Zhou et al. 2023, arXiv 2312.00359), where Hill's own estimate has n − 1. Small is a heavy tail.

    Args:
        evals: (m,) at least two, above 0, in any order.
        xmin: where the tail begins; `median` is what there is.

    Raises:
        ValueError: for fewer than two, or another beginning.
    """
    if xmin != "median":
        raise ValueError(f"xmin must be median, got {xmin!r}")
    if evals.numel() < 2:
        raise ValueError(f"a tail needs at least 2 eigenvalues, got {evals.numel()}")
    tail = evals.flatten().sort().values[evals.numel() // 2 :].log()
    return 1.0 + tail.numel() / (tail - tail[0]).sum()
