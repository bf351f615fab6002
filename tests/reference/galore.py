"""GaLore's equations, one matrix, one loop, float64; slow on purpose. (Zhao et al. 2024, algorithm 2.)"""

import torch


def galore(weight, grads, *, lr, rank, gap, scale, side="std", betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
    """The weight (m, n) after all of `grads`. `side`: which side is compressed, in GaLore's words."""
    w = weight.detach().double().clone()
    m, n = w.shape
    left = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False, "full": None}[side]
    eye = torch.eye
    p, q = eye(m, dtype=w.dtype), eye(n, dtype=w.dtype)
    first = second = None
    for t, g in enumerate(grads):
        g = g.double()
        if t % gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            p = u[:, :rank] if left in (True, None) else p
            q = vh[:rank].T if left in (False, None) else q
        r = p.T @ g @ q
        first = torch.zeros_like(r) if first is None else first
        second = torch.zeros_like(r) if second is None else second
        first = betas[0] * first + (1 - betas[0]) * r
        second = betas[1] * second + (1 - betas[1]) * r * r
        size = lr * (1 - betas[1] ** (t + 1)) ** 0.5 / (1 - betas[0] ** (t + 1))
        w = w - size * scale * (p @ (first / (second.sqrt() + eps)) @ q.T)
        w = w - lr * weight_decay * w
    return w
