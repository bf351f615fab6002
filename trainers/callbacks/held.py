"""What a process holds in training, beside what was planned."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override


class HeldMemory(pl.Callback):
    """Bytes of weights on this rank, and the most of gradients that an optimizer step has found.

    To come after whoever asks for the gradient norm, since replicas exchange what they have then.

    Attributes:
        weights: of the model, trained or not; 0 before the first step.
        gradients: whole ones, and coordinates where these have taken their place.
    """

    def __init__(self) -> None:
        self.weights = self.gradients = 0

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        own = getattr(optimizer, "gradient_bytes", None)
        if own is not None:
            found = own()
        else:
            found = sum(_here(p.grad) for p in pl_module.parameters() if p.grad is not None)
        self.gradients = max(self.gradients, found)
        if not self.weights:
            self.weights = sum(_here(p) for p in pl_module.parameters())


def _here(tensor: Tensor) -> int:
    """Bytes of a tensor, or of this rank's piece of it."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()
