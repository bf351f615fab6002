"""How a small direction becomes an update of the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thinrank.optim.linalg.norms import limit_growth
from thinrank.optim.lowrank.subspace import Subspace
from thinrank.optim.rule import State, Step
from thinrank.optim.update import Factored


class Lift(Protocol):
    def init(self, shape: tuple[int, int, int], device: torch.device) -> State: ...

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Factored:
        """The update for what entered (`x`), its coordinates (`low`) and the direction found for them."""
        ...


@dataclass(frozen=True, slots=True)
class Project:
    """Back through the basis, and nothing else."""

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {}

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Factored:
        return subspace.up(direction, state, x.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Back through the basis, plus what the subspace missed, scaled row by row as Adam scaled what it held.

    Row j of the residual `x − up(low)` is multiplied by `φ_j = ‖direction_j‖ / ‖low_j‖` and the whole is kept from
    growing by more than `limit` a step (Fira, Chen et al. 2024, eq. 4 and its limiter).

    Attributes:
        limit: largest ratio of two consecutive residual norms.
        signs: keep only the signs and one scale a row (the row's mean magnitude, the l1-optimal one): what a message of one bit
            a weight could carry. Ours; not in the paper.
    """

    limit: float = 1.01
    signs: bool = False

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {"residual_norm": torch.zeros(shape[0], dtype=torch.float32, device=device)}

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Factored:
        held = subspace.up(low, state, x.shape[-1])
        if held.direction.dtype == torch.float32:
            residual = torch.baddbmm(x.float(), held.direction, held.basis.mT, alpha=-1.0)
        else:
            residual = (held.direction @ held.basis.mT).float().neg_().add_(x)
        low_norm = torch.linalg.vector_norm(low, dim=-1, keepdim=True)
        phi = torch.linalg.vector_norm(direction, dim=-1, keepdim=True) / low_norm.clamp(min=1e-8)
        if self.signs:
            scale = residual.abs().mean(-1, keepdim=True)
            residual = residual.sign_().mul_(scale * phi)
        else:
            residual.mul_(phi)
        residual, norm = limit_growth(residual, state["residual_norm"], self.limit, step.axis)
        state["residual_norm"].copy_(norm)
        update = subspace.up(direction, state, x.shape[-1])
        return Factored(update.direction, update.basis, residual)
