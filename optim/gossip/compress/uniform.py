"""Evenly spaced levels between the largest entries of a bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor, Scratch, multiply_rows, spans, whole_rows
from thinrank.optim.gossip.compress.packing import GROUP, pack, packed_bytes, unpack
from thinrank.optim.gossip.compress.scales import BF16_MAX, INSIDE, SMALLEST, Draws, bf16_above, check_bucket

BITS = (8, 6, 4, 3, 2)


@dataclass(frozen=True, kw_only=True)
class Uniform(Compressor):
    """Levels evenly spaced from -max to max of each bucket, s = 2^(bits-1) - 1 on either side of zero.

    The scheme of QSGD (Alistarh et al. 2017) with a bucket's largest entry instead of its norm, which loses less by the
    factor of their ratio. Zero is exact.

    Attributes:
        bits: 8, 6, 4, 3 or 2.
        bucket: entries that share a scale (2 bytes of bfloat16), a multiple of 8. Buckets run on over tensors' ends.
        stochastic: rounds up with the probability that keeps the mean (15 random bits: to 2⁻¹⁵ of a step); else to the
            nearest level.
        scaled: multiplies what a bucket decodes to by the number that brings it nearest to the bucket (least squares),
            for stochastic rounding about 1/(1 + omega), omega being its relative variance. Biased, but no bucket moves
            away from what it was: exchanges of differences need that where omega is 1 or more. Ours, in that the number
            is found for each bucket. None: for 2 bits only.
    """

    bits: int = 8
    bucket: int = 512
    stochastic: bool = True
    scaled: bool | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        check_bucket(self.bucket)

    @property
    def name(self) -> str:
        return f"uniform{self.bits}"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return UniformCodec(shapes, self)


def worst(bits: int, bucket: int, stochastic: bool, scaled: bool) -> float:
    """The largest `sqrt(E‖C(z) - z‖² / ‖z‖²)` of any bucket whose largest entry is above `SMALLEST`.

    With d the step over the largest entry and n the other entries, stochastic rounding is worst where these all have
    the same size below half a step: omega = (sqrt(1 + n d²) - 1) / 2, which for large n is near QSGD's √bucket / s, and
    which no variance of a quarter step for each entry, n d² / 4, exceeds. The nearest level is worst halfway, where it
    loses n d² / 4 of 1 + n d² / 4. A scale rounded up to bfloat16 puts the largest entry itself between two levels.
    Derived here.
    """
    levels = 2 ** (bits - 1) - 1
    excess = 0.0 if scaled else 2.0**-7
    step = (1.0 + excess) / levels
    spread = (bucket - 1) * step**2
    off = min(0.5, levels * excess)
    if not stochastic:
        return math.sqrt((step**2 * off**2 + spread / 4) / (1.0 + spread / 4))
    omega = (math.sqrt(1.0 + spread) - 1.0) / 2.0 + step**2 * off * (1.0 - off)
    return math.sqrt(omega / (1.0 + omega) if scaled else omega)


class UniformCodec(Codec):
    """`Uniform` bound to shapes. Payload: bfloat16 scales, one for each bucket, then codes in two's complement."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: Uniform) -> None:
        self.bits, self.bucket, self.stochastic = config.bits, config.bucket, config.stochastic
        self.scaled = config.bits == 2 if config.scaled is None else config.scaled
        self.levels = 2 ** (self.bits - 1) - 1
        super().__init__(shapes, unbiased=self.stochastic and not self.scaled, error=0.0)
        self.error = worst(self.bits, max(min(self.bucket, self.numel), 1), self.stochastic, self.scaled)

    def _length(self) -> int:
        self.buckets = -(-self.numel // self.bucket)
        return 2 * self.buckets + packed_bytes(self.numel, self.bits)

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        scales, codes = payload[: 2 * self.buckets].view(torch.bfloat16), payload[2 * self.buckets :]
        room = Scratch(flat.device)
        draws = Draws(key, room) if self.stochastic else None
        entries, size = GROUP[self.bits]
        for start, stop in spans(self.numel, self.bucket, flat.device):
            rows = whole_rows(flat[start:stop], self.bucket)
            count = rows.numel()
            level = room("level", torch.float32, count).view(rows.shape)
            most = torch.abs(rows, out=level).amax(1)
            scale = (most if self.scaled else bf16_above(most)).clamp(min=SMALLEST)
            # beyond bfloat16's range the scale is below the largest entry, and the bucket decodes to 0.4 % less
            inverse = (self.levels * INSIDE) / torch.maximum(scale, most).unsqueeze(1)
            torch.mul(rows, inverse, out=level)
            if draws is not None:
                level.view(-1).add_(draws.odd(count), alpha=2.0**-16)
            level.round_()
            if self.scaled:
                scale = self._nearest(rows, level, inverse, room)
            scales[start // self.bucket :][: len(rows)] = scale
            packed = pack(room("codes", torch.int8, count).copy_(level.view(-1)), self.bits)
            place = start // entries * size
            end = min(place + packed.numel(), codes.numel())
            codes[place:end] = packed[: end - place]

    def _nearest(self, rows: Tensor, level: Tensor, inverse: Tensor, room: Scratch) -> Tensor:
        """The scale with which levels come nearest to a bucket; zero for a bucket of zeros."""
        product = room("product", torch.float32, rows.numel()).view(rows.shape)
        across = torch.mul(rows, inverse, out=product).mul_(level).sum(1)
        square = torch.square(level, out=product).sum(1)
        scale = self.levels * (across / square.clamp(min=1.0)) / inverse.squeeze(1)
        return scale.clamp_(max=BF16_MAX)

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        scales, codes = payload[: 2 * self.buckets].view(torch.bfloat16), payload[2 * self.buckets :]
        entries, size = GROUP[self.bits]
        for start, stop in spans(self.numel, self.bucket, flat.device):
            part = flat[start:stop]
            step = scales[start // self.bucket :][: -(-len(part) // self.bucket)].to(torch.float32)
            place = start // entries * size
            packed = codes[place : place + packed_bytes(len(part), self.bits)]
            part.copy_(unpack(packed, self.bits)[: len(part)])
            multiply_rows(part, step.div_(self.levels).mul_(2.0 ** (self.bits - 8)), self.bucket)
