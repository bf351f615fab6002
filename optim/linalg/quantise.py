"""Block-wise codes of 8 and of 4 bits for what must be remembered cheaply."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256

BLOCK4 = 64
"""With 15 levels the largest entry of a block costs the others more; a scale for 64 is half a bit for each."""


def block_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
    """Shape of the scales of a tensor of `shape`: one for each `block` entries of the last dimension."""
    return (*shape[:-1], -(-shape[-1] // block))


def quantise8(x: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit codes by blocks of the last dimension: `x ≈ codes · scale`, zero exact, error ≤ scale/2.

    Blocks never straddle rows, so that a matrix sharded by rows quantises as the whole one does.

    Returns:
        codes int8 of x's shape in [-127, 127], and scales float32 of `block_shape(x.shape)` (max|block| / 127).
    """
    codes, scale = _levels(x, 127, block)
    return codes.to(torch.int8), scale


def dequantise8(codes: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """The float32 tensor that `codes` and `scale` stand for."""
    return _values(codes, scale, block)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the bytes of a tensor of `shape`, two entries of the last dimension in each."""
    return (*shape[:-1], -(-shape[-1] // 2))


def quantise4(x: Tensor, block: int = BLOCK4) -> tuple[Tensor, Tensor]:
    """Symmetric 4-bit codes, as `quantise8`, two neighbours in a byte: zero exact, error ≤ scale/2.

    Entry 2i is the low half of byte i, entry 2i+1 the high half, each in two's complement, so that a zero byte is two
    zeros. An odd width is filled up with a zero.

    Returns:
        uint8 of `packed_shape(x.shape)`, and scales float32 of `block_shape(x.shape, block)` (max|block| / 7).
    """
    codes, scale = _levels(x, 7, block)
    pairs = torch.nn.functional.pad(codes.to(torch.int8), (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2)).view(torch.uint8)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4), scale


def dequantise4(codes: Tensor, scale: Tensor, width: int, block: int = BLOCK4) -> Tensor:
    """The float32 tensor, `width` entries in its last dimension, that `codes` and `scale` stand for."""
    pairs = torch.stack([codes << 4, codes & 240], -1).view(torch.int8) >> 4  # an arithmetic shift keeps the sign
    return _values(pairs.flatten(-2)[..., :width], scale, block)


def _levels(x: Tensor, most: int, block: int) -> tuple[Tensor, Tensor]:
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % block))
    blocks = padded.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1) / most
    codes = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().clamp_(-most, most)
    return codes.flatten(-2)[..., : x.shape[-1]], scale


def _values(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    wide = scale.repeat_interleave(block, -1)[..., : codes.shape[-1]]
    return codes.to(torch.float32).mul_(wide)
