"""SVFit: only the largest singular values of a weight are trained (Sun et al. 2024, arXiv 2409.05926).

    W = R + U diag(s) Vᵀ        U (out, r), V (in, r), R (out, in) frozen;  s (r,) trained, from its own values on

r numbers for a matrix. The directions are those of the largest r singular values of the weight that was there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from thinrank.optim.layers.base import FineTuning, RankedReparam
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.triples import TripleLinear
from thinrank.optim.linalg.factor import singular


@dataclass(frozen=True, kw_only=True)
class SVFit(FineTuning, RankedReparam):
    """SVFit (Sun et al. 2024, arXiv 2409.05926): the largest singular values are trained, and nothing else.

    Defaults: ours are rank=0.5, since the paper was read in its abstract and says that a large one is meant, and what
    the shared classes say is.

    Equations and shapes: `thinrank.optim.layers.svfit`.
    """

    name: str = field(default="svfit", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    rank: int | float = field(
        default=0.5, metadata={"help": "singular values trained: a number, or a share of the shorter side"}
    )

    def layer(self, dense: Dense, generator: torch.Generator) -> TripleLinear:
        layer = TripleLinear(dense, self.rank_of(dense), trained=("s",))
        if not dense.is_meta:
            layer.start_(dense, *singular(dense.weight, layer.rank))
        return layer
