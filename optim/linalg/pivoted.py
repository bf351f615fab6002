"""QR with column pivoting, which torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor


def pivoted_qr(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x = Q R`, where the columns of `x` were taken in the order of what the earlier ones leave of them.

    Each step takes the column that is longest when its part in the columns taken so far is removed (Businger & Golub
    1965); equal ones by the lower number. In float64, by Gram–Schmidt, twice each time, so that Q is orthonormal to
    rounding. One product with `x` a step: what is left of all columns' squares is reckoned down, and computed anew when
    it has fallen so far that rounding could decide.

    Args:
        x: (m, n).

    Returns:
        `Q` (m, k) with k = min(m, n); `R` (k, n) with columns in the order of `x`, so that `R[:, order]` is upper
        triangular with falling positive diagonal; `order` (k,) int64, columns taken. All in float64. Where the rank
        ends before k, what follows in Q and R is zero, and `order` goes on with columns that are left.

    Raises:
        ValueError: where an entry is not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError("has entries that are not finite and no pivots: mend or leave out that weight")
    a = x.detach().double()
    m, n = a.shape
    k = min(m, n)
    q, r = a.new_zeros(m, k), a.new_zeros(k, n)
    taken = torch.zeros(n, dtype=torch.bool, device=a.device)
    order = torch.empty(k, dtype=torch.int64, device=a.device)
    squares = a.square().sum(0)
    peak = reckoned_from = float(squares.max()) if n else 0.0
    nothing = peak * (max(m, n) * torch.finfo(a.dtype).eps) ** 2
    done = k
    for i in range(k):
        longest = float(squares.masked_fill(taken, -1.0).max())
        if longest < 1e-8 * reckoned_from:
            squares = (a - q[:, :i] @ (q[:, :i].mT @ a)).square().sum(0)
            longest = reckoned_from = float(squares.masked_fill(taken, -1.0).max())
        pivot = int(squares.masked_fill(taken, -1.0).argmax())
        order[i], taken[pivot] = pivot, True
        if done < k or longest <= nothing:
            done = min(done, i)
            continue
        column = a[:, pivot]
        for _ in range(2):
            column = column - q[:, :i] @ (q[:, :i].mT @ column)
        q[:, i] = column / torch.linalg.vector_norm(column)
        row = q[:, i] @ a
        row[order[:i]] = 0.0
        r[i] = row
        squares = (squares - row.square()).clamp_(min=0.0)
    return q, r, order
