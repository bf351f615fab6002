"""What happens to the moments when the basis is renewed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thinrank.optim.inner.moments import NAMES, moments
from thinrank.optim.rule import State, beside


@dataclass(frozen=True, slots=True)
class Rotation:
    """`matrix = B_newᵀ B_old` (batch, r, r): old coordinates times its transpose are new coordinates."""

    matrix: Tensor

    def overlap(self) -> Tensor:
        """`‖B_newᵀ B_old‖² / r` (batch,): the mean squared cosine of the principal angles; 1 when nothing changed."""
        return self.matrix.square().sum((-2, -1)) / self.matrix.shape[-1]


@dataclass(frozen=True, slots=True)
class Slots:
    """A rotation of zeros and ones.

    Attributes:
        kept: (batch, r) bool, the columns whose meaning did not change; the others are new.
        held: (batch,) bool, the matrices for which nothing was chosen, so that all columns are `kept`; None: no such.
    """

    kept: Tensor
    held: Tensor | None = None

    def overlap(self) -> Tensor:
        """The share of columns that stayed (batch,); no number for matrices that are `held`."""
        share = self.kept.float().mean(-1)
        return share if self.held is None else share.masked_fill(self.held, math.nan)


Change = Rotation | Slots


class Transport(Protocol):
    def carry(self, state: State, change: Change, count: Sequence[int]) -> None:
        """Carries the moments in `state` over `change`, in place; `count` updates have entered them."""
        ...


@dataclass(frozen=True, slots=True)
class Keep:
    """GaLore: the old numbers are read as coordinates in the new basis."""

    def carry(self, state: State, change: Change, count: Sequence[int]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Reset:
    """Both moments start again from zero, and so do the columns' ages where they are kept."""

    def carry(self, state: State, change: Change, count: Sequence[int]) -> None:
        held = change.held if isinstance(change, Slots) else None
        with moments(state, count) as (m, v):
            for value in (m, v, state["age"]) if "age" in state else (m, v):
                if held is None:
                    value.zero_()
                else:
                    value.masked_fill_(~held.view(-1, *[1] * (value.ndim - 1)), 0.0)


@dataclass(frozen=True, slots=True)
class Rotate:
    """The first moment is rotated; the second by the rule of LDAdam (Robert et al. 2024, alg. 1), which rotates its two
    parts apart.

    With hats for bias-corrected values, `v̂ − m̂²` (the variance) goes over by the squared entries of the rotation and
    `m̂²` by rotating m̂ first: `v ← (1−β2^k) (max((v̂ − m̂²) (R∘R)ᵀ, 0) + (m̂ Rᵀ)²)`. For a choice of columns both rules
    say: what stays keeps its moments, what is new starts at zero.

    The paper takes the absolute value of the sum instead of cutting the variance off at zero. The estimate of the
    variance is often negative (β1 ≠ β2), the sum then passes through zero where the mean does not, and the next step is
    up to 60 learning rates long; with `v̂ ≥ m̂²` it stays within Adam's own bound.

    Attributes:
        betas: of the moments.
        negative: `zero` (the variance is cut off) or `absolute` (the paper's absolute value of the sum).
        also: what else is rotated as the first moment is: coordinates in its last dimension, the batch in its first.
    """

    betas: tuple[float, float]
    negative: str = "zero"
    also: tuple[str, ...] = ()

    def carry(self, state: State, change: Change, count: Sequence[int]) -> None:
        linear = [state[key] for key in self.also]
        if NAMES[0] in state and NAMES[1] not in state:  # a momentum, and no second moment
            linear.append(state[NAMES[0]])
        else:
            with moments(state, count) as (m, v):
                if isinstance(change, Slots):
                    _clear(change, m, v)
                else:
                    self._rotate(m, v, change.matrix.mT, count)
        if isinstance(change, Slots):
            _clear(change, *linear)
            if "age" in state:
                state["age"].masked_fill_(~change.kept, 0.0)
            return
        for value in linear:
            wide = value.flatten(1, -2) @ change.matrix.mT
            value.copy_(wide.view(value.shape))

    def _rotate(self, m: Tensor, v: Tensor, back: Tensor, count: Sequence[int]) -> None:
        """Both moments, in place, by `back` (batch, r_old, r_new)."""
        k = beside(count, m.device).to(m.dtype).clamp(min=1.0)[:, None, None]
        fix1, fix2 = 1.0 - self.betas[0] ** k, 1.0 - self.betas[1] ** k
        mean = m / fix1
        new_mean = mean @ back
        # after a gradient of 1e20 both squares are infinite, and their difference no number
        variance = (v / fix2 - mean.square()).nan_to_num_() @ back.square()
        if self.negative == "zero":
            variance = variance.clamp_(min=0.0)
        total = variance.add_(new_mean.square()).abs_()
        m.copy_(new_mean * fix1)
        v.copy_(total.nan_to_num_(nan=torch.inf, posinf=torch.inf).mul_(fix2))


def _clear(change: Slots, *values: Tensor) -> None:
    """Zeros in the columns (last dimension) of `values` that are new."""
    for value in values:  # filled and not multiplied: zero times a second moment that overflowed is no number
        new = ~change.kept
        value.masked_fill_(new.view(new.shape[0], *[1] * (value.ndim - 2), new.shape[1]), 0.0)
