"""One basis for all heads of an attention matrix, computed from the rows of a few of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from thinrank.optim.linalg.heads import largest_heads, take_heads
from thinrank.optim.lowrank.subspace import PowerIteration, Shape3, Svd, width
from thinrank.optim.lowrank.transport import Change
from thinrank.optim.rule import State, Step
from thinrank.optim.update import Update

SELECTIONS = ("max_norm", "random", "round_robin")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHead:
    """Cross-head projection (GaLore+, Liao et al. 2024): the basis of one head serves them all.

    The heads are equal blocks of rows of the long side: the outputs of a query, key or value projection seen with
    `proj_type="right"`, the inputs of an output projection seen with `"left"`. Every head's gradient is a product with
    the same activations on the short side, so their row spaces are alike; a factorisation of (head size × short)
    numbers stands for one of `heads` times as many.

    One head has no more directions than rows. Where more are wanted, `ceil((r + oversample) / head size)` heads are
    pooled (ours; an exact factorisation needs no oversampling).

    Attributes:
        inner: what finds a basis in the rows it is shown.
        heads: blocks of rows; one is the plain rule.
        select: `max_norm`, the heads of largest Frobenius norm (ours: it loses least, and costs one pass); `random`
            (said of the paper by its reviewers), drawn anew at each renewal; `round_robin`, the next ones in turn.
    """

    inner: PowerIteration | Svd
    by_rows: ClassVar[bool] = False
    heads: int
    select: str = "max_norm"

    @property
    def every(self) -> int:
        return self.inner.every

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def factorises(self) -> bool:
        return self.inner.factorises

    @property
    def orthonormal(self) -> bool:
        return self.inner.orthonormal

    def small(self, shape: Shape3) -> Shape3:
        return self.inner.small(shape)

    def init(self, shape: Shape3, device: torch.device) -> State:
        if shape[1] % self.heads:
            raise ValueError(
                f"heads must divide the {shape[1]} rows (columns for 'left') that hold them, got {self.heads}: "
                "correct it, or leave heads out of this group"
            )
        return self.inner.init(shape, device)

    def pooled(self, shape: Shape3) -> int:
        """How many heads a basis is computed from."""
        rank, rows = width(self.inner.rank, shape), shape[1] // self.heads
        if rank <= rows:
            return 1
        spare = self.inner.oversample if isinstance(self.inner, PowerIteration) else 0
        return min(self.heads, -(-(rank + spare) // rows))

    def choose(self, x: Tensor, step: Step) -> Tensor:
        """Numbers of the heads to show to `inner`: (batch, pooled)."""
        few = self.pooled((x.shape[0], x.shape[1], x.shape[2]))
        if self.select == "max_norm":
            return largest_heads(x, self.heads, few)
        if self.select == "random":
            drawn = [torch.randperm(self.heads, generator=step.generator(i))[:few] for i in range(x.shape[0])]
        else:
            renewals = [-(-count // self.every) for count in step.count]  # until now, this one excluded
            drawn = [(renewal * few + torch.arange(few)) % self.heads for renewal in renewals]
        return torch.stack(drawn).to(x.device)

    def renew(self, x: Tensor, state: State, step: Step) -> tuple[Change, Tensor | None]:
        if not step.axis.whole:
            raise RuntimeError("a head's basis needs whole matrices: use cross_heads=[] where rows are sharded")
        if self.pooled((x.shape[0], x.shape[1], x.shape[2])) < self.heads:
            shown = take_heads(x, self.heads, self.choose(x, step))
            change, _ = self.inner.renew(shown, state, step)  # the coordinates of these heads are not those of all
            return change, None
        return self.inner.renew(x, state, step)

    def down(self, x: Tensor, state: State) -> Tensor:
        return self.inner.down(x, state)

    def up(self, low: Tensor, state: State, short: int) -> Update:
        return self.inner.up(low, state, short)
