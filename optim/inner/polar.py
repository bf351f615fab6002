"""Momentum with all singular values at one: Muon's direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.inner.moments import MOMENTUM, moments, zeros
from thinrank.optim.linalg.momentum import momentum_direction
from thinrank.optim.linalg.orthogonal import JORDAN, Coefficients, newton_schulz, shape_scale
from thinrank.optim.rule import State, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Polar:
    """The orthogonal factor of the momentum, by Newton-Schulz iterations.

    Attributes:
        momentum: decay rate of the running mean.
        nesterov: orthogonalise the mean with the gradient taken in once more.
        coefficients: of the iterations.
        dtype: of their products; None: bfloat16 on a GPU and float32 on a CPU.
        shape: a scale for the weight's shape (`linalg.orthogonal.shape_scale`). The shape is that of the space the rule
            works in: in a subspace that is no weight's, so leave `none` there.
        bits: of an entry of the momentum: 32, or 8 (`linalg/quantise.py`, `compand8`).
    """

    momentum: float = 0.95
    nesterov: bool = True
    coefficients: Coefficients = JORDAN
    dtype: torch.dtype | None = None
    shape: str = "none"
    bits: int = 32

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """One moment of `shape` (batch, long, width)."""
        return zeros(shape, device, self.bits, MOMENTUM)

    def direction(self, low: Tensor, state: State, step: Step) -> Tensor:
        with moments(state, step.count, MOMENTUM) as (buffer,):
            mean = momentum_direction(low, buffer, self.momentum, nesterov=self.nesterov)
        direction = newton_schulz(mean, self.coefficients, dtype=self.dtype, axis=step.axis)
        if self.shape == "none":
            return direction
        return direction.mul_(shape_scale(self.shape, *step.stored(low)))
