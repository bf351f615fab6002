"""Weights of 16 bits: how they take an update that is smaller than their spacing.

bfloat16 has 8 bits, so a weight near 1 moves by multiples of 2⁻⁸ = 0.004 or not at all; updates of a learning rate
below half of that are lost in rounding to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.linalg.rounding import HALVES, noise16, stochastic_round
from thinrank.optim.rule import State

WAYS = ("nearest", "stochastic", "master")
MASTER = "master"


@dataclass(frozen=True, slots=True)
class HalfWeights:
    """What is done for bfloat16 and float16 weights; wider ones are stepped as they are, at no cost.

    Attributes:
        way: `nearest`: torch's own arithmetic. `stochastic`: the update is computed in float32 and rounded to one of
            the two neighbours, right on average. `master`: a float32 copy is kept in the state and updated, and the
            weight is its rounding.

    Where somebody has changed the weight (a model that was loaded, an average with other ranks), the weight wins:
    entries that are no longer the rounding of the master's start again from the weight, all others keep theirs.
    """

    way: str = "nearest"

    def apply(self, weight: Tensor) -> bool:
        """True when `weight` is stepped in float32 and rounded."""
        return self.way != "nearest" and weight.dtype in HALVES

    def init(self, weight: Tensor) -> State:
        """The master, where one is kept: float32, in the weight's shape."""
        if self.way != "master" or not self.apply(weight):
            return {}
        return {MASTER: _wide(weight)}

    def open(self, weight: Tensor, state: State) -> Tensor:
        """`weight` in float32, contiguous, to be changed in place and given to `close_`: the master, or a copy."""
        if MASTER not in state:
            return _wide(weight)
        master = state[MASTER]
        master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.to(torch.float32)))
        return master

    def close_(self, weight: Tensor, wide: Tensor, seed: int) -> None:
        """Rounds `wide` to `weight`, in place; `seed` is of the random numbers, if the way needs any."""
        if self.way == "stochastic" and self.apply(weight):
            wide = stochastic_round(wide, weight.dtype, noise16(wide.shape, seed, wide.device))
        weight.copy_(wide)


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
