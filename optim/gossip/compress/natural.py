"""Powers of two: a sign and an exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor, Scratch, spans, whole_rows
from thinrank.optim.gossip.compress.packing import packed_bytes, read_signs, write_signs
from thinrank.optim.gossip.compress.scales import Draws

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
        room = Scratch(flat.device)
        draws = Draws(key, room)
        for start, stop in spans(self.numel, 8, flat.device):
            padded = whole_rows(flat[start:stop], 8).view(-1)
            count = padded.numel()
            size = torch.bitwise_and(padded.view(torch.int32), 0x7FFFFFFF, out=room("size", torch.int32, count))
            # 64, 192 .. 2²³ - 64, which carry a mantissa into the exponent as often as it is large
            size.add_(draws.wide(count), alpha=128).add_(2**22 + 64)
            exponents[start:stop] = size.bitwise_right_shift_(23).clamp_(max=254)[: stop - start]
            write_signs(padded, signs, start, room)

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        exponents, signs = payload[: self.numel], payload[self.numel :]
        room = Scratch(flat.device)
        for start, stop in spans(self.numel, 8, flat.device):
            part = flat[start:stop]
            word = read_signs(part.view(torch.int32), signs, start)
            word |= room("size", torch.int32, len(part)).copy_(exponents[start:stop]).bitwise_left_shift_(23)
            if self.scaled:
                part.mul_(_SHRUNK)
