"""Replicas that share out the work and the state: each matrix is stepped by one of them, who tells the others how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor

from thinrank.optim.bucket import Bucket
from thinrank.optim.exchange import local
from thinrank.optim.exchange.replicas import Group, Part
from thinrank.optim.exchange.shards import Carrier, Parcel, Span
from thinrank.optim.exchange.wire import Wire
from thinrank.optim.islands import Islands
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.messages import MESSAGES, ROWS, refuse_signs
from thinrank.optim.methods.config import choice
from thinrank.optim.places import EVEN_FROM, at, of_replicas
from thinrank.optim.replicated import equalise, refuse_wrapped
from thinrank.optim.rule import MatrixRule, Probe, State, Step, Tells
from thinrank.optim.update import Update


class Owned(Islands):
    """What an optimizer of matrices does where ranks hold the same weights and other data, and one of them steps each.

    Gradients meet at the owner alone: their coordinates where these are enough, in half the bytes of a sum that all
    ranks get. The owner steps its matrices as one process would, holds their moments, and tells the others its update
    in the numbers it is made of: the direction in the small space and, where the step chose one, the new basis. Large
    weights that are stepped element by element are cut into equal pieces, one a rank.
    """

    _owning = False

    def _forget(self) -> None:
        super()._forget()
        self._present: set[Tensor] = set()
        self._plans: dict[tuple[Tensor, str], tuple[Step, bool]] = {}
        self._told: dict[tuple[Tensor, str], State] = {}

    def own(
        self,
        group: Group | None = None,
        *,
        messages: str = "auto",
        dtype: torch.dtype | None = None,
        even_from: int = EVEN_FROM,
        **options: Any,
    ) -> None:
        """As `replicate`, with the state, and the work of a step, shared out among the ranks of `group`.

        Every rank holds all weights, the bases of all matrices that send coordinates, and about an n-th of everything
        else of the state. `state_dict` and `full_state_dict` give what one process would have; every rank must call
        them, as `clip_grad_norm_` and the others.

        Args:
            group, messages: as in `replicate`.
            dtype: of the messages; None: float32 for coordinates and each tensor's own for the rest.
            even_from: entries from which what is stepped element by element is cut into equal pieces.
            options: the others of `replicate`.

        Raises:
            RuntimeError, ValueError: as `replicate`, and when steps have been taken, ranks are shared out later, or
                weights are in pieces; nothing is changed then.
        """
        choice("messages", messages, MESSAGES)
        refuse_signs(messages, "owners")
        if self._shards is not None:
            raise ValueError("weights are in pieces, and the state with them: leave own out, or do not shard the model")
        self._refuse_allocation(self._allocation)
        self._refuse_stepped()
        before = dict(self.state)
        self._told_dtype, self._owning, self._whole_messages = dtype, True, messages == "full"
        try:
            self._refuse_alone()
            device = next(param.device for _, param in self._named())
            self._carrier = Carrier(group, Wire(), device)  # which is the exchange's, once there is one
            self._share(even_from)
            super().replicate(group, messages=messages, dtype=dtype, **options)
        except Exception:
            self._owning, self._layouts = False, None
            self.state.update(before)
            raise
        assert self._meeting is not None
        self._carrier.wire = self._meeting.wire

    def replicate(self, *args: Any, **kwargs: Any) -> None:
        if self._owning:
            raise ValueError(
                "the ranks have shared out the state, and replicas need all of it: load full_state_dict() into a new "
                "optimizer"
            )
        super().replicate(*args, **kwargs)

    @property
    def _apart(self) -> bool:
        return self._owning or super()._apart

    # --- who steps what -----------------------------------------------------------------------------------------------

    def _share(self, even_from: int) -> None:
        self._deal_out(even_from)
        for name, param, group, rank in self._members():
            self.state[param] = self._own_state(name, param, group, rank)
        self._layouts = None

    def _deal_out(self, even_from: int) -> None:
        """Who steps what; the same on every rank."""
        members = self._members()
        weights = [self._stepped_by(param, group, rank) for _, param, group, rank in members]
        places = of_replicas(weights, self._carrier.ranks, even_from)
        self._cut = {param: place for (_, param, *_), place in zip(members, places, strict=True)}

    def _at(self, owner: int, size: int) -> list[Span]:
        return at(owner, size, self._carrier.ranks)

    def _mine(self, param: Tensor) -> bool:
        return super()._mine(param) if not self._owning else self._cut[param].owner in (None, self._carrier.rank)

    def _has_place(self, param: Tensor) -> bool:
        return self._owning or super()._has_place(param)  # whose coordinates are sent must be known, whoever steps it

    def _own_state(self, name: str, param: Tensor, group: dict[str, Any], rank: int | float | None) -> State:
        if not self._owning:
            return super()._own_state(name, param, group, rank)
        place = self._cut[param]
        if place.way == "piece":
            return self._state_of_piece(name, param, group, rank, param.device)
        state = self._initial_state(name, param, group, rank)
        if self._mine(param):
            return state
        kept = ["step", *self._kept_by_all(param, group, rank)]
        return {key: value for key, value in state.items() if key in kept}

    def _knows_subspace(self, rule: MatrixRule | None, param: Tensor) -> TypeGuard[LowRank]:
        """True where every rank has the subspace of a matrix, whoever steps it."""
        told = self._cut[param].way == "told"
        return isinstance(rule, LowRank) and (self._sends_coordinates(rule) or (told and rule.linear))

    def _kept_by_all(self, param: Tensor, group: dict[str, Any], rank: int | float | None) -> list[str]:
        """Names of the state of a matrix that ranks need to send less than its gradients, or to hear of its updates."""
        views, kept = self._views(param, group, rank), []
        for i, view in enumerate(views):
            rule, _ = self.rules(group, i, rank)
            if isinstance(rule, Tells) and self._knows_subspace(rule, param):
                prefix = f"{i}." if len(views) > 1 else ""
                kept += [prefix + key for key in rule.shared((view.blocks, *view.shape))]
        return kept

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _pack(self, param: torch.nn.Parameter) -> list[Part]:
        if not self._owning:
            return super()._pack(param)
        for rule, group, bucket, i in self._all_homes(param):
            step = bucket.step([i], group)
            chose = self._knows_subspace(rule, param) and rule.chooses(bucket.state([i]), step)
            self._plans[param, bucket.prefix] = (step, chose)
        parts, place = super()._pack(param), self._cut[param]
        if place.owner is not None:
            return [Part(p.kind, p.value, p.place, self._at(place.owner, p.value.numel())) for p in parts]
        if place.way == "piece":
            return [Part(p.kind, p.value, p.place, self._rows_of(param, p) or place.spans) for p in parts]
        return parts

    def _rows_of(self, param: Tensor, part: Part) -> list[Span] | None:
        """Which of the touched rows are of each rank's piece; None where the gradient travels whole."""
        if part.place != ROWS:
            return None
        columns = param.shape[1]
        ends = torch.tensor([stop // columns for _, stop in self._cut[param].spans if stop])
        found = torch.searchsorted(self._touched[param].cpu(), ends).tolist()
        found += found[-1:] * (self._carrier.ranks - len(found))  # of ranks that have no piece
        return [(a * columns, b * columns) for a, b in pairwise([0, *found])]

    def _unpack(self, param: torch.nn.Parameter, parts: list[Part]) -> None:
        if not self._owning:
            super()._unpack(param, parts)
            return
        self._present.add(param)
        place = self._cut[param]
        if place.way == "piece":
            piece = param.detach().view(-1)[slice(*place.spans[self._carrier.rank])]
            grad = parts[0].value.to(param.dtype)
            if parts[0].place == ROWS:
                grad = self._untouched_rows(param, grad.view(-1, param.shape[1]))
            self._brought[param] = (grad, piece)
        elif self._mine(param):
            super()._unpack(param, parts)

    def _untouched_rows(self, param: Tensor, some: Tensor) -> Tensor:
        """This rank's piece of a gradient of which `some` rows are known, and the others zeros."""
        start, stop = (end // param.shape[1] for end in self._cut[param].spans[self._carrier.rank])
        rows = self._touched.pop(param)
        grad = some.new_zeros(stop - start, param.shape[1])
        grad[rows[(rows >= start) & (rows < stop)] - start] = some
        return grad.view(-1)

    def _all_homes(self, param: Tensor) -> list[tuple[MatrixRule, dict[str, Any], Bucket, int]]:
        found = []
        for group, bucket, i in self._homes.get(param, []):
            rule, _ = self.rules(group, bucket.section, bucket.rank)
            assert rule is not None  # buckets are made for groups with a matrix rule only
            found.append((rule, group, bucket, i))
        return found

    # --- updates ------------------------------------------------------------------------------------------------------

    def _in_chunks(self, only: Any, probe: Probe | None) -> None:
        super()._in_chunks(only, probe)
        if self._owning:
            self._tell_all()
            self._brought.clear()

    def _held_back(self, bucket: Bucket, active: Sequence[int], rule: MatrixRule, update: Update, state: State) -> bool:
        """Keeps an update for `_tell_all`, where all ranks are to make it in the same way; False where it is none."""
        if not self._owning or self._cut[bucket.params[active[0]]].way != "told":
            return False
        assert isinstance(rule, Tells)
        for key, values in rule.tell(update, state).items():
            for a, value in zip(active, values.split(bucket.view.blocks), strict=True):
                self._told.setdefault((bucket.params[a], bucket.prefix), {})[key] = value
        return True

    def _tell_all(self) -> None:
        """Exchanges what the ranks' updates are made of, and makes them, one matrix after the other on every rank."""
        parcels: list[Parcel] = []
        stepped = [param for _, param, *_ in self._members() if param in self._present]
        for param in stepped:
            parcels += self._parcels(param)
        whole = iter(self._carrier.spread(parcels))
        for param in stepped:
            place = self._cut[param]
            if place.way in ("piece", "whole"):
                value = next(whole)
                if place.way == "piece" or not self._mine(param):
                    param.copy_(value.view(place.shape))
            for rule, group, bucket, i in self._all_homes(param):
                step, chose = self._plans[param, bucket.prefix]
                forms = self._forms(rule, bucket, step) if place.way == "told" else {}
                told = {key: next(whole).view(shape).to(dtype) for key, (shape, dtype) in forms.items()}
                new = {key: next(whole) for key in self._chosen(rule, bucket, chose)}
                if not self._mine(param):
                    for key, value in new.items():
                        own = bucket.stacked[key][bucket.rows([i])]
                        own.copy_(value.view(own.shape))
                    bucket.advance([i])
                if told:
                    self._make(param, rule, group, bucket, i, told)
        self._present.clear()
        self._told.clear()
        self._plans.clear()

    def _forms(self, rule: MatrixRule, bucket: Bucket, step: Step) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        assert isinstance(rule, Tells)
        forms = rule.told((bucket.view.blocks, *bucket.view.shape), step)
        assert forms is not None
        return forms

    def _chosen(self, rule: MatrixRule, bucket: Bucket, chose: bool) -> tuple[str, ...]:
        return rule.shared((bucket.view.blocks, *bucket.view.shape)) if chose and isinstance(rule, Tells) else ()

    def _parcels(self, param: Tensor) -> list[Parcel]:
        place, mine = self._cut[param], self._mine(param)
        if place.way == "all":
            return []
        if place.way == "piece":
            return [Parcel(0, place.spans, place.dtype, "weights", piece=self._brought[param][1])]
        assert place.owner is not None
        found = []
        if place.way == "whole":
            value = param.detach().reshape(-1) if mine else param.new_empty(0)
            found.append(Parcel(place.owner, place.spans, place.dtype, "weights", piece=value))
        for rule, _, bucket, i in self._all_homes(param):
            step, chose = self._plans[param, bucket.prefix]
            forms = self._forms(rule, bucket, step) if place.way == "told" else {}
            for key, (shape, dtype) in forms.items():
                floating = dtype.is_floating_point and self._told_dtype is not None
                sent = self._told_dtype if floating and self._told_dtype is not None else dtype
                none = torch.empty(0, dtype=sent, device=param.device)
                value = self._told[param, bucket.prefix][key].reshape(-1) if mine else none
                found.append(Parcel(place.owner, self._at(place.owner, math.prod(shape)), sent, "updates", piece=value))
            for key in self._chosen(rule, bucket, chose):
                own = bucket.stacked[key][bucket.rows([i])]
                value = own.to(param.device).reshape(-1) if mine else own.new_empty(0, device=param.device)
                spans = self._at(place.owner, own.numel())
                found.append(Parcel(place.owner, spans, own.dtype, "bases", piece=value))
        return found

    def _make(
        self, param: Tensor, rule: MatrixRule, group: dict[str, Any], bucket: Bucket, i: int, told: State
    ) -> None:
        assert isinstance(rule, Tells)
        keep, factor = self._factors(group, [param], rule)
        with fast_products(param.device):
            update = rule.hear(told, bucket.state([i]), bucket.view.shape[1])
            local.give_back([param], bucket.view, update, keep=keep, step=factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for left in (self._present, self._plans, self._told, self._brought):
            left.clear()

    # --- norms, state -------------------------------------------------------------------------------------------------

    def _lying_here(self) -> list[Tensor]:
        found = super()._lying_here()
        return [*found, *(grad for grad, _ in self._brought.values())] if self._owning else found

    def _gradients(self) -> list[Tensor]:
        if not self._owning:
            return super()._gradients()
        return [*super()._gradients(), *(grad for grad, _ in self._brought.values())]

    def _once(self) -> list[Tensor]:
        if not self._owning:
            return super()._once()
        if self._carrier.rank == 0:
            return self._gradients()
        several = {p for p, place in self._cut.items() if place.way == "all"}
        grads = [p.grad for p in self._cut if p.grad is not None and p not in several]
        return [*grads, *(grad for grad, _ in self._brought.values())]

    def _alike(self) -> dict[str, Tensor]:
        if not self._owning:
            return super()._alike()
        held: dict[str, Tensor] = {}
        for name, param, group, rank in self._members():
            held[name] = param
            if self._cut[param].way == "all":
                held |= {f"{key} of {name}": value for key, value in self.state[param].items() if value.numel()}
            else:
                for key in self._kept_by_all(param, group, rank):
                    held[f"{key} of {name}"] = self.state[param][key]
        return held


def own(model: torch.nn.Module, optimizer: Owned, group: Group | None = None, **options: Any) -> None:
    """`replicate` with the optimizer's state, and the work of its step, shared out among the ranks of `group`.

        optimizer = build(model, config)
        own(model, optimizer)

    The options are those of `MatrixOptimizer.own`.

    Raises:
        ValueError: for a model inside of DistributedDataParallel, and as `MatrixOptimizer.own`.
    """
    refuse_wrapped(model)
    optimizer.own(group, **options)
    owned = {param for each in optimizer.param_groups for param in each["params"]}
    equalise(model, group, but=owned, wire=optimizer.wire)
