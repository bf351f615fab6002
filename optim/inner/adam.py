"""Adam in the small space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.inner.moments import moments, zeros
from thinrank.optim.linalg.adam import adam_direction
from thinrank.optim.rule import State, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam's two moments of the projected gradient.

    Attributes:
        betas: decay rates of the first and the second moment.
        eps: added to the denominator.
        eps_raw: before the bias correction (GaLore) instead of after it (torch).
        ages: keep an age for each column of the small space and correct each column's bias by its own. A column that
            entered late has moments of zero: with the matrix's count its first step would be
            (1-β1)/sqrt(1-β2) times too long, 3.2 for (0.9, 0.999). Ours; not in the papers.
        bits: of an entry of the moments: 32, or 8 (`linalg/quantise.py`, `compand8`).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_raw: bool = False
    ages: bool = False
    bits: int = 32

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """Moments of `shape` (batch, long, r), and (batch, r) float32 ages where they are kept."""
        state = zeros(shape, device, self.bits)
        if self.ages:
            state["age"] = torch.zeros(shape[0], shape[2], dtype=torch.float32, device=device)
        return state

    def direction(self, low: Tensor, state: State, step: Step) -> Tensor:
        count: Tensor | list[int] = [c + 1 for c in step.count]
        if self.ages:
            state["age"].add_(1.0)
            count = state["age"].unsqueeze(-2)
        with moments(state, step.count) as (m, v):
            return adam_direction(low, m, v, count, betas=self.betas, eps=self.eps, eps_raw=self.eps_raw)
