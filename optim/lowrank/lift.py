"""How a small direction becomes an update of the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from thinrank.optim.linalg.norms import frobenius, growth_limit
from thinrank.optim.lowrank.subspace import Subspace
from thinrank.optim.rule import State, Step
from thinrank.optim.update import Update


class Lift(Protocol):
    def init(self, shape: tuple[int, int, int], device: torch.device) -> State: ...

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Update:
        """The update for what entered (`x`), its coordinates (`low`) and the direction found for them."""
        ...


@runtime_checkable
class LinearLift(Lift, Protocol):
    """A lift that needs no more of `x` than a part linear in it, so that gradients may be added up as images."""

    def image(self, x: Tensor, low: Tensor, subspace: Subspace, state: State, step: Step) -> State:
        """What `lift` needs of `x` beside its coordinates."""
        ...

    def lift(
        self, image: State, direction: Tensor, short: int, subspace: Subspace, state: State, step: Step
    ) -> Update: ...


@dataclass(frozen=True, slots=True)
class Project:
    """Back through the basis, and nothing else."""

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {}

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Update:
        return self.lift({}, direction, x.shape[-1], subspace, state, step)

    def image(self, x: Tensor, low: Tensor, subspace: Subspace, state: State, step: Step) -> State:
        return {}

    def lift(self, image: State, direction: Tensor, short: int, subspace: Subspace, state: State, step: Step) -> Update:
        return subspace.up(direction, state, short)


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Back through the basis, plus what the subspace missed, scaled row by row as Adam scaled what it held.

    Row j of the residual `x − up(low)` is multiplied by `φ_j = ‖direction_j‖ / ‖low_j‖` and the whole is kept from
    growing by more than `limit` a step (Fira, Chen et al. 2024, eq. 4 and its limiter).

    Attributes:
        limit: largest ratio of two consecutive residual norms.
        signs: keep only the signs and one scale a row (the row's mean magnitude, the best one for them): what a message
            of one bit a weight could carry. Ours; not in the paper.
    """

    limit: float = 1.01
    signs: bool = False

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {"residual_norm": torch.zeros(shape[0], dtype=torch.float32, device=device)}

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Update:
        low_norm = torch.linalg.vector_norm(low, dim=-1, keepdim=True)
        phi = torch.linalg.vector_norm(direction, dim=-1, keepdim=True) / low_norm.clamp(min=1e-8)  # (batch, long, 1)
        if self.signs:
            held = subspace.up(low, state, x.shape[-1])
            rest = (x - held.materialise()).float()
            phi = phi * rest.abs().mean(-1, keepdim=True)
            rest = rest.sign_()
            norms = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        else:
            # N Bᵀ + φ∘(x − L Bᵀ) = (N − φ∘L) Bᵀ + φ∘x : the residual costs no product and is never stored. Its norms
            # follow from those of x and L, because B is orthonormal.
            rest = x
            total = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            norms = (total.square() - low_norm.square()).clamp_(min=0.0).sqrt_()
        # a row so long that its norm overflows has φ = 0, and zero times infinity is no number
        norm = frobenius((phi * norms).nan_to_num_(nan=0.0), step.axis)
        factor, norm = growth_limit(norm, state["residual_norm"], self.limit)
        state["residual_norm"].copy_(norm)
        phi = phi * factor[:, None, None]
        update = subspace.up(direction if self.signs else direction - phi * low, state, x.shape[-1])
        return Update(update.direction, update.basis, rest, phi)


RESIDUALS = ("full", "sign", "off")


def lift_named(residual: str, limit: float) -> Lift:
    """The lift with the whole residual (`full`), its signs (`sign`), or none (`off`)."""
    return Project() if residual == "off" else Residual(limit=limit, signs=residual == "sign")
