"""Replicas that exchange what their updates need of gradients instead of the gradients."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.backward import Hooks
from thinrank.optim.exchange.replicas import (
    BUCKET_BYTES,
    Group,
    Meeting,
    broadcast,
    connected,
    difference,
    refuse_other_models,
)
from thinrank.optim.exchange.signs import TALLIES
from thinrank.optim.exchange.wire import Count, Wire
from thinrank.optim.lowrank.remainder import leaves_remainder, remembers_untold
from thinrank.optim.messages import (
    COARSE,
    EMBEDDINGS,
    MESSAGES,
    NO_NORM,
    UNUSED_FEEDBACK,
    refuse_widened,
    whole_messages_because,
)
from thinrank.optim.methods.config import choice, whole_steps
from thinrank.optim.sending import Sending

_log = logging.getLogger(__name__)


class ReplicaDrift(RuntimeError):
    """Weights or optimizer state that must be equal on all ranks are not."""


class Replicated(Sending):
    """What an optimizer of matrices does where other ranks hold the same weights and other data.

    Attributes:
        wire: what this rank has sent, by kind: `coordinates` and `entries` of matrices, `norms` (by which all know the
            norm of gradients), `renewals` (gradients of matrices by which a step chooses), `gradients` (of matrices of
            which nothing less is enough), `rows` (of embeddings, those that were touched), `dense` (of everything
            else), `present` (which parameters, and rows, had a gradient); where the rest of gradients travels in signs,
            `signs` on the way up, `votes` down, and `sizes`; of owners and of weights in pieces, `updates`, `bases`,
            `weights` and `sums` besides; what no step needs in `wire.rare`. None without other ranks.
    """

    _meeting_hooks: Hooks | None = None
    _check_every: int | None = 100
    _steps = 0
    _knows_norm = True

    @abstractmethod
    def names(self, index: int) -> list[str]: ...

    def replicate(
        self,
        group: Group | None = None,
        *,
        messages: str = "auto",
        embeddings: str = "dense",
        dtype: torch.dtype | None = None,
        norms: bool = True,
        overlap: bool = True,
        check_every: int | None = 100,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Takes over the exchange with the ranks of `group`, which hold the same weights and other data.

        No wrapper around the model is needed, and none may be there: gradients must be this rank's own. Instead of
        them, a matrix sends its coordinates in the subspace (and, for GaLore+, its entries in S), r/short of it, where
        its update needs nothing else; in steps that choose a subspace, or entries, it sends the gradient. Since both
        are linear, the mean of what is sent is what the mean of the gradients would give, and the weights are those of
        one process with all the data. Everything else (embeddings, head and vectors; every matrix of a method that
        needs whole gradients) sends its gradient, as DDP does. Every rank steps all weights and keeps all state.

        With `messages="signs"` that is another method for matrices whose update is as large as the gradient (Fira, a
        residual): between renewals coordinates travel as they are, and of the rest a bit an entry and a size a row, of
        which all ranks make `mean(sizes) ∘ mean(signs)`; the update is that of the gradient so put together. In steps
        that choose a subspace whole gradients travel. With `majority` the sign that more ranks have takes the place of
        the mean of signs, which costs fewer bytes from 4 ranks on. Ours: the published methods exchange gradients.

        Parameters are made equal to the first rank's, here and now.

        A gradient is freed once it is sent: between `backward` and `step` look at `gradient_norm()`, and clip with
        `clip_grad_norm_`. Their norm is that of one process, of the mean of the whole gradients: beside coordinates
        goes a sketch of each gradient (at most 1021 sums of its entries with random signs), of which all know it within
        some 2 % a weight, and exactly up to 1021 entries; ours. It costs a pass over the gradient, and 5 % of the
        message at 9M parameters and a rank of 8 of 128; who does not clip may leave it out (`norms=False`). With
        several backward passes before a step set `accumulating` during all but the last. Ranks must call `backward`,
        `gradient_norm`, `clip_grad_norm_`, `step` and `zero_grad` alike.

        Args:
            group: the replicas; None: all processes.
            messages: `auto`; `full`: whole gradients every step, as DDP sends them; `signs`: as `auto`, and signs of
                what is outside of the subspace where a method needs whole gradients, or their `majority` (above).
            embeddings: how gradients of embeddings (groups of that role) travel that are stepped element by element:
                `dense`, or `rows`: those that any rank's data has touched, after one byte a row has told which; the
                rest are zeros anyway, so that nothing else changes. A tied head touches all. `bfloat16` sends them,
                and the head's, rounded to that, half as many bytes of float32, while matrices keep their own;
                `rows_bfloat16` both.
            dtype: of the messages; None: float32 for coordinates and the gradient's own dtype for gradients.
            norms: sketches travel beside coordinates. Without them `gradient_norm` and `clip_grad_norm_` raise a
                RuntimeError where coordinates travel, captured energy is measured in steps alone that choose a
                subspace, and `gradients_are_finite()` goes by coordinates.
            overlap: messages leave while backward goes on; otherwise all of them at the end.
            check_every: compare a sample of weights and state over the ranks after so many steps; None: never.
            bucket_bytes: least payload of a message.

        Raises:
            RuntimeError: without a process group.
            ValueError: for bad values, ranks whose parameters differ in names, shapes or dtypes, with `in_backward` or
                ranks shared out by gradients, which need what is not there any more, for signs where no matrix has a
                use for them, and for rounded embeddings in messages of another `dtype`.
        """
        choice("messages", messages, MESSAGES)
        choice("embeddings", embeddings, EMBEDDINGS)
        refuse_widened(embeddings, dtype)
        self.check_every = check_every
        self._refuse_alone()
        if self._hooks is not None:
            raise ValueError(
                "in_backward keeps no gradients to exchange, and replicas free them anyway: use mode 'off'"
            )
        if self._allocation is not None and self._allocation.spectra == "gradient":
            raise ValueError(
                "ranks are shared out by whole gradients, which replicas do not keep until step: use "
                "rank_allocation='weight'"
            )
        if messages in COARSE and not any(leaves_remainder(self.rules(own)[0]) for own in self.param_groups):
            raise ValueError(
                f"messages={messages!r} is for what a subspace misses of gradients, and {type(self).__name__} with "
                "these settings has no use for it, or no subspace that stays for some steps: use messages='auto'"
            )
        params, wire = dict(self._named()), Wire()
        refuse_other_models(params, wire.rare, group)
        broadcast((param.data for param in params.values()), wire.rare, group)
        if self._meeting_hooks is not None:
            self._meeting_hooks.remove()
        self._whole_messages, self._tally = messages == "full", messages if messages in TALLIES else None
        self._by_touched_rows = {p for p in self._of_roles("embedding") if p.ndim == 2 and "rows" in embeddings}
        self._rounded = {p for p in self._of_roles("embedding", "head") if "bfloat16" in embeddings}
        self._steps = 0
        trained = [param for param in reversed(params.values()) if param.requires_grad]
        self._leave_norms_out(not norms, trained)
        self._meeting = Meeting(
            trained,
            [self._usual_bytes(param) for param in trained],
            self._pack,
            self._unpack,
            group=group,
            dtype=dtype,
            overlap=overlap,
            bucket_bytes=bucket_bytes,
            wire=wire,
        )
        self._meeting_hooks = Hooks(trained, self._ready)
        self._say_what_travels()

    def _leave_norms_out(self, out: bool, trained: Sequence[Tensor]) -> None:
        """To be called before what parameters send is asked for."""
        self._norms_travel = not out
        self._knows_norm = self._norms_travel or not any(self._is_sketched(param) for param in trained)

    @property
    def knows_norm(self) -> bool:
        return self._knows_norm

    @property
    def _apart(self) -> bool:
        """True where ranks hold parts of the state."""
        return False

    @staticmethod
    def _refuse_alone() -> None:
        if connected() == 0:
            raise RuntimeError("replicas need a process group: call torch.distributed.init_process_group before")

    @property
    def wire(self) -> Wire | None:
        return None if self._meeting is None else self._meeting.wire

    @property
    def check_every(self) -> int | None:
        """Steps between two looks at whether what several ranks hold alike is still the same; None: never.

        `replicate` and `own` set it. Of weights in pieces it is 100 unless somebody sets it, on all ranks alike.

        Raises:
            ValueError: when it is set to less than 1 step.
        """
        return self._check_every

    @check_every.setter
    def check_every(self, steps: int | None) -> None:
        if steps is not None:
            whole_steps("check_every", steps)
        self._check_every = steps

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for index, group in enumerate(self.param_groups):
            yield from zip(self.names(index), group["params"], strict=True)

    def _of_roles(self, *roles: str) -> Iterator[torch.nn.Parameter]:
        for group in self.param_groups:
            if group["role"] in roles:
                yield from group["params"]

    def _say_what_travels(self) -> None:
        for group in self.param_groups:
            rule, _ = self.rules(group)
            cause = whole_messages_because(rule, apart=not self._apart)
            if cause is not None and not self._whole_messages and not self._sends_rest(rule):
                _log.info("replicas exchange whole gradients of %s every step, because %s", group["label"], cause)
            if remembers_untold(rule) and not self._sends_rest(rule):
                _log.warning("sign_feedback of %s %s", group["label"], UNUSED_FEEDBACK)

    # --- one gradient -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _ready(self, param: Tensor) -> None:
        if not self.accumulating and self._meeting is not None:
            self._meeting.ready(param)  # pyright: ignore[reportArgumentType] - hooks are on parameters

    @torch.no_grad()
    def _meet(self) -> None:
        """Replaces this rank's gradients by their means over the replicas, or by images of these; once a step."""
        if self._meeting is not None:
            self._finish(self._meeting)

    def _finish(self, meeting: Meeting) -> None:
        for name, param in self._named():
            if param.grad is not None and param not in meeting:
                raise RuntimeError(
                    f"{name} has a gradient, and was frozen or not there when the replicas were set up, so that it "
                    "would be stepped by this rank's data alone: call replicate again after a change of what is trained"
                )
        meeting.finish()

    @property
    def _under_way(self) -> bool:
        """True where replicas have begun to exchange the gradients of a step."""
        return self._meeting is not None and self._meeting.under_way

    # --- after a step -------------------------------------------------------------------------------------------------

    def _stepped(self) -> None:
        """Ends the exchange of a step; looks now and then whether the replicas are still equal."""
        self._sent()
        if self._meeting is None:
            return
        self._meeting.begin()
        self._check_if_due()

    def _check_if_due(self) -> None:
        self._steps += 1
        if self._check_every is not None and self._steps % self._check_every == 0:
            self.check_replicas()

    @torch.no_grad()
    def check_replicas(self) -> None:
        """Compares a sample of every weight and every tensor of state over the replicas; all of them must call it.

        Raises:
            ReplicaDrift: with the name of the first that differs.
        """
        if self._meeting is None:
            return
        self._refuse_drift(difference(self._alike() | self._said(), self._meeting.wire.rare, self._meeting.group))

    def _refuse_drift(self, name: str | None) -> None:
        if name is not None:
            raise ReplicaDrift(
                f"replicas have drifted apart: {name} is not the same on all ranks after {self._steps} steps of this "
                "process; go on from the last checkpoint, and look for a rank with other code, data types or devices"
            )

    def _alike(self) -> dict[str, Tensor]:
        """Everything that must be the same on all replicas, by name."""
        held: dict[str, Tensor] = {}
        for name, param in self._named():
            held[name] = param
            held |= {f"{key} of {name}": value for key, value in self.state[param].items() if value.numel()}
        return held

    def in_backward(self, mode: str, *, max_norm: float | None = None) -> None:
        if mode != "off" and self._meeting is not None:
            raise ValueError(
                f"mode {mode!r} is for one process; replicas exchange gradients, and free them, in backward already: "
                "use mode 'off'"
            )
        if mode != "off" and connected() > 1:
            raise ValueError(
                f"mode {mode!r} takes gradients before other ranks have had their say, and there are some: leave it "
                "'off', and call replicate, which frees gradients in backward as well"
            )
        super().in_backward(mode, max_norm=max_norm)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        if not self._knows_norm:
            raise RuntimeError(NO_NORM)
        return super().gradient_norm()

    def _norm_left(self) -> Tensor:
        self._meet()
        return super()._norm_left()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._meeting is not None:
            self._meeting.begin()


def replicate(model: torch.nn.Module, optimizer: Replicated, group: Group | None = None, **options: Any) -> None:
    """Makes `model` and `optimizer` one of several equal replicas, each with its own data, without any wrapper.

    All weights and buffers of the model are made equal to those of the first rank of `group`, whether `optimizer` steps
    them or not; then the optimizer takes over the exchange (`MatrixOptimizer.replicate`, which has the options).

        optimizer = build(model, config)
        replicate(model, optimizer)
        for batch in my_share_of_the_data:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

    Raises:
        ValueError: for a model inside of DistributedDataParallel, and as `MatrixOptimizer.replicate`.
    """
    refuse_wrapped(model)
    optimizer.replicate(group, **options)
    own = {param for each in optimizer.param_groups for param in each["params"]}
    equalise(model, group, but=own, wire=optimizer.wire)


def refuse_wrapped(model: torch.nn.Module) -> None:
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError("DistributedDataParallel averages whole gradients itself: give the module inside it")


def equalise(
    model: torch.nn.Module, group: Group | None = None, *, but: Collection[Tensor] = (), wire: Wire | None = None
) -> None:
    """Gives all ranks of `group` the first one's weights and buffers, but for those in `but`.

    Args:
        wire: of the optimizer for which it is; None: nobody counts it.
    """
    tensors = (tensor.data for tensor in (*model.parameters(), *model.buffers()) if tensor not in but)
    broadcast(tensors, Count() if wire is None else wire.rare, group)
