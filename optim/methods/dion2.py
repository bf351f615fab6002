"""Dion2: orthonormal updates of some of a weight's own rows or columns (Ahn et al. 2025, arXiv 2512.16928).

    M ← M + G ;  K = a share α of the slices along the shorter side, those of largest l1 norm
    U = NS(M[K]) ;  M[K] ← μ M[K] ;  W ← (1−η λ) W ;  W[K] ← W[K] − η sqrt(m/n) U

which is `trion` in the basis of unit vectors: no transform, no product but Newton-Schulz's, and an update that touches
a share of the weight. Theirs: this, with α = 0.25. Ours: α of the slices is rounded to the nearest number where theirs
is rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from thinrank.optim.methods.trion import TrionConfig


@dataclass(frozen=True, kw_only=True)
class Dion2Config(TrionConfig):
    """Dion2 (Ahn et al. 2025, arXiv 2512.16928): orthonormal updates of a weight's strongest rows or columns; `rank` is
    the authors' share α of them, or a number.

    Defaults: the authors' are rank=0.25, lr=0.01, weight_decay=0.01, momentum=0.95, norm=l1, adjust_lr=spectral,
    basis=identity and, from Dion, eps=1e-08; ours, or not known to be theirs, are orthogonalizer=jordan and
    embedding_lr=0.003.

    Equations and shapes: `thinrank.optim.methods.dion2`.
    """

    name: str = field(default="dion2", metadata={"help": "method (chosen by `optimizer=…`)"})
    eps: float = field(default=1e-8, metadata={"help": "added to Adam's denominator"})
    basis: str = field(
        default="identity", metadata={"help": "fixed orthogonal basis: identity (Dion2), dct (Trion), hadamard, random"}
    )
    adjust_lr: str = field(
        default="spectral", metadata={"help": "scale for the shape: original, spectral, match_rms_adamw, none"}
    )
