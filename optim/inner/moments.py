"""Moments in the state: float32 tensors, or 8-bit codes that are opened for a change and closed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from thinrank.optim.linalg.quantise import block_shape, compand8, dither, expand8
from thinrank.optim.rule import State

BITS = (32, 8)
NAMES = ("exp_avg", "exp_avg_sq")
"""Adam's two moments."""

MOMENTUM = ("momentum",)
"""The one of methods that have no second moment."""


def pays(width: int) -> bool:
    """True when the codes and scales of a row of `width` are less than its float32 numbers: whenever width > 1.

    `width + 4 ⌈width/256⌉` bytes against `4 width`; narrow rows have short blocks, so that the scales are 4/width of
    a byte for each entry: 1.3 bytes at 12 columns, 1.02 from 256 on.
    """
    return width + 4 * block_shape((width,))[0] < 4 * width


def zeros(shape: tuple[int, ...], device: torch.device, bits: int = 32, names: tuple[str, ...] = NAMES) -> State:
    """The moments `names` of `shape`, zero: a tensor of that name, or for each of them `…_codes` and `…_scale`.

    With 8 bits, rows for which that does not pay (of one entry) are kept in float32.
    """
    if bits == 32 or not pays(shape[-1]):
        return {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in names}
    state: State = {}
    for name in names:
        dtype = torch.uint8 if name == "exp_avg_sq" else torch.int8
        state[f"{name}_codes"] = torch.zeros(shape, dtype=dtype, device=device)
        state[f"{name}_scale"] = torch.zeros(block_shape(shape), dtype=torch.float32, device=device)
    return state


def first_moment(state: State) -> Tensor:
    """The first moment in `state` in float32, to be read."""
    name = NAMES[0]
    return state[name] if name in state else expand8(state[f"{name}_codes"], state[f"{name}_scale"])


@contextmanager
def moments(
    state: State, count: Sequence[int], names: tuple[str, ...] = NAMES, spare: Sequence[Tensor] = ()
) -> Iterator[tuple[Tensor, ...]]:
    """The float32 moments `names` in `state`, to be changed in place; when the block ends they are in `state`.

    Args:
        count: the step of each matrix of the batch, by which codes are rounded.
        spare: contiguous float32 tensors of their shape to compute in, one for each of `names` and two more, for
            whoever opens many of one shape.
    """
    if names[0] in state:
        yield tuple(state[name] for name in names)
        return
    work = spare[len(names) :]
    opened = tuple(
        expand8(state[f"{name}_codes"], state[f"{name}_scale"], spare=(spare[i], work[0]) if spare else ())
        for i, name in enumerate(names)
    )
    yield opened
    noise = dither(count, opened[0].shape[-1], opened[0].device)
    for name, moment in zip(names, opened, strict=True):
        own = state[f"{name}_codes"]
        codes, scale = compand8(moment, noise, signed=own.dtype is torch.int8, spare=work)
        own.copy_(codes)
        state[f"{name}_scale"].copy_(scale)
