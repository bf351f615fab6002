"""LDAdam's equations, one matrix, one loop, float64, every matrix in full; slow on purpose. (Robert et al. 2024.)"""

import torch


def ldadam(
    weight, grads, *, lr, rank, rho=0.908, feedback=True, absolute=True, betas=(0.908, 0.99), eps=1e-8, weight_decay=0.0
):
    """The weight (m, n), the error and the basis after all of `grads`; wide matrices with the sides exchanged."""
    w = weight.detach().double().clone()
    if w.shape[0] < w.shape[1]:
        w, error, basis = ldadam(
            w.T, [g.T for g in grads], lr=lr, rank=rank, rho=rho, feedback=feedback, absolute=absolute, betas=betas,
            eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        return w.T, error.T, basis
    b1, b2 = betas
    error = torch.zeros_like(w)
    m = v = torch.zeros(w.shape[0], rank, dtype=torch.float64)
    basis = torch.zeros(w.shape[1], rank, dtype=torch.float64)
    for k, g in enumerate(grads):
        a = g.double() + error
        old, m_old = basis, m
        if k == 0:
            basis = torch.linalg.svd(a, full_matrices=False)[2][:rank].T
            turned = m
        else:
            b = rho * (m / (1 - b1**k)) @ old.T + (1 - rho) * a
            basis = torch.linalg.qr(b.T @ b @ old).Q
            c = basis.T @ old
            turned = m @ c.T
            m_hat, v_hat = m / (1 - b1**k), v / (1 - b2**k)
            variance = (v_hat - m_hat**2) @ (c * c).T
            mean = (turned / (1 - b1**k)) ** 2
            v = (1 - b2**k) * ((variance + mean).abs() if absolute else variance.clamp(min=0) + mean)
        low = a @ basis
        m = b1 * turned + (1 - b1) * low
        v = b2 * v + (1 - b2) * low**2
        w = (1 - lr * weight_decay) * w
        w = w - lr * (m / (1 - b1 ** (k + 1))) / ((v / (1 - b2 ** (k + 1))).sqrt() + eps) @ basis.T
        if feedback:
            error = (a - low @ basis.T) + b1 / (1 - b1) * (m_old @ old.T - turned @ basis.T)
    return w, error, basis
