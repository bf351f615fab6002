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
full moment, half of AdamW's, or with `state_bits=8` an eighth. Codes that lie evenly serve Muon as well (Gupta et al.
2025, arXiv 2509.23106); ours are Adam's (`linalg/quantise.py`), which keep small columns beside large ones. Their noise
is 3 to 4 % of the momentum, spread over all directions: what is weaker than that turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thinrank.optim.inner.base import Whole
from thinrank.optim.inner.polar import Polar
from thinrank.optim.linalg.orthogonal import SETS
from thinrank.optim.methods.config import MatrixConfig
from thinrank.optim.methods.momentum import NewtonSchulzConfig, OrthonormalConfig


@dataclass(frozen=True, kw_only=True)
class MuonConfig(NewtonSchulzConfig, OrthonormalConfig):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose singular values are all set to one.

    Defaults: the author's are lr=0.02, momentum=0.95, nesterov=True, orthogonalizer=jordan, adjust_lr=original,
    betas=(0.9, 0.95) and weight_decay=0.0; ours are embedding_lr=0.003 (his: 3e-4) and eps=1e-08 (his: 1e-10).

    Equations and shapes: `thinrank.optim.methods.muon`.
    """

    name: str = field(default="muon", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(
        default=0.02, metadata={"help": "learning rate of the matrices; with match_rms_adamw, as for AdamW"}
    )
    nesterov: bool = field(default=True, metadata={"help": "take the gradient into the mean once more"})

    GROUP: ClassVar[tuple[str, ...]] = (
        *MatrixConfig.GROUP, "momentum", "nesterov", "orthogonalizer", "ns_dtype", "adjust_lr",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.nesterov, bool):
            raise ValueError(f"nesterov must be true or false, got {self.nesterov!r}")

    def matrix_rule(self) -> Whole:
        return Whole(
            inner=Polar(
                momentum=self.momentum,
                nesterov=self.nesterov,
                coefficients=SETS[self.orthogonalizer],
                dtype=self.products,
                shape=self.adjust_lr,
                bits=self.state_bits,
            ),
            scale=self.scale,
        )
