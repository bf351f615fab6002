"""What every compressor offers: a payload of known length, no chance but by its key, and its error as one number."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.rule import seed_of

BLOCK = 2**18
"""Entries worked on at a time on a CPU: what is computed from 1 MiB of float32 stays in its caches. With a quarter of
it torch's own time for each operation, some thirty of which a block takes, costs a third of the speed."""

DEVICE_BLOCK = 2**24
"""The same elsewhere, where only the memory for what is computed matters, and each kernel's launch costs."""


class Codec(ABC):
    """A compressor bound to the shapes of the tensors that lie one after the other in a flat float32 vector.

    A payload's length depends on the shapes alone, so a receiver can have its buffer ready. Nothing here is remembered
    between calls, and torch's global generator is neither read nor moved.

    Attributes:
        shapes: of the tensors, in their order in the vector.
        numel: entries of the vector.
        nbytes: bytes of every payload.
        unbiased: the mean of `decode(encode(x))` over keys is x (to 2⁻¹⁵ of a quantiser's step).
        error: what `sqrt(E‖C(z) - z‖² / ‖z‖²)` cannot exceed for any finite z of ordinary size (the worst case, far
            above the usual one), inf where there is no bound.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], *, unbiased: bool, error: float) -> None:
        self.shapes = tuple(tuple(int(n) for n in shape) for shape in shapes)
        self.numel = sum(math.prod(shape) for shape in self.shapes)
        self.unbiased = unbiased
        self.error = error
        self.nbytes = self._length()

    def encode(self, flat: Tensor, key: int, *, out: Tensor | None = None) -> Tensor:
        """The payload of a vector.

        Args:
            flat: float32 (numel,), finite (ask `finite` before); infinities and NaN give a payload without meaning.
            key: decides all chance, as by `key_of`; not negative.
            out: uint8 (nbytes,), contiguous and at a multiple of 8 bytes of its storage, to write into; a fresh tensor
                of this size costs a CPU as much as the compression.

        Returns:
            uint8 (nbytes,) on the vector's device.
        """
        _check(flat, torch.float32, self.numel)
        payload = torch.empty(self.nbytes, dtype=torch.uint8, device=flat.device) if out is None else out
        _check(payload, torch.uint8, self.nbytes)
        if self.numel:
            self._write(flat.detach().contiguous(), payload, key)
        return payload

    def decode(self, payload: Tensor, key: int, *, out: Tensor | None = None) -> Tensor:
        """The vector that a payload stands for: the same bits on every machine of one kind.

        Args:
            payload: uint8 (nbytes,).
            key: the one that it was encoded with.
            out: float32 (numel,), contiguous, to write into.

        Returns:
            float32 (numel,) on the payload's device.
        """
        _check(payload, torch.uint8, self.nbytes)
        flat = torch.empty(self.numel, dtype=torch.float32, device=payload.device) if out is None else out
        _check(flat, torch.float32, self.numel)
        if self.numel:
            payload = payload.contiguous()
            # torch views bytes as wider numbers only where they begin at a multiple of their width
            self._read(payload.clone() if payload.storage_offset() % 8 else payload, flat, key)
        return flat

    @abstractmethod
    def _length(self) -> int:
        """`nbytes`, from `shapes` and `numel`."""

    @abstractmethod
    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        """Fills a payload; both contiguous, neither empty."""

    @abstractmethod
    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        """Fills a vector; both contiguous, neither empty."""


def _check(x: Tensor, dtype: torch.dtype, numel: int) -> None:
    if x.dtype is not dtype or x.shape != (numel,):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"expected {kind} of shape ({numel},), got {x.dtype} of {tuple(x.shape)}")


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """What a config holds: a compressor and its options, not yet bound to shapes."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name by which `compressor` makes it."""

    @property
    def digest(self) -> int:
        """A number of 8 bits that follows from the name and all options: what two ranks should agree on."""
        return zlib.crc32(repr(self).encode()) & 0xFF

    @abstractmethod
    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        """The codec of a flat vector in which tensors of these shapes lie one after the other."""


def key_of(seed: int, rank: int, step: int, part: int) -> int:
    """The key of one rank's message about one part of the model in one step, in [0, 2⁶³).

    Counters next to each other give unrelated keys (the finaliser of splitmix64, Steele, Lea and Flood 2014). torch's
    generator of a CPU takes the lower 32 bits alone, which are mixed as well as the others.
    """
    mixed = seed_of(seed, rank, step)
    for counter in (rank, step, part):
        mixed = (mixed + 0x9E3779B97F4A7C15 * (counter + 1)) & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed & 0x7FFFFFFFFFFFFFFF


def generator_of(key: int, device: torch.device) -> torch.Generator:
    """A generator that belongs to `key` alone (Philox on CUDA, Mersenne Twister on a CPU)."""
    return torch.Generator(device=device).manual_seed(key)


def spans(numel: int, unit: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Where the blocks begin and end in which a vector is worked on; each but the last holds whole units."""
    most = BLOCK if device.type == "cpu" else DEVICE_BLOCK
    length = max(most // unit, 1) * unit
    for start in range(0, numel, length):
        yield start, min(start + length, numel)


def whole_rows(flat: Tensor, width: int) -> Tensor:
    """(n,) as (rows, width), filled up with zeros; a view where nothing is missing."""
    short = -flat.numel() % width
    return (torch.nn.functional.pad(flat, (0, short)) if short else flat).view(-1, width)


def multiply_rows(flat: Tensor, factor: Tensor, width: int) -> None:
    """Multiplies each `width` entries of a vector, the last ones perhaps fewer, by their own factor, in place."""
    if flat.numel() % width:
        flat.mul_(factor.repeat_interleave(width)[: flat.numel()])
    else:
        flat.view(-1, width).mul_(factor.unsqueeze(1))


class Scratch:
    """Memory in which the blocks of one call are worked on, by name: fresh memory costs a CPU more than arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """(count,) of a name that always has the same dtype; what it holds is what its last user left."""
        if name not in self._held or self._held[name].numel() < count:
            self._held[name] = torch.empty(count, dtype=dtype, device=self.device)
        return self._held[name][:count]


def finite(flat: Tensor) -> bool:
    """Whether a float32 vector holds neither an infinity nor a NaN; waits for the device once."""
    room = Scratch(flat.device)
    largest = [
        torch.abs(flat[a:b], out=room("size", flat.dtype, b - a)).amax() for a, b in spans(flat.numel(), 1, flat.device)
    ]
    return not largest or math.isfinite(torch.stack(largest).amax().item())


class Measured:
    """How much a compressor loses in use: a moving average of `‖C(z) - z‖² / ‖z‖²`.

    Vectors of zeros, and those whose norm overflows, do not count. Nothing waits for the device before `alpha` is read.

    Args:
        decay: of the average, by each vector, in [0, 1).
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self._sum: Tensor | None = None
        self._weight: Tensor | None = None

    def add(self, z: Tensor, decoded: Tensor) -> None:
        """Counts one vector (float32, flat) and what came of it."""
        lost = torch.zeros((), dtype=torch.float64, device=z.device)
        all_ = torch.zeros_like(lost)
        room = Scratch(z.device)
        for a, b in spans(z.numel(), 1, z.device):
            part, difference = z[a:b], torch.sub(decoded[a:b], z[a:b], out=room("difference", z.dtype, b - a))
            all_ += torch.dot(part, part)
            lost += torch.dot(difference, difference)
        counts = ((all_ > 0) & (lost < math.inf) & (all_ < math.inf)).to(torch.float64)
        share = torch.where(counts > 0, lost / all_, 0.0)
        if self._sum is None or self._weight is None:
            self._sum, self._weight = torch.zeros_like(lost), torch.zeros_like(lost)
        gain = (1.0 - self.decay) * counts
        self._sum += gain * (share - self._sum)
        self._weight += gain * (1.0 - self._weight)

    @property
    def alpha(self) -> float:
        """The square root of the average, NaN before the first vector; compare with a graph's limit on alpha."""
        if self._sum is None or self._weight is None:
            return math.nan
        weight = self._weight.item()
        return math.sqrt(self._sum.item() / weight) if weight else math.nan
