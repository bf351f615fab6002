"""AuON and Hybrid-AuON (arXiv 2509.24320): Muon without, or with few, iterations, and a bound by hyperbolic cosines.

For a gradient G of N entries, with momentum μ and B = 0 at first:

    B ← μ B + (1−μ) G ;  u = μ B + (1−μ) G ;  Hybrid: u ← NS_k(u), k iterations of Newton-Schulz (Jordan)
    X = u / (‖u‖_F + 1e-7) ;  ρ = sqrt(mean(cosh²(γ X))) + 1e-8
    W ← (1−η λ) W − η X/ρ    as the paper has it (`normalize_update=True`)
    W ← (1−η λ) W − η u/ρ    as the authors' code has it (False)

Theirs: k = 1 for the hybrid in the paper and 5 in the code; γ is 1 in the paper and 1.5 in the code; rates 0.055 in the
paper and 0.08 to 0.24 with the code, whose steps have the gradient's size.

What it amounts to (ours): ‖γ X‖_F ≤ γ, so the mean of (γ X)² is at most γ²/N and ρ = sqrt(1 + γ²/N + …). For a million
entries that is 1.000001. Without iterations, then, the paper's step is momentum divided by its Frobenius norm, the
code's is plain Nesterov momentum (SGD's), and neither changes a singular value relative to another; ρ is seen in
matrices of a few entries alone. With k iterations the code's step is Muon's of k iterations without a scale for the
shape, and the paper's is that divided by its norm, about sqrt(min(m, n)). We take sizes from 1e-30 to 1e30.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thinrank.optim.inner.auon import AuON
from thinrank.optim.inner.base import Whole
from thinrank.optim.linalg.orthogonal import JORDAN
from thinrank.optim.methods.config import MatrixConfig, number
from thinrank.optim.methods.momentum import NewtonSchulzConfig

MOST = len(JORDAN.triples)


@dataclass(frozen=True, kw_only=True)
class AuONConfig(NewtonSchulzConfig):
    """AuON as its paper (arXiv 2509.24320) has it: momentum of unit norm; with `newton_schulz_steps`, Hybrid-AuON.

    Defaults: the paper's are lr=0.055, newton_schulz_steps=0 and normalize_update=True; gamma=1.5 is the authors'
    code's; ours are the rates of what is no matrix, and what the shared classes say.

    Equations and shapes: `thinrank.optim.methods.auon`.
    """

    name: str = field(default="auon", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(default=0.055, metadata={"help": "learning rate: a matrix moves by this in Frobenius norm"})
    newton_schulz_steps: int = field(
        default=0, metadata={"help": "iterations before the bound: 0 (AuON), 1 to 5 (Hybrid-AuON)"}
    )
    normalize_update: bool = field(
        default=True,
        metadata={"help": "true: the paper's step, of unit norm; false: the code's, of the gradient's size"},
    )
    gamma: float = field(default=1.5, metadata={"help": "multiplies normalised entries under cosh"})

    GROUP: ClassVar[tuple[str, ...]] = (
        *MatrixConfig.GROUP, "momentum", "newton_schulz_steps", "ns_dtype", "normalize_update", "gamma",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.newton_schulz_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps <= MOST:
            raise ValueError(f"newton_schulz_steps must be a whole number from 0 to {MOST}, got {steps!r}")
        if not isinstance(self.normalize_update, bool):
            raise ValueError(f"normalize_update must be true or false, got {self.normalize_update!r}")
        number("gamma", self.gamma, high=30.0)

    def matrix_rule(self) -> Whole:
        return Whole(
            inner=AuON(
                momentum=self.momentum,
                gamma=self.gamma,
                steps=self.newton_schulz_steps,
                dtype=self.products,
                normalise=self.normalize_update,
                bits=self.state_bits,
            ),
            scale=self.scale,
        )
