"""Fira's equations, one matrix, one loop, float64; slow on purpose. (Chen et al. 2024, and its code's alpha.)"""

import torch
from reference.parts import carried


def fira(
    weight, grads, *, lr, rank, gap, scale, side="std", transport="keep", betas=(0.9, 0.999), eps=1e-6,
    weight_decay=0.0, limit=1.01,
):  # fmt: skip
    """The weight (m, n) after all of `grads`, and the norm of what was added to each step beside the subspace."""
    w = weight.detach().double().clone()
    m, n = w.shape
    left = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False}[side]
    turn = (lambda x: x.T) if left else (lambda x: x)  # everything below keeps the rows
    w = turn(w)
    basis, first, second, before = w, None, None, None
    norms = []
    for t, grad in enumerate(grads):
        g = turn(grad.double())
        if t % gap == 0:
            # as stored and in its own precision: moments kept over a renewal depend on the factorisation's signs
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            old, basis = basis, (u[:, :rank] if left else vh[:rank].T).double()
            if first is not None:
                first, second = carried(first, second, basis.T @ old, t, betas, transport)
        low = g @ basis
        first = (1 - betas[0]) * low + (0 if first is None else betas[0] * first)
        second = (1 - betas[1]) * low**2 + (0 if second is None else betas[1] * second)
        direction = first / (second.sqrt() + eps)
        rest = g - scale * (low @ basis.T)
        for row in range(rest.shape[0]):
            rest[row] *= direction[row].norm() / (low[row].norm() + 1e-8)
        if before is not None and rest.norm() > limit * before:
            rest = rest * limit * before / rest.norm()
        before = rest.norm()
        norms.append(float(before))
        size = lr * (1 - betas[1] ** (t + 1)) ** 0.5 / (1 - betas[0] ** (t + 1))
        w = w - size * (scale * direction @ basis.T + rest)
        w = w - lr * weight_decay * w
    return turn(w), norms
