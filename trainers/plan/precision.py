"""Which types a run's precision means, as Lightning has them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

WEIGHTS = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
"""Types that weights, and with them gradients, are turned into; other precisions leave them as they are built."""

CAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Types that products are computed in under autocast."""


def as_trained(model: M, precision: str) -> M:
    """`model`, its weights in the type in which `trainer.precision` trains them; changed in place."""
    return model.to(WEIGHTS[precision]) if precision in WEIGHTS else model
