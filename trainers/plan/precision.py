"""Which types a run's precision means, as Lightning has them."""

from __future__ import annotations

import platform
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

WEIGHTS = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
"""Types that weights, and with them gradients, are turned into; other precisions leave them as they are built."""

AUTO = "auto"
"""Chosen when a run begins, by rank 0's machine (`fitting`), and kept by the run wherever it goes on."""

CAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Types that products are computed in under autocast."""


def emulated(precision: str, *, cuda: bool) -> bool:
    """Whether this machine has no instructions for the products of `precision` and computes them in several others.

    x86 processors without AVX-512 do so with bfloat16: a product of 4096 × 192 by 192 × 512 takes an AMD EPYC of 2021
    nine times as long as in float32.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not cuda and precision.startswith("bf16") and x86 and torch.backends.cpu.get_cpu_capability() != "AVX512"


def fitting(*, cuda: bool) -> str:
    """What `trainer.precision=auto` is on this machine: bf16-mixed where it has bfloat16 products, else 32-true."""
    emulates = (
        not torch.cuda.is_bf16_supported(including_emulation=False) if cuda else emulated("bf16-mixed", cuda=False)
    )
    return "32-true" if emulates else "bf16-mixed"


def as_trained(model: M, precision: str) -> M:
    """`model`, its weights in the type in which `trainer.precision` trains them; changed in place."""
    return model.to(WEIGHTS[precision]) if precision in WEIGHTS else model
