"""Dion: orthonormal updates of low rank from a full momentum (Ahn et al. 2025, arXiv 2504.05295).

For a gradient G of a weight W (m × n, m ≥ n), with momentum M (m × n, zero at first) and right factor Q (n × r, normal
columns at first):

    M ← M + G ;  P = orth(M Q) ;  R = Mᵀ P
    M ← M − (1−μ) P Rᵀ                      what was captured decays, what was not is kept whole: error feedback
    Q ← R with columns of length one ;  W ← (1−η λ) W − η s(m, n) P Qᵀ

for wide matrices with the sides exchanged: P is on the longer side. s is sqrt(m/n) (`spectral`). Only P is orthonormal.
`right_factor="qr"` takes Q from the QR decomposition of R as well, so that the update's singular values are one
(Orth-Dion, arXiv 2605.16341). The memory is a full momentum and Q: more than Muon's. What is low-rank is the message:
with the data on several ranks, P and R (r numbers a row and a column) are averaged and no gradient is, and the weights
are those of one rank that has all data; a rank's M is its own.

M stays float32 where AdamW's moments are codes (`state_bits=8`): what was not captured does not decay, nor would
the errors that codes make in it, which are in proportion to the captured part beside it.

The paper's: all of the above. Ours: signs for which Q and P agree (R's triangular factor has a positive diagonal, else
`right_factor="qr"` could step uphill); a column of P that rounding alone would make is left out, and its column of Q
kept, where the paper keeps Q for a zero momentum only; a gradient that is not finite counts as zero, since M would keep
it for ever, and Q stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from thinrank.optim.axis import Asking, alone
from thinrank.optim.linalg.basis import captured_energy, random_columns
from thinrank.optim.linalg.norms import all_finite, unit_columns
from thinrank.optim.linalg.orthogonal import cholesky_qr, householder_qr, shape_scale
from thinrank.optim.linalg.products import product
from thinrank.optim.lowrank.subspace import width
from thinrank.optim.lowrank.told import ToldFactors
from thinrank.optim.methods.config import RankedConfig, choice
from thinrank.optim.methods.momentum import OrthonormalConfig
from thinrank.optim.rule import Decay, State, Step
from thinrank.optim.update import Update


@dataclass(frozen=True, slots=True, kw_only=True)
class DionRule(ToldFactors):
    """Dion's step. What is projected is the momentum, and the error stays in it: the five slots have no such order.

    Attributes:
        rank: of the update, as in the subspaces.
        momentum: what remains of the captured part.
        orthogonalizer: `cholesky_qr`, or `qr` by reflections, for matrices that are whole on a rank.
        right_factor: `column_norm` or `qr`.
        adjust_lr: a scale for the weight's shape (`linalg.orthogonal.shape_scale`).
        dtype: of the products with the momentum and of the update.
    """

    rank: int | float
    momentum: float = 0.95
    orthogonalizer: str = "cholesky_qr"
    right_factor: str = "column_norm"
    adjust_lr: str = "spectral"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    decay: Decay = field(default=Decay())

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        start = torch.eye(shape[2], width(self.rank, shape), dtype=torch.float32, device=device)
        return {
            "momentum": torch.zeros(shape, dtype=torch.float32, device=device),
            "basis": start.expand(shape[0], -1, -1).clone(),
        }

    @property
    def by_rows(self) -> bool:
        return self.orthogonalizer == "cholesky_qr"

    def factors(self, shape: tuple[int, int, int]) -> tuple[int, torch.dtype]:
        return width(self.rank, shape), self.dtype

    def update(self, grad: Tensor, state: State, step: Step) -> Update:
        return alone(self.exchange(grad, state, step))

    def exchange(self, grad: Tensor, state: State, step: Step) -> Asking[Update]:
        momentum, basis = state["momentum"], state["basis"]
        _, short, r = basis.shape
        for i, count in enumerate(step.count):
            if count == 0:
                basis[i] = unit_columns(random_columns(short, r, step.generator(i), basis.device))
        fine = all_finite(grad, step.axis)  # (batch, 1, 1)
        step.hold(range(len(step.count)), ~fine.flatten())
        momentum.add_(torch.where(fine, grad, 0.0))
        del grad  # who asks others may have to wait, with many others
        left = self.orthonormal(step)((yield self.product(momentum, basis)))  # (batch, long, r)
        right = yield step.axis.sum(self.product(momentum.mT, left))  # (batch, short, r)
        if step.record is not None:
            step.record["captured_energy"] = captured_energy(momentum, left @ right.mT, step.axis)
        momentum.baddbmm_(left, right.mT, alpha=self.momentum - 1.0)
        unit = unit_columns(right) if self.right_factor == "column_norm" else self.orthonormal()(right)
        basis.copy_(torch.where(fine & unit.any(-2, keepdim=True), unit, basis))
        left.mul_(shape_scale(self.adjust_lr, *step.stored(momentum)))
        return Update(left.to(self.dtype), unit.to(self.dtype))

    # --- replicas (`Remembers`) ---------------------------------------------------------------------------------------

    @property
    def remembers(self) -> bool:
        return True

    @property
    def memory(self) -> tuple[str, ...]:
        return ("momentum",)

    def recall(self, state: State, short: int) -> Tensor:
        return state["momentum"]

    def remember(self, value: Tensor, state: State) -> None:
        state["momentum"].copy_(value)

    def asks(self, shape: tuple[int, int, int], *, choosing: bool = False) -> int:
        batch, long, short = shape
        return batch * (long + short) * width(self.rank, shape)

    # --- products -----------------------------------------------------------------------------------------------------

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return product(a.to(self.dtype), b.to(self.dtype)).float()

    def orthonormal(self, step: Step | None = None) -> Callable[[Tensor], Tensor]:
        """The Q factor of columns on the long side (with `step`, whose ranks may share them) or on the short one."""
        if self.orthogonalizer == "cholesky_qr":
            return cholesky_qr if step is None else lambda x: cholesky_qr(x, step.axis)
        if step is not None and not step.axis.whole:
            raise RuntimeError("orthogonalizer='qr' needs whole matrices: use 'cholesky_qr' where rows are sharded")
        return householder_qr


@dataclass(frozen=True, kw_only=True)
class DionConfig(OrthonormalConfig, RankedConfig):
    """Dion (Ahn et al. 2025, arXiv 2504.05295): orthonormal updates of low rank from a full momentum, at every step.

    Defaults: the authors' are lr=0.01, weight_decay=0.01, momentum=0.95, right_factor=column_norm, adjust_lr=spectral,
    betas=(0.9, 0.95) and rank=0.25, the least of what they advise for small models; ours are
    orthogonalizer=cholesky_qr (theirs draws random numbers), state_bits=32 and embedding_lr=0.003.

    Equations and shapes: `thinrank.optim.methods.dion`.
    """

    name: str = field(default="dion", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(default=0.01, metadata={"help": "learning rate of the matrices (theirs: 0.01 to 0.02)"})
    weight_decay: float = field(
        default=0.01,
        metadata={"help": "decoupled weight decay of matrices, embeddings and head; norms and biases have none"},
    )
    state_bits: int = field(
        default=32,
        metadata={"help": "bits of each entry of Adam's moments: 32, or 8; the matrices' momentum is always float32"},
    )
    momentum: float = field(default=0.95, metadata={"help": "what remains of the part of the momentum that was sent"})
    orthogonalizer: str = field(
        default="cholesky_qr",
        metadata={"help": "of the left factor: cholesky_qr (products, sharded too), qr (reflections)"},
    )
    right_factor: str = field(
        default="column_norm", metadata={"help": "columns of length one: column_norm (Dion), or qr (Orth-Dion)"}
    )
    adjust_lr: str = field(
        default="spectral", metadata={"help": "scale for the shape: original, spectral, match_rms_adamw, none"}
    )

    GROUP: ClassVar[tuple[str, ...]] = (
        *RankedConfig.GROUP, "momentum", "orthogonalizer", "right_factor", "adjust_lr",
    )  # fmt: skip

    ORTHOGONALIZERS: ClassVar[tuple[str, ...]] = ("cholesky_qr", "qr")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("right_factor", self.right_factor, ("column_norm", "qr"))

    def matrix_rule(self) -> DionRule | None:
        if self.rank is None:
            return None
        return DionRule(
            rank=self.rank,
            momentum=self.momentum,
            orthogonalizer=self.orthogonalizer,
            right_factor=self.right_factor,
            adjust_lr=self.adjust_lr,
            dtype=self.dtype,
            scale=self.scale,
        )
