"""Muon (Jordan et al. 2024): momentum whose singular values are all set to one.

For a gradient G of a weight W (m outputs, n inputs), with momentum μ and B = 0 at first:

    B ← μ B + (1−μ) G ;  M = μ B + (1−μ) G with Nesterov's look ahead, else M = B
    O = NS(M), nearly U Vᵀ of M = U S Vᵀ ;  W ← (1−η λ) W − η s(m, n) O

NS is five iterations of Newton-Schulz (`linalg/orthogonal.py`); s is sqrt(max(1, m/n)) (`original`), sqrt(m/n)
(`spectral`; Bernstein 2025) or 0.2 sqrt(max(m, n)) (`match_rms_adamw`; Liu et al. 2025, arXiv 2502.16982), which makes
O's entries as large as AdamW's steps, so that its rates and decay can be kept. Vectors, embeddings and the head are
AdamW's, as the authors advise. With `orthogonalizer="jordan"` the step is that of `torch.optim.Muon`.

Theirs: coefficients by Jordan, You (2025) and Amsel et al. (2025, arXiv 2505.16932, Polar Express). Ours: gradients of
any size (theirs shrink below a norm of 1e-7), and the Gram form where it is faster. There is no rank: the state is one
full moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thinrank.optim.inner.base import Whole
from thinrank.optim.inner.polar import Polar
from thinrank.optim.linalg.orthogonal import DTYPES, SETS, SHAPE_SCALES
from thinrank.optim.methods.config import MatrixConfig, choice, decay_rate


@dataclass(frozen=True, kw_only=True)
class MuonConfig(MatrixConfig):
    """Muon with its author's rate, momentum and coefficients."""

    name: str = field(default="muon", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(
        default=0.02, metadata={"help": "learning rate of the matrices; with match_rms_adamw, as for AdamW"}
    )
    embedding_lr: float | None = field(
        default=3e-3,
        # An entry of O is about 1/sqrt(max(m, n)), one of AdamW's step about 1: 0.02 would be far too much. This lies
        # between the 3e-4 of Jordan's auxiliary Adam and the 5e-3 that was best for AdamW in the default run.
        metadata={"help": "learning rate of embeddings and output head, which AdamW steps; null: as lr"},
    )
    betas: tuple[float, float] = field(
        default=(0.9, 0.95), metadata={"help": "decay rates of Adam's two moments, for all but matrices"}
    )
    momentum: float = field(default=0.95, metadata={"help": "decay rate of the matrices' running mean"})
    nesterov: bool = field(default=True, metadata={"help": "take the gradient into the mean once more"})
    orthogonalizer: str = field(
        default="jordan",
        metadata={"help": "coefficients of the iterations: jordan, you (closer to one), polar_express (small values)"},
    )
    ns_dtype: str = field(
        default="auto",
        metadata={"help": "precision of its products: auto (bfloat16 on a GPU, else float32), float32, bfloat16"},
    )
    adjust_lr: str = field(
        default="original", metadata={"help": "scale for the shape: original, spectral, match_rms_adamw, none"}
    )

    GROUP: ClassVar[tuple[str, ...]] = (
        *MatrixConfig.GROUP, "momentum", "nesterov", "orthogonalizer", "ns_dtype", "adjust_lr",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        decay_rate("momentum", self.momentum)
        if not isinstance(self.nesterov, bool):
            raise ValueError(f"nesterov must be true or false, got {self.nesterov!r}")
        choice("orthogonalizer", self.orthogonalizer, tuple(SETS))
        choice("ns_dtype", self.ns_dtype, tuple(DTYPES))
        choice("adjust_lr", self.adjust_lr, SHAPE_SCALES)

    def matrix_rule(self) -> Whole:
        return Whole(
            inner=Polar(
                momentum=self.momentum,
                nesterov=self.nesterov,
                coefficients=SETS[self.orthogonalizer],
                dtype=DTYPES[self.ns_dtype],
                shape=self.adjust_lr,
            ),
            scale=self.scale,
        )
