"""One step: what is asked of the rules, bucket by bucket, and done to the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.bucket import Bucket, Turn
from thinrank.optim.exchange import local
from thinrank.optim.inner.elementwise import ElementwiseAdamW
from thinrank.optim.inner.half import HalfWeights
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.owned import Owned
from thinrank.optim.rule import Decay, MatrixRule, Probe, Step, seed_of
from thinrank.optim.skipped import Skipped
from thinrank.optim.update import Update


class Stepping(Owned):
    """How an optimizer of matrices steps, with what it measures on the way."""

    _attended: tuple[Callable[[], None], Callable[[], None]] | None = None
    _begun = False  # a step of which parts may follow

    def attend(self, before: Callable[[], None] | None, after: Callable[[], None] | None) -> None:
        """Has `before` and `after` called around every whole step, also where a framework steps one group after the
        other; None for both ends it. A dry run, of zero gradients at a rate of zero, is no step.

        Raises:
            ValueError: when somebody does so already.
        """
        if before is None or after is None:
            self._attended = None
            return
        if self._attended is not None:
            raise ValueError("somebody attends to this optimizer's steps already: end that first (Upkeep.detach)")
        self._attended = (before, after)

    def _forget(self) -> None:
        super()._forget()
        self.measure = False
        self._probe: Probe | None = None  # of the part of a step that is done
        self.measured: dict[str, dict[str, float]] = {}
        self._skipped = Skipped()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; the others, and their state, stay as they are.

        Args:
            closure: re-evaluates the model under `enable_grad` and returns the loss.

        Returns:
            the closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run()
        return loss

    @torch.no_grad()
    def _run(self, only: Collection[Tensor] | None = None, *, last: bool = True) -> None:
        self._refuse_sparse()
        if self._is_dry_run():
            return
        if self._attended is not None and not self._begun:
            self._begun = True
            self._attended[0]()
        self._meet()
        self._allocate_if_due("gradient")
        probe = (self._probe or Probe()) if self.measure else None
        self._in_chunks(only, probe)
        self._images.clear()
        if last:
            self._stepped()
        if probe is not None and last:
            self._tell(self._together(probe))
            self.measure, probe = False, None
        self._probe = probe
        self._allocate_if_due("weight")  # at the end, since coordinates that backward left are in the old subspaces
        if self._attended is not None and last:
            self._begun = False
            self._attended[1]()

    def _step_layouts(self, probe: Probe | None) -> None:
        """Steps everything that there is a gradient, or an image of one, for."""
        for group, layout in zip(self.param_groups, self._assembled(), strict=True):
            _, element = self.rules(group)
            for bucket in layout.buckets:
                rule, _ = self.rules(group, bucket.section, bucket.rank)
                assert rule is not None  # buckets are made for groups with a matrix rule only
                if self._images and isinstance(rule, LowRank) and rule.linear:
                    for param in bucket.params:  # whoever has a gradient of its own was given it by hand
                        self._take_image(param)
                active = [i for i, p in enumerate(bucket.params) if self._gradient(p) is not None or p in self._images]
                if active:
                    self._step_bucket(bucket, active, rule, group, probe)
            rest = [(p, key) for p, key in layout.rest if self._gradient(p) is not None]
            if rest:
                self._step_rest(rest, element, group, probe)
        self._step_together(probe)

    def _tell(self, probe: Probe) -> None:
        self.measured = {
            **probe.matrices,
            "update_rms": probe.update_rms(),
            "effective_lr": {g["label"]: float(g["lr"]) * self.scale(g) for g in self.param_groups},
        }
        if any(group["ranks"] is not None for group in self.param_groups):
            self.measured["rank"] = {name: float(rank) for name, rank in self.directions().items()}
        self._skipped.fetch()

    def scale(self, group: Mapping[str, Any]) -> float:
        """What multiplies the learning rate of `group`."""
        rule, _ = self.rules(group)
        return 1.0 if rule is None else rule.scale

    def _is_dry_run(self) -> bool:
        # a distributed checkpoint takes one step with zero gradients at lr 0 before it loads: it must leave no trace
        if self._under_way:  # other ranks count on what this one sends
            return False
        if self._images or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        return not self._agreed(any(bool(grad.any()) for grad in self._gradients()))

    def _refuse_sparse(self) -> None:
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} needs dense gradients; {self.names(index)[i]} has a sparse one: "
                        "use sparse=False"
                    )

    def _step_bucket(
        self, bucket: Bucket, active: list[int], rule: MatrixRule, group: dict[str, Any], probe: Probe | None
    ) -> None:
        """One update of the parameters at the places `active`, which all have a gradient or an image of one."""
        record: dict[str, Tensor] | None = {} if probe is not None else None
        turn = Turn(bucket, active, rule, group, bucket.state(active), bucket.step(active, group, record))
        if self._put_off(turn):
            return
        params, view = turn.params, bucket.view
        with fast_products(params[0].device):
            if params[0] in self._images:
                assert isinstance(rule, LowRank)  # no other rule lets gradients become images
                image = self._images.stacked(params, bucket.prefix)
                if record is not None and rule.subspace.orthonormal:
                    record |= self._shares(turn, image)
                update = rule.update_from(image, view.shape[1], turn.state, turn.step)
            else:
                grads = [grad for p in params if (grad := self._gradient(p)) is not None]
                update = rule.update(local.bring(grads, view), turn.state, turn.step)
            self._apply(turn, update, probe)

    def _apply(self, turn: Turn, update: Update, probe: Probe | None) -> None:
        """Ends a turn: keeps its state, tells what was measured, changes the weights."""
        bucket, active, rule, group = turn.bucket, turn.active, turn.rule, turn.group
        view, step = bucket.view, turn.step
        bucket.advance(active)
        bucket.keep(active, turn.state)
        self._hear(bucket, active, step)
        if probe is not None:
            probe.saw(group["label"], update.materialise())
            for key, values in (step.record or {}).items():
                measured = values.reshape(len(active), view.blocks).mean(-1).tolist()
                names = [bucket.prefix + bucket.names[i] for i in active]
                probe.measured(key, dict(zip(names, measured, strict=True)))
            probe.measured("subspace_overlap", bucket.overlaps())
        if self._held_back(bucket, active, rule, update, turn.state):
            return
        keep, factor = self._factors(group, turn.params, rule, view.blocks)
        half = HalfWeights(group["half_weights"])
        weights = [self._weight(p) for p in turn.params]
        rounded = half.apply(weights[0])
        wide = weights
        if rounded:
            wide = [half.open(w, self.state[p]) for w, p in zip(weights, turn.params, strict=True)]
        local.give_back(wide, view, update, keep=keep, step=factor)
        if rounded:
            for i, (weight, own) in enumerate(zip(weights, wide, strict=True)):
                first = i * view.blocks
                half.close_(weight, own, seed_of(group["seed"], step.keys[first], step.count[first]))

    def _hear(self, bucket: Bucket, active: list[int], step: Step) -> None:
        """Takes what a rule has left in `step` about the parameters at `active`."""
        bucket.remember(active, step.overlaps or ())
        self._skipped.hear(bucket, active, step)

    @property
    def skipped_renewals(self) -> dict[str, int]:
        return self._skipped.counts

    def _step_rest(
        self,
        rest: list[tuple[torch.nn.Parameter, int]],
        rule: ElementwiseAdamW,
        group: dict[str, Any],
        probe: Probe | None,
    ) -> None:
        for (lr, weight_decay), some in self._alike_rates(group, rest).items():
            weights = [self._weight(p) for p, _ in some]
            before = [w.detach().clone() for w in weights] if probe is not None and lr else []
            grads = [grad for p, _ in some if (grad := self._gradient(p)) is not None]
            states = [self.state[p] for p, _ in some]
            seeds = [seed_of(group["seed"], key, int(self.state[p]["step"])) for p, key in some]
            rule.step_(weights, grads, states, lr=lr, weight_decay=weight_decay, seeds=seeds)
            keep, _ = Decay().factors(lr, weight_decay)
            for old, new in zip(before, weights, strict=bool(before)):
                assert probe is not None
                probe.saw(group["label"], (old * keep - new) / lr)
