"""The inverse of the Fisher matrix of the last gradients, times the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.inner.adam import Adam
from thinrank.optim.linalg.norms import frobenius, reciprocal_peak
from thinrank.optim.linalg.woodbury import fisher_coefficients
from thinrank.optim.rule import State, Step, beside


@dataclass(frozen=True, slots=True, kw_only=True)
class MFAC:
    """`F⁻¹ g` with `F = λI + (1/k) Σ g_i g_iᵀ` over the last `window` gradients of each matrix (Frantar et al. 2021).

    A gradient is kept as its norm and a matrix of norm one. What is not finite is kept as a gradient of zero.

    Attributes:
        window: gradients remembered; the new one takes the place of the oldest.
        damping: λ.
        momentum: of the preconditioned direction, `v ← μ v + (1−μ) F⁻¹ g`.
        adam: what steps on the preconditioned direction in the place of the momentum.
    """

    window: int = 32
    damping: float = 1e-3
    momentum: float = 0.9
    adam: Adam | None = None

    @property
    def carried(self) -> tuple[str, ...]:
        """State beside the moments whose last dimension holds coordinates, to be turned with them."""
        return ("window",)

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """(batch, window, long, width) gradients over their norms, (batch, window) norms, and moments."""
        batch, long, width = shape
        state = {
            "window": torch.zeros(batch, self.window, long, width, dtype=torch.float32, device=device),
            "window_norm": torch.zeros(batch, self.window, dtype=torch.float32, device=device),
        }
        if self.adam is not None:
            return {**state, **self.adam.init(shape, device)}
        return {**state, "exp_avg": torch.zeros(shape, dtype=torch.float32, device=device)}

    def direction(self, low: Tensor, state: State, step: Step) -> Tensor:
        direction = self.precondition(low, state, step)
        if self.adam is not None:
            return self.adam.direction(direction, state, step)
        return state["exp_avg"].lerp_(direction, 1.0 - self.momentum).clone()

    def precondition(self, low: Tensor, state: State, step: Step) -> Tensor:
        """`F⁻¹ low` (batch, long, width), with `low` taken into the window."""
        unit = reciprocal_peak(low, step.axis)
        scaled = low * unit
        norm = frobenius(scaled, step.axis)  # of entries near one, so that no square overflows
        size = norm / unit.flatten()
        finite = torch.isfinite(size) & (norm > 0)
        scaled = torch.where(finite[:, None, None], scaled / norm[:, None, None], 0.0)
        place = beside([count % self.window for count in step.count], low.device)
        filled = beside([min(count + 1, self.window) for count in step.count], low.device)
        number = torch.arange(low.shape[0], device=low.device)
        state["window"][number, place] = scaled
        state["window_norm"][number, place] = torch.where(finite, size, 0.0)
        rows = state["window"].flatten(-2)  # (batch, window, long·width)
        gram = step.axis.sum(rows @ rows.mT)
        weights = fisher_coefficients(gram, state["window_norm"], place, damping=self.damping, divisor=filled)
        return (weights.unsqueeze(-2) @ rows).view(low.shape)
