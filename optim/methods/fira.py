"""Fira: full-rank training under a low-rank constraint (Chen et al., NeurIPS 2025, arXiv 2410.01623).

GaLore, and what it drops is added back, scaled as Adam has scaled what it keeps. Every T steps B = the top r right
singular vectors of G (m × n, m ≥ n); at every step, with GaLore's moments M, V of R = G B and its ε,

    ψ = M / (sqrt(V) + ε) ;  φ_j = ‖ψ_j‖ / (‖R_j‖ + 1e-8) for each row j
    S = φ ∘ (G − α R Bᵀ) ;  if ‖S‖ > γ ‖S_before‖: S ← S γ ‖S_before‖ / ‖S‖
    W ← W − η sqrt(1−β2ᵗ)/(1−β1ᵗ) (α ψ Bᵀ + S) ;  W ← W − η λ W

for wide matrices with the sides exchanged. This is what the authors' code computes (fira 1.0.2): the paper's S is
φ ∘ (G − R Bᵀ), but the code's way back multiplies by α, so that a share 1 − α of the gradient in the subspace is in S
as well; α does not multiply S. The trajectory is the code's own with `svd="exact"` and `transport="keep"`. Ours: S is
never formed, as φ∘G and a correction within the subspace are the same; a limiter that has seen a norm of zero starts
anew, where theirs lets the norm grow from 1e-8; the cheaper `svd="power"`; the other transports.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from thinrank.optim.lowrank.feedback import unsent_named
from thinrank.optim.lowrank.lift import Residual
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.methods.config import choice, number
from thinrank.optim.methods.dct_adamw import SIGN_FEEDBACK, TRANSPORTS, check_sign_feedback, transport_named
from thinrank.optim.methods.galore import GaLoreConfig


@dataclass(frozen=True, kw_only=True)
class FiraConfig(GaLoreConfig):
    """Fira as published (Chen et al., NeurIPS 2025, arXiv 2410.01623): GaLore, and what it drops added back, scaled.

    Defaults: the authors', of their pre-training recipe for 60M parameters, are lr=0.01, scale=0.25, rank=0.25,
    update_proj_gap=200, proj_type=std, svd=exact, transport=keep and residual_limit=1.01; ours are
    sign_feedback=off and what the shared classes say is.

    Equations and shapes: `thinrank.optim.methods.fira`.
    """

    name: str = field(default="fira", metadata={"help": "method (chosen by `optimizer=…`)"})
    scale: float = field(
        default=0.25, metadata={"help": "the paper's alpha: multiplies what the subspace holds, not the residual"}
    )
    proj_type: str = field(
        default="std", metadata={"help": "compressed side: std (the shorter), reverse_std, left, right"}
    )
    transport: str = field(default="keep", metadata={"help": "moments at a renewal: keep (the paper), rotate, reset"})
    residual_limit: float = field(default=1.01, metadata={"help": "largest growth of the residual's norm in a step"})
    sign_feedback: str = field(default="off", metadata=SIGN_FEEDBACK)

    GROUP: ClassVar[tuple[str, ...]] = (*GaLoreConfig.GROUP, "transport", "residual_limit", "sign_feedback")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proj_type == "full":
            raise ValueError("proj_type='full' leaves no rows to scale the residual by: choose std, left or right")
        choice("transport", self.transport, TRANSPORTS)
        number("residual_limit", self.residual_limit, low=1.0)
        check_sign_feedback(self.sign_feedback, "full")

    def matrix_rule(self) -> LowRank | None:
        galore = super().matrix_rule()
        if galore is None:
            return None
        return replace(
            galore,
            feedback=unsent_named(self.sign_feedback),
            transport=transport_named(self.transport, self.betas),
            lift=Residual(limit=self.residual_limit, alpha=self.scale, betas=self.betas),
            scale=1.0,  # alpha is the lift's
        )
