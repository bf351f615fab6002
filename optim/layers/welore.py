"""WeLore: one threshold says which trained weights are low-rank, and of what rank (Jaiswal et al. 2024,
arXiv 2407.11239).

Of every weight (out, in) the singular values, stretched to [0, 1], and one k for all of them:

    ŝ = (s − min s) / (max s − min s) ;     r_l = #{ŝ ≥ k} ;     Σ_l #{ŝ < k} / Σ_l #s = the asked share

    r_l < c #s, c = 1/2     *low-rank component*: W ← B A, B (out, r) = U_r sqrt(s_r), A (r, in) = sqrt(s_r) V_rᵀ
    else                    stays dense

That compresses a trained model; on random weights spectra say little. With `freeze`, the factors alone are trained and
all the rest of the model is frozen (WeLore's fine-tuning): gradients of low-rank components are low-rank, too, says the
paper. k is found by `thinrank.optim.linalg.allocate.global_threshold`, where the authors search a grid of 0.005. #s is
the shorter side, as in their code. Which norms and biases they train we do not know; here, none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from thinrank.optim.layers.base import Layer, ReparamConfig, freeze_others
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.optim.linalg.allocate import global_threshold, keep_counts, stretched
from thinrank.optim.methods.config import number


def spectrum(dense: Dense) -> Tensor:
    """The singular values of a weight, stretched to [0, 1], falling, on the CPU in float32 or float64.

    Raises:
        ValueError: where an entry is not finite.
    """
    if not bool(torch.isfinite(dense.weight).all()):
        raise ValueError(f"{dense.name} has entries that are not finite and no singular values: mend or exclude it")
    wide = dense.weight.to(torch.promote_types(dense.weight.dtype, torch.float32))
    return stretched(torch.linalg.svdvals(wide).cpu())


@dataclass(frozen=True, kw_only=True)
class WeLore(ReparamConfig):
    """WeLore (Jaiswal et al. 2024, arXiv 2407.11239): factors of those weights that a common threshold finds low-rank.

    `convert` finds the ranks, in `Conversion.rows`; on machines that are not alike, or on the meta device, give those
    of the first as `ranks`, since singular values that are nearly at the threshold may fall on either side.

    Defaults: the paper's is cutoff=0.5; ours are reduction=0.5, which is within what they report on (0.1 to 0.7),
    freeze=False, ranks=None and what the shared class says is.

    Equations and shapes: `thinrank.optim.layers.welore`.
    """

    name: str = field(default="welore", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    reduction: float = field(
        default=0.5, metadata={"help": "share of all singular values that are below the common threshold"}
    )
    cutoff: float = field(
        default=0.5, metadata={"help": "weights that keep less than this share of theirs get factors"}
    )
    freeze: bool = field(default=False, metadata={"help": "train the factors alone, and nothing else of the model"})
    ranks: dict[str, int] | None = field(
        default=None, metadata={"help": "layer: rank of those that get factors; null: found from the weights"}
    )

    PRETRAINS = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("reduction", self.reduction, high=1.0, open_low=True)
        number("cutoff", self.cutoff, high=1.0, open_low=True)
        if self.reduction == 1.0:
            raise ValueError("reduction must be below 1, or nothing is left of any weight: 0.5 is usual")
        for name, rank in (self.ranks or {}).items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"ranks: that of {name} must be at least 1, got {rank!r}: leave out what stays dense")

    def check(self, dense: Dense) -> None:
        rank = (self.ranks or {}).get(dense.name, 0)
        if rank > min(dense.shape):
            raise ValueError(
                f"ranks: {rank} is above the shorter side of {dense.name}, {tuple(dense.shape)}: lower it, or leave it "
                "out so that the layer stays dense"
            )

    def plan(self, denses: Iterable[Dense], model: nn.Module | None = None) -> WeLore:
        """The same with `ranks`.

        Raises:
            ValueError: for weights without values or with some that are not finite, where nothing is low-rank, and for
                ranks of layers that are not there.
        """
        denses = list(denses)
        if self.ranks is not None:
            missing = set(self.ranks) - {dense.name for dense in denses}
            if missing:
                raise ValueError(f"ranks: {min(missing)!r} is none of the chosen layers: correct or remove it")
            return self
        if any(dense.is_meta for dense in denses):
            raise ValueError(
                "ranks are found from singular values, and weights on the meta device have none: give ranks={layer: "
                "rank, …} as the first conversion found them"
            )
        spectra = [spectrum(dense) for dense in denses]
        counts = keep_counts(spectra, global_threshold(spectra, self.reduction))
        low = {
            dense.name: count
            for dense, count, each in zip(denses, counts, spectra, strict=True)
            if count < self.cutoff * len(each)
        }
        if not low:
            raise ValueError(
                f"reduction: at {self.reduction} no weight keeps less than {self.cutoff:g} of its singular values, and "
                "all would stay dense: raise reduction or cutoff"
            )
        return replace(self, ranks=low)

    def layer(self, dense: Dense, generator: torch.Generator) -> Layer | None:
        rank = (self.ranks or {}).get(dense.name)
        return None if rank is None else LowRankLinear(dense, rank).start_("svd", dense, generator)

    def settle(self, model: nn.Module, made: Mapping[str, Layer]) -> None:
        if self.freeze:
            freeze_others(model, made)
