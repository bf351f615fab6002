"""Any parameter as matrices `(long, short)`: compressed along short, one day sharded along long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

SIDES = ("std", "reverse_std", "left", "right", "full")


@dataclass(frozen=True, slots=True)
class MatrixView:
    """How (a part of) a parameter is seen as `blocks` equal matrices.

    The parameter is flattened to two dimensions (a convolution `(out, in, kh, kw)` becomes `(out, in·kh·kw)`), rows
    `start:stop` are taken, split into `blocks` equal parts (heads, or the parts of a fused weight), and each part is
    transposed where its columns and not its rows are to be kept.

    Attributes:
        start, stop: rows of the flattened parameter.
        blocks: equal parts these rows are cut into.
        columns: columns of the flattened parameter.
        transposed: True when the kept ("long") side is the columns.
        first: the first of these columns; not 0 where a fused weight lies transposed, as GPT-2's do.
    """

    start: int
    stop: int
    blocks: int
    columns: int
    transposed: bool
    first: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """`(long, short)` of one block."""
        rows = (self.stop - self.start) // self.blocks
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    @property
    def stored(self) -> tuple[int, int]:
        """`(rows, columns)` of what the view shows, all blocks together, as it lies in memory."""
        return (self.stop - self.start, self.columns)

    def of(self, tensor: Tensor) -> Tensor:
        """`(blocks, long, short)` of `tensor`; a view of it wherever its strides allow one, else a copy."""
        if self.blocks == 1 and tensor.shape == self.stored:
            parts = tensor.unsqueeze(0)  # the plain matrix, which is nearly always what comes
        else:
            flat = tensor.reshape(tensor.shape[0], -1)[self.start : self.stop, self.first : self.first + self.columns]
            parts = flat.unflatten(0, (self.blocks, -1))
        return parts.mT if self.transposed else parts


def writable(tensor: Tensor) -> bool:
    """True when `MatrixView.of(tensor)` is a view, so that writing to it writes to `tensor`.

    A convolution in channels-last memory is the usual exception: its flattening is a copy.
    """
    try:
        tensor.view(tensor.shape[0], -1)
    except RuntimeError:
        return False
    return True


def matrix_views(
    shape: tuple[int, ...],
    side: str = "std",
    *,
    sections: Sequence[int] | None = None,
    blocks: int = 1,
    along: str = "rows",
) -> tuple[MatrixView, ...]:
    """The views of a parameter of `shape`, one for each section of a fused weight.

    Args:
        shape: of a parameter with at least two dimensions; the first is the rows.
        side: which side is compressed, in GaLore's words: `std` the shorter one (columns when square), `reverse_std`
            the longer one, `right` the columns, `left` the rows, `full` both (kept as for `std`).
        sections: row counts of a fused weight (q, k, v of unequal size), each its own matrix.
        blocks: equal parts (heads) every section's rows are cut into.
        along: `rows`, or `columns` where the sections are column counts: a fused weight that is stored transposed.

    Raises:
        ValueError: when the sections do not add up to the rows or the blocks do not divide them.
    """
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"a matrix view needs at least two non-empty dimensions, got {tuple(shape)}: use a dense rule")
    if side not in SIDES:
        raise ValueError(f"proj_type must be one of {', '.join(SIDES)}, got {side!r}")
    rows, columns = shape[0], math.prod(shape[1:])
    if not isinstance(sections, (tuple, list, type(None))):
        raise ValueError(f"sections must be a list of row counts, got {sections!r}")
    if along not in ("rows", "columns"):
        raise ValueError(f"sections_along must be rows or columns, got {along!r}")
    whole = rows if along == "rows" else columns
    parts = (whole,) if sections is None else tuple(sections)
    if sum(parts) != whole or min(parts) < 1:
        raise ValueError(f"sections must be positive and add up to the {whole} {along} of the weight, got {parts}")
    views, start = [], 0
    for part in parts:
        height, width = (part, columns) if along == "rows" else (rows, part)
        if blocks < 1 or height % blocks:
            raise ValueError(f"blocks must divide the {height} rows of its section, got {blocks}")
        short_is_columns = height // blocks >= width
        compress_columns = {
            "std": short_is_columns,
            "full": short_is_columns,
            "reverse_std": not short_is_columns,
            "right": True,
            "left": False,
        }[side]
        top, left = (start, 0) if along == "rows" else (0, start)
        views.append(MatrixView(top, top + height, blocks, width, transposed=not compress_columns, first=left))
        start += part
    return tuple(views)
