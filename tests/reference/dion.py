"""Dion's, Trion's and Dion2's equations as their papers have them: one matrix, one loop, float64; slow on purpose."""

import math

import torch
from reference.dct_adamw import dct


def gram_schmidt(x, floor=1e-9):
    """Orthonormal columns one after the other, twice for accuracy; a dependent column is zero."""
    done = []
    for column in x.T:
        rest = column.clone()
        for _ in range(2):
            for q in done:
                rest = rest - (q @ rest) * q
        length = float(rest.norm())
        done.append(rest / length if length > floor * float(column.norm()) else torch.zeros_like(rest))
    return torch.stack(done, 1)


def scale(name, rows, columns):
    return {
        "original": math.sqrt(max(1.0, rows / columns)),
        "spectral": math.sqrt(rows / columns),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "none": 1.0,
    }[name]


def dion(weight, grads, start, *, lr, momentum=0.95, weight_decay=0.01, right="column_norm", adjust="spectral"):
    """The weight (m, n) and the momentum after all of `grads`, from right factors `start` (short, r)."""
    w, q = weight.detach().double().clone(), start.double()
    factor = scale(adjust, *w.shape)
    wide = w.shape[0] < w.shape[1]
    m = torch.zeros_like(w.T if wide else w)
    for g in grads:
        m = m + (g.double().T if wide else g.double())
        p = gram_schmidt(m @ q)
        r = m.T @ p
        m = m - (1 - momentum) * p @ r.T
        q = r / r.norm(dim=0) if right == "column_norm" else gram_schmidt(r)
        update = p @ q.T
        w = (1 - lr * weight_decay) * w - lr * factor * (update.T if wide else update)
    return w, m.T if wide else m


def newton_schulz(x, triples):
    """Singular values through the polynomials, by their definition."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


def trion(weight, grads, *, lr, rank, atoms, triples, norm=1, momentum=0.95, weight_decay=0.01, adjust="original"):
    """The weight (m, n) and the momentum after all of `grads`; what was sent is subtracted from the plain momentum."""
    w = weight.detach().double().clone()
    factor = scale(adjust, *w.shape)
    wide = w.shape[0] < w.shape[1]
    m = torch.zeros_like(w.T if wide else w)
    for g in grads:
        b = m + (g.double().T if wide else g.double())
        similar = b @ atoms.T
        sizes = similar.abs().pow(norm).sum(0)
        chosen = sorted(range(len(atoms)), key=lambda j: (-float(sizes[j]), j))[:rank]
        low = similar[:, chosen]
        rest = b - low @ atoms[chosen]
        m = momentum * b + (1 - momentum) * rest
        update = newton_schulz(low, triples) @ atoms[chosen]
        w = (1 - lr * weight_decay) * w - lr * factor * (update.T if wide else update)
    return w, m.T if wide else m


def dion2(weight, grads, *, lr, count, triples, momentum=0.95, weight_decay=0.01):
    """Dion2 by its listing: slices along the shorter side."""
    w = weight.detach().double().clone()
    m = torch.zeros_like(w)
    side = 1 if w.shape[0] >= w.shape[1] else 0
    for g in grads:
        m = m + g.double()
        sizes = m.abs().sum(1 - side)
        chosen = sizes.argsort(descending=True)[:count]
        u = newton_schulz(m.index_select(side, chosen), triples)
        m.index_copy_(side, chosen, momentum * m.index_select(side, chosen))
        w = (1 - lr * weight_decay) * w
        w.index_add_(side, chosen, -lr * math.sqrt(w.shape[0] / w.shape[1]) * u)
    return w, m


def muon(weight, grads, *, lr, triples, momentum=0.95, weight_decay=0.01, adjust="original"):
    """Muon with a heavy ball, all singular values."""
    w = weight.detach().double().clone()
    b = torch.zeros_like(w)
    for g in grads:
        b = momentum * b + g.double()
        w = (1 - lr * weight_decay) * w - lr * scale(adjust, *w.shape) * newton_schulz(b, triples)
    return w


def identity(n):
    return torch.eye(n, dtype=torch.float64)


__all__ = ["dct", "dion", "dion2", "identity", "muon", "newton_schulz", "trion"]
