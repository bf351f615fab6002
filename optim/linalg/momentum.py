"""One moment, with or without a look ahead."""

from __future__ import annotations

from torch import Tensor


def momentum_direction(grad: Tensor, buffer: Tensor, momentum: float, *, nesterov: bool) -> Tensor:
    """The mean of the gradients so far, after taking `grad` into it; `buffer` changes in place.

        b ← μ b + (1−μ) g ;  direction = b, or with Nesterov's look ahead  μ b + (1−μ) g

    A running mean without bias correction, as in Jordan et al. 2024 and `torch.optim.Muon`: (1−μ) times the sum that
    heavy ball keeps.

    Returns:
        (...), of `grad`'s shape; `buffer` itself without Nesterov, so not to be written to.
    """
    buffer.lerp_(grad, 1.0 - momentum)
    return grad.lerp(buffer, momentum) if nesterov else buffer
