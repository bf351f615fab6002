"""DCT-AdamW's equations, one matrix, one loop, float64, explicit rotations; slow on purpose. (Modoranu et al. 2025.)"""

import math

import torch
from reference.parts import missed


def dct(n):
    """Orthonormal DCT-II by its definition, entry by entry."""
    rows = [[math.sqrt(2 / n) * math.cos(math.pi * k * (2 * j + 1) / (2 * n)) for j in range(n)] for k in range(n)]
    rows[0] = [math.sqrt(1 / n)] * n
    return torch.tensor(rows, dtype=torch.float64)


def decoded(codes, scale, *, bits, width, block):
    """(m, width) numbers for integers of 8 or 4 bits (two in a byte, the first of them low) and a scale each block."""
    if bits == 4:
        halves = torch.stack([codes % 16, codes // 16], -1).flatten(-2)[:, :width].double()
        codes = torch.where(halves > 7, halves - 16, halves)
    place = torch.arange(width) // block
    return codes.double() * scale.double()[:, place]


def choice(sizes, before, rank):
    """The columns of largest size in slots: what stays keeps its slot, what is new takes the free ones in order."""
    best = sorted(range(len(sizes)), key=lambda j: (-float(sizes[j]), j))[:rank]
    if before is None:
        return sorted(best)
    new = sorted(set(best) - set(before))
    return [j if j in best else new.pop(0) for j in before]


def dct_adamw(
    weight, grads, *, lr, rank, gap, norm=1, atoms=None, feedback=False, remembered=None, residual="off", limit=1.01,
    transport="rotate", ages=False, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
):  # fmt: skip
    """The weight (m, n) and the error after all of `grads`; wide matrices with the sides exchanged.

    `atoms` (n, n) are the rows of another basis than the DCT. `remembered(t, error)` gives what is kept of an error.
    """
    w = weight.detach().double().clone()
    wide = w.shape[0] < w.shape[1]
    w, grads = (w.T, [g.T for g in grads]) if wide else (w, grads)
    m_rows, n = w.shape
    c = dct(n) if atoms is None else atoms
    error = torch.zeros_like(w)
    m = v = torch.zeros(m_rows, rank, dtype=torch.float64)
    age = torch.zeros(rank, dtype=torch.float64)
    index, before = None, None
    for t, g in enumerate(grads):
        a = g.double() + error
        if t % gap == 0:
            sizes = (a @ c.T).abs().pow(norm).sum(0)
            old, index = index, choice(sizes, index, rank)
            if old is not None and transport == "rotate":
                rotation = c[old] @ c[index].T
                m, v, age = m @ rotation, (v @ rotation).abs(), age @ rotation.round()
            elif transport == "reset":
                m, v, age = torch.zeros_like(m), torch.zeros_like(v), torch.zeros_like(age)
        basis = c[index]  # (r, n)
        low = a @ basis.T
        if feedback:
            error = a - low @ basis
            error = error if remembered is None else remembered(t, error)
        m = betas[0] * m + (1 - betas[0]) * low
        v = betas[1] * v + (1 - betas[1]) * low * low
        age = age + 1
        count = age if ages else torch.tensor(t + 1.0, dtype=torch.float64)
        direction = (m / (1 - betas[0] ** count)) / ((v / (1 - betas[1] ** count)).sqrt() + eps)
        update = direction @ basis
        if residual != "off":
            rest, before = missed(a, low, basis.T, direction, before, kind=residual, limit=limit)
            update = update + rest
        w = (1 - lr * weight_decay) * w - lr * update
    return (w.T, error.T) if wide else (w, error)
