"""Entries one by one in fewer bits, or as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor, Scratch, multiply_rows, spans, whole_rows
from thinrank.optim.gossip.compress.scales import BF16_MAX, INSIDE, SMALLEST, Draws, bf16_above, check_bucket
from thinrank.optim.linalg.rounding import stochastic_round

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, kw_only=True)
class Float32(Compressor):
    """The vector itself: what others are compared with."""

    @property
    def name(self) -> str:
        return "float32"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return Float32Codec(shapes, unbiased=True, error=0.0)


class Float32Codec(Codec):
    """`Float32` bound to shapes: 4 bytes for each entry."""

    def _length(self) -> int:
        return 4 * self.numel

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        payload.view(torch.float32).copy_(flat)

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        flat.copy_(payload.view(torch.float32))


@dataclass(frozen=True, kw_only=True)
class BFloat16(Compressor):
    """The upper half of each float32. Beyond its range entries become its largest number, not infinity.

    Attributes:
        stochastic: rounds up with the probability that keeps the mean; else to nearest, which is biased but half as
            far off at worst.
    """

    stochastic: bool = False

    @property
    def name(self) -> str:
        return "bf16"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return BFloat16Codec(shapes, self)


class BFloat16Codec(Codec):
    """`BFloat16` bound to shapes: 2 bytes for each entry."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: BFloat16) -> None:
        self.stochastic = config.stochastic
        # nearest: halfway above a power of two; by chance: a variance of a quarter of the square of 2⁻⁷
        super().__init__(shapes, unbiased=self.stochastic, error=2.0**-8 if self.stochastic else 1.0 / 513.0)

    def _length(self) -> int:
        return 2 * self.numel

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        values = payload.view(torch.bfloat16)
        room = Scratch(flat.device)
        draws = Draws(key, room) if self.stochastic else None
        for start, stop in spans(self.numel, 8, flat.device):
            count = stop - start
            part = torch.clamp(flat[start:stop], -BF16_MAX, BF16_MAX, out=room("part", torch.float32, count))
            if draws is not None:
                part = stochastic_round(part, torch.bfloat16, draws.wide(count).bitwise_and_(0xFFFF))
            values[start:stop] = part

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        flat.copy_(payload.view(torch.bfloat16))


@dataclass(frozen=True, kw_only=True)
class Float8(Compressor):
    """Floating-point numbers of 8 bits (e4m3, 3 bits of mantissa), a bucket's largest entry becoming 448, the largest.

    Micikevicius et al. 2022. Rounded to nearest, biased. A Gaussian bucket loses 2.6 % of its norm, twice what
    `uniform8` takes and more, but each entry down to 3.5e-5 of the largest loses at most 6 % of itself.

    Attributes:
        bucket: entries that share a scale (2 bytes of bfloat16), a multiple of 8. Buckets run on over tensors' ends.
    """

    bucket: int = 512

    def __post_init__(self) -> None:
        check_bucket(self.bucket)

    @property
    def name(self) -> str:
        return "fp8"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return Float8Codec(shapes, self)


class Float8Codec(Codec):
    """`Float8` bound to shapes. Payload: bfloat16 scales, one for each bucket, then float8_e4m3fn."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: Float8) -> None:
        self.bucket = config.bucket
        # halfway above a power of two, 1/17 of the number; below 2⁻⁶ steps of 2⁻⁹, next to a largest entry above 444
        error = (1.0 / 17.0) ** 2 + self.bucket * (2.0**-10 / 444.0) ** 2
        super().__init__(shapes, unbiased=False, error=math.sqrt(error))

    def _length(self) -> int:
        self.buckets = -(-self.numel // self.bucket)
        return 2 * self.buckets + self.numel

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        scales, codes = payload[: 2 * self.buckets].view(torch.bfloat16), payload[2 * self.buckets :]
        room = Scratch(flat.device)
        for start, stop in spans(self.numel, self.bucket, flat.device):
            rows = whole_rows(flat[start:stop], self.bucket)
            level = room("level", torch.float32, rows.numel()).view(rows.shape)
            most = torch.abs(rows, out=level).amax(1)
            scale = bf16_above(most).clamp_(min=SMALLEST)
            scales[start // self.bucket :][: len(rows)] = scale
            # beyond bfloat16's range the scale is below the largest entry, and the bucket decodes to 0.4 % less
            torch.mul(rows, (FLOAT8_MAX * INSIDE) / torch.maximum(scale, most).unsqueeze(1), out=level)
            codes[start:stop].view(torch.float8_e4m3fn).copy_(level.view(-1)[: stop - start])

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        scales, codes = payload[: 2 * self.buckets].view(torch.bfloat16), payload[2 * self.buckets :]
        for start, stop in spans(self.numel, self.bucket, flat.device):
            part = flat[start:stop]
            step = scales[start // self.bucket :][: -(-len(part) // self.bucket)].to(torch.float32).div_(FLOAT8_MAX)
            # Sign, exponent and mantissa come to where float32 has them, and 2¹²⁰ makes up for the difference of the
            # exponents' zeros, also for subnormal numbers: ten times as fast as torch's own conversion on a CPU.
            part.view(torch.int32).copy_(codes[start:stop].view(torch.int8)).mul_(2**20).bitwise_and_(-0x78100000)
            multiply_rows(part.mul_(2.0**120), step, self.bucket)
