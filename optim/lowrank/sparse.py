"""Sparsely coded residuals: the exact Adam on the entries that a subspace serves worst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from thinrank.optim.linalg.adam import adam_direction
from thinrank.optim.linalg.entries import carry_entries, largest_entries, take_entries
from thinrank.optim.lowrank.renewals import Renewals
from thinrank.optim.lowrank.subspace import Subspace
from thinrank.optim.rule import State, Step, beside
from thinrank.optim.update import Entries, Update

RESELECT = ("never", "renewal")
MOMENTS = ("entry_avg", "entry_avg_sq", "entry_age")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseResidual:
    """Back through the basis, with the few entries that it misses most replaced by what AdamW would do there.

    GaLore+ (Liao et al. 2024) corrects both moments and the update by residuals on a sparse set S of entries, which a
    warm-up finds. How is our reconstruction. The residual of the first moment, `M − P M̃`, obeys a recursion of its own
    while P is fixed, but it is of use only together with the low-rank moment: on S, `(P M̃)_S + (M − P M̃)_S = M_S`, the
    moment of the raw gradient's entries; likewise for the second moment with any surrogate. Keeping `M_S` and `V_S`
    themselves is the same numbers, needs no expansion of the low-rank moments, and does not notice a change of P.

    For K = `warmup` steps the entries are only looked for: candidates add up what the subspace misses of them,
    `|G − P Pᵀ G|`, and each step the k best of candidates and newcomers stay. A newcomer starts with this step's score,
    so that k numbers do in the place of a full matrix of sums; they lie where the first moments will be. With K = 0 the
    first step's scores decide. Then the moments start from zero, with a clock of their own.

    Nothing but the choice of S needs more of a gradient than its coordinates and its entries in S, both linear, so a
    gradient may come in parts (`in_backward("project")`): their sums then give the update of the sum. The choice sees
    the first part alone, as a renewal of the basis does.

    Entries are multiplied by the method's `scale` like everything else. Equal scores are resolved by the lower place in
    the matrix as it is seen, (long, short).

    Attributes:
        density: share of the entries that are in S, rounded up.
        warmup: K, steps.
        reselect: `never`, or `renewal`: S is chosen anew from one step's residual whenever the basis is renewed after
            the warm-up; entries that stay keep their moments and age, others start from zero.
        renewals: when the subspace renews.
        betas, eps, eps_raw: as Adam's.
    """

    by_rows: ClassVar[bool] = False
    density: float
    warmup: int = 0
    reselect: str = "never"
    renewals: Renewals = field(default=Renewals())
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_raw: bool = False

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """`entries` (batch, k) int32 (int64 from 2³¹ places on), their two moments and, where S changes, their ages."""
        batch, size = shape[0], shape[1] * shape[2]
        k = self._size(shape)
        places = torch.arange(k, dtype=torch.int32 if size < 2**31 else torch.int64, device=device)
        keys = MOMENTS[:2] if self.reselect == "never" else MOMENTS
        return {
            "entries": places.expand(batch, -1).clone(),
            **{key: torch.zeros(batch, k, dtype=torch.float32, device=device) for key in keys},
        }

    def __call__(
        self, x: Tensor, low: Tensor, direction: Tensor, subspace: Subspace, state: State, step: Step
    ) -> Update:
        image = self.image(x, low, subspace, state, step, first=True)
        return self.lift(image, direction, x.shape[-1], subspace, state, step)

    def chooses(self, step: Step) -> bool:
        return any(count < self.searches for count in step.count)

    @property
    def searches(self) -> int:
        return max(self.warmup, 1)

    def image_sizes(self, shape: tuple[int, int, int]) -> dict[str, int]:
        return {"at_entries": shape[0] * self._size(shape)}

    def image(self, x: Tensor, low: Tensor, subspace: Subspace, state: State, step: Step, *, first: bool) -> State:
        """`at_entries` (batch, k): the entries of `x` in S, and zeros for matrices that still search.

        Where `x` is the first part of a gradient, S is searched by what the subspace misses of this part.
        """
        if not step.axis.whole:
            raise RuntimeError("sparsely coded residuals need whole matrices: use density=0 where rows are sharded")
        if first:
            self._choose(x, low, subspace, state, step)
        active = self._active(step)
        if len(active) == len(step.count):
            return {"at_entries": take_entries(x, state["entries"]).float()}
        taken = torch.zeros(state["entries"].shape, dtype=torch.float32, device=x.device)
        if active:
            taken[active] = take_entries(x[active], state["entries"][active]).float()
        return {"at_entries": taken}

    def lift(self, image: State, direction: Tensor, short: int, subspace: Subspace, state: State, step: Step) -> Update:
        update = subspace.up(direction, state, short)
        active = self._active(step)
        if not active:
            return update
        if len(active) == len(step.count):
            values = self._values(image["at_entries"], state, step)
        else:  # those that still search are given what they had
            values = take_entries(update.materialise(), state["entries"])
            some = {key: state[key][active] for key in MOMENTS if key in state}
            values[active] = self._values(image["at_entries"][active], some, step.only(active))
            for key, value in some.items():
                state[key][active] = value
        return replace(update, entries=Entries(index=state["entries"], values=values))

    def apart(self, shape: tuple[int, int, int], step: Step) -> int:
        return self._size(shape) if self._active(step) else 0

    def _size(self, shape: tuple[int, int, int]) -> int:
        size = shape[1] * shape[2]
        return min(size, math.ceil(round(self.density * size, 6)))

    def remainder(
        self, image: State, low: Tensor, short: int, subspace: Subspace, state: State, step: Step
    ) -> Tensor | None:
        """What the subspace misses of the entries: a part of `G − P Pᵀ G`, which is orthogonal to `P Pᵀ G`."""
        active = self._active(step)
        if not active:
            return None
        held = take_entries(subspace.up(low, state, short).materialise(), state["entries"])
        missed = image["at_entries"] - held
        return missed if len(active) == len(step.count) else missed[active]

    def _active(self, step: Step) -> list[int]:
        """The matrices whose entries have been chosen and step."""
        return [i for i, count in enumerate(step.count) if count >= self.warmup]

    def _choose(self, x: Tensor, low: Tensor, subspace: Subspace, state: State, step: Step) -> None:
        """Lets `x` have its say in the choice of S, where one is to be made."""
        searching = [i for i, count in enumerate(step.count) if count < self.searches]
        again: list[int] = []
        if self.reselect == "renewal":
            later = [i for i, count in enumerate(step.count) if count > self.warmup]
            again = [i for i in later if self.renewals.now(state, step, subspace.every, i)]
        if not searching and not again:
            return
        # in place, and in one order: a processor takes five times longer to subtract a matrix that lies transposed than
        # to turn it round
        missed = subspace.up(low, state, x.shape[-1]).materialise()
        missed = missed.sub_(x.float().contiguous()).abs_().flatten(1)
        fine = missed.amax(-1, keepdim=True).isfinite()  # a gradient that is no number has no say
        if missed.device.type != "cpu" or not bool(fine.all()):  # a GPU is not waited for
            missed = torch.where(fine, missed, 0.0)
        if searching:
            every = len(searching) == len(step.count)
            some = state if every else {key: state[key][searching] for key in ("entries", "entry_avg")}
            self._search(missed if every else missed[searching], some, [step.count[i] for i in searching])
            if not every:
                state["entries"][searching], state["entry_avg"][searching] = some["entries"], some["entry_avg"]
        if again:
            self._reselect(missed[again], fine[again], state, again)

    def _values(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Adam's direction for the entries `grad` (batch, k) of the gradient, by moments of their own."""
        count: Tensor | list[int] = [c - self.warmup + 1 for c in step.count]
        if "entry_age" in state:
            count = state["entry_age"].add_(1.0)
        return adam_direction(
            grad, state["entry_avg"], state["entry_avg_sq"], count, betas=self.betas, eps=self.eps, eps_raw=self.eps_raw
        )

    def _search(self, missed: Tensor, state: State, count: Sequence[int]) -> None:
        held = state["entries"].long()
        sums = missed.scatter_add_(-1, held, state["entry_avg"])
        # as many candidates as are wanted have at least this much; at first they are any entries, and it says nothing
        floor = sums.gather(-1, held).amin(-1, keepdim=True) if min(count) > 0 else None
        best = largest_entries(sums, held.shape[-1], floor=floor)
        goes_on = beside([c + 1 < self.warmup for c in count], sums.device).bool().unsqueeze(-1)
        state["entries"].copy_(best)
        state["entry_avg"].copy_(torch.where(goes_on, sums.gather(-1, best), 0.0))

    def _reselect(self, missed: Tensor, fine: Tensor, state: State, which: Sequence[int]) -> None:
        old = state["entries"][which].long()
        new = torch.where(fine, largest_entries(missed, old.shape[-1]), old)
        state["entries"][which] = new.to(state["entries"].dtype)
        for key in MOMENTS:
            state[key][which] = carry_entries(old, new, state[key][which])
