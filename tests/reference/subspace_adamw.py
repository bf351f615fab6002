"""SubspaceAdamW as `thinrank.optim.methods.subspace_adamw` describes it, with exact singular vectors in the place of
subspace iteration: one matrix, one loop, float64; slow on purpose."""

import torch
from reference.parts import carried, missed, principal


def subspace_adamw(
    weight, grads, *, lr, rank, gap, transport="rotate", residual="full", limit=1.01, scale=1.0, betas=(0.9, 0.999),
    eps=1e-8, weight_decay=0.0,
):  # fmt: skip
    """The weight (m, n) after all of `grads`, and the norm of each step's residual; wide matrices with the sides
    exchanged."""
    w = weight.detach().double().clone()
    wide = w.shape[0] < w.shape[1]
    w = w.T if wide else w
    basis = torch.zeros(w.shape[1], rank, dtype=w.dtype)
    m = v = torch.zeros(w.shape[0], rank, dtype=w.dtype)
    before, norms = None, []
    for t, grad in enumerate(grads):
        g = grad.double().T if wide else grad.double()
        if t % gap == 0:
            old, basis = basis, principal(g, rank)
            m, v = carried(m, v, basis.T @ old, t, betas, transport)
        low = g @ basis
        m = betas[0] * m + (1 - betas[0]) * low
        v = betas[1] * v + (1 - betas[1]) * low**2
        direction = (m / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
        update = direction @ basis.T
        if residual != "off":
            rest, before = missed(g, low, basis, direction, before, kind=residual, limit=limit)
            norms.append(float(before))
            update = update + rest
        w = (1 - lr * weight_decay) * w - lr * scale * update
    return (w.T if wide else w), norms
