"""One bit for each entry, and their mean size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor, Scratch, spans, whole_rows
from thinrank.optim.gossip.compress.packing import packed_bytes, read_signs, write_signs
from thinrank.optim.gossip.compress.scales import BF16_MAX, check_bucket


@dataclass(frozen=True, kw_only=True)
class Sign(Compressor):
    """Signs times the mean absolute value of each bucket (Bernstein et al. 2018; scaled as in Karimireddy et al. 2019).

    The mean is the factor that loses least: `‖x‖² - ‖x‖₁²/d`, 1 - 2/π of a Gaussian bucket's square, at most
    1 - 1/d. Biased, contractive. A zero has the sign of its bits.

    Attributes:
        bucket: entries that share a scale (2 bytes of bfloat16), a multiple of 8. Buckets run on over tensors' ends.
    """

    bucket: int = 512

    def __post_init__(self) -> None:
        check_bucket(self.bucket)

    @property
    def name(self) -> str:
        return "sign"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return SignCodec(shapes, self)


class SignCodec(Codec):
    """`Sign` bound to shapes. Payload: bfloat16 scales, one for each bucket, then signs, a set bit for a minus."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: Sign) -> None:
        self.bucket = config.bucket
        # a scale off by 2⁻⁹ of itself keeps 1 - 2⁻¹⁸ of what the mean takes away
        super().__init__(shapes, unbiased=False, error=0.0)
        self.error = math.sqrt(1.0 - (1.0 - 2.0**-18) / max(min(self.bucket, self.numel), 1))

    def _length(self) -> int:
        self.buckets = -(-self.numel // self.bucket)
        return 2 * self.buckets + packed_bytes(self.numel, 1)

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        scales, signs = payload[: 2 * self.buckets].view(torch.bfloat16), payload[2 * self.buckets :]
        room = Scratch(flat.device)
        for start, stop in spans(self.numel, self.bucket, flat.device):
            rows = whole_rows(flat[start:stop], self.bucket)
            size = torch.abs(rows, out=room("size", torch.float32, rows.numel()).view(rows.shape))
            # each entry is divided before the sum, which would overflow for entries near the largest float32
            mean = size.mul_(1.0 / self.bucket).sum(1)
            if stop == self.numel:
                mean[-1] *= self.bucket / (self.bucket - -self.numel % self.bucket)
            scales[start // self.bucket :][: len(rows)] = mean.clamp_(max=BF16_MAX)
            write_signs(rows.view(-1), signs, start, room)

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        scales, signs = payload[: 2 * self.buckets].view(torch.bfloat16), payload[2 * self.buckets :]
        for start, stop in spans(self.numel, self.bucket, flat.device):
            part = flat[start:stop]
            scale = scales[start // self.bucket :][: -(-len(part) // self.bucket)].to(torch.float32)
            sign = read_signs(part.view(torch.int32), signs, start)
            if len(part) % self.bucket:
                sign |= scale.repeat_interleave(self.bucket)[: len(part)].view(torch.int32)
            else:
                sign.view(-1, self.bucket).bitwise_or_(scale.view(torch.int32).unsqueeze(1))
