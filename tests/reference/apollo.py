"""APOLLO's equations, one matrix, one loop, float64; slow on purpose. (Zhu et al. 2024, algorithm 1.)"""

import torch


def apollo(
    weight,
    grads,
    *,
    lr,
    rank,
    gap,
    scale,
    project=None,
    side="std",
    per="channel",
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.0,
    limit=1.01,
):
    """The weight (m, n) after all of `grads`. `side`: which side is projected, in GaLore's words.

    `project(epoch, short)` gives the (short, rank) matrix of a period; None stands for singular vectors.
    """
    w = weight.detach().double().clone()
    m, n = w.shape
    left = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False}[side]
    turn = (lambda x: x.T) if left else (lambda x: x)
    w = turn(w)
    basis, first, second, before = w, None, None, None
    for t, grad in enumerate(grads):
        g = turn(grad.double())
        if t % gap == 0:
            if project is None:
                # as stored and in its own precision: moments kept over a renewal depend on the factorisation's signs
                u, _, vh = torch.linalg.svd(grad, full_matrices=False)
                basis = (u[:, :rank] if left else vh[:rank].T).double()
            else:
                basis = project(t // gap, g.shape[1]).double()
        low = g @ basis
        first = (1 - betas[0]) * low + (0 if first is None else betas[0] * first)
        second = (1 - betas[1]) * low**2 + (0 if second is None else betas[1] * second)
        direction = first / (second.sqrt() + eps)
        if per == "tensor":
            scaled = g * (direction.norm() / (low.norm() + 1e-8))
        else:
            scaled = torch.stack([g[j] * direction[j].norm() / (low[j].norm() + 1e-8) for j in range(g.shape[0])])
        if before is not None and limit is not None and scaled.norm() > limit * before:
            scaled = scaled * limit * before / scaled.norm()
        before = scaled.norm()
        size = lr * scale**0.5 * (1 - betas[1] ** (t + 1)) ** 0.5 / (1 - betas[0] ** (t + 1))
        w = w - size * scaled
        w = w - lr * weight_decay * w
    return turn(w)
