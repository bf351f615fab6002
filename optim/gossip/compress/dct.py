"""The largest coefficients of chunks' cosine transforms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor, spans
from thinrank.optim.gossip.compress.sparse import (
    PLACES,
    ROUNDED,
    VALUES,
    check,
    largest,
    read_places,
    read_values,
    write_places,
    write_values,
)
from thinrank.optim.linalg.fixed import basis_matrix


@dataclass(frozen=True, kw_only=True)
class Dct(Compressor):
    """Chunks of matrices in the orthonormal DCT-II of both sides, of which the largest coefficients are sent: DeMo.

    Peng, Quesnelle and Kingma 2024. Biased, contractive. Tensors of more than two dimensions are matrices of their
    first dimension and the rest, vectors have chunks of one row. DeMo's chunk is a side's largest divisor up to 64,
    which is 43 for 5461 and 1 for a large prime; here a side has as few equal chunks of at most `chunk` as it can, the
    last filled up with zeros.

    Products are the same to the bit on equal machines with equally many threads.

    Attributes:
        chunk: the longest side of a chunk, at most 256.
        k: coefficients of a whole chunk, chunk × chunk, that are sent. Of smaller ones the same share, rounded up.
        values: "bf16" (rounded to nearest) or "float32".
    """

    chunk: int = 64
    k: int = 32
    values: str = "bf16"

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= math.isqrt(PLACES):
            raise ValueError(f"chunk must be from 1 to {math.isqrt(PLACES)}, got {self.chunk}")
        if not 1 <= self.k <= self.chunk**2:
            raise ValueError(f"k must be from 1 to chunk² = {self.chunk**2}, got {self.k}")
        check(1.0, self.values)

    @property
    def name(self) -> str:
        return "dct"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return DctCodec(shapes, self)


@dataclass(frozen=True, slots=True)
class _Part:
    """How a matrix is cut: `down` by `across` chunks of `rows` by `columns` entries, `keep` coefficients of each."""

    shape: tuple[int, int]
    down: int
    across: int
    rows: int
    columns: int
    keep: int

    @property
    def kept(self) -> int:
        return self.down * self.across * self.keep


class _Strip(NamedTuple):
    """Rows of chunks of a matrix: its own entries, which the last chunks may reach beyond, and their coefficients."""

    part: _Part
    entries: Tensor
    down: int
    width: int
    left: Tensor
    right: Tensor
    values: Tensor
    places: Tensor


class DctCodec(Codec):
    """`Dct` bound to shapes. Payload: values, tensor by tensor and chunk by chunk in the order of their places, then
    the places within the chunks, uint16."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: Dct) -> None:
        self.chunk, self.k, self.values = config.chunk, config.k, config.values
        super().__init__(shapes, unbiased=False, error=0.0)
        share = min((part.keep / (part.rows * part.columns) for part in self.parts), default=1.0)
        # 2⁻²⁰: the transforms' own rounding
        self.error = math.sqrt(1.0 - share + ROUNDED[self.values] ** 2 * share) + 2.0**-20
        self.bases: dict[tuple[int, torch.device], Tensor] = {}

    def _length(self) -> int:
        self.parts = [self._cut(shape) for shape in self.shapes if math.prod(shape)]
        self.kept = sum(part.kept for part in self.parts)
        return self.kept * (VALUES[self.values].itemsize + 2)

    def _cut(self, shape: tuple[int, ...]) -> _Part:
        m, n = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        down, across = -(-m // self.chunk), -(-n // self.chunk)
        rows, columns = -(-m // down), -(-n // across)
        keep = -(-self.k * rows * columns // self.chunk**2)
        return _Part((m, n), -(-m // rows), -(-n // columns), rows, columns, keep)

    def _basis(self, n: int, device: torch.device) -> Tensor:
        if (n, device) not in self.bases:
            self.bases[n, device] = basis_matrix("dct", n, dtype=torch.float32, device=device)
        return self.bases[n, device]

    def _strips(self, flat: Tensor, payload: Tensor) -> Iterator[_Strip]:
        """The matrices in `flat` a few rows of chunks at a time, each beside what of the payload is of it."""
        ends = self.kept * VALUES[self.values].itemsize
        values, places = payload[:ends], payload[ends:]
        for part in self.parts:
            m, n = part.shape
            x, flat = flat[: m * n].view(m, n), flat[m * n :]
            left, right = self._basis(part.rows, x.device), self._basis(part.columns, x.device)
            width = part.across * part.columns
            for start, stop in spans(part.down * part.rows * width, part.rows * width, x.device):
                down = (stop - start) // width // part.rows
                count = down * part.across * part.keep
                size = count * VALUES[self.values].itemsize
                entries = x[start // width : stop // width]
                yield _Strip(part, entries, down, width, left, right, values[:size], places[: 2 * count])
                values, places = values[size:], places[2 * count :]

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        for part, entries, down, width, left, right, values, places in self._strips(flat, payload):
            filled = (0, width - part.shape[1], 0, down * part.rows - len(entries))
            strip = torch.nn.functional.pad(entries, filled)
            chunks = strip.view(down, part.rows, part.across, part.columns).transpose(1, 2)
            rows = (left @ chunks @ right.mT).view(down * part.across, -1)
            found = largest(rows, part.keep)
            write_values(rows.gather(1, found).view(-1), values, self.values)
            write_places(found, places)

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        for part, entries, down, width, left, right, values, places in self._strips(flat, payload):
            rows = torch.zeros(down * part.across, part.rows * part.columns, device=flat.device)
            value = read_values(values, self.values).view(-1, part.keep)
            rows.scatter_(1, read_places(places).view(-1, part.keep), value)
            chunks = left.mT @ rows.view(down, part.across, part.rows, part.columns) @ right
            strip = chunks.transpose(1, 2).reshape(down * part.rows, width)
            entries.copy_(strip[: len(entries), : part.shape[1]])
