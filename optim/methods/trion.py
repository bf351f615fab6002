"""Trion: orthonormal updates on the strongest columns of a fixed basis (Modoranu et al. 2025, arXiv 2505.17967).

For a gradient G of a weight W (m × n, m ≥ n), with the orthonormal DCT-II matrix C (its rows are the atoms) and the
momentum M, the paper says

    M ← M + G ;  S = M Cᵀ ;  idx = the r columns of S of largest l1 norm ;  b = S[:, idx]
    M ← M − (1−μ) b C[idx] ;  W ← (1−η λ) W − η s(m, n) NS(b) C[idx]

for wide matrices with the sides exchanged; NS is Newton-Schulz (`linalg/orthogonal.py`), on an m × r matrix alone, and
s is sqrt(max(1, m/n)) (`original`). The atoms are orthonormal, so that the update has NS(b)'s singular values. Here the
momentum is kept in the coordinates of the basis, H = M Cᵀ, which is the same and needs neither the product b C[idx] nor
a second pass over M:

    H ← H + G Cᵀ ;  b = H[:, idx] ;  H[:, idx] ← μ b

The memory is a full momentum and r integers: as Muon's, which orthogonalises all of it. H stays float32 with
`state_bits=8`, for Dion's reason: what was not chosen does not decay, nor would the codes' errors in it.

The paper's: everything above the last formula. Ours: the last, bases other than the DCT, columns by l2 norm. A gradient
that is not finite counts as zero, since H would keep it for ever, and the columns stay. Replicas of other data need the
mean of whole gradients: columns are chosen by norms, and a mean of the ranks' norms would choose those of much noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from thinrank.optim.linalg.basis import captured_energy
from thinrank.optim.linalg.fixed import column_norms, select_columns
from thinrank.optim.linalg.norms import all_finite
from thinrank.optim.linalg.orthogonal import SETS, newton_schulz, shape_scale
from thinrank.optim.lowrank.subspace import FixedColumns
from thinrank.optim.lowrank.told import ToldColumns
from thinrank.optim.lowrank.transport import Slots
from thinrank.optim.methods.config import RankedConfig
from thinrank.optim.methods.dct_adamw import check_columns
from thinrank.optim.methods.momentum import OrthonormalConfig
from thinrank.optim.rule import Decay, State, Step
from thinrank.optim.update import Update


@dataclass(frozen=True, slots=True, kw_only=True)
class TrionRule(ToldColumns):
    """Trion's and Dion2's step. The columns are the momentum's, not the gradient's, which the five slots cannot say.

    Attributes:
        subspace: the basis and how many of its columns; its `every` is not asked.
        momentum: what remains of the chosen columns.
        coefficients: of Newton-Schulz, a name in `SETS`.
        adjust_lr: a scale for the weight's shape (`linalg.orthogonal.shape_scale`).
    """

    subspace: FixedColumns
    momentum: float = 0.95
    coefficients: str = "jordan"
    adjust_lr: str = "original"
    scale: float = 1.0
    decay: Decay = field(default=Decay())

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        momentum = torch.zeros(shape, dtype=torch.float32, device=device)
        return {"momentum": momentum, **self.subspace.init(shape, device)}

    def update(self, grad: Tensor, state: State, step: Step) -> Update:
        momentum = state["momentum"]
        coordinates = self.subspace.coordinates(grad)
        fine = all_finite(coordinates, step.axis).squeeze(-1)  # (batch, 1)
        step.hold(range(len(step.count)), ~fine.squeeze(-1))
        momentum.add_(torch.where(fine.unsqueeze(-1), coordinates, 0.0))
        norms = column_norms(momentum, self.subspace.norm, step.axis)
        columns, kept = select_columns(norms, state["columns"], state["columns"].shape[-1])
        columns = torch.where(fine, columns, state["columns"].long())
        state["columns"].copy_(columns)
        index = columns.unsqueeze(-2).expand(-1, momentum.shape[-2], -1)
        own = momentum.gather(-1, index)  # (batch, long, r)
        if step.record is not None:
            first = torch.tensor([count == 0 for count in step.count]).to(own.device)
            step.record["captured_energy"] = captured_energy(momentum, own, step.axis)
            overlap = Slots(kept, ~fine.squeeze(-1)).overlap()
            step.record["subspace_overlap"] = overlap.masked_fill(first, math.nan)
        momentum.scatter_(-1, index, self.momentum * own)
        direction = newton_schulz(own, SETS[self.coefficients], axis=step.axis)
        direction.mul_(shape_scale(self.adjust_lr, *step.stored(momentum)))
        return self.subspace.up(direction, state, momentum.shape[-1])


@dataclass(frozen=True, kw_only=True)
class TrionConfig(OrthonormalConfig, RankedConfig):
    """Trion (Modoranu et al. 2025, arXiv 2505.17967): orthonormal updates on the strongest columns of a fixed cosine
    basis, which are chosen at every step.

    Defaults: the paper's are lr=0.01, weight_decay=0.01, momentum=0.95, basis=dct, norm=l1, adjust_lr=original,
    betas=(0.9, 0.95) and eps=1e-10; ours, or not known to be theirs, are rank=0.25 (theirs: 128 to 512, a sixteenth to
    a half of the width), orthogonalizer=jordan, engine=auto, state_bits=32 and embedding_lr=0.003 (theirs: 3e-4).

    Equations and shapes: `thinrank.optim.methods.trion`.
    """

    name: str = field(default="trion", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(default=0.01, metadata={"help": "learning rate of the matrices"})
    eps: float = field(default=1e-10, metadata={"help": "added to Adam's denominator"})
    weight_decay: float = field(
        default=0.01,
        metadata={"help": "decoupled weight decay of matrices, embeddings and head; norms and biases have none"},
    )
    state_bits: int = field(
        default=32,
        metadata={"help": "bits of each entry of Adam's moments: 32, or 8; the matrices' momentum is always float32"},
    )
    momentum: float = field(default=0.95, metadata={"help": "what remains of the columns that were sent"})
    basis: str = field(default="dct", metadata={"help": "fixed orthogonal basis: dct, identity, hadamard, random"})
    norm: str = field(default="l1", metadata={"help": "columns are ranked by this norm: l1 (the paper), l2"})
    engine: str = field(default="auto", metadata={"help": "how coordinates are computed: auto, matmul, fft (dct only)"})

    GROUP: ClassVar[tuple[str, ...]] = (
        *RankedConfig.GROUP, "momentum", "basis", "norm", "engine", "orthogonalizer", "adjust_lr",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_columns(self.basis, self.norm, self.engine)

    def matrix_rule(self) -> TrionRule | None:
        if self.rank is None:
            return None
        return TrionRule(
            subspace=FixedColumns(
                rank=self.rank, basis=self.basis, norm=self.norm, engine=self.engine, dtype=self.dtype
            ),
            momentum=self.momentum,
            coefficients=self.orthogonalizer,
            adjust_lr=self.adjust_lr,
            scale=self.scale,
        )
