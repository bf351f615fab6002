"""From float32 to the two 16-bit formats without losing small changes on average."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def noise16(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """int32 numbers uniform in [0, 2¹⁶) that depend on `seed` (and the kind of device) alone."""
    generator = torch.Generator(device=device).manual_seed(seed)
    count = shape.numel()
    # four of them from each draw: drawing is most of the cost on a processor
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF).view(shape)


def stochastic_round(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """`x` rounded to one of its two neighbours in `dtype`, to the farther from zero with the probability that keeps the
    mean (Gupta et al. 2015).

    What `dtype` can represent stays; infinities and NaN stay. Beyond the largest finite number the upper neighbour is
    infinity, as in rounding to the nearest. Unbiased: exactly for bfloat16, to 2⁻¹³ of the spacing for float16.

    Args:
        x: float32.
        dtype: bfloat16 or float16.
        noise: int32 of x's shape, uniform in [0, 2¹⁶).
    """
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]  # bits of the mantissa that have no place
    x = x.contiguous()
    noise = noise >> (16 - dropped)
    carried = (x.view(torch.int32) + noise).bitwise_and_(-(1 << dropped))
    # a NaN is all ones and something behind, to which nothing may be added: subtracting zero, or NaN where x is one,
    # makes it one again (by `clamp`, because a choice by `isfinite` and `where` takes a processor ten times as long)
    rounded = carried.view(torch.float32).sub_(x.abs().clamp_(0.0, 0.0))
    if dtype is torch.float16:  # below 2⁻¹⁴ its numbers are evenly spaced, 2⁻²⁴ apart; 10 + 13 bits fit the sum
        even = (x.abs() * 2.0**24 + noise / 8192.0).floor_().mul_(2.0**-24).copysign_(x)
        rounded = torch.where(x.abs() < 2.0**-14, even, rounded)
    return rounded.to(dtype)
