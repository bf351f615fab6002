"""The largest singular triples of many weights, followed by warm power iteration, wherever the weights lie.

A weight W (out, in) is a `Piece` on each rank: all of it, its rows, or any range of its entries row by row. Products
with W are sums of products with the pieces, so that no weight is ever gathered: what travels for a matrix in an
iteration are 2 vectors of its long and 2 of its short side, of all matrices in one message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.rule import key_of

FIRST = 30
"""Iterations of a matrix's first reading, or its first after a weight that was not finite."""

MORE = 20
"""Further iterations where the residual says that the triple is not found yet."""

RESIDUAL = 0.1
"""Above this share of σ1 a triple is not found yet."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What lies on this rank of a matrix.

    Attributes:
        entries: (n,) of it, one after the other row by row, of any floating dtype; () where there is nothing here. A
            weight (out, in) that is whole may be given as it is.
        shape: (out, in) of the whole matrix.
        start: the place of the first of them in the whole.
    """

    entries: Tensor
    shape: tuple[int, int]
    start: int = 0

    @classmethod
    def whole(cls, weight: Tensor) -> Piece:
        """Of a weight that is all here: (out, …), later dimensions flattened."""
        return cls(weight.detach().flatten(1), (weight.shape[0], weight.numel() // max(1, weight.shape[0])))

    def _parts(self) -> tuple[int, int, Tensor, Tensor, Tensor]:
        """Of what is here: its first row, where in that row it begins, the end of a row that was begun elsewhere, whole
        rows, and the beginning of a row that ends elsewhere; in float32."""
        width = self.shape[1]
        entries = self.entries.float()
        if entries.ndim == 2:
            empty = entries.new_empty(0)
            return 0, 0, empty, entries, empty
        row, column = divmod(self.start, width) if width else (0, 0)
        head = min((-self.start) % width if width else 0, len(entries))
        rows = (len(entries) - head) // width if width else 0
        middle = entries[head : head + rows * width].view(rows, width)
        return row, column, entries[:head], middle, entries[head + rows * width :]

    def times(self, right: Tensor) -> Tensor:
        """This rank's part of W · `right`: (in, k) → (out, k)."""
        row, column, head, middle, tail = self._parts()
        out = right.new_zeros(self.shape[0], right.shape[1])
        if len(head):
            out[row] += head @ right[column : column + len(head)]
            row += 1
        if len(middle):
            out[row : row + len(middle)] = middle @ right
        if len(tail):
            out[row + len(middle)] += tail @ right[: len(tail)]
        return out

    def turned_times(self, left: Tensor) -> Tensor:
        """This rank's part of Wᵀ · `left`: (out, k) → (in, k)."""
        row, column, head, middle, tail = self._parts()
        out = left.new_zeros(self.shape[1], left.shape[1])
        if len(head):
            out[column : column + len(head)] += head[:, None] * left[row]
            row += 1
        if len(middle):
            out += middle.mT @ left[row : row + len(middle)]
        if len(tail):
            out[: len(tail)] += tail[:, None] * left[row + len(middle)]
        return out

    def energy(self) -> Tensor:
        """This rank's part of ‖W‖_F² (scalar)."""
        return self.entries.float().square().sum()


@dataclass(slots=True)
class Triple:
    """What is known of a weight's spectrum.

    Attributes:
        left: (out,) u1, the first left singular vector; zero for a zero weight.
        right: (in,) v1, the first right one.
        sigma: (2,) the two largest singular values, both from below; the second is 0 for a weight that is a vector.
        energy: ‖W‖_F² (scalar).
        residual: ‖Wᵀu1 − σ1 v1‖ / σ1 (scalar) before the last half step: above 0.1, v1 is not found. Between two values
            that nearly agree any vector of their plane leaves little, so that the gap has to be looked at as well.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor
    energy: Tensor
    residual: Tensor

    @property
    def stable_rank(self) -> Tensor:
        """‖W‖_F² / σ1² (scalar), from 1 to the rank of W; 0 for a zero weight.

        It sees that energy gathers in one direction, early and cheaply; it does not see what happens among the others.
        """
        first = self.sigma[0].square()
        return torch.where(first > 0, self.energy / first.clamp(min=torch.finfo(first.dtype).tiny), 0.0)

    @property
    def gap(self) -> Tensor:
        """σ1 / σ2 (scalar): near 1 no direction is the first, and v1 says nothing; infinite without a second."""
        return self.sigma[0] / self.sigma[1]


@dataclass
class SpectrumTracker:
    """Follows (u1, σ1, v1) and σ2 of weights from reading to reading.

    Block power iteration on two vectors, the second kept orthogonal to the first; it starts where the last reading
    ended. An iteration takes four products of a weight with a vector, as much as the forward of two tokens. After a
    drift of 0.2 % of a weight per step, one iteration in ten steps follows v1 to a cosine of 0.99 wherever σ1 / σ2 is
    above 1.03; σ1 is right to 2 % even below. The recursion is that of spectral normalisation (Miyato et al. 2018), the
    second vector and the stopping are ours.

    Args:
        shapes: (out, in) of each matrix by name.
        iterations: at each reading but the first.

    Attributes:
        triples: the last reading, by name.
    """

    shapes: Mapping[str, tuple[int, int]]
    iterations: int = 3
    triples: dict[str, Triple] = field(default_factory=dict)
    _right: dict[str, Tensor] = field(default_factory=dict)  # (in, 2)
    _cold: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}: 3 follow a weight in training")
        self._cold = set(self.shapes)

    @torch.no_grad()
    def update(self, pieces: Mapping[str, Piece], axis: Axis = WHOLE) -> dict[str, Triple]:
        """Reads the weights anew. Where matrices lie in pieces, all ranks call it, with pieces of the same names.

        A weight with an entry that is not finite has triples that are no numbers, and is begun anew at the next.

        Args:
            pieces: of some or all matrices, by name.
            axis: the ranks that hold the other pieces.

        Raises:
            ValueError: for a matrix that was not named at the start, or has another shape.
        """
        names = list(pieces)
        for name in names:
            if self.shapes.get(name) != pieces[name].shape:
                raise ValueError(
                    f"{name} is {pieces[name].shape}, and the tracker was made for {self.shapes.get(name)}: make one "
                    "for the matrices that are to be followed"
                )
        if not names:
            return {}
        for name in names:
            right = self._right[name] if name in self._right else _start(name, self.shapes[name][1])
            self._right[name] = right.to(pieces[name].entries.device)
        with exact(pieces[names[0]].entries.device):
            return self._update(names, pieces, axis)

    def _update(self, names: Sequence[str], pieces: Mapping[str, Piece], axis: Axis) -> dict[str, Triple]:
        cold = [name for name in names if name in self._cold]
        self._iterate(cold, pieces, axis, FIRST - self.iterations)
        left, values, residual = self._iterate(names, pieces, axis, self.iterations)
        energies = _together([pieces[name].energy().reshape(1) for name in names], axis)
        late = [name for name, value in zip(names, _listed(residual), strict=True) if value > RESIDUAL]
        again = dict(zip(late, zip(*self._iterate(late, pieces, axis, MORE), strict=True), strict=True))
        found: dict[str, Triple] = {}
        for i, name in enumerate(names):
            u, s, r = again.get(name, (left[i], values[i], residual[i]))
            found[name] = Triple(u[:, 0], self._right[name][:, 0], s, energies[i][0], r)
        finite = _listed([triple.sigma[0].isfinite() & triple.energy.isfinite() for triple in found.values()])
        for name, fine in zip(names, finite, strict=True):
            self._cold.discard(name)
            if not fine:
                nothing = torch.full_like(found[name].sigma, torch.nan)
                found[name].sigma, found[name].residual = nothing, nothing[0]
                del self._right[name]
                self._cold.add(name)
        self.triples |= found
        return found

    def _iterate(
        self, names: Sequence[str], pieces: Mapping[str, Piece], axis: Axis, times: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Left vectors (out, 2), values (2,) and residuals of `names` after so many iterations."""
        left: list[Tensor] = []
        values: list[Tensor] = []
        residual: list[Tensor] = []
        for _ in range(times if names else 0):
            before = [self._right[name] for name in names]
            images = _together([pieces[name].times(v) for name, v in zip(names, before, strict=True)], axis)
            left = [_orthonormal(image)[0] for image in images]
            backs = _together([pieces[name].turned_times(u) for name, u in zip(names, left, strict=True)], axis)
            values, residual = [], []
            for name, image, back, v in zip(names, images, backs, before, strict=True):
                length = image[:, 0].norm()
                floor = torch.finfo(length.dtype).tiny
                residual.append((back[:, 0] - length * v[:, 0]).norm() / length.clamp(min=floor))
                new, sizes = _orthonormal(back)
                values.append(sizes)
                self._right[name] = torch.where(sizes > 0, new, v)
        return left, values, residual

    def drive(self, gradients: Mapping[str, Piece], axis: Axis = WHOLE) -> dict[str, Tensor]:
        """u1ᵀ G v1 of each gradient G (scalars), by the triples of the last reading.

        Under plain gradient descent σ1 grows by −lr times as much in a step. It cannot see what an adaptive optimizer
        makes of the gradient: there only its sign, and that it lasts, mean something.
        """
        names = [name for name in gradients if name in self.triples]
        if not names:
            return {}
        own = []
        with exact(gradients[names[0]].entries.device):
            for name in names:
                triple = self.triples[name]
                own.append((triple.left @ gradients[name].times(triple.right[:, None])[:, 0]).reshape(1))
        return {name: value[0] for name, value in zip(names, _together(own, axis), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Where the vectors are, as CPU tensors."""
        return {"right": {name: right.cpu() for name, right in self._right.items() if name not in self._cold}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; matrices that are new, or have another shape now, are begun anew."""
        for name, right in state["right"].items():
            if self.shapes.get(name, (0, -1))[1] == len(right):
                self._right[name] = right.clone()
                self._cold.discard(name)


def _start(name: str, width: int) -> Tensor:
    """Two directions by chance, the same on every rank for one name."""
    generator = torch.Generator().manual_seed(key_of(name))
    return _orthonormal(torch.randn(width, 2, generator=generator))[0]


def _orthonormal(pair: Tensor) -> tuple[Tensor, Tensor]:
    """The two columns of `pair` (n, 2) made orthonormal in their order, and the lengths (2,) that they had after the
    first had been taken out of the second; a column that is left with nothing is zero, with length zero."""
    eps, tiny = torch.finfo(pair.dtype).eps, torch.finfo(pair.dtype).tiny
    first, second = pair.unbind(1)
    length = first.norm()
    unit = first / length.clamp(min=tiny)
    whole = second.norm()
    rest = second - unit * (unit @ second)
    rest = rest - unit * (unit @ rest)  # once is not enough where they were nearly parallel
    left = rest.norm()
    left = torch.where(left > 8 * eps * whole, left, 0.0)
    other = torch.where(left > 0, rest / left.clamp(min=tiny), 0.0)
    return torch.stack([unit, other], 1), torch.stack([length, left])


def _together(parts: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """The sum of each tensor over the ranks, in one message."""
    if axis.whole or not parts:
        return list(parts)
    whole = axis.sum(torch.cat([part.reshape(-1) for part in parts]))
    pieces = whole.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def _listed(values: Sequence[Tensor]) -> list[float]:
    return torch.stack(list(values)).tolist() if values else []


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the dtype of their operands, also within autocast."""
    return torch.autocast(device.type, enabled=False)
