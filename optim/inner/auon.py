"""Momentum under a bound of its root mean square hyperbolic cosine: AuON's direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.inner.moments import MOMENTUM, moments, zeros
from thinrank.optim.linalg.momentum import momentum_direction
from thinrank.optim.linalg.norms import cosh_rms, frobenius, reciprocal_peak
from thinrank.optim.linalg.orthogonal import JORDAN, newton_schulz
from thinrank.optim.rule import State, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class AuON:
    """Nesterov momentum divided by rms(cosh), of which the room `methods/auon.py` says what it amounts to.

    Attributes:
        momentum: decay rate of the running mean.
        gamma: multiplies the normalised entries under cosh.
        steps: iterations of Newton-Schulz before, with Jordan's coefficients; 0 is none.
        dtype: of their products; None: bfloat16 on a GPU and float32 on a CPU.
        normalise: divide the direction by its Frobenius norm (the paper) and not its copy under cosh alone (the
            authors' code).
        bits: of an entry of the momentum: 32, or 8 (`linalg/quantise.py`, `compand8`).
    """

    momentum: float = 0.95
    gamma: float = 1.5
    steps: int = 0
    dtype: torch.dtype | None = None
    normalise: bool = True
    bits: int = 32

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """One moment of `shape` (batch, long, width)."""
        return zeros(shape, device, self.bits, MOMENTUM)

    def direction(self, low: Tensor, state: State, step: Step) -> Tensor:
        with moments(state, step.count, MOMENTUM) as (buffer,):
            mean = momentum_direction(low, buffer, self.momentum, nesterov=True)
        if self.steps:
            mean = newton_schulz(mean, JORDAN.first(self.steps), dtype=self.dtype, axis=step.axis)
        unit = mean * reciprocal_peak(mean, step.axis)
        unit.div_((frobenius(unit, step.axis) + 1e-7)[..., None, None])
        rms = cosh_rms(self.gamma * unit, step.axis) + 1e-8
        return (unit if self.normalise else mean) / rms[..., None, None]
