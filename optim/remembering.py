"""Replicas that remember apart: each keeps of its own gradients what an update did not use."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.axis import Asking
from thinrank.optim.bucket import Bucket, Turn
from thinrank.optim.exchange import local
from thinrank.optim.exchange.asking import answered
from thinrank.optim.exchange.replicas import BUCKET_BYTES, Group, Letter, Meeting, Part, batches
from thinrank.optim.exchange.wire import Count
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.messages import sketch_bytes
from thinrank.optim.methods.config import whole_steps
from thinrank.optim.replicated import Replicated
from thinrank.optim.rule import MatrixRule, Probe, Remembers, remembers
from thinrank.optim.update import Update

SIDE_BY_SIDE_BYTES = 16 * BUCKET_BYTES
"""So much is asked for side by side at least, and hardly more: matrices that wait for answers hold what they are about
to need of their gradients."""

MEMORIES_EVERY = 200
"""Steps between two messages of memories: as many as between GaLore's renewals, whose gradients cost the same."""


class Remembering(Replicated):
    """What replicas do about methods that remember as much as a gradient (Dion's momentum, error feedback).

    No gradient of such a matrix travels. In `step` the replicas ask each other for the products that the update is made
    of (`Remembers.exchange`), all matrices side by side. Each adds its own gradient to a memory of its own; the mean of
    the memories is the memory of the mean, and the weights are those of one process, and the same on all ranks.

    Before, in backward, goes the sketch alone by which all know the norm of the mean gradient, and whether it is a
    number; without norms, one sum, which tells whether it is.
    """

    _memories_every: int | None = None

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        self._own: dict[Tensor, Tensor] = {}
        self._later: list[Turn] = []

    def replicate(
        self, group: Group | None = None, *, memories_every: int | None = MEMORIES_EVERY, **options: Any
    ) -> None:
        """As `Replicated.replicate`, which has the other options.

        Of matrices whose rule remembers gradients (Dion, LDAdam, error feedback with a gap above 1) no gradient travels
        between steps that choose a subspace by it, but with `messages="full"`. `state_dict` makes the ranks' memories
        equal and gives what one process would have: every rank must call it. In `wire` these matrices are `factors`
        (means of products), `norms` and `memories`.

        Args:
            memories_every: make the ranks' memories equal (`share_memories`) after so many steps; None: never.
        """
        if memories_every is not None:
            whole_steps("memories_every", memories_every)
        super().replicate(group, **options)
        self._memories_every = memories_every

    def _remembers_apart(self, rule: MatrixRule | None) -> bool:
        return self._meeting is not None and not self._whole_messages and not self._apart and remembers(rule)

    def _own_homes(self, param: Tensor) -> list[tuple[Remembers, dict[str, Any], Bucket, int]]:
        """Where the matrices of a parameter are stepped of which every rank keeps its own gradient; [] for others."""
        found = []
        for group, bucket, i in self._homes.get(param, []):
            rule, _ = self.rules(group, bucket.section, bucket.rank)
            if not self._remembers_apart(rule):
                return []
            assert isinstance(rule, Remembers)
            found.append((rule, group, bucket, i))
        return found

    # --- before the step ----------------------------------------------------------------------------------------------

    def _pack(self, param: torch.nn.Parameter) -> list[Part]:
        homes = self._own_homes(param)
        if not homes:
            return super()._pack(param)
        self._refuse_sparse_one(param)
        assert param.grad is not None
        self._own[param] = param.grad
        return [self._sketch(param.grad, *homes[0][1:], *([] if self._norms_travel else [1]))]

    def _is_sketched(self, param: Tensor) -> bool:
        return bool(self._own_homes(param)) or super()._is_sketched(param)

    def _unpack(self, param: torch.nn.Parameter, parts: list[Part]) -> None:
        super()._unpack(param, parts)
        if param not in self._own:
            return
        grad, fine = self._own.pop(param), self._sketches[param].isfinite().all()
        if grad.is_cuda or not bool(fine):  # what one rank cannot use, none does; a GPU is not waited for
            grad.mul_(torch.where(fine, 1.0, torch.nan))
        param.grad = grad

    def _once(self) -> list[Tensor]:
        own = [param for param in self._sketches if param not in self._images]
        if not own:
            return super()._once()
        whole = [p.grad for _, p in self._named() if p.grad is not None and p not in self._sketches]
        return [*whole, *(self._sketches[param] for param in own)]

    def _usual_bytes(self, param: torch.nn.Parameter) -> int:
        if not self._own_homes(param):
            return super()._usual_bytes(param)
        return sketch_bytes(param) if self._norms_travel else 4

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._own.clear()
        self._later.clear()

    # --- the step -----------------------------------------------------------------------------------------------------

    def _put_off(self, turn: Turn) -> bool:
        """True for matrices that replicas step together (`_step_together`)."""
        if not self._remembers_apart(turn.rule):
            return False
        self._later.append(turn)
        return True

    @abstractmethod
    def _apply(self, turn: Turn, update: Update, probe: Probe | None) -> None: ...

    def _step_together(self, probe: Probe | None) -> None:
        """Steps what has been put off until all of it is known."""
        later, self._later = self._later, []
        for turns in batches(later, _asked_bytes, SIDE_BY_SIDE_BYTES):
            self._ask(turns, probe)

    def _ask(self, turns: list[Turn], probe: Probe | None) -> None:
        assert self._meeting is not None
        meeting = self._meeting

        def send(asked: list[Tensor]) -> Letter:
            return Letter([Part("factors", x) for x in asked], meeting.group, meeting.dtype, meeting.wire)

        with fast_products(turns[0].params[0].device):
            updates = answered([_asking(turn) for turn in turns], send, meeting.bucket_bytes)
            for turn, update in zip(turns, updates, strict=True):
                self._apply(turn, update, probe)

    def _stepped(self) -> None:
        self._own.clear()
        super()._stepped()
        if self._memories_every is not None and self._steps and self._steps % self._memories_every == 0:
            self.share_memories()

    # --- memories -----------------------------------------------------------------------------------------------------

    def _memories(self, untold: bool = True) -> Iterator[tuple[Remembers, Bucket]]:
        for group, layout in zip(self.param_groups, self._assembled(), strict=True):
            for bucket in layout.buckets:
                rule, _ = self.rules(group, bucket.section, bucket.rank)
                apart = self._remembers_apart(rule) or (untold and self._sends_rest(rule))
                if apart and isinstance(rule, Remembers) and rule.memory:
                    yield rule, bucket

    @torch.no_grad()
    def share_memories(self) -> None:
        """Gives all replicas the mean of what they remember of their own gradients; every rank must call it.

        Updates depend on the mean alone, so that nothing changes but rounding. What memories differ in is noise of
        gradients that adds up, as a random walk does.
        """
        if self._meeting is not None:
            self._share_memories(self._meeting, self._meeting.wire, untold=False)  # which does not add up

    def _share_memories(self, meeting: Meeting, wire: Count, *, untold: bool = True) -> None:
        memories = self._memories(untold)
        for some in batches(memories, lambda each: 4 * sum(p.numel() for p in each[1].params), BUCKET_BYTES):
            parts = [Part("memories", rule.recall(bucket.stacked, bucket.view.shape[1])) for rule, bucket in some]
            means = Letter(parts, meeting.group, None, wire).open()
            for (rule, bucket), mean in zip(some, means, strict=True):
                rule.remember(mean, bucket.stacked)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        if self._meeting is not None:
            self._share_memories(self._meeting, self._meeting.wire.rare)  # what is saved is no part of a step
        return super().state_dict()

    def _alike(self) -> dict[str, Tensor]:
        apart = {
            f"{bucket.prefix}{key} of {name}"
            for rule, bucket in self._memories()
            for key in rule.memory
            for name in bucket.names
        }
        return {name: value for name, value in super()._alike().items() if name not in apart}


def _asked_bytes(turn: Turn) -> int:
    assert isinstance(turn.rule, Remembers)
    return 4 * turn.rule.asks((len(turn.active) * turn.bucket.view.blocks, *turn.bucket.view.shape))


def _asking(turn: Turn) -> Asking[Update]:
    """As `rule.exchange`, which does not hold on to gradients before it is its turn; nothing is measured, for nobody
    has the mean gradient."""
    assert isinstance(turn.rule, Remembers)
    grads = [grad for param in turn.params if (grad := param.grad) is not None]
    step = replace(turn.step, record=None)
    return (yield from turn.rule.exchange(local.bring(grads, turn.bucket.view), turn.state, step))
