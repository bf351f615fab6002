"""How a small direction becomes an update of the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from thinrank.optim.linalg.adam import bias_factor
from thinrank.optim.linalg.norms import frobenius, growth_limit, row_norms
from thinrank.optim.lowrank.subspace import Subspace
from thinrank.optim.rule import State, Step
from thinrank.optim.update import Update

FLOOR = 1e-8
"""Keeps a ratio to the norm of a row of zeros finite (Fira's and APOLLO's value)."""


class Lift(Protocol):
    by_rows: ClassVar[bool]
    """True when ranks may hold other rows of a matrix each."""

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State: ...

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Update:
        """The update for what entered (`x`), its coordinates (`low`) and the direction found for them."""
        ...


@runtime_checkable
class LinearLift(Lift, Protocol):
    """A lift that needs no more of `x` than a part linear in it, so that gradients may be added up as images."""

    def chooses(self, step: Step) -> bool:
        """True when this step's choice, which is not linear in `x`, is made whether or not a subspace is renewed."""
        ...

    @property
    def searches(self) -> int:
        """How many first updates of a matrix `chooses` is true of."""
        ...

    def image_sizes(self, shape: tuple[int, int, int]) -> dict[str, int]:
        """Numbers in each tensor of the `image` of a batch of `shape`."""
        ...

    def image(self, x: Tensor, low: Tensor, subspace: Subspace, state: State, step: Step, *, first: bool) -> State:
        """What `lift` needs of `x` beside its coordinates: tensors of the same keys and shapes for every step.

        Args:
            first: `x` is a whole gradient or its first part, by which a lift chooses what it has to choose; what it
                chose holds for the parts that follow.
        """
        ...

    def lift(
        self, image: State, direction: Tensor, short: int, subspace: Subspace, state: State, step: Step
    ) -> Update: ...

    def apart(self, shape: tuple[int, int, int], step: Step) -> int:
        """How many entries of each matrix the update of this step gives by themselves."""
        ...

    def remainder(
        self, image: State, low: Tensor, short: int, subspace: Subspace, state: State, step: Step
    ) -> Tensor | None:
        """What `image` shows of the gradient that its coordinates `low` do not, for norms; None: nothing.

        It is orthogonal to what has these coordinates, so that the squares of both norms add up.
        """
        ...


@dataclass(frozen=True, slots=True)
class Project:
    """Back through the basis, and nothing else."""

    by_rows: ClassVar[bool] = True

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {}

    def chooses(self, step: Step) -> bool:
        return False

    @property
    def searches(self) -> int:
        return 0

    def image_sizes(self, shape: tuple[int, int, int]) -> dict[str, int]:
        return {}

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Update:
        return self.lift({}, direction, x.shape[-1], subspace, state, step)

    def image(self, x: Tensor, low: Tensor, subspace: Subspace, state: State, step: Step, *, first: bool) -> State:
        return {}

    def lift(self, image: State, direction: Tensor, short: int, subspace: Subspace, state: State, step: Step) -> Update:
        return subspace.up(direction, state, short)

    def apart(self, shape: tuple[int, int, int], step: Step) -> int:
        return 0

    def remainder(
        self, image: State, low: Tensor, short: int, subspace: Subspace, state: State, step: Step
    ) -> Tensor | None:
        return None


def limited_rows(
    rows: Tensor,
    norms: Tensor,
    previous: Tensor,
    limit: float,
    step: Step,
    betas: tuple[float, float] | None = None,
) -> Tensor:
    """`rows`, scaled down so that `‖rows ∘ rest‖` grows by no more than `limit` since the last step (Fira's limiter).

    Args:
        rows: (batch, long, 1) or (batch, 1, 1), what each row of the rest is multiplied by.
        norms: (batch, long, 1), the norm of each of these rows.
        previous: (batch,), the norm that was let through last; overwritten.
        betas: compare norms without Adam's bias correction by these; None: as they are.
    """
    # A row so long that its norm overflows: its ratio is 0, and zero times infinity no number; or, from 1e19 on, its
    # ratio is not yet 0, and the infinite norm would make the whole matrix's factor no number.
    norm = frobenius((rows * norms).nan_to_num_(nan=0.0, posinf=0.0), step.axis)
    if betas is not None:
        norm = norm / bias_factor([count + 1 for count in step.count], betas, norm.device)
    factor, norm = growth_limit(norm, previous, limit)
    previous.copy_(norm)
    return rows * factor[:, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Back through the basis, plus what the subspace missed, scaled row by row as Adam scaled what it held.

    Row j of the residual `x − alpha·up(low)` is multiplied by `φ_j = ‖direction_j‖ / ‖low_j‖` and the whole is kept
    from growing by more than `limit` a step (Fira, Chen et al. 2024, eq. 4 and its limiter); the update is
    `alpha·up(direction)` plus that.

    Attributes:
        limit: largest ratio of two consecutive residual norms.
        signs: keep only the signs and one scale a row (the row's mean magnitude, the best one for them): what a message
            of one bit a weight could carry. Ours; not in the paper.
        alpha: multiplies whatever comes back through the basis. Other values than 1 leave a share of `1 − alpha` of
            what the subspace held in the residual, as the authors' code does.
        betas: of the Adam before this, whose bias correction the limiter then leaves out, and 1e-8 is added to
            `‖low_j‖` instead of being its lower bound: the authors' arithmetic. None: norms as they are.
    """

    by_rows: ClassVar[bool] = True
    limit: float = 1.01
    signs: bool = False
    alpha: float = 1.0
    betas: tuple[float, float] | None = None

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {"residual_norm": torch.zeros(shape[0], dtype=torch.float32, device=device)}

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Update:
        short = x.shape[-1]
        low_norm = row_norms(low)
        floored = low_norm.clamp(min=FLOOR) if self.betas is None else low_norm + FLOOR
        phi = row_norms(direction) / floored  # (batch, long, 1)
        if self.signs:
            held = subspace.up(self._times_alpha(low), state, short)
            rest = (x - held.materialise()).float()
            phi = phi * rest.abs().mean(-1, keepdim=True)
            rest = rest.sign_()
            norms = row_norms(rest)
        else:
            # α N Bᵀ + φ∘(x − α L Bᵀ) = α (N − φ∘L) Bᵀ + φ∘x : the residual costs no product and is never stored. Its
            # norms follow from those of x and L, because B is orthonormal: ‖x‖² − 2α‖L‖² + α²‖L‖².
            rest = x
            total = row_norms(x)
            held_energy = self.alpha * (2.0 - self.alpha) * low_norm.square()
            norms = (total.square() - held_energy).clamp_(min=0.0).sqrt_()
        phi = limited_rows(phi, norms, state["residual_norm"], self.limit, step, self.betas)
        image = direction if self.signs else direction - phi * low
        update = subspace.up(self._times_alpha(image), state, short)
        return Update(update.direction, update.basis, rest, phi)

    def _times_alpha(self, low: Tensor) -> Tensor:
        return low if self.alpha == 1.0 else low * self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledGradient:
    """The gradient itself, row by row as much longer or shorter as Adam made its projection (APOLLO, Zhu et al. 2024).

    `s_j = ‖direction_j‖ / ‖low_j‖` for each row j of the long side, or one such ratio for the matrix; the update is
    `s ∘ x`, kept from growing by more than `limit` a step. Nothing goes back through the basis.

    Attributes:
        betas: of the Adam before this, whose bias correction the limiter leaves out.
        per: `channel` (a ratio for each row) or `tensor` (one for the matrix).
        limit: largest ratio of two consecutive norms of the update; None: whatever comes.
    """

    by_rows: ClassVar[bool] = True
    betas: tuple[float, float]
    per: str = "channel"
    limit: float | None = 1.01

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        if self.limit is None:
            return {}
        return {"update_norm": torch.zeros(shape[0], dtype=torch.float32, device=device)}

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Update:
        if self.per == "channel":
            after, before = row_norms(direction), row_norms(low)
        else:
            after, before = (frobenius(part, step.axis)[:, None, None] for part in (direction, low))
        rows = after / (before + FLOOR)
        if self.limit is not None:
            norms = row_norms(x)
            rows = limited_rows(rows, norms, state["update_norm"], self.limit, step, self.betas)
        return Update(rest=x, rows=rows)


RESIDUALS = ("full", "sign", "off")


def lift_named(residual: str, limit: float) -> Lift:
    """The lift with the whole residual (`full`), its signs (`sign`), or none (`off`)."""
    return Project() if residual == "off" else Residual(limit=limit, signs=residual == "sign")
