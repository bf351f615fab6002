"""Entries one by one in fewer bits, or as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor


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
