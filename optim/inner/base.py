"""What every inner rule is, and the matrix rule that uses one in the whole space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from thinrank.optim.rule import Decay, State, Step
from thinrank.optim.update import Update


class Inner(Protocol):
    """From a gradient to a direction, in a space of any width."""

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """The state for gradients of `shape` (batch, long, width)."""
        ...

    def direction(self, low: Tensor, state: State, step: Step) -> Tensor:
        """The direction for `low` (batch, long, width), float32, of the same shape; changes `state` in place."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """An inner rule as the rule for matrices, with no subspace.

    Attributes:
        inner: what makes the direction.
        scale: multiplies the learning rate.
        decay: when the weight decay acts.
    """

    inner: Inner
    scale: float = 1.0
    decay: Decay = field(default=Decay())

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return self.inner.init(shape, device)

    def update(self, grad: Tensor, state: State, step: Step) -> Update:
        return Update(rest=self.inner.direction(grad.float(), state, step))
