"""The norm of a model's gradients, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together (scalar); of sharded ones, which all ranks have to ask for, of the whole."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
