"""GaLore+: cross-head projection, fast subspaces, sparsely coded residuals (Liao et al. 2024, arXiv 2412.19820).

The paper's abstract and its reviews were at hand, its equations were not. From the abstract: the heads of an attention
share one low-rank projection; the SVD is replaced by randomized subspace iteration; sparsely coded residuals correct
what the projection loses of the first moment, the second moment and the update. From the reviews: the shared basis is
that of one randomly chosen head, and a warm-up builds the sparse index set. Everything else is our reconstruction: all
constants, the pooling of heads, `max_norm`, transport, how the residuals are stored (see
`thinrank.optim.lowrank.sparse`). With G a gradient (m × n) and S ceil(density · m · n) entries

    every T steps: A ← G, or for shared heads the rows of one head of G ;  B ← top-r right singular subspace of A
    R = G B ;  D = N Bᵀ with N = Adam(R)
    K steps long:  S ← where |G − R Bᵀ| adds up to most
    then:          D_S ← Adam(G_S), with moments of its own
    W ← (1−η λ) W − η α D

Query, key and value weights are compressed on their input side, output weights on their output side, which all heads
have in common; other matrices on the shorter side. The reviews speak of queries and keys, and values are what a shared
basis serves worst: `cross_heads` is [q, k] unless it says otherwise. With `density=1` and no warm-up every entry is in
S and the method is AdamW. Without heads and residuals, with `svd="exact"`, `transport="keep"` and
`convention="galore"`, it is GaLore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from thinrank.optim.inner.elementwise import ElementwiseAdamW
from thinrank.optim.lowrank.heads import SELECTIONS, SharedHead
from thinrank.optim.lowrank.lift import Lift, Project
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.sparse import RESELECT, SparseResidual
from thinrank.optim.lowrank.subspace import PowerIteration, Subspace, Svd
from thinrank.optim.methods.config import LowRankConfig, MethodConfig, choice, number
from thinrank.optim.methods.dct_adamw import TRANSPORTS, transport_named
from thinrank.optim.rule import Decay

SIDES = ("std", "reverse_std", "left", "right")


@dataclass(frozen=True, kw_only=True)
class GaLorePlusConfig(LowRankConfig):
    """GaLore+ (Liao et al. 2024, arXiv 2412.19820), in part reconstructed: GaLore with a basis shared by heads,
    subspace iteration in the place of the SVD, and AdamW on the entries that the subspace misses most.

    Defaults: the paper's is svd=power; GaLore's are lr=0.01, scale=0.25, update_proj_gap=200, rank=0.25 and
    proj_type=std; ours, since the paper's were not at hand, are cross_heads=['q', 'k'], heads=1, head_select=max_norm
    (the paper draws one), density=0.01, warmup=10, reselect=never, transport=rotate and convention=adamw.

    Equations and shapes: `thinrank.optim.methods.galore_plus`.
    """

    name: str = field(default="galore_plus", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(default=0.01, metadata={"help": "learning rate; projected matrices run at scale × lr"})
    scale: float = field(
        default=0.25,
        metadata={"help": "GaLore's alpha: multiplies the projected matrices' rate, also of the entries in S"},
    )
    svd: str = field(
        default="power", metadata={"help": "power: randomized subspace iteration (the paper), or exact (GaLore)"}
    )
    proj_type: str = field(
        default="std",
        metadata={"help": "compressed side: std (the shorter), reverse_std, left, right; cross_heads has its own"},
    )
    cross_heads: list[str] = field(
        default_factory=lambda: ["q", "k"],
        metadata={"help": "attention weights whose heads share a basis, of q, k, v, o; []: none"},
    )
    heads: int | tuple[int, ...] = field(
        default=1,
        metadata={"help": "blocks of rows that share a basis, for groups of one's own; found from the model otherwise"},
    )
    head_select: str = field(
        default="max_norm", metadata={"help": "head the basis is from: max_norm, random (the paper), round_robin"}
    )
    density: float = field(default=0.01, metadata={"help": "share of entries that AdamW steps in full; 0: none"})
    warmup: int = field(default=10, metadata={"help": "steps over which these entries are chosen; 0: the first's"})
    reselect: str = field(default="never", metadata={"help": "choose them anew: never, or renewal (of the basis)"})
    transport: str = field(default="rotate", metadata={"help": "moments at a renewal: rotate, keep (GaLore), reset"})
    convention: str = field(
        default="adamw",
        metadata={"help": "adamw: eps after the bias correction, decay before the update; galore: the other way round"},
    )

    GROUP: ClassVar[tuple[str, ...]] = (
        *LowRankConfig.GROUP, "svd", "proj_type", "heads", "head_select", "density", "warmup", "reselect", "transport",
        "convention",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("svd", self.svd, ("power", "exact"))
        choice("proj_type", self.proj_type, SIDES)
        if not isinstance(self.cross_heads, (list, tuple)):
            raise ValueError(f"cross_heads must be a list of q, k, v, o, got {self.cross_heads!r}")
        for role in self.cross_heads:
            choice("cross_heads", role, ("q", "k", "v", "o"))
        counts = self.heads if isinstance(self.heads, (tuple, list)) else (self.heads,)
        if not counts or any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in counts):
            raise ValueError(f"heads must be at least 1, for each section where there are some, got {self.heads!r}")
        if max(counts) > 1 and self.proj_type not in ("right", "left"):
            raise ValueError(
                f"heads need proj_type='right' (heads are rows) or 'left' (columns), got {self.proj_type!r}: set it"
            )
        choice("head_select", self.head_select, SELECTIONS)
        number("density", self.density, high=1.0)
        if not isinstance(self.warmup, int) or isinstance(self.warmup, bool) or self.warmup < 0:
            raise ValueError(f"warmup must be a whole number of at least 0 steps, got {self.warmup!r}")
        choice("reselect", self.reselect, RESELECT)
        choice("transport", self.transport, TRANSPORTS)
        choice("convention", self.convention, ("adamw", "galore"))

    def of_section(self, index: int) -> GaLorePlusConfig:
        if not isinstance(self.heads, (tuple, list)):
            return self
        return replace(self, heads=self.heads[index])

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> MethodConfig:
        parts = len(group.get("sections") or (0,))
        if isinstance(group["heads"], (tuple, list)) and len(group["heads"]) != parts:
            raise ValueError(f"heads must be one number for each of the {parts} sections, got {group['heads']!r}")
        return super().of_group(group)

    @property
    def _galore(self) -> bool:
        return self.convention == "galore"

    def matrix_rule(self) -> LowRank | None:
        if self.rank is None:
            return None
        inner: PowerIteration | Svd
        if self.svd == "exact":
            signs = "lapack" if self._galore else "fixed"
            inner = Svd(rank=self.rank, every=self.update_proj_gap, signs=signs, dtype=self.dtype)
        else:
            inner = PowerIteration(rank=self.rank, every=self.update_proj_gap, dtype=self.dtype)
        subspace: Subspace = inner
        if isinstance(self.heads, int) and self.heads > 1:
            subspace = SharedHead(inner=inner, heads=self.heads, select=self.head_select)
        lift: Lift = Project()
        if self.density > 0:
            lift = SparseResidual(
                density=self.density,
                warmup=self.warmup,
                reselect=self.reselect,
                renewals=self.renewals,
                betas=self.betas,
                eps=self.eps,
                eps_raw=self._galore,
            )
        return LowRank(
            subspace=subspace,
            transport=transport_named(self.transport, self.betas),
            inner=self.adam(eps_raw=self._galore, ages=self.transport == "reset"),
            lift=lift,
            scale=self.scale,
            renewals=self.renewals,
            decay=Decay(after=self._galore),
        )

    def element_rule(self) -> ElementwiseAdamW:
        return self.adamw(eps_raw=self._galore, decay=Decay(after=self._galore))
