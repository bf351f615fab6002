"""M-FAC by its definitions in float64: the explicit inverse, and the paper's recursion. (Frantar et al. 2021.)"""

import torch
from reference.parts import carried, principal


def explicit(gradients, x, damping, divisor):
    """`(λI + (1/k) Σ g gᵀ)⁻¹ x` for `gradients` (m, d)."""
    g = gradients.double()
    fisher = damping * torch.eye(g.shape[1], dtype=torch.float64) + g.T @ g / divisor
    return torch.linalg.solve(fisher, x.double())


def recursive(gradients, x, damping, divisor):
    """The same, one rank-one update of the inverse after the other (Sherman and Morrison)."""
    g = gradients.double()
    inverse = torch.eye(g.shape[1], dtype=torch.float64) / damping
    for row in g:
        image = inverse @ row
        inverse = inverse - torch.outer(image, image) / (divisor + row @ image)
    return inverse @ x.double()


def mfac(weight, grads, *, lr, window, damping, rounding, momentum=0.9):
    """The weight after all of `grads`, the whole matrix as one vector."""
    w, v, last = weight.double().flatten(), 0.0, []
    for grad in grads:
        g = grad.double().flatten()
        last = [*last, g][-window:]
        rows = torch.stack(last)
        floor = rounding * float(rows.square().sum()) / len(last)
        v = momentum * v + (1 - momentum) * explicit(rows, g, damping + floor, len(last))
        w = w - lr * v
    return w.view(weight.shape)


def projected(
    weight, grads, *, lr, rank, gap, window, damping, rounding, finish="momentum", scale=1.0, betas=(0.9, 0.999),
    eps=1e-8, weight_decay=0.0,
):  # fmt: skip
    """The weight (m, n) after all of `grads`, in the coordinates of exact singular vectors; wide matrices with the
    sides exchanged. Remembered gradients turn with the basis; `rounding` counts them as long as they came."""
    w = weight.detach().double().clone()
    wide = w.shape[0] < w.shape[1]
    w = w.T if wide else w
    basis = torch.zeros(w.shape[1], rank, dtype=w.dtype)
    m = v = torch.zeros(w.shape[0], rank, dtype=w.dtype)
    last, squares = [], []
    for t, grad in enumerate(grads):
        g = grad.double().T if wide else grad.double()
        if t % gap == 0:
            old, basis = basis, principal(g, rank)
            turn = basis.T @ old
            last = [one @ turn.T for one in last]
            if finish == "momentum":
                m = m @ turn.T
            else:
                m, v = carried(m, v, turn, t, betas, "rotate")
        low = g @ basis
        last, squares = [*last, low][-window:], [*squares, float(low.square().sum())][-window:]
        rows = torch.stack([one.flatten() for one in last])
        floor = damping + rounding * sum(squares) / len(last)
        direction = explicit(rows, rows[-1], floor, len(last)).view(low.shape)
        m = betas[0] * m + (1 - betas[0]) * direction
        v = betas[1] * v + (1 - betas[1]) * direction**2
        if finish == "momentum":
            direction = m
        else:
            direction = (m / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
        w = (1 - lr * weight_decay) * w - lr * scale * direction @ basis.T
    return w.T if wide else w
