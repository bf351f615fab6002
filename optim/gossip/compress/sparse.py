"""A few entries as they are, the others as zeros: the largest, or some chosen by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor, generator_of
from thinrank.optim.gossip.compress.scales import BF16_MAX

VALUES = {"bf16": torch.bfloat16, "float32": torch.float32}
"""Formats in which entries that are kept travel."""

ROUNDED = {"bf16": 1.0 / 513.0, "float32": 0.0}
"""The largest relative error of a number in it (rounded to nearest, halfway above a power of two)."""

PLACES = 2**16
"""A place within a chunk is sent in 16 bits."""


def write_values(values: Tensor, part: Tensor, kind: str) -> None:
    """Puts float32 values into their bytes of a payload."""
    part.view(VALUES[kind]).copy_(values.clamp(-BF16_MAX, BF16_MAX) if kind == "bf16" else values)


def read_values(part: Tensor, kind: str) -> Tensor:
    """The float32 values that `write_values` put there."""
    return part.view(VALUES[kind]).to(torch.float32)


def largest(rows: Tensor, keep: int) -> Tensor:
    """Places (rows, keep) of the largest entries of each row by size, ascending; which of equal ones is left open."""
    return rows.abs().topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def write_places(places: Tensor, part: Tensor) -> None:
    """Puts places below 2¹⁶ into their bytes of a payload."""
    part.view(torch.int16).copy_(places.reshape(-1))  # the conversion drops what is above 16 bits


def read_places(part: Tensor) -> Tensor:
    """The int64 places that `write_places` put there."""
    return part.view(torch.int16).to(torch.int64).bitwise_and_(0xFFFF)


def check(fraction: float, values: str) -> None:
    """Refuses options that cannot be."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, got {values!r}")


@dataclass(frozen=True, kw_only=True)
class TopK(Compressor):
    """The largest entries of each chunk by size (Aji and Heafield 2017), exactly, with 16 bits for each one's place.

    Biased, contractive: what is left out is at most 1 - fraction of the square.

    Attributes:
        fraction: of the entries of a chunk that are sent, rounded up.
        chunk: entries that are compared with each other, at most 65536. Chunks run on over tensors' ends.
        values: "bf16" (rounded to nearest) or "float32".
    """

    fraction: float = 0.01
    chunk: int = PLACES
    values: str = "bf16"

    def __post_init__(self) -> None:
        check(self.fraction, self.values)
        if not 1 <= self.chunk <= PLACES:
            raise ValueError(f"chunk must be from 1 to {PLACES}, got {self.chunk}")

    @property
    def name(self) -> str:
        return "topk"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return TopKCodec(shapes, self)


class TopKCodec(Codec):
    """`TopK` bound to shapes. Payload: values, chunk by chunk in the order of their places, then the places, uint16."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: TopK) -> None:
        self.fraction, self.chunk, self.values = config.fraction, config.chunk, config.values
        kept = ROUNDED[self.values] ** 2 * self.fraction
        super().__init__(shapes, unbiased=False, error=math.sqrt(1.0 - self.fraction + kept))

    def _length(self) -> int:
        whole, rest = divmod(self.numel, self.chunk)
        keep = math.ceil(self.fraction * self.chunk)
        # (first entry, rows, entries of a row, how many of them are kept): the whole chunks, then what remains
        parts = [(0, whole, self.chunk, keep), (whole * self.chunk, 1, rest, math.ceil(self.fraction * rest))]
        self.parts = [part for part in parts if part[1] and part[2]]
        self.kept = sum(rows * keep for _, rows, _, keep in self.parts)
        return self.kept * (VALUES[self.values].itemsize + 2)

    def _split(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        size = self.kept * VALUES[self.values].itemsize
        return payload[:size], payload[size:]

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        values, places = self._split(payload)
        size = VALUES[self.values].itemsize
        done = 0
        for start, count, width, keep in self.parts:
            rows = flat[start : start + count * width].view(count, width)
            found = largest(rows, keep)
            write_values(
                rows.gather(1, found).view(-1), values[done * size : (done + count * keep) * size], self.values
            )
            write_places(found, places[2 * done : 2 * (done + count * keep)])
            done += count * keep

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        values, places = self._split(payload)
        value, place = read_values(values, self.values), read_places(places)
        flat.zero_()
        done = 0
        for start, count, width, keep in self.parts:
            rows = flat[start : start + count * width].view(count, width)
            own = slice(done, done + count * keep)
            rows.scatter_(1, place[own].view(count, keep), value[own].view(count, keep))
            done += count * keep


@dataclass(frozen=True, kw_only=True)
class RandomK(Compressor):
    """One entry by chance of each run of neighbours; sender and receiver draw the same ones, so no places travel.

    As random-k (Stich et al. 2018), each entry being sent with probability `fraction`, but stratified: runs of equal
    length cost one draw for each entry that is sent and none is twice as likely as another to be neglected. Ours.

    Both sides must draw on one kind of device, whose generators differ.

    Attributes:
        fraction: of the entries that are sent, their number rounded up.
        values: "float32" or "bf16" (rounded to nearest).
        unbiased: multiplies by the length of the run. The relative variance is then that length less one: schemes that
            exchange differences diverge, so it is not the default. Needs float32.
    """

    fraction: float = 0.01
    values: str = "float32"
    unbiased: bool = False

    def __post_init__(self) -> None:
        check(self.fraction, self.values)
        if self.unbiased and self.values != "float32":
            raise ValueError(f"values must be float32 to be unbiased, got {self.values!r}")

    @property
    def name(self) -> str:
        return "randomk"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return RandomKCodec(shapes, self)


class RandomKCodec(Codec):
    """`RandomK` bound to shapes. Payload: the values, in the order of their places."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: RandomK) -> None:
        self.fraction, self.values, self.enlarged = config.fraction, config.values, config.unbiased
        super().__init__(shapes, unbiased=config.unbiased, error=0.0)
        longest = -(-self.numel // self.kept) if self.kept else 1
        kept = ROUNDED[self.values] ** 2 / longest
        self.error = math.sqrt(longest - 1 if self.enlarged else 1.0 - 1.0 / longest + kept)

    def _length(self) -> int:
        self.kept = math.ceil(self.fraction * self.numel)
        return self.kept * VALUES[self.values].itemsize

    def _places(self, key: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places of the entries, and the lengths of their runs."""
        ends = torch.arange(self.kept + 1, device=device).mul_(self.numel).div_(self.kept, rounding_mode="floor")
        length = ends.diff()
        draw = torch.empty_like(length).random_(2**31, generator=generator_of(key, device))
        return draw.mul_(length).bitwise_right_shift_(31).add_(ends[:-1]), length

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        write_values(flat[self._places(key, flat.device)[0]], payload, self.values)

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        places, length = self._places(key, flat.device)
        value = read_values(payload, self.values)
        flat.zero_()
        most = torch.finfo(torch.float32).max
        flat[places] = (value * length).clamp_(-most, most) if self.enlarged else value
