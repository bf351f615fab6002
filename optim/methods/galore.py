"""GaLore: memory-efficient training by gradient low-rank projection (Zhao et al., ICML 2024, arXiv 2403.03507).

Every T steps, from the gradient G of that step (m × n, m ≥ n):

    U S Vᵀ = svd(G) ;  B = V[:, :r]

and at every step

    R = G B ;  M ← β1 M + (1−β1) R ;  V ← β2 V + (1−β2) R²
    N = M / (sqrt(V) + ε) ;  W ← W − η α sqrt(1−β2ᵗ)/(1−β1ᵗ) N Bᵀ ;  W ← W − η λ W

for wide matrices with the sides exchanged. The moments are kept as they are when B changes. With `svd="exact"` the
trajectory is the authors' own (galore-torch 1.0); `svd="power"` replaces the factorisation by randomized subspace
iteration, an order of magnitude cheaper (ours; the moments are still kept).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thinrank.optim.inner.elementwise import ElementwiseAdamW
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import PowerIteration, Subspace, Svd, TwoSidedSvd
from thinrank.optim.matrix import SIDES
from thinrank.optim.methods.config import LowRankConfig, choice
from thinrank.optim.rule import Decay


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig(LowRankConfig):
    """GaLore as published (Zhao et al., ICML 2024, arXiv 2403.03507): Adam in the gradient's singular subspace.

    Defaults: the authors', of their pre-training recipes and their AdamW, are lr=0.01, scale=0.25, update_proj_gap=200,
    rank=0.25 (60M, 350M and 1B), proj_type=std, svd=exact, eps=1e-06 and weight_decay=0.0; ours are
    targets=['all-linear'] (theirs: attention and mlp) and what the shared classes say is.

    Equations and shapes: `thinrank.optim.methods.galore`.
    """

    name: str = field(default="galore", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(default=0.01, metadata={"help": "learning rate; projected matrices run at scale × lr"})
    eps: float = field(default=1e-6, metadata={"help": "added to Adam's denominator before the bias correction"})
    scale: float = field(default=0.25, metadata={"help": "the paper's alpha: multiplies the projected matrices' rate"})
    proj_type: str = field(
        default="std", metadata={"help": "compressed side: std (the shorter), reverse_std, left, right, full (both)"}
    )
    svd: str = field(
        default="exact",
        metadata={"help": "exact (the paper), or power: randomized subspace iteration (one-sided only)"},
    )

    GROUP: ClassVar[tuple[str, ...]] = (*LowRankConfig.GROUP, "proj_type", "svd")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("proj_type", self.proj_type, SIDES)
        choice("svd", self.svd, ("exact", "power"))
        if self.proj_type == "full" and self.svd != "exact":
            raise ValueError("proj_type='full' needs svd='exact', got svd='power': choose another proj_type or svd")

    def matrix_rule(self) -> LowRank | None:
        if self.rank is None:
            return None
        subspace: Subspace
        if self.proj_type == "full":
            subspace = TwoSidedSvd(rank=self.rank, every=self.update_proj_gap, dtype=self.dtype)
        elif self.svd == "exact":
            subspace = Svd(rank=self.rank, every=self.update_proj_gap, dtype=self.dtype)
        else:
            subspace = PowerIteration(rank=self.rank, every=self.update_proj_gap, dtype=self.dtype)
        return LowRank(
            subspace=subspace,
            inner=self.adam(eps_raw=True),
            scale=self.scale,
            renewals=self.renewals,
            decay=Decay(after=True),
        )

    def element_rule(self) -> ElementwiseAdamW:
        return self.adamw(eps_raw=True, decay=Decay(after=True))
