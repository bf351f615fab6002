"""LORO: low-rank Riemannian optimizer (Mo et al., ICLR 2025): factors, and now and then a step on the manifold.

    W = B A, with M = B (out, r) and N = Aᵀ (in, r)

Most steps are the optimizer's own on M and N, made r/d times as long (`lazy`), d being the longer side. Every K-th
(η ΔM, η ΔN) is taken for η G N and η Gᵀ M of a step on the manifold of matrices of rank r
(`linalg.factor.riemannian_step`), which gives the best approximation by rank r of the projected step, and balanced
factors; the optimizer's moments begin anew.

So the exact step is made of what any optimizer has just done, and needs no room in it. The authors' code preconditions
with Adam's moments, as happens here with `optimizer=adamw`. Which length r is divided by is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinrank.optim.layers.base import RankedReparam
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.optim.linalg.factor import riemannian_step
from thinrank.optim.methods.config import choice, whole_steps

if TYPE_CHECKING:
    from thinrank.optim.layers.upkeep import Upkeep


class LOROLinear(LowRankLinear):
    """Two factors that are now and then stepped together.

    Attributes:
        clock: steps done, a buffer.
    """

    keeps = True

    def __init__(self, dense: Dense, rank: int, config: LORO) -> None:
        super().__init__(dense, rank)
        self.config = config
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64, device=dense.weight.device))
        self.clock: Tensor
        self._before: list[Tensor] = []

    def before_step(self, upkeep: Upkeep) -> None:
        self._before = [upkeep.weights.here(p).clone() for p in (self.A, self.B)]

    def after_step(self, upkeep: Upkeep) -> None:
        before, self._before = self._before, []
        clock = upkeep.tick(self)
        here = [upkeep.weights.here(p) for p in (self.A, self.B)]
        if clock % self.config.every:
            if self.config.lazy:
                share = self.rank / max(self.in_features, self.out_features)
                for now, old in zip(here, before, strict=True):
                    now.copy_(torch.lerp(old, now, share))
            return
        new = [value.clone() for value in upkeep.whole(self.A, self.B)]
        for now, old in zip(here, before, strict=True):
            now.copy_(old)
        old_a, old_b = (value.clone() for value in upkeep.whole(self.A, self.B))
        step_a, step_b = old_a - new[0], old_b - new[1]
        if not bool(step_a.any()) and not bool(step_b.any()):
            return  # the step was skipped, and skipped steps change nothing

        def exact() -> tuple[Tensor, Tensor]:
            wide = torch.promote_types(old_a.dtype, torch.float32)
            parts = (old_b, old_a.mT, step_b, step_a.mT)
            m, n = riemannian_step(*(part.to(wide) for part in parts))
            return n.mT.contiguous().to(old_a.dtype), m.to(old_a.dtype)

        upkeep.replace((self.A, self.B), upkeep.by_owner(self, exact, [old_a.shape, old_b.shape], old_a))
        upkeep.forget(self.A, self.B)

    def warmth(self, step: int) -> float:
        return self.config.warmth(step)


@dataclass(frozen=True, kw_only=True)
class LORO(RankedReparam):
    """LORO (Mo et al., ICLR 2025): factors with an exact step on the manifold of their products every K steps.

    Defaults: the authors' are every=500 (200 at 1B), init=xavier, warmup=100 and lazy=true; what the shared class says
    is ours.

    Equations and shapes: `thinrank.optim.layers.loro`.
    """

    name: str = field(default="loro", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    every: int = field(default=500, metadata={"help": "steps from one exact step to the next"})
    warmup: int = field(default=100, metadata={"help": "steps after each in which the learning rate rises again"})
    lazy: bool = field(default=True, metadata={"help": "other steps are rank / longer side times as long"})
    init: str = field(default="xavier", metadata={"help": "first values: xavier, svd (of the weight), normal"})

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_steps("every", self.every)
        choice("init", self.init, ("xavier", "svd", "normal"))
        if not isinstance(self.warmup, int) or not 0 <= self.warmup <= self.every:
            raise ValueError(f"warmup must be from 0 to the {self.every} steps of a period, got {self.warmup!r}")

    def warmth(self, step: int) -> float:
        """What the learning rate is multiplied by in the step after `step` of them."""
        if not self.warmup or step < self.every:
            return 1.0  # the schedule's own warm-up is enough before the first
        return min(1.0, (step % self.every + 1) / self.warmup)

    @property
    def acts(self) -> bool:
        return True

    def layer(self, dense: Dense, generator: torch.Generator) -> LOROLinear:
        layer = LOROLinear(dense, self.rank_of(dense), self)
        layer.start_(self.init, dense, generator)
        return layer
