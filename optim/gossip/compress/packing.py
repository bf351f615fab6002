"""Small signed numbers, several to a byte.

The lower-numbered entry lies in the lower bits. Whole words are shifted and masked, which costs a fraction of what
strides do, and takes the machine to be little-endian, as the whole wire format does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Scratch

GROUP = {8: (1, 1), 6: (4, 3), 4: (2, 1), 3: (8, 3), 2: (4, 1), 1: (8, 1)}
"""By bits: so many entries fill so many bytes."""

_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ONES = 0x0101010101010101
_GATHER = 0x0102040810204080
_PLACES = 0x8040201008040201 - 2**64  # byte i keeps bit i; as a signed number, because torch takes no other


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes of `numel` entries, the last group filled up."""
    entries, size = GROUP[bits]
    return -(-numel // entries) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 (n,) in two's complement, n a multiple of the group, to uint8 (`packed_bytes(n, bits)`,).

    Numbers must fit in `bits`; for one bit they are 0 and -1.
    """
    if bits == 8:
        return codes.view(torch.uint8)
    entries, size = GROUP[bits]
    word = codes.view(_WORD[entries])
    if bits == 1:  # the product brings the lowest bit of byte i to bit 56 + i; no two bits meet
        return (word & _ONES).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)
    mask = 2**bits - 1
    packed = word & mask
    for i in range(1, entries):
        packed |= word >> (8 - bits) * i & mask << bits * i
    if size == 1:
        return packed.to(torch.uint8)
    return packed.view(torch.uint8).view(-1, packed.element_size())[:, :size].reshape(-1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, times 2^(8 - bits): int8 with the numbers in the upper bits, where signs need no care.

    For one bit they are 0 and -128.
    """
    if bits == 8:
        return packed.view(torch.int8)
    entries, size = GROUP[bits]
    kind = _WORD[entries]
    if size == 1:
        word = packed.to(kind)
    else:
        word = torch.zeros(packed.numel() // size, dtype=kind, device=packed.device)
        word.view(torch.uint8).view(-1, word.element_size())[:, :size] = packed.view(-1, size)
    if bits == 1:
        # the sum carries any set bit to the top of its byte and none beyond
        word.mul_(_ONES).bitwise_and_(_PLACES).add_(0x7F * _ONES)
        return word.bitwise_and_(_signed(0x80 * _ONES, 8)).view(torch.int8)
    mask = (2**bits - 1) << (8 - bits)
    codes = (word << 8 - bits).bitwise_and_(mask)
    for i in range(1, entries):
        codes |= (word << (8 - bits) * (i + 1)).bitwise_and_(_signed(mask << 8 * i, codes.element_size()))
    return codes.view(torch.int8)


def write_signs(flat: Tensor, into: Tensor, start: int, room: Scratch) -> None:
    """Puts the sign bits of a float32 vector, filled up to a multiple of 8, behind those of `start` entries."""
    word = torch.bitwise_right_shift(flat.view(torch.int32), 31, out=room("signs", torch.int32, flat.numel()))
    packed = pack(room("signs8", torch.int8, flat.numel()).copy_(word), 1)
    part = into[start // 8 :][: packed.numel()]
    part.copy_(packed[: part.numel()])


def read_signs(out: Tensor, signs: Tensor, start: int) -> Tensor:
    """Fills int32 `out` with the sign bits of the entries from `start` on, all other bits zero; returns it."""
    part = signs[start // 8 :][: packed_bytes(out.numel(), 1)]
    return out.copy_(unpack(part, 1)[: out.numel()]).bitwise_left_shift_(24)


def _signed(mask: int, size: int) -> int:
    return mask - 2 ** (8 * size) if mask >= 2 ** (8 * size - 1) else mask
