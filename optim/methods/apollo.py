"""APOLLO: SGD-like memory, AdamW-level performance (Zhu et al., MLSys 2025, arXiv 2412.05270), and APOLLO-Mini.

Adam runs in a random subspace only to say how long each row of the gradient should be. Every T steps P (n × r) is drawn
from N(0, 1/r); at every step, for a gradient G (m × n, m ≥ n),

    R = G P ;  M ← β1 M + (1−β1) R ;  V ← β2 V + (1−β2) R² ;  ψ = M / (sqrt(V) + ε)
    s_j = ‖ψ_j‖ / ‖R_j‖ for each row j (APOLLO)   or   s = ‖ψ‖ / ‖R‖ for the matrix, with r = 1 (APOLLO-Mini)
    S = diag(s) G ;  if ‖S‖ > γ ‖S_before‖: S ← S γ ‖S_before‖ / ‖S‖ (Fira's limiter)
    W ← W − η a sqrt(1−β2ᵗ)/(1−β1ᵗ) S ;  W ← W − η λ W

for wide matrices with the sides exchanged. s is about sqrt(r/n) times what Adam in the whole space would give, hence
a ≈ sqrt(n/r). The state is 2mr + 1 numbers: P is remade from a seed.

The bias correction outside the norms, ε, 1e-8 added to ‖R‖, and decay after the update are not in the paper: they were
inferred from what apollo-torch 1.0.3 gives, seen from outside, and from descriptions of it; this room's outputs agree
with its for `proj="svd"`. So were the two scales: `scale` enters by its root, a = sqrt(scale), so that APOLLO-Mini's
sqrt(128) is scale = 128, and `scale_front` says whether a is applied before the limiter. That looks at a ratio of
norms, in which a constant cancels, so that the option does nothing here. Ours: one P for all matrices of a size
(theirs: one each), and none for r = n; a limiter that has seen a norm of zero starts anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thinrank.optim.inner.elementwise import ElementwiseAdamW
from thinrank.optim.lowrank.lift import ScaledGradient
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import Gaussian, Subspace, Svd
from thinrank.optim.matrix import SIDES
from thinrank.optim.methods.config import LowRankConfig, choice, number
from thinrank.optim.rule import Decay

ONE_SIDED = tuple(side for side in SIDES if side != "full")


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(LowRankConfig):
    """APOLLO as published (Zhu et al., MLSys 2025, arXiv 2412.05270): SGD with Adam's length for each channel, which is
    read off a random projection of a quarter of the short side.

    Defaults: the paper's are lr=0.01, scale=1.0, rank=0.25, proj=random, proj_type=std, scale_type=channel and
    update_proj_gap=200; Fira's limiter with update_limit=1.01 and disable_nl=False is part of its step; eps=1e-06 and
    scale_front=False are apollo-torch's; ours are weight_decay=0.0 and what the shared classes say.

    Equations and shapes: `thinrank.optim.methods.apollo`.
    """

    name: str = field(default="apollo", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(default=0.01, metadata={"help": "learning rate; scaled gradients run at sqrt(scale) × lr"})
    eps: float = field(default=1e-6, metadata={"help": "added to Adam's denominator before the bias correction"})
    scale: float = field(default=1.0, metadata={"help": "its square root multiplies the scaled gradients' rate"})
    proj: str = field(default="random", metadata={"help": "projection: random (from a seed, no state), svd (exact)"})
    proj_type: str = field(
        default="std", metadata={"help": "projected side: std (the shorter), reverse_std, left, right"}
    )
    scale_type: str = field(default="channel", metadata={"help": "a factor for each: channel (row), tensor (matrix)"})
    update_limit: float = field(default=1.01, metadata={"help": "largest growth of the update's norm in a step"})
    disable_nl: bool = field(default=False, metadata={"help": "let the update's norm grow as it likes"})
    scale_front: bool = field(
        default=False, metadata={"help": "apollo-torch's: scale before the limiter, which makes no difference"}
    )

    GROUP: ClassVar[tuple[str, ...]] = (
        *LowRankConfig.GROUP, "proj", "proj_type", "scale_type", "update_limit", "disable_nl", "scale_front",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("proj", self.proj, ("random", "svd"))
        choice("proj_type", self.proj_type, ONE_SIDED)
        choice("scale_type", self.scale_type, ("channel", "tensor"))
        number("update_limit", self.update_limit, low=1.0)
        for name in ("disable_nl", "scale_front"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.stagger and self.proj == "random":
            raise ValueError("stagger spreads factorisations, got proj='random', which has none: use stagger=False")
        if self.lazy_overlap is not None and self.proj == "random":
            raise ValueError(
                f"lazy_overlap={self.lazy_overlap} compares subspaces, got proj='random', whose draws have nothing in "
                "common: leave it out"
            )

    def matrix_rule(self) -> LowRank | None:
        if self.rank is None:
            return None
        subspace: Subspace = Gaussian(rank=self.rank, gap=self.update_proj_gap, dtype=self.dtype)
        if self.proj == "svd":
            subspace = Svd(rank=self.rank, every=self.update_proj_gap, dtype=self.dtype)
        limit = None if self.disable_nl else self.update_limit
        return LowRank(
            subspace=subspace,
            inner=self.adam(eps_raw=True),
            lift=ScaledGradient(betas=self.betas, per=self.scale_type, limit=limit),
            scale=self.scale**0.5,
            renewals=self.renewals,
            decay=Decay(after=True),
        )

    def element_rule(self) -> ElementwiseAdamW:
        return self.adamw(eps_raw=True, decay=Decay(after=True))


@dataclass(frozen=True, kw_only=True)
class ApolloMiniConfig(ApolloConfig):
    """APOLLO-Mini as published (Zhu et al., MLSys 2025, arXiv 2412.05270): SGD with Adam's length for each matrix,
    which is read off one random direction.

    Defaults: the paper's are rank=1, scale=128.0 (which enters by its root), scale_type=tensor and lr=0.01, to which it
    prefers 0.02; the rest is APOLLO's, and ours what is ours there.

    Equations and shapes: `thinrank.optim.methods.apollo`.
    """

    name: str = field(default="apollo_mini", metadata={"help": "method (chosen by `optimizer=…`)"})
    rank: int | float | None = field(
        default=1, metadata={"help": "directions: a count, or a fraction of the matrix's short side (0.25, 1.0)"}
    )
    scale: float = field(default=128.0, metadata={"help": "its square root multiplies the scaled gradients' rate"})
    scale_type: str = field(default="tensor", metadata={"help": "a factor for each: channel (row), tensor (matrix)"})
