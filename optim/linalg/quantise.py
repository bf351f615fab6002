"""Block-wise 8-bit codes for what must be remembered cheaply."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def block_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
    """Shape of the scales of a tensor of `shape`: one for each `block` entries of the last dimension."""
    return (*shape[:-1], -(-shape[-1] // block))


def quantise8(x: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit codes by blocks of the last dimension: `x ≈ codes · scale`, zero exact, error ≤ scale/2.

    Blocks never straddle rows, so that a matrix sharded by rows quantises as the whole one does.

    Returns:
        codes int8 of x's shape in [-127, 127], and scales float32 of `block_shape(x.shape)` (max|block| / 127).
    """
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % block))
    blocks = padded.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1) / 127.0
    codes = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().clamp_(-127, 127)
    return codes.flatten(-2)[..., : x.shape[-1]].to(torch.int8), scale


def dequantise8(codes: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """The float32 tensor that `codes` and `scale` stand for."""
    wide = scale.repeat_interleave(block, -1)[..., : codes.shape[-1]]
    return codes.to(torch.float32).mul_(wide)
