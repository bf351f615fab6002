"""M-FAC by its definitions in float64: the explicit inverse, and the paper's recursion. (Frantar et al. 2021.)"""

import torch


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
