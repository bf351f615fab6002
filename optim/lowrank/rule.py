"""The combinator: feedback → subspace → transport → inner → lift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinrank.optim.inner.adam import Adam
from thinrank.optim.linalg.basis import captured_energy
from thinrank.optim.lowrank.feedback import Feedback, NoFeedback
from thinrank.optim.lowrank.lift import Lift, Project
from thinrank.optim.lowrank.subspace import Subspace
from thinrank.optim.lowrank.transport import Keep, Transport
from thinrank.optim.rule import Decay, State, Step
from thinrank.optim.update import Update


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A low-rank rule for a batch of equal matrices.

    Attributes:
        feedback: what enters, and what is remembered of the part that did not fit.
        subspace: which basis, and when it is renewed.
        transport: what happens to the moments then.
        inner: what happens in the small space.
        lift: how the small direction becomes a full update.
        scale: multiplies the learning rate.
        decay: when the weight decay acts.
    """

    subspace: Subspace
    inner: Adam
    feedback: Feedback = field(default=NoFeedback())
    transport: Transport = field(default=Keep())
    lift: Lift = field(default=Project())
    scale: float = 1.0
    decay: Decay = field(default=Decay())

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """Every tensor the rule will ever keep for a batch of `shape` (batch, long, short), by name."""
        return {
            **self.subspace.init(shape, device),
            **self.inner.init(self.subspace.small(shape), device),
            **self.feedback.init(shape, device),
            **self.lift.init(shape, device),
        }

    def update(self, grad: Tensor, state: State, step: Step) -> Update:
        x = self.feedback.enter(grad, state)
        due = [i for i, count in enumerate(step.count) if count % self.subspace.every == 0]
        low = self.renew(x, state, step, due) if due else None
        if low is None:
            low = step.axis.mean(self.subspace.down(x, state))  # (batch, long, r): where replicas meet
        if self.feedback.listens:
            self.feedback.sent(x, self.subspace.up(low, state, x.shape[-1]).materialise(), state)
        if step.record is not None:
            step.record["captured_energy"] = captured_energy(x, low, step.axis)
        direction = self.inner.direction(low, state, step)
        return self.lift(x, low, direction, self.subspace, state, step)

    def renew(self, x: Tensor, state: State, step: Step, due: Sequence[int]) -> Tensor | None:
        """Renews the subspaces of the matrices `due` and carries their moments over.

        A gradient that is not finite would leave a basis that is not one: such a matrix keeps what it has.

        Returns the coordinates of all of `x` where the renewal computed them.
        """
        shared = step.axis.mean(x.float())
        if self.subspace.factorises:
            strange = step.axis.sum((~torch.isfinite(shared)).sum((-2, -1)).float()).tolist()
            due = [i for i in due if not strange[i]]
        if len(due) == len(step.count):
            first = [i for i in due if step.count[i] == 0]
            if not first or len(first) == len(due):
                change, low = self.subspace.renew(shared, state, step)
                self.transport.carry(state, change, step.count)
                return low
        for which in ([i for i in due if step.count[i] == 0], [i for i in due if step.count[i] > 0]):
            if which:
                some = {key: value[which] for key, value in state.items()}
                part = step.only(which)
                change, _ = self.subspace.renew(shared[which], some, part)
                self.transport.carry(some, change, part.count)
                for key, value in some.items():
                    state[key][which] = value
        return None
