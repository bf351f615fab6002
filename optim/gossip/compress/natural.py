"""Powers of two: a sign and an exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor, generator_of, spans
from thinrank.optim.gossip.compress.packing import pack, packed_bytes, unpack
from thinrank.optim.gossip.compress.scales import draw16

_SHRUNK = 8.0 / 9.0


@dataclass(frozen=True, kw_only=True)
class Natural(Compressor):
    """Each entry becomes one of the two powers of two beside it (natural compression, Horváth et al. 2022): 9 bits.

    Unbiased to 2⁻¹⁷ of the lower power with 16 random bits, the relative variance at most 1/8. Zero is exact. Entries
    below 2⁻¹²⁶ become 0 or that, still unbiased; those above 2¹²⁷ become 2¹²⁷.

    Attributes:
        scaled: divides by 1 + 1/8, which makes the squared error 1/9 at most and the result biased.
    """

    scaled: bool = False

    @property
    def name(self) -> str:
        return "natural"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return NaturalCodec(shapes, self)


class NaturalCodec(Codec):
    """`Natural` bound to shapes. Payload: exponents as in float32, a byte each, then signs, a set bit for x < 0."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: Natural) -> None:
        self.scaled = config.scaled
        omega = 1.0 / 8.0
        super().__init__(
            shapes,
            unbiased=not self.scaled,
            error=math.sqrt(omega / (1.0 + omega) if self.scaled else omega),
        )

    def _length(self) -> int:
        return self.numel + packed_bytes(self.numel, 1)

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        exponents, signs = payload[: self.numel], payload[self.numel :]
        generator = generator_of(key, flat.device)
        for start, stop in spans(self.numel, 8, flat.device):
            count = stop - start
            padded = torch.nn.functional.pad(flat[start:stop], (0, -count % 8))
            word = padded.view(torch.int32)
            # uniform in [64, 2²³) in steps of 128, which carries a mantissa into the exponent as often as it is large
            noise = draw16(word.numel(), generator, flat.device).to(torch.int32).bitwise_and_(0xFFFF)
            size = noise.bitwise_left_shift_(7).bitwise_or_(64).add_(word & 0x7FFFFFFF)
            exponents[start:stop] = size.bitwise_right_shift_(23).clamp_(max=254).to(torch.uint8)[:count]
            packed = pack((word < 0).view(torch.int8), 1)
            signs[start // 8 : start // 8 + packed.numel()] = packed

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        exponents, signs = payload[: self.numel], payload[self.numel :]
        for start, stop in spans(self.numel, 8, flat.device):
            count = stop - start
            word = exponents[start:stop].to(torch.int32).bitwise_left_shift_(23)
            negative = unpack(signs[start // 8 : start // 8 + packed_bytes(count, 1)], 1)[:count] != 0
            word |= negative.to(torch.int32).bitwise_left_shift_(31)
            value = word.view(torch.float32)
            flat[start:stop] = value.mul_(_SHRUNK) if self.scaled else value
