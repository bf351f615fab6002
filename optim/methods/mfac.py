"""M-FAC: a step along the inverse empirical Fisher matrix of the last gradients (Frantar et al., NeurIPS 2021,
arXiv 2107.03356), in the coordinates of a subspace.

With the projected gradients g = vec(G B) of the last k ≤ m steps, G (long × short; a wide weight with the sides
exchanged), B (short × r) as in `subspace_adamw`, g and v (long · r), F (long · r × long · r) for each matrix:

    F = λ I + (1/k) Σ g_i g_iᵀ ;  v ← μ v + (1−μ) F⁻¹ g ;  W ← (1−η λ_w) W − η α v Bᵀ

    every T steps: B is renewed, and the remembered gradients and v turn with it, exactly where old and new agree

The paper's: the Fisher of a window of gradients, momentum on the preconditioned direction, λ = 1e-5, m = 1024. Ours:
one window for each matrix, where the paper has one for all parameters (a block-diagonal Fisher: blocks need no inner
products across the model, so that they can be stepped where they lie; correlations between matrices are lost); the
subspace, because m copies of a large model fit nowhere; m = 32; λ = 1e-3, at which learning depends less on the rate;
k in the place of m while the window fills, without which the first steps are m times too long; decay beside the
gradient, not within it; the inverse by one m × m solve (`linalg/woodbury.py`) instead of a recursion. A direction has
the size of 1/‖g‖ where ‖g‖² is above λ, and of ‖g‖/λ below, so that learning rates are not Adam's.

`finish="adam"` is Natural GaLore (Das 2024, arXiv 2410.16029): Adam steps on F⁻¹ g. There m = 20 and λ = 1e-3 without
the division by k.

Memory: a basis (short × r), a momentum (long × r) and m numbers for each projected one, float32 with `state_bits=8`,
too, which is for AdamW's moments and those of `finish="adam"`: what the errors of codes would do to F⁻¹ is not known.
`space="whole"` has no subspace, for parameters that are small themselves: factors of LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thinrank.optim.inner.base import Whole
from thinrank.optim.inner.mfac import MFAC
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import PowerIteration
from thinrank.optim.lowrank.transport import Rotate
from thinrank.optim.methods.config import LowRankConfig, choice, number


@dataclass(frozen=True, kw_only=True)
class MFACConfig(LowRankConfig):
    """M-FAC (Frantar et al., NeurIPS 2021, arXiv 2107.03356) on projected gradients: steps along the inverse Fisher
    matrix of the last ones; `betas[0]` is the momentum, `betas[1]` is AdamW's alone.

    Defaults: the paper's is finish=momentum; ours are space=projected, window=32 (the paper's 1024), damping=0.001 (the
    paper's 1e-5), rank=0.25, update_proj_gap=200, lr=0.001 and state_bits=32.

    Equations and shapes: `thinrank.optim.methods.mfac`.
    """

    name: str = field(default="mfac", metadata={"help": "method (chosen by `optimizer=…`)"})
    state_bits: int = field(
        default=32,
        metadata={"help": "bits of each entry of Adam's moments: 32, or 8; the window and its momentum are float32"},
    )
    window: int = field(
        default=32, metadata={"help": "gradients remembered, each as large as the projection (the paper: 1024)"}
    )
    damping: float = field(
        default=1e-3,
        metadata={"help": "added to the Fisher matrix's diagonal, in squares of a gradient's norm (the paper: 1e-5)"},
    )
    finish: str = field(
        default="momentum", metadata={"help": "what steps along F⁻¹g: momentum (the paper), adam (Natural GaLore)"}
    )
    space: str = field(
        default="projected", metadata={"help": "projected, or whole: no subspace, for small matrices such as LoRA's"}
    )

    GROUP: ClassVar[tuple[str, ...]] = (*LowRankConfig.GROUP, "window", "damping", "finish", "space")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ValueError(f"window must be at least 1 gradient, got {self.window!r}")
        number("damping", self.damping, open_low=True)
        choice("finish", self.finish, ("momentum", "adam"))
        choice("space", self.space, ("projected", "whole"))
        if self.space == "whole" and self.rank_allocation != "uniform":
            raise ValueError(
                f"rank_allocation={self.rank_allocation!r} shares out ranks, which space='whole' does not have: use "
                "space='projected', or rank_allocation='uniform'"
            )

    def matrix_rule(self) -> LowRank | Whole | None:
        if self.rank is None:
            return None
        adam = self.adam() if self.finish == "adam" else None
        inner = MFAC(window=self.window, damping=self.damping, momentum=self.betas[0], adam=adam)
        if self.space == "whole":
            return Whole(inner=inner, scale=self.scale)
        return LowRank(
            subspace=PowerIteration(rank=self.rank, every=self.update_proj_gap, dtype=self.dtype),
            transport=Rotate(self.betas, also=inner.carried),
            inner=inner,
            scale=self.scale,
            renewals=self.renewals,
        )
