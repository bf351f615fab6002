"""LDAdam: Adam in a subspace that is learned anew at every step (Robert et al., ICLR 2025, arXiv 2410.16103).

With the basis B (n × r, orthonormal), the error E, and hats for bias-corrected values, for a gradient G (m × n, m ≥ n):

    A = G + E ;  Y = ρ M̂ Bᵀ + (1−ρ) A ;  B' = qr(Yᵀ Y B).Q        (at first: the top singular vectors of A)
    R = B'ᵀ B ;  M' = M Rᵀ ;  V' = (1−β2ᵏ) (max((V̂ − M̂²)(R∘R)ᵀ, 0) + (M̂ Rᵀ)²)
    a = A B' ;  M ← β1 M' + (1−β1) a ;  V ← β2 V' + (1−β2) a²
    W ← (1−η λ) W − η (M̂ / (sqrt(V̂) + ε)) B'ᵀ
    E ← (A − a B'ᵀ) + β1/(1−β1) (M_old Bᵀ − M' B'ᵀ)

for wide matrices with the sides exchanged. The error holds what the subspace lost of the gradient *and* of the
momentum, which would have come out over the next 1/(1−β1) steps.

The paper's: all of the above but the maximum, β and ρ. Its V' is the absolute value `|(V̂ − M̂²)(R∘R)ᵀ + (M̂ Rᵀ)²|`, which
passes through zero where the momentum does not, so that single entries step many learning rates
(`negative_variance="absolute"` is the paper's). Ours, too: Q has the signs that make R's diagonal positive, so that it
does not turn over by itself. Nothing depends on signs, since M turns with them and V holds squares; the basis within
the span matters to V alone, elementwise.

The error is a state tensor of its own. The authors keep it in `p.grad` by letting `zero_grad` leave it there; then
gradient clipping clips it, a scaler unscales it, DDP averages it and `set_to_none` deletes it.

A matrix whose gradient holds something that is no number takes its step as if the gradient were zero, in the basis that
it has: an error of NaN would stay for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from thinrank.optim.axis import Asking, alone
from thinrank.optim.inner.adam import Adam
from thinrank.optim.inner.moments import first_moment
from thinrank.optim.linalg.basis import captured_energy, momentum_iteration, svd_basis
from thinrank.optim.linalg.norms import all_finite
from thinrank.optim.lowrank.feedback import FEEDBACKS, Feedback, KeepsErrors
from thinrank.optim.lowrank.subspace import PowerIteration
from thinrank.optim.lowrank.told import ToldFactors
from thinrank.optim.lowrank.transport import Rotate, Rotation
from thinrank.optim.methods.config import RankedConfig, choice, number
from thinrank.optim.rule import FAILED, SVD_FAILED, Decay, State, Step, beside
from thinrank.optim.update import Update


@dataclass(frozen=True, slots=True, kw_only=True)
class LDAdamRule(KeepsErrors, ToldFactors):
    """LDAdam's step. The error needs both bases and both momenta, which the five slots do not show to one another.

    Attributes:
        subspace: coordinates, and the first basis where it is not exact.
        inner, transport, feedback: as in `LowRank`.
        rho: the momentum's share in what the subspace follows.
        exact: the first basis is an exact SVD's.
    """

    subspace: PowerIteration
    inner: Adam
    transport: Rotate
    feedback: Feedback
    rho: float
    exact: bool = True
    scale: float = 1.0
    decay: Decay = field(default=Decay())

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {
            **self.subspace.init(shape, device),
            **self.inner.init(self.subspace.small(shape), device),
            **self.feedback.init(shape, device),
        }

    @property
    def by_rows(self) -> bool:
        return not self.exact

    def factors(self, shape: tuple[int, int, int]) -> tuple[int, torch.dtype]:
        return self.subspace.small(shape)[-1], self.subspace.dtype

    def update(self, grad: Tensor, state: State, step: Step) -> Update:
        return alone(self.exchange(grad, state, step))

    def exchange(self, grad: Tensor, state: State, step: Step) -> Asking[Update]:
        fine = all_finite(grad, step.axis)  # (batch, 1, 1)
        x = self.feedback.enter(torch.where(fine, grad, 0.0).float(), state)
        old, momentum = state["basis"].clone(), first_moment(state).clone()
        yield from self.renew(x, state, step)
        state["basis"].copy_(torch.where(fine, state["basis"], old))
        step.hold(range(len(step.count)), ~fine.flatten())
        turn = state["basis"].mT @ old
        change = Rotation(torch.where(fine, turn, torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)))
        self.transport.carry(state, change, step.count)
        low = yield self.subspace.down(x, state)
        if self.feedback.listens:
            factor = self.inner.betas[0] / (1.0 - self.inner.betas[0])
            image = torch.baddbmm(
                momentum @ old.mT, low + factor * first_moment(state), state["basis"].mT, beta=-factor
            )  # what is not remembered: a B'ᵀ + factor · (M' B'ᵀ − M_old Bᵀ)
            self.feedback.sent(x, image, state)
        if step.record is not None:
            step.record["captured_energy"] = captured_energy(x, low, step.axis)
            first = torch.tensor([count == 0 for count in step.count]).to(x.device)
            step.record["subspace_overlap"] = change.overlap().masked_fill(first | ~fine.flatten(), math.nan)
        return self.subspace.up(self.inner.direction(low, state, step), state, x.shape[-1])

    # --- replicas (`Remembers`) ---------------------------------------------------------------------------------------

    @property
    def remembers(self) -> bool:
        return True

    def asks(self, shape: tuple[int, int, int], *, choosing: bool = False) -> int:
        batch, long, short = shape
        low = long * self.subspace.small(shape)[-1]
        return batch * (low + (long * short if choosing else low + short * self.subspace.small(shape)[-1]))

    # --- the subspace -------------------------------------------------------------------------------------------------

    def renew(self, x: Tensor, state: State, step: Step) -> Asking[None]:
        """Writes the next basis to `state`: one warm power iteration or, for a first update, a factorisation.

        Where that does not converge, the matrices are taken one by one; subspace iteration takes the place of an exact
        SVD, and where that fails, too, the old basis stays.
        """
        basis = state["basis"]
        first = [i for i, count in enumerate(step.count) if count == 0]
        if len(first) < len(step.count):
            count = beside(step.count, x.device).float().clamp(min=1.0)[:, None, None]
            mean = first_moment(state) / (1.0 - self.inner.betas[0] ** count)
            warm = yield from momentum_iteration(x, basis, mean, self.rho, axis=step.axis)
            if not first:
                basis.copy_(warm)
                return
            later = [i for i, count in enumerate(step.count) if count > 0]
            basis[later] = warm[later]
        if self.exact and not step.axis.whole:
            raise RuntimeError("an exact SVD needs whole matrices: use svd='power' where rows are sharded")
        shared = yield x[first]
        self._begin(shared, basis, step, first)

    def _begin(self, x: Tensor, basis: Tensor, step: Step, which: list[int]) -> None:
        """Writes the first bases of the matrices `which`, whose gradients are `x` (len(which), long, short)."""
        own, part = basis[which], step.only(which)
        try:
            basis[which] = self._exact(x, own, part) if self.exact else self._iterated(x, own, part)
        except torch.linalg.LinAlgError:
            if len(which) > 1:
                for row, i in enumerate(which):
                    self._begin(x[row : row + 1], basis, step, [i])
                return
            try:
                if not self.exact:
                    raise
                basis[which] = self._iterated(x, own, part)
                step.note(which[0], SVD_FAILED, skipped=False)
            except torch.linalg.LinAlgError:
                step.note(which[0], FAILED, skipped=True)

    def _exact(self, x: Tensor, basis: Tensor, step: Step) -> Tensor:
        return svd_basis(x, basis.shape[-1], transposed=step.transposed)

    def _iterated(self, x: Tensor, basis: Tensor, step: Step) -> Tensor:
        state = {"basis": basis.clone()}
        self.subspace.renew(x, state, step)
        return state["basis"]


@dataclass(frozen=True, kw_only=True)
class LDAdamConfig(RankedConfig):
    """LDAdam (Robert et al., ICLR 2025, arXiv 2410.16103): Adam in a subspace that is renewed at every step, with
    feedback of what it lost.

    Defaults: the authors' are lr=0.001, betas=(0.908, 0.99), rho=0.908, eps=1e-08, error_feedback=full and svd=exact;
    ours are rank=0.25 (theirs 16, and 8 in their recipe for 350M), weight_decay=0.0 and negative_variance=zero (theirs:
    absolute).

    Equations and shapes: `thinrank.optim.methods.ldadam`.
    """

    name: str = field(default="ldadam", metadata={"help": "method (chosen by `optimizer=…`)"})
    betas: tuple[float, float] = field(default=(0.908, 0.99), metadata={"help": "decay rates of Adam's two moments"})
    rho: float = field(
        default=0.908, metadata={"help": "share of the momentum in what the subspace follows; 0: the gradient alone"}
    )
    error_feedback: str = field(
        default="full",
        metadata={"help": "what did not fit is added to the next gradient: off, full (float32), 8bit, 4bit"},
    )
    svd: str = field(
        default="exact", metadata={"help": "the first basis: exact (the paper), or power: randomized iteration"}
    )
    negative_variance: str = field(
        default="zero",
        metadata={"help": "a rotated variance below zero is cut off: zero, or turned over: absolute (the paper)"},
    )

    GROUP: ClassVar[tuple[str, ...]] = (*RankedConfig.GROUP, "rho", "error_feedback", "svd", "negative_variance")

    def __post_init__(self) -> None:
        super().__post_init__()
        number("rho", self.rho, high=1.0)
        choice("error_feedback", self.error_feedback, tuple(FEEDBACKS))
        choice("svd", self.svd, ("exact", "power"))
        choice("negative_variance", self.negative_variance, ("zero", "absolute"))

    def matrix_rule(self) -> LDAdamRule | None:
        if self.rank is None:
            return None
        return LDAdamRule(
            # float32 though products may not be: error and moments are carried from basis to basis at every step
            subspace=PowerIteration(rank=self.rank, every=1, dtype=self.dtype, stored=torch.float32),
            inner=self.adam(),
            transport=Rotate(self.betas, negative=self.negative_variance),
            feedback=FEEDBACKS[self.error_feedback],
            rho=self.rho,
            exact=self.svd == "exact",
            scale=self.scale,
        )
