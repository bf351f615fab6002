"""DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967): AdamW on the strongest columns of a fixed cosine basis.

With the orthonormal DCT-II matrix C (its rows are the atoms), for a gradient G (m × n, m ≥ n) and the error E:

    A = G + E ;  S = A Cᵀ ;  every T_u steps: idx = the r columns of S of largest norm
    a = S[:, idx] ;  E ← A − a C[idx]
    M, V: a column that stays chosen keeps its moments, a new one starts from zero
    M ← β1 M + (1−β1) a ;  V ← β2 V + (1−β2) a² ;  W ← (1−η λ) W − η (M̂ / (sqrt(V̂) + ε)) C[idx]

for wide matrices with the sides exchanged: it is always the shorter side that is compressed, which is how we read the
paper's projections from the left and from the right. The r of n columns of largest l2 norm keep at least the share r/n
of ‖A‖², whichever the side, so that as much state guarantees as much on both; the shorter one has the smaller C and the
cheaper transform, m n² instead of m² n. (The authors' code takes the longer side for keys and values of two families of
models, so that one C serves all layers; here every size has its own.) There is no `proj_type`.

The paper's: selection by l1 norm, gap 1, rotation of the moments by C[idx_old] C[idx_new]ᵀ, quantised error. Ours:
slots that keep their column, which turns the rotation into setting a few columns to zero; correct quantisers (the
published ones use 16 of 256 levels, or return neighbours in another order); one basis in both engines; one basis for
each size; ages by column; bases other than the DCT; a residual in the place of error feedback.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thinrank.optim.linalg.fixed import BASES, NORMS
from thinrank.optim.lowrank.feedback import FEEDBACKS, unsent_named
from thinrank.optim.lowrank.lift import RESIDUALS, lift_named
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import FixedColumns
from thinrank.optim.lowrank.transport import Keep, Reset, Rotate, Transport
from thinrank.optim.methods.config import LowRankConfig, choice, number

TRANSPORTS = ("rotate", "keep", "reset")


def transport_named(name: str, betas: tuple[float, float]) -> Transport:
    """`rotate`, `keep` or `reset`."""
    return {"rotate": Rotate(betas), "keep": Keep(), "reset": Reset()}[name]


SIGN_FEEDBACK = {
    "help": "with strategy.messages=signs, majority: what these leave out is kept for the next: off, full, 8bit, 4bit"
}


def check_sign_feedback(name: str, residual: str) -> None:
    """Refuses what `unsent_named` does not know, and feedback where nothing is told of a residual."""
    choice("sign_feedback", name, tuple(FEEDBACKS))
    if residual == "off" and name != "off":
        raise ValueError(
            f"sign_feedback={name!r} is for messages of a residual, and residual is off: set it to off, too"
        )


def check_columns(basis: str, norm: str, engine: str) -> None:
    """Refuses what `FixedColumns` does not know."""
    choice("basis", basis, BASES)
    choice("norm", norm, NORMS)
    choice("engine", engine, ("auto", "matmul", "fft"))
    if engine == "fft" and basis != "dct":
        raise ValueError(f"engine='fft' computes the DCT alone, got basis={basis!r}: use engine='matmul'")


@dataclass(frozen=True, kw_only=True)
class DCTAdamWConfig(LowRankConfig):
    """DCT-AdamW (Modoranu et al. 2025, arXiv 2505.17967): AdamW on the strongest columns of a fixed cosine basis.

    Defaults: the paper's are update_proj_gap=1, basis=dct, norm=l1, transport=rotate, betas=(0.9, 0.999), eps=1e-08 and
    residual=off; error_feedback=off is the authors' code's; ours are lr=0.001 (it has none to begin with), rank=0.25
    (theirs 128 to 512), weight_decay=0.0, column_age=True, residual_limit=1.01 (Fira's), sign_feedback=off and
    engine=auto.

    Equations and shapes: `thinrank.optim.methods.dct_adamw`.
    """

    name: str = field(default="dct_adamw", metadata={"help": "method (chosen by `optimizer=…`)"})
    update_proj_gap: int = field(default=1, metadata={"help": "steps between two choices of columns"})
    basis: str = field(default="dct", metadata={"help": "fixed orthogonal basis: dct, identity, hadamard, random"})
    norm: str = field(default="l1", metadata={"help": "columns are ranked by this norm: l1 (the paper), l2"})
    transport: str = field(
        default="rotate", metadata={"help": "moments at a new choice: rotate, keep (mixes columns), reset"}
    )
    error_feedback: str = field(
        default="off",
        metadata={"help": "what did not fit is added to the next gradient: off, full (float32), 8bit, 4bit"},
    )
    column_age: bool = field(
        default=True,
        metadata={"help": "correct each column's bias by its own age, so that new columns do not overshoot"},
    )
    residual: str = field(
        default="off",
        metadata={
            "help": "what the columns miss: off (the paper), full (added back, scaled as Fira does), sign (its signs)"
        },
    )
    residual_limit: float = field(default=1.01, metadata={"help": "largest growth of the residual's norm in a step"})
    sign_feedback: str = field(default="off", metadata=SIGN_FEEDBACK)
    engine: str = field(default="auto", metadata={"help": "how coordinates are computed: auto, matmul, fft (dct only)"})

    GROUP: ClassVar[tuple[str, ...]] = (
        *LowRankConfig.GROUP, "basis", "norm", "transport", "error_feedback", "column_age", "residual",
        "residual_limit", "sign_feedback", "engine",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_columns(self.basis, self.norm, self.engine)
        choice("transport", self.transport, TRANSPORTS)
        choice("error_feedback", self.error_feedback, tuple(FEEDBACKS))
        choice("residual", self.residual, RESIDUALS)
        number("residual_limit", self.residual_limit, low=1.0)
        check_sign_feedback(self.sign_feedback, self.residual)
        if self.residual != "off" and self.error_feedback != "off":
            raise ValueError(
                f"error_feedback={self.error_feedback!r} keeps for later what residual={self.residual!r} applies now: "
                "set one of the two to off"
            )

    def matrix_rule(self) -> LowRank | None:
        if self.rank is None:
            return None
        return LowRank(
            feedback=FEEDBACKS[self.error_feedback] if self.residual == "off" else unsent_named(self.sign_feedback),
            subspace=FixedColumns(
                rank=self.rank,
                every=self.update_proj_gap,
                basis=self.basis,
                norm=self.norm,
                engine=self.engine,
                dtype=self.dtype,
            ),
            transport=transport_named(self.transport, self.betas),
            inner=self.adam(ages=self.column_age),
            lift=lift_named(self.residual, self.residual_limit),
            scale=self.scale,
            renewals=self.renewals,
        )
