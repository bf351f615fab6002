"""Signs and small counts, several to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 255
"""The largest count that fits."""


def pack_bits(flags: Tensor) -> Tensor:
    """(8n,) bool to (n,) uint8, the first of eight in the lowest bit."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags.view(-1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """(..., n) uint8 to (..., 8n) uint8 of zeros and ones; the inverse of `pack_bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places & 1).flatten(-2)


def digits(most: int) -> int:
    """How many counts from 0 to `most` fit into a byte."""
    found = 1
    while (most + 1) ** (found + 1) <= MOST + 1:
        found += 1
    return found


def pack_counts(counts: Tensor, most: int) -> Tensor:
    """(d·n,) uint8 of values from 0 to `most` to (n,) uint8, d = `digits(most)` of them to a byte."""
    own = digits(most)
    packed = torch.zeros(counts.numel() // own, dtype=torch.uint8, device=counts.device)
    for column in counts.view(-1, own).unbind(-1):
        packed.mul_(most + 1 if own > 1 else 1).add_(column)
    return packed


def unpack_counts(packed: Tensor, most: int) -> Tensor:
    """(n,) uint8 to (d·n,) uint8; the inverse of `pack_counts`."""
    own = digits(most)
    found = torch.empty(packed.numel(), own, dtype=torch.uint8, device=packed.device)
    left = packed.clone()
    for place in reversed(range(own)):
        if own > 1:
            torch.remainder(left, most + 1, out=found[:, place])
            left.div_(most + 1, rounding_mode="floor")
        else:
            found[:, place] = left
    return found.view(-1)
