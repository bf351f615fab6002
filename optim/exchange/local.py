"""Whole matrices on every rank: one process, DDP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thinrank.optim.matrix import MatrixView, writable
from thinrank.optim.update import Update


def bring(grads: Sequence[Tensor], view: MatrixView) -> Tensor:
    """The gradients of equally shaped parameters as one batch (parameters·blocks, long, short) of their dtype.

    One parameter comes as a view where its strides allow it; several are copied together, in the orientation they are
    stored in: copying the transpose of a matrix takes a processor twenty times longer.
    """
    if len(grads) == 1:
        return view.of(grads[0])
    stored = replace(view, transposed=False)
    batch = torch.cat([stored.of(grad) for grad in grads])
    return batch.mT if view.transposed else batch


def give_back(weights: Sequence[Tensor], view: MatrixView, update: Update, *, keep: float, step: float) -> None:
    """`weight ← keep·weight − step·update` for each parameter, in place."""
    for i, weight in enumerate(weights):
        direct = weight.is_contiguous() or writable(weight)
        # channels-last and the like: work on a copy of the rows and write them back
        target = weight if direct else weight.reshape(weight.shape[0], -1).contiguous()
        for block, part in enumerate(view.of(target).unbind()):
            update.apply_(i * view.blocks + block, part, keep=keep, step=step)
        if not direct:
            weight.copy_(target.reshape(weight.shape))
