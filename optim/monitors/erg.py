"""Where the eigenvalues of a spectrum multiply to one: the condition of SETOL (Martin and Hinrichs, arXiv
2507.17912)."""

from __future__ import annotations

import torch
from torch import Tensor


def erg_count(evals: Tensor) -> Tensor:
    """How many of the largest eigenvalues, scaled so that their mean is one, it takes until their product is below one.

    WeightWatcher's `detX_num` or `num_ERG_spikes`, from a running sum of logarithms: its running product overflows for
    a thousand eigenvalues. SETOL takes this tail for the part of a layer that has learnt; where a power law's tail is
    as long (`ERG_gap`, the difference, near zero) and α near 2, it calls the layer ideal. That is a statement about
    trained networks: a matrix of random numbers has 0.73 m (square), 0.81 m (2:1), 0.87 m (4:1), so that the count by
    itself says nothing of training.

    Args:
        evals: (..., m) non-negative, in any order; zeros count as smaller than anything.

    Returns:
        (...,) int64, from 1 to m; 0 for a spectrum of zeros, and of equal values, which never multiply to less than
        one.
    """
    x = evals.detach().double().sort(-1, descending=True).values
    total = x.sum(-1, keepdim=True)
    logs = (x * (x.shape[-1] / total)).log().cumsum(-1)
    tiny = 1e-9 * x.shape[-1]  # rounding of sums of equal values
    below = logs < -tiny
    count = below.to(torch.int64).argmax(-1) + 1
    return torch.where(below.any(-1) & (total.squeeze(-1) > 0), count, torch.zeros_like(count))
