"""DCT-AdamW's equations, one matrix, one loop, float64, explicit rotations; slow on purpose. (Modoranu et al. 2025.)"""

import math

import torch


def dct(n):
    """Orthonormal DCT-II by its definition, entry by entry."""
    rows = [[math.sqrt(2 / n) * math.cos(math.pi * k * (2 * j + 1) / (2 * n)) for j in range(n)] for k in range(n)]
    rows[0] = [math.sqrt(1 / n)] * n
    return torch.tensor(rows, dtype=torch.float64)


def dct_adamw(
    weight, grads, *, lr, rank, gap, norm=1, feedback=False, ages=False, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
):
    """The weight (m, n) and the error after all of `grads`; wide matrices with the sides exchanged."""
    w = weight.detach().double().clone()
    if w.shape[0] < w.shape[1]:
        w, error = dct_adamw(
            w.T, [g.T for g in grads], lr=lr, rank=rank, gap=gap, norm=norm, feedback=feedback, ages=ages, betas=betas,
            eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        return w.T, error.T
    m_rows, n = w.shape
    c = dct(n)
    error = torch.zeros_like(w)
    m = v = torch.zeros(m_rows, rank, dtype=torch.float64)
    age = torch.zeros(rank, dtype=torch.float64)
    index = list(range(rank))
    for t, g in enumerate(grads):
        a = g.double() + error
        if t % gap == 0:
            sizes = (a @ c.T).abs().pow(norm).sum(0)
            new = sorted(sorted(range(n), key=lambda j: (-float(sizes[j]), j))[:rank])
            rotation = c[index] @ c[new].T
            m, v, age = m @ rotation, (v @ rotation).abs(), age @ rotation.round()
            index = new
        atoms = c[index]  # (r, n)
        low = a @ atoms.T
        if feedback:
            error = a - low @ atoms
        m = betas[0] * m + (1 - betas[0]) * low
        v = betas[1] * v + (1 - betas[1]) * low * low
        age = age + 1
        count = age if ages else torch.tensor(t + 1.0, dtype=torch.float64)
        direction = (m / (1 - betas[0] ** count)) / ((v / (1 - betas[1] ** count)).sqrt() + eps)
        w = (1 - lr * weight_decay) * w - lr * direction @ atoms
    return w, error
