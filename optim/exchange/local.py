"""Whole matrices on every rank: one process, DDP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thinrank.optim.matrix import MatrixView, writable
from thinrank.optim.update import Factor, Update


def bring(grads: Sequence[Tensor], view: MatrixView) -> Tensor:
    """The gradients of equally shaped parameters as one batch (parameters·blocks, long, short) of their dtype.

    One parameter comes as a view where its strides allow it; several are copied together, in the orientation they are
    stored in: copying the transpose of a matrix takes a processor eight to ten times longer.
    """
    if len(grads) == 1:
        return view.of(grads[0])
    if view.blocks == 1 and grads[0].shape == view.stored:
        batch = torch.stack(list(grads))
    else:
        stored = replace(view, transposed=False)
        batch = torch.cat([stored.of(grad) for grad in grads])
    return batch.mT if view.transposed else batch


def give_back(weights: Sequence[Tensor], view: MatrixView, update: Update, *, keep: Factor, step: Factor) -> None:
    """`weight ← keep·weight − step·update` for each parameter, in place.

    Args:
        keep, step: one number for all, or one for each matrix (of parameters, block by block).
    """
    # channels-last and the like: work on a copy of the rows and write them back
    direct = [weight.is_contiguous() or writable(weight) for weight in weights]
    targets = [
        weight if as_is else weight.reshape(weight.shape[0], -1).contiguous()
        for weight, as_is in zip(weights, direct, strict=True)
    ]
    if view.blocks == 1 and targets[0].shape == view.stored:  # plain matrices, nearly always
        parts = [target.mT for target in targets] if view.transposed else targets
    else:
        parts = [part for target in targets for part in view.of(target).unbind()]
    update.apply_(parts, keep=keep, step=step)
    for weight, target, as_is in zip(weights, targets, direct, strict=True):
        if not as_is:
            weight.copy_(target.reshape(weight.shape))
