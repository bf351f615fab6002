"""Whole matrices on every rank: one process, DDP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinrank.optim.matrix import MatrixView, writable
from thinrank.optim.update import Update


def bring(grads: Sequence[Tensor], view: MatrixView) -> Tensor:
    """The gradients of equally shaped parameters as one float32 batch (parameters·blocks, long, short).

    One parameter comes as a view where dtype and strides allow it; several are copied together.
    """
    if len(grads) == 1:
        return view.of(grads[0]).float()
    return torch.cat([view.of(grad) for grad in grads]).float()


def give_back(
    weights: Sequence[Tensor], view: MatrixView, update: Update, *, keep: float, step: float
) -> None:
    """`weight ← keep·weight − step·update` for each parameter, in place."""
    for i, weight in enumerate(weights):
        if writable(weight):
            parts = view.of(weight)
        else:  # channels-last and the like: work on a copy of the rows and write them back
            copy = weight.reshape(weight.shape[0], -1).contiguous()
            parts = view.of(copy)
        for block in range(view.blocks):
            update.apply_(i * view.blocks + block, parts[block], keep=keep, step=step)
        if not writable(weight):
            weight.copy_(copy.reshape(weight.shape))
