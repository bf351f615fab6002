"""Which basis, and when it is renewed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from thinrank.optim.linalg.basis import random_columns, subspace_iteration, svd_bases, svd_basis
from thinrank.optim.linalg.fixed import basis_matrix, column_norms, dct_rows_fft, select_columns
from thinrank.optim.linalg.norms import peak
from thinrank.optim.linalg.products import pays, product
from thinrank.optim.lowrank.transport import Change, Rotation, Slots
from thinrank.optim.rule import State, Step
from thinrank.optim.update import Columns, Update

Shape3 = tuple[int, int, int]


class Subspace(Protocol):
    """A rule for choosing `r` directions of the short side. Stateless: what it chose lies in `state`."""

    by_rows: ClassVar[bool]
    """True when ranks may hold other rows of a matrix each, and share a basis that small sums decide."""

    @property
    def every(self) -> int:
        """Updates between two renewals; the first update of a matrix always renews."""
        ...

    @property
    def orthonormal(self) -> bool:
        """True when the directions are orthonormal, so that squared coordinates are shares of a matrix's energy."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the products with the basis."""
        ...

    @property
    def factorises(self) -> bool:
        """True when a renewal fails on numbers that are not finite, so that somebody must look first."""
        ...

    def small(self, shape: Shape3) -> Shape3:
        """Shape of the projection of a batch of `shape`."""
        ...

    def init(self, shape: Shape3, device: torch.device) -> State: ...

    def renew(self, x: Tensor, state: State, step: Step) -> tuple[Change, Tensor | None]:
        """Chooses from `x` (batch, long, short) and writes the choice to `state`.

        Returns how coordinates change, and `x`'s new coordinates where the choice has already computed them.
        """
        ...

    def down(self, x: Tensor, state: State) -> Tensor:
        """Coordinates of `x` in the subspace, float32; the product is computed in the subspace's `dtype`."""
        ...

    def up(self, low: Tensor, state: State, short: int) -> Update:
        """The full-size matrix with these coordinates, in factors of the subspace's `dtype`."""
        ...


def width(rank: int | float, shape: Shape3) -> int:
    """The number of directions: `rank` itself or, below one, that fraction of the short side; at most what exists."""
    _, long, short = shape
    wanted = max(1, round(rank * short)) if rank < 1 or (isinstance(rank, float) and rank == 1.0) else int(rank)
    return min(wanted, short, long)


@lru_cache(maxsize=64)  # sizes in use at once; one too few and a model's every step would build them all again
def _matrix(basis: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # remembered because every step needs it; a pure function of its arguments, so it is not state
    return basis_matrix(basis, n, dtype=dtype, device=device)


def _unit_columns(shape: Shape3, rank: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # kept in the type in which it is multiplied: more digits would count at renewals alone, and take twice the memory
    return torch.eye(shape[side], rank, dtype=dtype, device=device).expand(shape[0], -1, -1).clone()


@dataclass(frozen=True, slots=True, kw_only=True)
class Svd:
    """The exact top singular vectors of one gradient (GaLore, Zhao et al. 2024, §3)."""

    rank: int | float
    by_rows: ClassVar[bool] = False
    every: int = 200
    signs: str = "lapack"
    dtype: torch.dtype = torch.float32
    factorises: bool = True
    orthonormal: bool = True

    def small(self, shape: Shape3) -> Shape3:
        return (shape[0], shape[1], width(self.rank, shape))

    def init(self, shape: Shape3, device: torch.device) -> State:
        return {"basis": _unit_columns(shape, width(self.rank, shape), 2, self.dtype, device)}

    def renew(self, x: Tensor, state: State, step: Step) -> tuple[Change, Tensor | None]:
        if not step.axis.whole:
            raise RuntimeError("an exact SVD needs whole matrices: use svd='power' where rows are sharded")
        basis = state["basis"]
        new = svd_basis(x, basis.shape[-1], transposed=step.transposed, signs=self.signs)
        change = Rotation(new.mT @ basis.float())
        basis.copy_(new)
        return change, None

    def down(self, x: Tensor, state: State) -> Tensor:
        return product(x.to(self.dtype), state["basis"]).float()

    def up(self, low: Tensor, state: State, short: int) -> Update:
        return Update(low.to(self.dtype), state["basis"])


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedSvd:
    """Singular vectors of both sides: GaLore's `proj_type="full"`, an r×r state."""

    rank: int | float
    by_rows: ClassVar[bool] = False
    every: int = 200
    dtype: torch.dtype = torch.float32
    factorises: bool = True
    orthonormal: bool = True

    def small(self, shape: Shape3) -> Shape3:
        r = width(self.rank, shape)
        return (shape[0], r, r)

    def init(self, shape: Shape3, device: torch.device) -> State:
        r = width(self.rank, shape)
        return {
            name: _unit_columns(shape, r, side, self.dtype, device) for name, side in (("basis", 2), ("basis_long", 1))
        }

    def renew(self, x: Tensor, state: State, step: Step) -> tuple[Change, Tensor | None]:
        if not step.axis.whole:
            raise RuntimeError("proj_type='full' needs whole matrices: use 'std' where rows are sharded")
        left, right = svd_bases(x, state["basis"].shape[-1], transposed=step.transposed)
        change = Rotation(right.mT @ state["basis"].float())
        state["basis"].copy_(right)
        state["basis_long"].copy_(left)
        return change, None

    def down(self, x: Tensor, state: State) -> Tensor:
        image = product(x.to(self.dtype), state["basis"])
        return product(state["basis_long"].mT, image).float()

    def up(self, low: Tensor, state: State, short: int) -> Update:
        return Update(state["basis_long"] @ low.to(self.dtype), state["basis"])


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerIteration:
    """Randomized subspace iteration: cold at first, then warm from the basis before (Halko et al. 2011).

    Attributes:
        oversample: random columns beside the ones that are kept.
        cold, warm: products with xᵀx at the first renewal and at later ones.
        stored: type of the basis in the state; None: `dtype`.
    """

    rank: int | float
    by_rows: ClassVar[bool] = True
    every: int = 200
    oversample: int = 8
    cold: int = 2
    warm: int = 1
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None
    factorises: bool = True
    orthonormal: bool = True

    def small(self, shape: Shape3) -> Shape3:
        return (shape[0], shape[1], width(self.rank, shape))

    def init(self, shape: Shape3, device: torch.device) -> State:
        return {"basis": _unit_columns(shape, width(self.rank, shape), 2, self.stored or self.dtype, device)}

    def renew(self, x: Tensor, state: State, step: Step) -> tuple[Change, Tensor | None]:
        basis = state["basis"]
        _, short, r = basis.shape
        extra = min(self.oversample, short - r)
        first = step.count[0] == 0
        starts = []
        for i in range(basis.shape[0]):
            random = random_columns(short, (r if first else 0) + extra, step.generator(i), basis.device)
            starts.append(random if first else torch.cat([basis[i].float(), random], -1))
        iterations = self.cold if first else self.warm
        new, low = subspace_iteration(
            x, torch.stack(starts), r, iterations=iterations, dtype=self.dtype, axis=step.axis
        )
        change = Rotation(new.mT @ basis.float())
        basis.copy_(new)
        return change, low

    def down(self, x: Tensor, state: State) -> Tensor:
        return product(x.to(self.dtype), state["basis"].to(self.dtype)).float()

    def up(self, low: Tensor, state: State, short: int) -> Update:
        return Update(low.to(self.dtype), state["basis"].to(self.dtype))


def factor_dtype(subspace: Subspace) -> torch.dtype:
    """Of the factors that `up` gives."""
    if isinstance(subspace, FixedColumns) and subspace.basis == "identity":
        return torch.float32  # what is put into columns is not multiplied
    return subspace.dtype


def second_choice(subspace: Subspace) -> Subspace | None:
    """What chooses in the place of `subspace`, into the same state, when that does not converge; None: nothing does."""
    if isinstance(subspace, Svd):
        return PowerIteration(rank=subspace.rank, every=subspace.every, dtype=subspace.dtype)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedColumns:
    """The strongest columns of a fixed orthogonal basis: r small integers of state, no projector.

    (Modoranu et al. 2025, DCT-AdamW and Trion; slots that keep their column, the choice of basis and engine are ours.)

    Attributes:
        basis: `dct`, `identity`, `hadamard` or `random`.
        norm: columns are ranked by `l1` (the paper) or `l2` (best for reconstruction: the residual is then at most
            1 − r/short of ‖x‖²).
        engine: how all coordinates are computed at a renewal: `matmul`, `fft` (dct only), `auto`: on a CPU the FFT,
            which with the choice takes a fifth of MKL's product at 2048 columns and nine tenths at 128; where they are
            oneDNN's (`linalg.products`) from 512 columns on (0.8 of them, 0.4 at 2048; 1.9 at 128); elsewhere for
            float32 from 2048 columns on, which was not measured.
    """

    rank: int | float
    by_rows: ClassVar[bool] = True
    every: int = 1
    basis: str = "dct"
    norm: str = "l1"
    engine: str = "auto"
    dtype: torch.dtype = torch.float32
    factorises: bool = False
    orthonormal: bool = True

    def small(self, shape: Shape3) -> Shape3:
        return (shape[0], shape[1], width(self.rank, shape))

    def init(self, shape: Shape3, device: torch.device) -> State:
        r = width(self.rank, shape)
        return {"columns": torch.arange(r, dtype=torch.int32, device=device).expand(shape[0], -1).clone()}

    def coordinates(self, x: Tensor) -> Tensor:
        """All coordinates of the rows of `x` (..., long, short): the same shape."""
        if self.basis == "identity":
            return x.float()
        if x.device.type == "cpu":
            worth = x.shape[-1] >= 512 or not pays()
        else:
            worth = self.dtype == torch.float32 and x.shape[-1] >= 2048
        if self.engine == "fft" or (self.engine == "auto" and self.basis == "dct" and worth):
            return dct_rows_fft(x.float())
        return product(x.to(self.dtype), _matrix(self.basis, x.shape[-1], self.dtype, x.device).T).float()

    def renew(self, x: Tensor, state: State, step: Step) -> tuple[Change, Tensor | None]:
        coordinates = self.coordinates(x)
        norms = column_norms(coordinates, self.norm, step.axis)
        first = step.count[0] == 0
        columns, kept = select_columns(norms, None if first else state["columns"], state["columns"].shape[-1])
        held = ~torch.isfinite(peak(x, step.axis)).squeeze(-1)  # (batch, 1): by what is no number, nothing is chosen
        columns = torch.where(held, state["columns"].long(), columns)
        state["columns"].copy_(columns)
        low = coordinates.gather(-1, columns.unsqueeze(-2).expand(-1, x.shape[-2], -1))
        return Slots(kept | held, held.squeeze(-1)), low

    def atoms(self, state: State, short: int) -> Tensor:
        """The chosen atoms as columns: (batch, short, r)."""
        columns = state["columns"].long()
        return _matrix(self.basis, short, self.dtype, columns.device)[columns].mT

    def down(self, x: Tensor, state: State) -> Tensor:
        if self.basis == "identity":
            columns = state["columns"].long().unsqueeze(-2).expand(-1, x.shape[-2], -1)
            return x.gather(-1, columns).float()
        return product(x.to(self.dtype), self.atoms(state, x.shape[-1])).float()

    def up(self, low: Tensor, state: State, short: int) -> Update:
        if self.basis == "identity":
            return Update(low, Columns(index=state["columns"].long(), short=short))
        return Update(low.to(self.dtype), self.atoms(state, short))


GAUSSIANS_KEPT = 2
"""Projections remembered for each size and seed: this period's, and one more for matrices whose counts differ."""


@lru_cache(maxsize=64)
def _kept_gaussians(
    short: int, r: int, seed: int, dtype: torch.dtype, device: torch.device
) -> dict[int, Tensor]:  # by epoch; a pure function of the arguments and the epoch, so it is not state
    return {}


def gaussian_projection(
    short: int, r: int, *, seed: int, epoch: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(short, r) independent normal numbers of variance 1/r: with G of any length, `E‖G P‖² = ‖G‖²`, row by row.

    The same on every device, and the same tensor until the epoch changes: it must not be written to.
    """
    kept = _kept_gaussians(short, r, seed, dtype, device)
    if epoch not in kept:
        while len(kept) >= GAUSSIANS_KEPT:
            kept.pop(next(iter(kept)))
        mixed = seed * 0x9E3779B1 + short * 0x85EBCA6B + r * 0xC2B2AE35 + epoch * 0x27D4EB2F
        generator = torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
        kept[epoch] = random_columns(short, r, generator, device).mul_(r**-0.5).to(dtype)
    return kept[epoch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """A random projection that is never state: seeds are kept, not matrices (APOLLO, Zhu et al. 2024, §4.1).

    The matrix is a function of the user's seed, its size and the period the step lies in, `count // gap`, and all
    matrices of one size share it; one for each size in use is remembered between steps, so that a step draws no random
    numbers. The paper draws one for each parameter, from a seed that moves on every `gap` steps.

    The columns are independent, not orthonormal: norms are kept in the mean only, and there is no way back up. Where
    there are as many columns as directions, nothing is to be estimated and the projection is the identity (ours: one
    number in the place of a one-wide matrix is often near zero, and its inverse then a very long step). Since only a
    renewal is told the step, every step is one; the columns change their meaning every `gap` steps.
    """

    rank: int | float
    by_rows: ClassVar[bool] = True
    gap: int = 200
    dtype: torch.dtype = torch.float32
    every: int = 1
    factorises: bool = False
    orthonormal: bool = False

    def small(self, shape: Shape3) -> Shape3:
        batch, long, short = shape
        return (batch, long, width(self.rank, (batch, short, short)))  # independent of how many rows are here

    def init(self, shape: Shape3, device: torch.device) -> State:
        return {}

    def renew(self, x: Tensor, state: State, step: Step) -> tuple[Change, Tensor | None]:
        batch, long, short = x.shape
        r = self.small((batch, long, short))[-1]
        if r == short:
            return Slots(torch.ones(batch, r, dtype=torch.bool, device=x.device)), x.float()
        epochs = [count // self.gap for count in step.count]
        projections = {
            epoch: gaussian_projection(short, r, seed=step.seed, epoch=epoch, dtype=self.dtype, device=x.device)
            for epoch in dict.fromkeys(epochs)
        }
        one = projections[epochs[0]] if len(projections) == 1 else torch.stack([projections[epoch] for epoch in epochs])
        stayed = [count % self.gap > 0 for count in step.count]
        if len(set(stayed)) == 1:  # filled on the device: a copy from the host would make it wait
            kept = torch.full((batch, r), stayed[0], device=x.device)
        else:
            kept = torch.tensor(stayed).to(x.device).unsqueeze(-1).expand(-1, r)
        return Slots(kept), (x.to(self.dtype) @ one).float()

    def down(self, x: Tensor, state: State) -> Tensor:
        raise RuntimeError("a Gaussian projection projects in its renewals, at every step: leave every=1")

    def up(self, low: Tensor, state: State, short: int) -> Update:
        raise RuntimeError("a Gaussian projection has no way back: use lift=ScaledGradient(…) and no error feedback")
