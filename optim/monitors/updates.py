"""What one step does to a weight, and to what the layer says: sizes, angles, and what to expect of them.

W (..., out, in) or any shape where matrices are not needed, ΔW the change of one step, η the learning rate, λ the
weight decay as torch's AdamW takes it (a step shrinks W by 1 − ηλ). rms is the root of the mean square. Equilibria hold
for updates that are uncorrelated over more than a few steps, at a constant η, and after some 1 / (ηλ) steps; under a
falling η weights lag behind theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinrank.optim.monitors.spectrum import wide


def rms(x: Tensor, dim: Sequence[int] | None = None) -> Tensor:
    """√mean(x²), over all entries or over the dimensions `dim`; float32 at least."""
    y = wide(x)
    return (y.square().mean() if dim is None else y.square().mean(tuple(dim))).sqrt()


def update_per_rate(update: Tensor, lr: float) -> Tensor:
    """rms(ΔW) / η, scalar. Adam: 0.2 to 1; its expectation for gradients without correlation is
    `equilibrium_update(1, β1)`, 0.23 for 0.9.

    Sees an update that is too large for its moments: above 1.5 for long, β2 is too slow for how fast gradients change,
    or a spike is on its way. Does not see whether the weights can bear it (`relative_update`). ΔW holds the decay too.

    Raises:
        ValueError: η not above 0.
    """
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}: leave out steps of a learning rate of 0")
    return rms(update) / lr


def relative_update(update: Tensor, weight: Tensor) -> Tensor:
    """rms(ΔW) / rms(W), scalar; infinite for a weight of zeros. In equilibrium `equilibrium_rotation`."""
    return rms(update) / rms(weight)


def angular_update(before: Tensor, after: Tensor) -> Tensor:
    """The angle between a weight before and after a step, in radians, scalar: arccos ⟨W, W′⟩ / (‖W‖ ‖W′‖).

    What matters of an update where a norm follows, which takes a weight's length away. By atan2 of difference and sum
    of the directions, which keeps the digits of small angles; the arccosine of a float32 sees none below 3e-4.
    In equilibrium `equilibrium_rotation`. No number for a weight of zeros.
    """
    a, b = (wide(x).double().flatten() for x in (before, after))
    a, b = a / torch.linalg.vector_norm(a), b / torch.linalg.vector_norm(b)
    return 2 * torch.atan2(torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(a + b))


def equilibrium_rotation(lr: float, weight_decay: float, beta1: float = 0.0) -> float:
    """√(2ηλ (1 − β1) / (1 + β1)): the angle of a step of AdamW in equilibrium, in radians, and its relative update.

    (Kosson, Messmer, Jaggi, arXiv 2305.17212, for a random walk; the factor of the momentum is that of a single step,
    while over many steps directions turn by √(2ηλ) each.) It does not depend on the size of gradients, so that layers
    rotate alike; one that does not is drifting, or is not there yet.
    """
    _check(lr, weight_decay, beta1)
    return math.sqrt(2 * lr * weight_decay * (1 - beta1) / (1 + beta1))


def equilibrium_rms(lr: float, weight_decay: float) -> float:
    """√(η / 2λ): rms(W) in equilibrium with updates whose sum over the momentum's memory has entries of size η, as
    Adam's (the same random walk). A part of the gradient that points the same way all along adds to it, and is not in
    it.

    Raises:
        ValueError: λ of 0: nothing holds the weights.
    """
    _check(lr, weight_decay, 0.0)
    if weight_decay == 0:
        raise ValueError("weight_decay must be above 0, got 0: without it there is no equilibrium")
    return math.sqrt(lr / (2 * weight_decay))


def equilibrium_update(lr: float, beta1: float) -> float:
    """η √((1 − β1) / (1 + β1)): rms(ΔW) of Adam for gradients that are uncorrelated from step to step; 0.23 η for
    0.9."""
    _check(lr, 0.0, beta1)
    return lr * math.sqrt((1 - beta1) / (1 + beta1))


def linear_gain(weight: Tensor, x: Tensor) -> Tensor:
    """rms(W x) / rms(x), scalar: what a linear layer does to the size of what it is given.

    A gain that changes with width is what rules of scale are to prevent (arXiv 2510.15262). It depends on where inputs
    point: σ₁ √(in / out) at most, rms(W) √in for inputs in all directions alike.

    Args:
        weight: (out, in).
        x: (..., in), as the layer is fed, after the norm before it.
    """
    y = wide(x)
    return rms(y @ wide(weight).to(y.dtype).mT) / rms(y)


def residual_gain(branch: Tensor, stream: Tensor) -> Tensor:
    """rms(f(h)) / rms(h), scalar: what a branch adds to the residual stream h, by the size of the stream it reads.

    Unlike `linear_gain` it holds norms and nonlinearities, and falls with depth as the stream grows, without anything
    being wrong.
    """
    return rms(branch) / rms(stream)


def alignment(matrix: Tensor, x: Tensor) -> Tensor:
    """‖M X‖_F / (‖M‖_F ‖X‖_F), scalar in [0, 1]: how much of a matrix meets its inputs (Kosson et al., arXiv
    2510.19093).

    Of a weight its weight alignment, of an update ΔW its update alignment. 1/√in where neither knows of the other; 1
    where both are of one direction, the same. Rules of width assume values of it that hold early in training.

    Args:
        matrix: (out, in), a weight or an update.
        x: (..., in), inputs.
    """
    y = wide(x).flatten(0, -2)
    m = wide(matrix).to(y.dtype)
    norms = torch.linalg.vector_norm(m) * torch.linalg.vector_norm(y)
    return torch.linalg.vector_norm(y @ m.mT) / norms


def relative_representation_change(update: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """‖ΔW X‖ / ‖W X‖, scalar: how much a step changes what the layer says, by this layer's weight alone.

    It equals (update alignment / weight alignment) · ‖ΔW‖ / ‖W‖, so that it grows where updates meet the inputs and
    weights do not, though both sizes stay. It does not see that the inputs change as well. 256 rows of X are enough.

    Args:
        update, weight: (out, in).
        x: (..., in), inputs.
    """
    y = wide(x).flatten(0, -2)
    moved, said = (torch.linalg.vector_norm(y @ wide(m).to(y.dtype).mT) for m in (update, weight))
    return moved / said


def adam_ratio(gradient: Tensor, second_moment: Tensor, eps: float = 1e-8) -> Tensor:
    """√mean(g² / max(v, ε²)), scalar: how large a gradient is for what Adam's second moment expects (StableAdamW,
    Wortsman et al. 2023, arXiv 2304.13013).

    About 1 in calm; far above it where v lags behind gradients that have grown, which comes before many spikes of the
    loss. Adam's own update does not show it at once where momentum is large. StableAdamW divides the learning rate by
    it where it is above 1; this only measures.

    Args:
        gradient: as the optimizer sees it.
        second_moment: v, bias corrected, this gradient included.
        eps: ε of the optimizer.
    """
    g, v = wide(gradient), wide(second_moment)
    return (g.square() / v.clamp(min=eps**2)).mean().sqrt()


def _check(lr: float, weight_decay: float, beta1: float) -> None:
    if lr < 0 or weight_decay < 0 or not 0 <= beta1 < 1:
        raise ValueError(
            f"lr and weight_decay must be at least 0 and beta1 in [0, 1), got {lr}, {weight_decay}, {beta1}: write "
            "those of the optimizer's group"
        )
