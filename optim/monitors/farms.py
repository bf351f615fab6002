"""Tails of matrices of any shape, measured on windows of one shape."""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.monitors.tail import hill_alpha


def farms_alpha(weight: Tensor, *, rows: int = 128, ratio: float = 1.0, per_side: int = 5) -> Tensor:
    """`hill_alpha` of the eigenvalues of all windows of one shape (scalar, float32), which does not depend on how much
    longer one side of the matrix is than the other (FARMS: Hu et al. 2025, arXiv 2506.06280).

    Args:
        weight: (out, in), of any floating dtype.
        rows: of a window; as many as the shorter side has where that is less.
        ratio: its columns for each row.
        per_side: windows along each side, at least 2; evenly spread, and they may overlap.

    Raises:
        ValueError: for fewer than two windows a side.
    """
    if per_side < 2:
        raise ValueError(f"per_side must be at least 2, got {per_side}")
    height = min(rows, *weight.shape)
    width = min(int(height * ratio), weight.shape[1])
    starts = [
        sorted({min(i * max(1, (size - length) // (per_side - 1)), size - length) for i in range(per_side)})
        for size, length in zip(weight.shape, (height, width), strict=True)
    ]
    wide = weight.detach().float()
    windows = torch.stack([wide[a : a + height, b : b + width] for a in starts[0] for b in starts[1]])
    return hill_alpha(torch.linalg.svdvals(windows).square().flatten())
