"""QR-LoRA: numbers before the leading terms of a weight's pivoted QR (Liang & Bharadwaj 2025, arXiv 2508.21810).

    W₀ Π = Q R with column pivoting ;   W = W₀ + Σ_{i ≤ r} λ_i q_i r_iᵀ Πᵀ

q_i (out,) are columns of Q, r_iᵀ Πᵀ (in,) rows of R with columns in the order of W₀. Only λ (r,) is trained, from zero
on. r is the least number with  Σ_{i ≤ r} R_ii² ≥ τ Σ_i R_ii²,  or the one that `rank` says. The paper was read in its
abstract and in a digest, and whether it sums R_ii² or |R_ii| was not to be seen: squares are ours. On the meta device,
where there are no values to choose r by, it is the most that there can be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinrank.optim.layers.base import FineTuning
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.triples import TripleLinear
from thinrank.optim.linalg.factor import share_of
from thinrank.optim.linalg.pivoted import pivoted_qr
from thinrank.optim.methods.config import number


def leading(squares: Tensor, tau: float) -> int:
    """The least number of the first `squares` (k,) whose sum is a share `tau` of all; at least 1."""
    sums = squares.cumsum(0)
    return min(len(squares), 1 + int((sums < tau * sums[-1]).sum()))


@dataclass(frozen=True, kw_only=True)
class QRLoRA(FineTuning):
    """QR-LoRA (Liang & Bharadwaj 2025, arXiv 2508.21810): numbers before the leading terms of a pivoted QR are trained.

    Defaults: the paper's is tau=0.9, the lower end of what it tries; ours are rank=None, which leaves it to tau, and
    what the shared class says is.

    Equations and shapes: `thinrank.optim.layers.qr_lora`.
    """

    name: str = field(default="qr_lora", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    tau: float = field(default=0.9, metadata={"help": "share of the squares of R's diagonal that is trained"})
    rank: int | float | None = field(
        default=None, metadata={"help": "terms, a number or a share of the shorter side, in the place of tau"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        number("tau", self.tau, high=1.0, open_low=True)
        if isinstance(self.rank, int):
            if isinstance(self.rank, bool) or self.rank < 1:
                raise ValueError(f"rank must be at least 1, or a share above 0, got {self.rank!r}: leave it to tau")
        elif self.rank is not None:
            number("rank", self.rank, high=1.0, open_low=True)

    def check(self, dense: Dense) -> None:
        if self.rank is not None and share_of(self.rank, min(dense.shape)) > min(dense.shape):
            raise ValueError(
                f"rank {self.rank} is above the shorter side of {dense.name}, {dense.shape}: lower it, or leave it out "
                "and have tau decide"
            )

    def layer(self, dense: Dense, generator: torch.Generator) -> TripleLinear:
        if dense.is_meta:
            short = min(dense.shape)
            return TripleLinear(dense, short if self.rank is None else share_of(self.rank, short), trained=("s",))
        q, r, order = pivoted_qr(dense.weight)
        diagonal = r.gather(1, order[:, None])[:, 0]
        rank = leading(diagonal.square(), self.tau) if self.rank is None else share_of(self.rank, len(order))
        layer = TripleLinear(dense, rank, trained=("s",))
        layer.start_(dense, q[:, :rank], q.new_zeros(rank), r[:rank].mT)
        return layer
