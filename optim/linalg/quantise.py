"""Block-wise codes of 8 and of 4 bits for what must be remembered cheaply."""

from __future__ import annotations

from collections.abc import Sequence

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


# --- codes for moments: few bits over many decades --------------------------------------------------------------------

DITHER_MARGIN = 2.0**-13
"""Dither keeps this distance from the ends of [0, 1): a value that a code stands for is found at its level up to
255 · 3 · 2⁻²⁴ = 2⁻¹⁴·⁵, and no dither may move it."""


def dither(count: Sequence[int], width: int, device: torch.device, block: int = BLOCK) -> Tensor:
    """Numbers in [0, 1) by which `compand8` rounds, one for each place in a block, others in each step.

    A Kronecker sequence (steps along the golden ratio, places along the plastic number's inverse): equidistributed over
    any run of steps, so that rounding errors of a slow drift cancel sooner than with random numbers; no generator, and
    the same for a matrix alone, in a batch, and for any of its rows.

    Args:
        count: the step of each matrix of a batch.
        width: length of the rows.

    Returns:
        (block,) where all counts are equal, else (batch, 1, 1, block); block is at most `width`.
    """
    place = torch.arange(min(block, width), device=device, dtype=torch.float32) * 0.7548776662466927
    phases = [c * 0.6180339887498949 % 1.0 for c in count]
    if len(set(count)) == 1:
        return place.add_(phases[0]).frac_()
    return (place + torch.tensor(phases, dtype=torch.float32).to(device)[:, None, None, None]).frac_()


def compand8(
    x: Tensor,
    noise: Tensor | None = None,
    *,
    signed: bool = True,
    block: int = BLOCK,
    spare: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """8-bit codes whose levels lie as fourth powers: `x ≈ ± scale · (code / L)⁴`, L = 127 with a sign, 255 without.

    Within a block, numbers over a range of L⁴ (2.6e8 signed, 4.2e9 unsigned) have a code that is not zero. A number
    between the levels c and c + 1 becomes one of the two, so its relative error is below `(1 + 1/c)⁴ − 1`: 1.6 % at the
    largest of the block (unsigned; 3.2 % signed), 5 % (10 %) at a hundredth of it, 17 % (38 %) at 1e-4 of it. Without
    `noise` it is the nearer level and the error about half of that. Zero is exact. What is not zero in an unsigned
    tensor has a code of at least 1: a second moment of zero would divide by zero.

    With `noise` (`dither`) a number becomes one of its two levels in proportion, on average over the steps. A moving
    average needs that: second moments change by 1 − β2 = 0.1 % a step and would never leave the nearest of levels that
    are 1.6 % and more apart, but for large gradients, which move them up alone. The mean is kept on the scale of codes;
    in `x` it is above by at most 1.5 / c².

    Codes are a fixed point: coding what `expand8` gives for them gives the same codes and scales to the bit, whatever
    the noise, while `scale · L⁻⁴` is a normal float32 (scale above 5e-29).

    An infinite number is coded as the largest finite one. A block with a NaN decodes to NaN.

    Args:
        x: (..., width); not negative unless `signed`.
        noise: in [0, 1), broadcast against (..., blocks, block).
        spare: two contiguous float32 tensors of x's shape to compute in, for whoever calls this often.

    Returns:
        codes of x's shape, int8 or uint8, and scales float32 of `block_shape(x.shape)`, the largest |x| of each block.
    """
    normal = torch.finfo(torch.float32)
    blocks = _by_blocks(x.float(), block)
    fits = len(spare) > 0 and blocks.numel() == x.numel()
    level, other = (each.view(blocks.shape) for each in spare) if fits else (None, None)
    size = torch.abs(blocks, out=level) if signed else blocks
    scale = size.amax(-1).clamp_(max=normal.max)
    level = torch.div(size, torch.where(scale == 0, 1.0, scale).unsqueeze(-1), out=size if signed else level)
    # No zeros, because MKL takes the roots of zeros and subnormal numbers one by one, four and thirty times as long. Of
    # the least normal number the level is 1e-7, which no dither lifts to 1. An infinite number counts as the scale.
    level.clamp_(normal.tiny, 1.0).sqrt_().sqrt_().mul_(127.0 if signed else 255.0)
    if noise is None:
        level.round_()
    else:
        level.add_(noise * (1.0 - 2.0 * DITHER_MARGIN) + DITHER_MARGIN)
    if signed:
        level.copysign_(blocks)
    else:
        torch.maximum(level, torch.sign(blocks, out=other), out=level)
    # The conversion cuts the fraction off. By way of int16 to uint8, since torch has no vectors for the direct way.
    whole = level.flatten(-2)[..., : x.shape[-1]]
    return whole.to(torch.int8) if signed else whole.to(torch.int16).to(torch.uint8), scale


def expand8(codes: Tensor, scale: Tensor, block: int = BLOCK, *, spare: Sequence[Tensor] = ()) -> Tensor:
    """The float32 tensor that the codes of `compand8` and their scales stand for.

    Args:
        spare: two contiguous float32 tensors of codes' shape to compute in, for whoever calls this often; the result
            lies in the first unless rows must be filled up.
    """
    signed = codes.dtype is torch.int8
    level = spare[1 if signed else 0].copy_(codes) if spare else codes.float()
    if signed:
        level.div_(127.0)
        power = torch.square(level, out=spare[0] if spare else None).square_().copysign_(level)
    else:
        power = level.div_(255.0).square_().square_()
    return _by_blocks(power, block).mul_(scale.unsqueeze(-1)).flatten(-2)[..., : codes.shape[-1]]


def _by_blocks(x: Tensor, block: int) -> Tensor:
    """(..., width) as (..., blocks, block), filled up with zeros; rows shorter than a block are one block."""
    block = min(block, x.shape[-1])
    short = -x.shape[-1] % block
    return (torch.nn.functional.pad(x, (0, short)) if short else x).unflatten(-1, (-1, block))
