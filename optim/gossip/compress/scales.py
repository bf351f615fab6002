"""What a bucket is divided by before its entries are rounded, and the chance that rounds them."""

from __future__ import annotations

import torch
from torch import Tensor

BF16_MAX = torch.finfo(torch.bfloat16).max

SMALLEST = 2.0**-118
"""The smallest scale. Its inverse times 448 is a finite float32; smaller entries are rounded as if it were theirs."""

INSIDE = 1.0 - 2.0**-22
"""Roundings of the largest entry's level must not carry it beyond the last level, where codes end."""


def bf16_above(x: Tensor) -> Tensor:
    """The bfloat16 (as float32) that is equal or next above, at most the largest finite one; x is not negative."""
    above = (x.view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000)
    return above.view(torch.float32).clamp_(max=BF16_MAX)


def draw16(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """int16 (count,), all values as likely; count is a multiple of 4.

    Four come from each draw, because drawing is half of all the time on a CPU.
    """
    draws = torch.empty(count // 4, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)


def noise15(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """float32 (count,) of odd integers between -2¹⁵ and 2¹⁵, each as likely; count is a multiple of 4.

    Odd numbers lie evenly about zero and never reach a half step, so that a number that is a level stays one.
    """
    return draw16(count, generator, device).bitwise_or_(1).to(torch.float32)
