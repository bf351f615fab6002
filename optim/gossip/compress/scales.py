"""What a bucket is divided by before its entries are rounded, and the chance that rounds them."""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Scratch, generator_of

BF16_MAX = torch.finfo(torch.bfloat16).max

SMALLEST = 2.0**-118
"""The smallest scale. Its inverse times 448 is a finite float32; smaller entries are rounded as if it were theirs."""

INSIDE = 1.0 - 2.0**-22
"""Roundings of the largest entry's level must not carry it beyond the last level, where codes end."""


def check_bucket(bucket: int) -> None:
    """Refuses a bucket whose codes would not end at a byte.

    Raises:
        ValueError: with the remedy.
    """
    if bucket < 8 or bucket % 8:
        raise ValueError(f"bucket must be a positive multiple of 8, got {bucket}: 512 is usual")


def bf16_above(x: Tensor) -> Tensor:
    """The bfloat16 (as float32) that is equal or next above, at most the largest finite one; x is not negative."""
    above = (x.view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000)
    return above.view(torch.float32).clamp_(max=BF16_MAX)


class Draws:
    """16 random bits for each entry, block after block, from a generator that belongs to a key alone.

    Four entries share a draw of 64 bits, because drawing is half of all the time on a CPU.
    """

    def __init__(self, key: int, room: Scratch) -> None:
        self.generator = generator_of(key, room.device)
        self.room = room

    def bits(self, count: int) -> Tensor:
        """int16 (count,), all values as likely."""
        draws = self.room("draws", torch.int64, -(-count // 4))
        return draws.random_(-(2**63), None, generator=self.generator).view(torch.int16)[:count]

    def odd(self, count: int) -> Tensor:
        """float32 (count,) of odd integers between -2¹⁵ and 2¹⁵, each as likely.

        They lie evenly about zero, and none reaches 2¹⁵, half a step, so that zero stays zero.
        """
        return self.room("odd", torch.float32, count).copy_(self.bits(count).bitwise_or_(1))

    def wide(self, count: int) -> Tensor:
        """int32 (count,) from -2¹⁵ to 2¹⁵ - 1, each as likely."""
        return self.room("wide", torch.int32, count).copy_(self.bits(count))
