"""SVFT: few numbers between all singular vectors of a weight (Lingam et al. 2024, arXiv 2405.19597).

    W = U (diag(s) + M) Vᵀ        U (out, k), s (k,), V (in, k) frozen, k = min(out, in);  M (k, k) sparse, trained

    plain    M = diag(m)                                                  k numbers
    banded   the main diagonal and d others on each side                  K = k (2d + 1) − d (d + 1)
    random   K places, drawn once
    topk     the K places with the largest |u_iᵀ v_j|, for square weights

U and V take more memory than W did. Ours: M begins at zero, so that the layer does what the dense one did (in the
authors' code it begins with small random numbers); places are drawn without repetition (theirs may repeat); `topk` is
refused where u_i and v_j differ in length (theirs then compares something else); and their factor sigmoid(g) before M,
with one more trained number g that begins at 0, is there on demand (`gate`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinrank.optim.layers.base import FineTuning, like
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.triples import TripleLinear
from thinrank.optim.linalg.factor import singular
from thinrank.optim.methods.config import choice

PATTERNS = ("plain", "banded", "random", "topk")


def band_size(k: int, bands: int) -> int:
    """Entries of a (k, k) matrix on the main diagonal and `bands` others on each side: k (2d+1) − d (d+1)."""
    d = min(bands, k - 1)
    return k * (2 * d + 1) - d * (d + 1)


def band(k: int, bands: int) -> Tensor:
    """Where they are, row by row: (K,) int64, rising."""
    place = torch.arange(k)
    return ((place[:, None] - place[None]).abs() <= bands).reshape(-1).nonzero()[:, 0]


class SVFTLinear(TripleLinear):
    """All singular triples, and a sparse matrix between them.

    Attributes:
        values: of M, (K,), trained.
        index: where they are, in M row by row, (K,) int64, rising; a buffer; None for a diagonal M.
        gate: g, (1,), trained, or None.
    """

    COEFFICIENTS = ("s", "values", "gate")

    def __init__(self, dense: Dense, config: SVFT) -> None:
        super().__init__(dense, min(dense.shape), residual=False)
        count = self.rank if config.pattern == "plain" else band_size(self.rank, config.bands)
        self.values = like(dense, count)
        self.gate: nn.Parameter | None = like(dense, 1) if config.gate else None
        index = None if config.pattern == "plain" else torch.zeros(count, dtype=torch.int64, device=self.values.device)
        self.register_buffer("index", index)
        self.index: Tensor | None

    def core(self, z: Tensor) -> Tensor:
        values = self.values if self.gate is None else self.values * torch.sigmoid(self.gate)
        if self.index is None:
            return z * (self.s + values)
        return F.linear(z, torch.diag(self.s).reshape(-1).index_add(0, self.index, values).view(self.rank, self.rank))

    def flops(self) -> int:
        return super().flops() + (0 if self.index is None else 2 * self.rank**2)


@dataclass(frozen=True, kw_only=True)
class SVFT(FineTuning):
    """SVFT (Lingam et al. 2024, arXiv 2405.19597): a sparse matrix between all singular vectors is trained.

    Defaults: the paper's first is pattern=plain; ours are bands=2, which says nothing for it, gate=False, where the
    authors' code has a gate, and what the shared class says is.

    Equations and shapes: `thinrank.optim.layers.svft`.
    """

    name: str = field(default="svft", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    pattern: str = field(default="plain", metadata={"help": "trained entries: plain, banded, random, topk"})
    bands: int = field(
        default=2, metadata={"help": "diagonals on each side of the main one; random and topk take as many entries"}
    )
    gate: bool = field(default=False, metadata={"help": "one more trained number, whose sigmoid multiplies the matrix"})

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("pattern", self.pattern, PATTERNS)
        if isinstance(self.bands, bool) or not isinstance(self.bands, int) or self.bands < 0:
            raise ValueError(f"bands must be a whole number of at least 0, got {self.bands!r}: 2 is usual")

    def check(self, dense: Dense) -> None:
        if self.pattern == "topk" and dense.shape[0] != dense.shape[1]:
            raise ValueError(
                f"pattern=topk compares left with right singular vectors, which differ in length for {dense.name}, "
                f"{dense.shape}: choose banded or random, or exclude that layer"
            )

    def layer(self, dense: Dense, generator: torch.Generator) -> SVFTLinear:
        layer = SVFTLinear(dense, self)
        if dense.is_meta:
            return layer
        left, s, right = singular(dense.weight)
        layer.start_(dense, left, s, right)
        with torch.no_grad():
            layer.values.zero_()
            if layer.gate is not None:
                layer.gate.zero_()
            if layer.index is not None:
                layer.index.copy_(self._places(left, right, generator))
        return layer

    def _places(self, left: Tensor, right: Tensor, generator: torch.Generator) -> Tensor:
        k = left.shape[1]
        if self.pattern == "banded":
            return band(k, self.bands)
        count = band_size(k, self.bands)
        if self.pattern == "random":
            return torch.randperm(k * k, generator=generator)[:count].sort().values
        return (left.mT @ right).abs().reshape(-1).topk(count).indices.sort().values
