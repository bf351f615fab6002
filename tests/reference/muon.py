"""Muon's equations, one matrix, one loop, float64, by singular values; slow on purpose. (Jordan et al. 2024.)"""

import torch


def moved(values, triples, safety, eps):
    """Where the polynomials take singular values, one by one."""
    s = values / (safety * values.norm() + eps)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return s


def orthogonalised(x, triples, safety=1.0, eps=0.0):
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ torch.diag(moved(s, triples, safety, eps)) @ vh


def muon(
    weight, grads, *, lr, triples, safety=1.0, momentum=0.95, nesterov=True, adjust_lr="original", weight_decay=0.0
):
    """The weight (m, n) after all of `grads`."""
    w = weight.detach().double().clone()
    m, n = w.shape
    size = {
        "original": max(1.0, m / n) ** 0.5,
        "spectral": (m / n) ** 0.5,
        "match_rms_adamw": 0.2 * max(m, n) ** 0.5,
        "none": 1.0,
    }[adjust_lr]
    b = torch.zeros_like(w)
    for g in grads:
        b = momentum * b + (1 - momentum) * g.double()
        u = momentum * b + (1 - momentum) * g.double() if nesterov else b
        w = w - lr * weight_decay * w - lr * size * orthogonalised(u, triples, safety)
    return w
