"""AuON's equations, one matrix, one loop, float64, both readings; slow on purpose. (arXiv 2509.24320.)"""

import torch
from reference.muon import orthogonalised


def auon(weight, grads, *, lr, triples=(), momentum=0.95, normalise=True, gamma=1.5, weight_decay=0.0):
    """The weight after all of `grads`, and rms(cosh) of every step."""
    w = weight.detach().double().clone()
    b, seen = torch.zeros_like(w), []
    for g in grads:
        b = momentum * b + (1 - momentum) * g.double()
        u = momentum * b + (1 - momentum) * g.double()
        u = orthogonalised(u, triples) if triples else u
        x = u / (u.norm() + 1e-7)
        rms = torch.cosh(gamma * x).square().mean().sqrt()
        seen.append(float(rms))
        w = w - lr * weight_decay * w - lr * (x if normalise else u) / (rms + 1e-8)
    return w, seen
