"""Steps that several methods share, one matrix each, float64: moments over a renewal, and what a subspace misses."""

import torch


def principal(x, rank):
    """The first right singular vectors of `x` (m, n) as (n, rank), each one's entry of largest magnitude positive."""
    basis = torch.linalg.svd(x, full_matrices=False)[2][:rank].T
    peaks = basis[basis.abs().argmax(0), torch.arange(rank)]
    return basis * peaks.sign()


def carried(m, v, turn, t, betas, transport):
    """Both moments after a renewal at which `t` gradients are in them. `turn`: new basis, transposed, times the old.

    `rotate` is LDAdam's rule with the variance cut off at zero (Robert et al. 2024, algorithm 1).
    """
    if transport == "keep" or t == 0:
        return m, v
    if transport == "reset":
        return torch.zeros_like(m), torch.zeros_like(v)
    fix1, fix2 = 1 - betas[0] ** t, 1 - betas[1] ** t
    mean = m / fix1
    variance = ((v / fix2 - mean**2) @ (turn**2).T).clamp(min=0)
    return m @ turn.T, (variance + (mean @ turn.T) ** 2) * fix2


def missed(g, low, basis, direction, before, *, kind, limit):
    """What is added to the update beside the subspace, and its norm (Chen et al. 2024, eq. 4 and the limiter).

    `kind`: full, or sign (of each row its signs times its mean magnitude). `before`: the norm of the last; None: none.
    """
    rest = g - low @ basis.T
    if kind == "sign":
        rest = rest.sign() * rest.abs().mean(1, keepdim=True)
    for row in range(len(rest)):
        rest[row] *= direction[row].norm() / max(float(low[row].norm()), 1e-8)
    if before is not None and rest.norm() > limit * before:
        rest = rest * limit * before / rest.norm()
    return rest, rest.norm()
