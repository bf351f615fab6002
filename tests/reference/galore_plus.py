"""GaLore+ as `thinrank.optim.methods.galore_plus` describes it: one matrix, one loop, float64, dense masks in the place
of lists of entries, sums over all of them in the place of candidates where that is the same; slow on purpose."""

import math

import torch
from reference.parts import principal


def loudest(g, heads, wanted):
    """The rows of the heads of largest norm, as many heads as it takes for `wanted` rows where one is too few."""
    size = g.shape[0] // heads
    few = 1 if wanted <= size else math.ceil(wanted / size)
    norms = [float(g[i * size : (i + 1) * size].norm()) for i in range(heads)]
    order = sorted(range(heads), key=lambda i: (-norms[i], i))[:few]
    return torch.cat([g[i * size : (i + 1) * size] for i in order])


def best(score, k):
    """The k places of largest score, the lower of equal ones first."""
    flat = score.flatten().tolist()
    return sorted(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k])


def galore_plus(
    weight, grads, *, lr, rank, gap, scale=1.0, side="std", heads=1, density=0.0, warmup=0, reselect="never",
    transport="rotate", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
):  # fmt: skip
    """The weight (m, n) after all of `grads`, and the entries chosen, as places in the matrix that was compressed."""
    w = weight.detach().double().clone()
    if side == "left" or (side == "std" and w.shape[0] < w.shape[1]):
        w, grads = w.T, [g.T for g in grads]
        turned = True
    else:
        turned = False
    b1, b2 = betas
    long, short = w.shape
    k = math.ceil(density * long * short - 1e-9)
    p = torch.zeros(short, rank, dtype=w.dtype)
    m = v = torch.zeros(long, rank, dtype=w.dtype)
    clock = 0
    entry_m, entry_v, entry_t = (torch.zeros(long * short, dtype=w.dtype) for _ in range(3))
    chosen, sums = [], {}
    for t, g in enumerate(grads):
        g = g.double()
        renew = t % gap == 0
        if renew:
            new = principal(loudest(g, heads, rank), rank)
            turn = new.T @ p
            p = new
            if t > 0 and transport == "rotate":
                c1, c2 = 1 - b1**t, 1 - b2**t
                mean = m / c1
                variance = ((v / c2 - mean**2) @ (turn**2).T).clamp(min=0)
                m, v = mean @ turn.T * c1, (variance + (mean @ turn.T) ** 2) * c2
            if t > 0 and transport == "reset":
                m, v, clock = torch.zeros_like(m), torch.zeros_like(v), 0
        low = g @ p
        clock += 1
        m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        direction = (m / (1 - b1**clock)) / ((v / (1 - b2**clock)).sqrt() + eps) @ p.T
        if k:
            missed = (g - low @ p.T).abs().flatten()
            if t < max(warmup, 1):  # candidates keep their sums, all others begin with this step's
                score = missed.clone()
                for place, total in sums.items():
                    score[place] += total
                chosen = best(score, k)
                sums = {place: float(score[place]) for place in chosen}
            elif renew and t > warmup and reselect == "renewal":
                again = best(missed, k)
                for gone in set(range(long * short)) - (set(again) & set(chosen)):
                    entry_m[gone] = entry_v[gone] = entry_t[gone] = 0
                chosen = again
            if t >= warmup:
                flat, raw = direction.flatten(), g.flatten()
                for i in chosen:
                    entry_t[i] += 1
                    entry_m[i] = b1 * entry_m[i] + (1 - b1) * raw[i]
                    entry_v[i] = b2 * entry_v[i] + (1 - b2) * raw[i] ** 2
                    above = entry_m[i] / (1 - b1 ** entry_t[i])
                    flat[i] = above / ((entry_v[i] / (1 - b2 ** entry_t[i])).sqrt() + eps)
                direction = flat.view(long, short)
        w = (1 - lr * weight_decay) * w - lr * scale * direction
    return (w.T if turned else w), chosen
