"""ReLoRA: high-rank training by low-rank updates (Lialin et al. 2023, arXiv 2307.05695), and LoRA-like factors.

    y = W x + (α / r) B A x + b        A (r, in) uniform, B (out, r) zero; W does not learn by itself

Every T steps  W ← W + (α/r) B A,  A is drawn anew, B ← 0;  of Adam's moments of A and B a share stays, the largest
(`keep`), and the learning rate rises again from zero. A is never zero together with B, or nothing would ever learn:
in the authors' code both are until the first merge. With `every=null` there is no merge, and it is LoRA from random
weights on, a baseline of the field.

The paper trains all weights for a while first: train a dense model, and convert that (`model.pretrained`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from thinrank.optim.layers.base import RankedReparam, kaiming_, like
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.optim.methods.config import number, whole_steps

if TYPE_CHECKING:
    from thinrank.optim.layers.upkeep import Upkeep


class ReLoRALinear(LowRankLinear):
    """Factors beside a weight that takes them in now and then.

    Attributes:
        base: W, (out, in), frozen.
        clock: steps done, a buffer.
    """

    def __init__(self, dense: Dense, rank: int, config: ReLoRA) -> None:
        super().__init__(dense, rank, scale=config.alpha / rank)
        self.config = config
        self.base = like(dense, *dense.shape, trained=False)
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64, device=dense.weight.device))
        self.clock: Tensor

    @property
    def keeps(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.config.every is not None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base, self.bias) + F.linear(self.hidden(x), self.B)

    def weight(self) -> Tensor:
        return self.base + self.product()

    def after_step(self, upkeep: Upkeep) -> None:
        every = self.config.every
        clock = upkeep.tick(self)
        if every is None or clock % every:
            return
        a, b, base = upkeep.whole(self.A, self.B, self.base)
        anew = torch.empty_like(a)
        kaiming_(anew, upkeep.generator(self, clock))
        upkeep.replace(
            (self.base, self.A, self.B),
            (torch.addmm(base, b, a.to(b.dtype), alpha=self.scale), anew, b.new_zeros(b.shape)),
        )
        if self.config.keep:
            upkeep.prune(self.config.keep, self.A, self.B)
        else:
            upkeep.forget(self.A, self.B)

    def warmth(self, step: int) -> float:
        return self.config.warmth(step)


@dataclass(frozen=True, kw_only=True)
class ReLoRA(RankedReparam):
    """ReLoRA (Lialin et al. 2023, arXiv 2307.05695): factors that are merged into a frozen weight now and then.

    Defaults: the authors' are alpha=32.0, every=5000, of their 250M model, warmup=100 and keep=0.1, which prunes 90 %
    of the moments by size, both at the same places here; 0 forgets all, as in the SST paper's comparison; what the
    shared class says is ours.

    Equations and shapes: `thinrank.optim.layers.relora`.
    """

    name: str = field(default="relora", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    alpha: float = field(default=32.0, metadata={"help": "the factors' product is multiplied by alpha / rank"})
    every: int | None = field(default=5000, metadata={"help": "steps from one merge to the next; null: never (LoRA)"})
    warmup: int = field(default=100, metadata={"help": "steps after a merge in which the learning rate rises again"})
    keep: float = field(default=0.1, metadata={"help": "share of Adam's moments that survives a merge; 0: none"})

    def __post_init__(self) -> None:
        super().__post_init__()
        number("alpha", self.alpha, open_low=True)
        number("keep", self.keep, high=1.0)
        if self.every is not None:
            whole_steps("every", self.every)
        if not isinstance(self.warmup, int) or self.warmup < 0 or (self.every and self.warmup > self.every):
            raise ValueError(f"warmup must be from 0 to the {self.every} steps between merges, got {self.warmup!r}")

    def warmth(self, step: int) -> float:
        """What the learning rate is multiplied by in the step after `step` of them."""
        if self.every is None or not self.warmup or step < self.every:
            return 1.0
        return min(1.0, step % self.every / self.warmup)

    @property
    def acts(self) -> bool:
        return self.every is not None

    def layer(self, dense: Dense, generator: torch.Generator) -> ReLoRALinear:
        layer = ReLoRALinear(dense, self.rank_of(dense), self)
        if not dense.is_meta:
            layer.start_("lora", dense, generator)
            with torch.no_grad():
                layer.base.copy_(dense.weight)
        return layer
