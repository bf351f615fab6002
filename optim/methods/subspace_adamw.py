"""AdamW in a warm-started dominant subspace, with what the subspace misses added back: our default.

No single paper's; its parts are: randomized subspace iteration (Halko et al. 2011; GaLore+, Liao et al. 2024) for the
basis, warm from the one before; LDAdam's rotation of both moments (Robert et al. 2024); Fira's scaled residual (Chen et
al. 2024), optionally reduced to signs and one scale a row (ours). For a gradient G (m × n, m ≥ n; wide weights with
the sides exchanged), basis B (n × r), coordinates R and their direction N (m × r), a factor φ_j for each of m rows:

    every T steps: B ← top-r right singular subspace of G by subspace iteration from the old B; moments rotated
    R = G B ;  N = Adam(R) ;  φ_j = ‖N_j‖ / ‖R_j‖ for each row j
    W ← (1−η λ) W − η α (N Bᵀ + limit(φ ∘ (G − R Bᵀ)))

Defaults: T = 200 and r = n/4 are GaLore's (its 60M, 350M and 1B models), limit 1.01 is Fira's, β and ε are torch's
AdamW's; α = 1 (the rate as it is), rotation and the whole residual are ours. State: B, two moments (m × r), one norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thinrank.optim.lowrank.feedback import unsent_named
from thinrank.optim.lowrank.lift import RESIDUALS, lift_named
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import PowerIteration
from thinrank.optim.methods.config import LowRankConfig, choice, number
from thinrank.optim.methods.dct_adamw import SIGN_FEEDBACK, TRANSPORTS, check_sign_feedback, transport_named


@dataclass(frozen=True, kw_only=True)
class SubspaceAdamWConfig(LowRankConfig):
    """AdamW in a subspace that follows the gradient, plus a scaled residual; no single paper's (its parts: Halko et al.
    2011, LDAdam, Fira).

    Defaults: update_proj_gap=200 and rank=0.25 are the GaLore paper's, residual_limit=1.01 is Fira's, lr=0.001,
    betas=(0.9, 0.999) and eps=1e-08 are Adam's; ours are transport=rotate, residual=full, scale=1.0,
    sign_feedback=off and weight_decay=0.0.

    Equations and shapes: `thinrank.optim.methods.subspace_adamw`.
    """

    name: str = field(default="subspace_adamw", metadata={"help": "method (chosen by `optimizer=…`)"})
    transport: str = field(default="rotate", metadata={"help": "moments at a renewal: rotate, keep, reset"})
    residual: str = field(
        default="full", metadata={"help": "what the subspace misses: full (added back, scaled), sign (its signs), off"}
    )
    residual_limit: float = field(default=1.01, metadata={"help": "largest growth of the residual's norm in a step"})
    sign_feedback: str = field(default="off", metadata=SIGN_FEEDBACK)

    GROUP: ClassVar[tuple[str, ...]] = (
        *LowRankConfig.GROUP,
        "transport",
        "residual",
        "residual_limit",
        "sign_feedback",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("transport", self.transport, TRANSPORTS)
        choice("residual", self.residual, RESIDUALS)
        number("residual_limit", self.residual_limit, low=1.0)
        check_sign_feedback(self.sign_feedback, self.residual)

    def matrix_rule(self) -> LowRank | None:
        if self.rank is None:
            return None
        return LowRank(
            feedback=unsent_named(self.sign_feedback),
            subspace=PowerIteration(rank=self.rank, every=self.update_proj_gap, dtype=self.dtype),
            transport=transport_named(self.transport, self.betas),
            inner=self.adam(),
            lift=lift_named(self.residual, self.residual_limit),
            scale=self.scale,
            renewals=self.renewals,
        )
