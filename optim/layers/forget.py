"""What becomes of an optimizer's memory of parameters that are suddenly others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinrank.optim.exchange.whole import Weights
from thinrank.optim.optimizer import MatrixOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
    """The state of `params` becomes, in place, what it was before the first step: with torch's optimizers, zeros."""
    if isinstance(optimizer, MatrixOptimizer):
        optimizer.forget(params)
        return
    for param in params:
        for value in optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor):
                value.zero_()


@torch.no_grad()
def prune(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], keep: float, weights: Weights) -> None:
    """Adam's moments of `params` keep the share `keep` of their entries, where the first is largest; counts stay.

    After ReLoRA (Lialin et al. 2023, arXiv 2307.05695), whose code prunes each moment by its own magnitudes. That
    leaves entries with a first moment and no second: those of A, which has no gradient until B has moved, would then be
    stepped by their moment divided by eps. So both keep the same entries here.

    Args:
        weights: knows where `params` lie; where in pieces, so do their moments.

    Raises:
        ValueError: for a state without float moments, such as of 8 bits or in a subspace.
    """
    for param in params:
        state = {key: value for key, value in optimizer.state.get(param, {}).items() if key != "step"}
        found = {key: value for key, value in state.items() if key in MOMENTS}
        if state and len(found) < len(MOMENTS):  # somebody else's state is nothing here
            raise ValueError(
                "moments can be pruned where they are float numbers of whole weights: use optimizer=adamw with "
                "state_bits=32, or keep=0"
            )
        if not found:
            continue
        size = found["exp_avg"].abs()
        sizes = weights.together(param, size.flatten())
        count = max(1, int(sizes.numel() * keep)) if keep > 0 and sizes.numel() else 0
        out = size < sizes.topk(count).values[-1] if count else torch.ones_like(size, dtype=torch.bool)
        for value in found.values():
            value.masked_fill_(out, 0)
