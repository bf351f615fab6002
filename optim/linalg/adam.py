"""Adam's direction in any space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

FUSED = ("cpu", "cuda", "meta")
"""Devices with torch's fused Adam; on the meta device it says what a step would allocate elsewhere."""


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: Sequence[int] | Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    eps_raw: bool = False,
) -> Tensor:
    """`m̂ / (sqrt(v̂) + eps)` after taking `grad` into the moments, which change in place (Kingma & Ba 2015, alg. 1).

    Args:
        grad, exp_avg, exp_avg_sq: (batch, ...) of one shape and dtype.
        count: updates including this one, for each matrix of the batch, or a tensor that broadcasts against `grad`
            (ages of single columns).
        eps_raw: add eps to sqrt(v) before the bias correction, as GaLore does: about 30 times larger at first.
    """
    if not isinstance(count, Tensor) and len(set(count)) == 1 and one_layout(grad, exp_avg, exp_avg_sq):
        t = count[0]
        fix2 = (1.0 - betas[1] ** t) ** 0.5
        return _fused_direction(grad, exp_avg, exp_avg_sq, t, betas, eps / fix2 if eps_raw else eps)
    exp_avg.lerp_(grad, 1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1.0 - betas[1])
    if isinstance(count, Tensor):
        t = count.to(torch.float32)
    else:
        t = torch.tensor(list(count), dtype=torch.float32).to(grad.device)
        t = t.reshape(-1, *[1] * (grad.ndim - 1))
    fix1, fix2 = 1.0 - betas[0] ** t, (1.0 - betas[1] ** t).sqrt()
    floor = eps / fix2 if eps_raw else eps
    return (exp_avg / fix1).div_((exp_avg_sq.sqrt() / fix2).add_(floor))


def bias_factor(count: Sequence[int], betas: tuple[float, float], device: torch.device) -> Tensor:
    """`sqrt(1−β2^t) / (1−β1^t)` for `count` = t updates of each matrix, (batch,) float32: with `eps_raw`, the direction
    is this times `m / (sqrt(v) + eps)`, which is how GaLore and its family keep the correction in the step size.
    """
    factors = [(1.0 - betas[1] ** t) ** 0.5 / (1.0 - betas[0] ** t) for t in count]
    if len(set(count)) == 1:  # filled on the device: a copy from the host would make it wait
        return torch.full((len(factors),), factors[0], dtype=torch.float32, device=device)
    return torch.tensor(factors, dtype=torch.float32).to(device)


def one_layout(*tensors: Tensor) -> bool:
    """True when all of `tensors` are dense in the same order, which torch's fused kernels need.

    They walk the memory of each from its first entry on and compare no strides: a sliced, transposed or expanded tensor
    among the four is read and written wrongly, without a word on a CPU.
    """
    return any(
        all(x.is_contiguous(memory_format=order) for x in tensors)
        for order in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    )


def _fused_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: int, betas: tuple[float, float], eps: float
) -> Tensor:
    # torch's fused Adam, one pass over all four tensors, on a weight that is zero: with a learning rate of -1 what it
    # leaves there is the direction.
    out = torch.zeros_like(grad)
    fused = grad.device.type in FUSED and grad.dtype.is_floating_point
    torch_adam(
        [out],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        # filled on the device: a copy from the host would make it wait
        [torch.full((), float(t - 1), dtype=torch.float32, device=grad.device)],
        fused=fused,
        foreach=False,
        amsgrad=False,
        has_complex=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=-1.0,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    return out
