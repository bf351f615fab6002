"""FARMS: heavy tails that do not depend on a matrix's shape (Hu, Goel, Killiakov, Yang 2025, arXiv 2506.06280).

The eigenvalues of many submatrices of one shape are pooled, and Hill's α is that of the pool. A matrix of random
numbers has then the same α whatever its sides: 2.1 for square windows, where of the whole matrix it is 2.1 to 4.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.monitors.spectrum import singular_values
from thinrank.optim.monitors.tail import Tail, hill

_PART = 2**22  # entries of windows that are factorised together: 16 MiB of float32


def window_starts(side: int, size: int, count: int) -> list[int]:
    """Where `count` windows of `size` begin along a side: every (side − size) // (count − 1) entries, and none
    twice."""
    step = max(1, (side - size) // (count - 1))
    return sorted({min(index * step, side - size) for index in range(count)})


def window_shape(shape: tuple[int, int], rows: int, ratio: float) -> tuple[int, int]:
    """(r, c) of the windows: r = min(rows, out, in) and c = ⌊r · ratio⌋; r less where c would be beyond the matrix,
    so that the ratio is kept (ours: the authors have windows cut off there)."""
    out, wide = shape
    r = min(rows, out, wide, int(wide / ratio))
    return max(1, r), max(1, min(int(r * ratio), wide))


def pooled_eigenvalues(
    weight: Tensor,
    *,
    rows: int = 128,
    ratio: float = 1.0,
    per_side: int = 5,
    draw: str = "windows",
    seed: int = 0,
) -> Tensor:
    """The eigenvalues of submatrices of `weight`, pooled, by rising size.

    Args:
        weight: (..., out, in), finite; matrices of a batch are pooled together.
        rows, ratio: shape of the submatrices, `window_shape`. The authors' are 100 and 1.0 for ResNet-18, 2000 and 1.0
            for 13B; 128 is ours.
        per_side: k: up to k × k of them, at least 2 (the authors': 9, 10 or 15; 5 is ours, the cost is k²
            factorisations).
        draw: `windows` of neighbouring rows and columns, as the authors do; or `random` rows and columns, which have
            the same spectrum in expectation for exchangeable entries and do not depend on how heads or neurons are
            ordered (ours).
        seed: of `random`, whose generator is its own.

    Returns:
        (windows · min(r, c),), float64.

    Raises:
        ValueError: a number out of range, or an entry that is not finite.
    """
    if per_side < 2:
        raise ValueError(f"per_side must be at least 2, got {per_side}: write 5")
    if rows < 1 or not ratio > 0:
        raise ValueError(f"rows and ratio must be above 0, got {rows} and {ratio}: write rows=128, ratio=1.0")
    out, columns = weight.shape[-2:]
    r, c = window_shape((out, columns), rows, ratio)
    if draw == "windows":
        places = [
            (slice(top, top + r), slice(left, left + c))
            for top in window_starts(out, r, per_side)
            for left in window_starts(columns, c, per_side)
        ]
    elif draw == "random":
        generator = torch.Generator().manual_seed(seed)
        places = [
            tuple(
                torch.randperm(side, generator=generator)[:size].to(weight.device)
                for side, size in ((out, r), (columns, c))
            )
            for _ in range(per_side**2)
        ]
    else:
        raise ValueError(f"draw must be windows or random, got {draw!r}")
    batch = weight.detach().reshape(-1, out, columns)
    found = []
    some = max(1, _PART // (r * c * len(batch)))
    for first in range(0, len(places), some):
        parts = [
            batch[:, top, left] if draw == "windows" else batch[:, top][:, :, left]
            for top, left in places[first : first + some]
        ]
        found.append(singular_values(torch.cat(parts)).flatten())
    return torch.cat(found).square().sort().values


def square_blocks(weight: Tensor) -> Tensor:
    """A convolution's matrices (k, out, in) as blocks that are square, the authors' windows for convolutions: each
    matrix, the longer side upright, is cut into ⌊long / short⌋ blocks (k · blocks, short, short); rows left over are
    left out."""
    upright = weight if weight.shape[-2] >= weight.shape[-1] else weight.mT
    short = upright.shape[-1]
    count = upright.shape[-2] // short
    return upright[..., : count * short, :].reshape(-1, short, short)


def farms_tail(
    weight: Tensor,
    *,
    rows: int = 128,
    ratio: float = 1.0,
    per_side: int = 5,
    draw: str = "windows",
    seed: int = 0,
    xmin: str = "median",
) -> Tail:
    """Hill's α of the pool of `pooled_eigenvalues`; `xmin` as in `hill`.

    It sees how heavy the tail of small pieces is, and so not what only the whole matrix has: a direction that is spread
    over all of it is weaker in a window. Compare it across layers and over time, with one shape of windows: windows
    smaller than `rows` (of a matrix with a short side) have α of their own scatter.
    """
    pool = pooled_eigenvalues(weight, rows=rows, ratio=ratio, per_side=per_side, draw=draw, seed=seed)
    return hill(pool, xmin)


def farms_alpha(
    weight: Tensor,
    *,
    rows: int = 128,
    ratio: float = 1.0,
    per_side: int = 5,
    draw: str = "windows",
    seed: int = 0,
    xmin: str = "median",
) -> Tensor:
    """The α of `farms_tail`, scalar."""
    return farms_tail(weight, rows=rows, ratio=ratio, per_side=per_side, draw=draw, seed=seed, xmin=xmin).alpha
