"""The combinator: feedback → subspace → transport → inner → lift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from thinrank.optim.axis import Asking, alone
from thinrank.optim.inner.base import Inner
from thinrank.optim.linalg.basis import captured_energy
from thinrank.optim.linalg.norms import peak
from thinrank.optim.lowrank.feedback import Feedback, KeepsErrors, NoFeedback
from thinrank.optim.lowrank.lift import Lift, LinearLift, Project
from thinrank.optim.lowrank.renewals import Renewals
from thinrank.optim.lowrank.subspace import Subspace, factor_dtype, second_choice
from thinrank.optim.lowrank.transport import Change, Keep, Slots, Transport
from thinrank.optim.rule import FAILED, NOT_FINITE, SVD_FAILED, Decay, Form, State, Step
from thinrank.optim.update import Entries, Update


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank(KeepsErrors):
    """A low-rank rule for a batch of equal matrices.

    Attributes:
        feedback: what enters, and what is remembered of the part that did not fit.
        subspace: which basis, and when it is renewed.
        transport: what happens to the moments then.
        inner: what happens in the small space.
        lift: how the small direction becomes a full update.
        scale: multiplies the learning rate.
        decay: when the weight decay acts.
        renewals: when the subspace's gap is over.
    """

    subspace: Subspace
    inner: Inner
    feedback: Feedback = field(default=NoFeedback())
    transport: Transport = field(default=Keep())
    lift: Lift = field(default=Project())
    scale: float = 1.0
    decay: Decay = field(default=Decay())
    renewals: Renewals = field(default=Renewals())

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """Every tensor the rule will ever keep for a batch of `shape` (batch, long, short), by name."""
        return {
            **self.subspace.init(shape, device),
            **self.inner.init(self.subspace.small(shape), device),
            **self.feedback.init(shape, device),
            **self.lift.init(shape, device),
            **self.renewals.init(shape[0], device, self.subspace.every),
        }

    def update(self, grad: Tensor, state: State, step: Step) -> Update:
        return alone(self.exchange(grad, state, step))

    def exchange(self, grad: Tensor, state: State, step: Step) -> Asking[Update]:
        x = self.feedback.enter(grad, state)
        if self.chooses(state, step) or not isinstance(self.lift, Project):
            shared = yield x
            low = self.coordinates(shared, state, step)
        else:
            shared, low = x, (yield self.subspace.down(x, state))
        if self.feedback.listens:
            self.feedback.sent(x, self.subspace.up(low, state, x.shape[-1]).materialise(), state)
        if step.record is not None and self.subspace.orthonormal:
            step.record["captured_energy"] = captured_energy(shared, low, step.axis)
        direction = self.inner.direction(low, state, step)
        return self.lift(shared, low, direction, self.subspace, state, step)

    def coordinates(self, x: Tensor, state: State, step: Step) -> Tensor:
        """(batch, long, r) coordinates of `x`, after the subspaces that are due have been renewed from it."""
        due = self.renewals.due(state, step, self.subspace.every)
        low = self.renew(x, state, step, due) if due else None
        return self.subspace.down(x, state) if low is None else low

    @property
    def by_rows(self) -> bool:
        """True when ranks that hold other rows of a matrix have no more to say to each other than small sums."""
        return self.subspace.by_rows and self.lift.by_rows

    # --- a gradient in parts, none of which is kept -------------------------------------------------------------------

    @property
    def linear(self) -> bool:
        """True when an update needs no more of a gradient than its `image`, which is linear between renewals."""
        return self.whole_because is None

    @property
    def whole_because(self) -> str | None:
        """Why an update needs whole gradients, in words; None where it does not."""
        if not isinstance(self.feedback, NoFeedback):
            return "its error feedback keeps what the subspace missed of the gradient"
        if not isinstance(self.lift, LinearLift):
            return "its update is as large as the gradient and made of the gradient's rows"
        return None

    def chooses(self, state: State, step: Step) -> bool:
        """True when this step chooses something by the gradient itself: a subspace, or what the lift has to choose."""
        return bool(self.renewals.due(state, step, self.subspace.every)) or (
            isinstance(self.lift, LinearLift) and self.lift.chooses(step)
        )

    @property
    def searches(self) -> int:
        """How many first updates of a matrix choose something by the gradient itself."""
        return max(1, self.lift.searches) if isinstance(self.lift, LinearLift) else 1

    def image_sizes(self, shape: tuple[int, int, int]) -> dict[str, int]:
        """Numbers in each tensor of the `image` of a batch of `shape`; {} for a rule that is not `linear`."""
        if not self.linear:
            return {}
        assert isinstance(self.lift, LinearLift)
        return {"low": math.prod(self.subspace.small(shape)), **self.lift.image_sizes(shape)}

    def image(self, grad: Tensor, state: State, step: Step, *, first: bool) -> State:
        """What an update needs of `grad`, to be added up over the parts of a gradient; only for a `linear` rule.

        Args:
            first: for the first part of a gradient: renew, and choose, what is due, from this part.
        """
        assert isinstance(self.lift, LinearLift)
        low = self.coordinates(grad, state, step) if first else self.subspace.down(grad, state)
        return {"low": low, **self.lift.image(grad, low, self.subspace, state, step, first=first)}

    def visible(self, image: State, short: int, state: State, step: Step) -> list[Tensor]:
        """Tensors whose joint norm is that of what `image` shows of the gradient (of an orthonormal subspace)."""
        assert isinstance(self.lift, LinearLift)
        rest = self.lift.remainder(image, image["low"], short, self.subspace, state, step)
        return [image["low"]] if rest is None else [image["low"], rest]

    def update_from(self, image: State, short: int, state: State, step: Step) -> Update:
        """The update for the gradient that left this `image`."""
        assert isinstance(self.lift, LinearLift)
        direction = self.inner.direction(image["low"], state, step)
        return self.lift.lift(image, direction, short, self.subspace, state, step)

    # --- replicas that remember apart (`Remembers`) -------------------------------------------------------------------

    @property
    def remembers(self) -> bool:
        return self.feedback.listens and isinstance(self.lift, Project) and self.stays

    @property
    def stays(self) -> bool:
        """True when a subspace is there for some steps."""
        return self.subspace.every > 1 or self.renewals.lazy is not None

    def asks(self, shape: tuple[int, int, int], *, choosing: bool = False) -> int:
        return math.prod(shape if choosing else self.subspace.small(shape))

    # --- an update in few numbers (`Tells`) ---------------------------------------------------------------------------

    def shared(self, shape: tuple[int, int, int]) -> tuple[str, ...]:
        if not self.linear:
            return ()
        meta = torch.device("meta")
        renewals = self.renewals.init(shape[0], meta, self.subspace.every)
        entries = [key for key in self.lift.init(shape, meta) if key == "entries"]
        return (*self.subspace.init(shape, meta), *entries, *renewals)

    def told(self, shape: tuple[int, int, int], step: Step) -> dict[str, Form] | None:
        small = self.subspace.small(shape)
        if not isinstance(self.lift, LinearLift) or not self.linear or small[1] != shape[1]:
            return None  # the last: with a basis on either side, what is given has been multiplied by one of them
        forms: dict[str, Form] = {"direction": (small, factor_dtype(self.subspace))}
        apart = self.lift.apart(shape, step)
        return forms | ({"values": ((shape[0], apart), torch.float32)} if apart else {})

    def tell(self, update: Update, state: State) -> State:
        assert update.direction is not None
        return {"direction": update.direction} | ({} if update.entries is None else {"values": update.entries.values})

    def hear(self, told: State, state: State, short: int) -> Update:
        update = self.subspace.up(told["direction"], state, short)
        if "values" not in told:
            return update
        return replace(update, entries=Entries(index=state["entries"], values=told["values"]))

    def renew(self, x: Tensor, state: State, step: Step, due: Sequence[int]) -> Tensor | None:
        """Renews the subspaces of the matrices `due` and carries their moments over.

        A gradient that is not finite would leave a basis that is not one: such a matrix keeps what it has (subspaces
        that do not factorise see to it on the device, `Slots.held`). Where a factorisation does not converge, the batch
        is renewed matrix by matrix and the one that fails by subspace iteration; where that fails too, it keeps what it
        has.

        Returns the coordinates of all of `x` where the renewal computed them.
        """
        shared = x.float()
        if self.subspace.factorises:
            finite = torch.isfinite(peak(shared, step.axis)).flatten().tolist()  # a maximum passes on what is no number
            for i in due:
                if not finite[i]:
                    step.note(i, NOT_FINITE, skipped=True)
            due = [i for i in due if finite[i]]
        first, later = [i for i in due if step.count[i] == 0], [i for i in due if step.count[i] > 0]
        waiting = [which for which in (first, later) if which]
        found: list[tuple[list[int], Tensor]] = []
        while waiting:
            which = waiting.pop(0)
            every = len(which) == len(step.count)
            some = state if every else {key: value[which] for key, value in state.items()}
            part = step if every else step.only(which)
            entered = shared if every else shared[which]
            try:
                change, low = self.subspace.renew(entered, some, part)
            except torch.linalg.LinAlgError:
                if len(which) > 1:
                    waiting = [*([i] for i in which), *waiting]
                    continue
                other = self._second_choice(entered, some, part)
                if other is None:
                    step.note(which[0], FAILED, skipped=True)
                    continue
                step.note(which[0], SVD_FAILED, skipped=False)
                change, low = other
            if isinstance(change, Slots) and change.held is not None:
                step.hold(which, change.held)
            self.transport.carry(some, change, part.count)
            overlap = change.overlap() if part.count[0] > 0 and self.subspace.orthonormal else None
            if overlap is not None and step.overlaps is not None:
                step.overlaps.append((which, overlap))
            self.renewals.done(some, part, self.subspace.every, overlap)
            if every:
                return low
            if low is not None:
                found.append((which, low))
            for key, value in some.items():
                state[key][which] = value
        if not found:
            return None
        if sum(len(which) for which, _ in found) == len(step.count):
            low = found[0][1].new_empty((x.shape[0], *found[0][1].shape[1:]))
        else:
            low = self.subspace.down(x, state)
        for which, part_low in found:  # a matrix is given the same numbers, whoever else is due
            low[which] = part_low
        return low

    def _second_choice(self, x: Tensor, state: State, step: Step) -> tuple[Change, Tensor | None] | None:
        other = second_choice(self.subspace)
        try:
            return None if other is None else other.renew(x, state, step)
        except torch.linalg.LinAlgError:
            return None
