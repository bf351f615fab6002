"""Weights that lie in pieces on several ranks: each matrix is stepped whole by one of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.allocation import Allocation
from thinrank.optim.axis import Axis
from thinrank.optim.bucket import Bucket
from thinrank.optim.exchange import local
from thinrank.optim.exchange.dtensors import DTensorShards, is_sharded
from thinrank.optim.exchange.replicas import (
    BUCKET_BYTES,
    Group,
    Letter,
    Part,
    Wire,
    anywhere,
    broadcast,
    difference,
    from_first,
    gathered,
    summed,
)
from thinrank.optim.exchange.shards import Carrier, Parcel, Shards, Span, length, owners
from thinrank.optim.inner.half import HalfWeights
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.linalg.quantise import BLOCK
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.matrix import MatrixView
from thinrank.optim.methods.config import choice, whole_steps
from thinrank.optim.own_ranks import OwnRanks, ranks_of
from thinrank.optim.replicated import MESSAGES
from thinrank.optim.rule import ByRows, MatrixRule, Probe, State
from thinrank.optim.update import Update

CHUNK_BYTES = 64 * 2**20
"""Whole gradients that a rank holds at a time, or one gradient where that is larger."""


@dataclass(frozen=True, slots=True)
class Place:
    """Who steps a weight that lies in pieces, and what travels for it.

    Attributes:
        spans: each rank's piece.
        shape: of the whole weight.
        owner: the rank that steps it; None where every rank steps its own piece.
        way: `piece`: element by element, nothing travels (8-bit moments: where pieces are whole blocks). `rows`: whole
            rows lie on each rank, and the method's small sums travel (`Axis`). `here`: it lies on its owner whole.
            `delta`: its gradient goes to the owner, and what is to be added comes back. `whole`: the weight itself goes
            to the owner as well, and comes back, for steps that look at it (8-bit moments in blocks of the whole,
            16-bit weights that are rounded by a master or by chance). Of replicas (`own`), `told`: what the update is
            made of travels; `all`: every rank steps it.
        dtype: of what is stepped.
    """

    spans: Sequence[Span]
    shape: tuple[int, ...]
    owner: int | None
    way: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Replicas:
    """The ranks that hold the same pieces, and how they are written to."""

    group: Group
    dtype: torch.dtype | None
    bucket_bytes: int

    def mean(self, parts: Sequence[Part], wire: Wire) -> list[Tensor]:
        """The means of `parts` over the ranks, in letters of at least `bucket_bytes`, all on their way at once."""
        letters: list[Letter] = []
        some: list[Part] = []
        for part in parts:
            some.append(part)
            if sum(p.value.numel() * p.value.element_size() for p in some) >= self.bucket_bytes:
                letters.append(Letter(some, self.group, self.dtype, wire))
                some = []
        letters.append(Letter(some, self.group, self.dtype, wire))
        for letter in letters:
            letter.turn()
        return [value for letter in letters for value in letter.open()]


class Sharded(OwnRanks):
    """What an optimizer of matrices does where a framework has cut the weights into pieces.

    Matrices are brought to owners, whole, in chunks; an owner steps its matrices as one process would, and holds their
    state; what its update adds goes back to the pieces. What is stepped element by element is stepped where it lies.
    So N ranks give what one process gives, for every method, and each rank holds about an N-th of the state.
    """

    _shards: Shards | None = None
    _replicas: _Replicas | None = None
    _met = False
    _brought: dict[Tensor, tuple[Tensor, Tensor]]
    """Of what is stepped here and now, the gradient and the weight."""

    def _forget(self) -> None:
        self._brought = {}
        self._groups: dict[Tensor, tuple[dict[str, Any], int | float | None]] = {}

    @abstractmethod
    def _step_layouts(self, probe: Probe | None) -> None: ...

    # --- where weights lie --------------------------------------------------------------------------------------------

    def shard(self, shards: Shards) -> None:
        """From now on, steps weights that lie as `shards` says; every rank must call it, before the first step.

        Nobody needs it for a model that went through `fully_shard`: its parameters say themselves that they are cut.

        Raises:
            ValueError: with `replicate`, `in_backward`, ranks that are to be shared out later, and where shapes are not
                those that the optimizer was built for.
        """
        if self._meeting is not None or self._hooks is not None:
            raise ValueError(
                "replicate and in_backward take gradients before the framework that shards weights has had its say: "
                "leave them out"
            )
        self._refuse_allocation(self._allocation)
        self._shards = shards
        self._wire = Wire()
        self._carrier = Carrier(shards.group, self._wire, self._device())
        self._decide()
        for name, param, group, rank in self._members():
            self.state[param] = self._own_state(name, param, group, rank)
        self._layouts = None

    def _shard_if_cut(self) -> None:
        """Looks whether the parameters themselves say that they are pieces."""
        named = list(self._named())
        if any(is_sharded(param) for _, param in named):
            self.shard(DTensorShards(named))

    @property
    def wire(self) -> Wire | None:
        return super().wire if self._shards is None else self._wire

    @property
    def _apart(self) -> bool:
        """True where ranks hold parts of the state."""
        return self._shards is not None

    def _like(self, param: Tensor) -> Tensor:
        """A tensor with the shape and the dtype of what is stepped of `param`: itself, or on the meta device."""
        if self._shards is not None:
            dtype = self._shards.weight(param).dtype
            return torch.empty(self._shards.shape(param), dtype=dtype, device="meta")
        return torch.empty(param.shape, dtype=param.dtype, device="meta") if is_sharded(param) else param

    def _own_state(self, name: str, param: Tensor, group: dict[str, Any], rank: int | float | None) -> State:
        """The initial state that this rank has for `param`: all of it, that of its piece, or nothing."""
        if self._shards is None:
            return self._initial_state(name, self._like(param), group, rank)
        place, own = self._cut[param], self._shards.weight(param)
        if place.way == "rows":
            whole = self._initial_state(name, own.new_empty(place.shape), group, rank)
            return {key: value.clone() for key, value in self._here(param, whole, group, rank).items()}
        if place.owner is None:
            return self._state_of_piece(name, param, group, rank, own.device)
        if place.owner != self._carrier.rank:
            return {}
        return self._initial_state(name, torch.zeros(place.shape, dtype=place.dtype, device=own.device), group, rank)

    def _device(self) -> torch.device:
        assert self._shards is not None
        return next(self._shards.weight(param).device for _, param in self._named())

    def _members(self) -> list[tuple[str, Tensor, dict[str, Any], int | float | None]]:
        """Every parameter with its name, group and rank, in order."""
        return [
            (name, param, group, rank)
            for index, group in enumerate(self.param_groups)
            for name, param, rank in zip(self.names(index), group["params"], ranks_of(group), strict=True)
        ]

    def _group_of(self, param: Tensor) -> tuple[dict[str, Any], int | float | None]:
        """The group that `param` is in, which is another one after loading, and its matrices' rank."""
        if param not in self._groups:
            self._groups = {param: (group, rank) for _, param, group, rank in self._members()}
        return self._groups[param]

    def _decide(self) -> None:
        """Who steps what, by where the pieces lie; the same on every rank."""
        assert self._shards is not None
        self._cut: dict[Tensor, Place] = {}
        owned: list[Tensor] = []
        for name, param, group, rank in self._members():
            like, spans = self._like(param), self._shards.spans(param)
            if like.numel() != sum(map(length, spans)):
                raise ValueError(f"{name} has {like.numel():,} entries, and its pieces {sum(map(length, spans)):,}")
            matrix, looks = bool(self._views(like, group, rank)), HalfWeights(group["half_weights"]).apply(like)
            if not matrix and "exp_avg" not in self.rules(group)[1].init(like):  # coded in blocks of the whole
                looks = looks or any(start % BLOCK for start, stop in spans if stop > start)
            way = "whole" if looks else "delta" if matrix else "piece"
            if way == "delta" and self._by_rows(like, spans, group, rank):
                way = "rows"
            self._cut[param] = Place(spans, tuple(like.shape), None, way, like.dtype)
            if way in ("delta", "whole"):
                owned.append(param)
        costs = [cost(self._cut[param].shape) for param in owned]
        for param, owner in zip(owned, owners([self._cut[p].spans for p in owned], costs), strict=True):
            place = self._cut[param]
            here = length(place.spans[owner]) == sum(map(length, place.spans))
            self._cut[param] = replace(place, owner=owner, way="here" if here else place.way)
        self._chunks = self._chunked(owned)

    def _by_rows(self, like: Tensor, spans: Sequence[Span], group: dict[str, Any], rank: int | float | None) -> bool:
        """True for a matrix of whose rows, the long side, several ranks have some, under a rule that is content."""
        view, *others = self._views(like, group, rank)
        rule, _ = self.rules(group, 0, rank)
        if others or view.transposed or view.blocks > 1 or not (isinstance(rule, ByRows) and rule.by_rows):
            return False
        if view.shape[0] < view.shape[1]:  # there may be fewer rows than directions
            return False
        several = sum(length(span) > 0 for span in spans) > 1
        return several and all(start % view.columns == stop % view.columns == 0 for start, stop in spans)

    def _axis(self, param: Tensor) -> Axis | None:
        """The ranks that `param` is stepped together with, where these are several."""
        if self._shards is None or self._cut[param].way != "rows":
            return None
        return Axis(rows=self._carrier.everybody, note=lambda size, ranks: self._wire.note([("sums", size)], ranks))

    def _rows_here(self, param: Tensor, view: MatrixView) -> MatrixView:
        """The view of this rank's rows of a matrix that is stepped by rows."""
        return replace(view, stop=length(self._cut[param].spans[self._carrier.rank]) // view.columns)

    def _along(
        self, param: Tensor, whole: Mapping[str, Tensor], group: dict[str, Any], rank: int | float | None
    ) -> dict[str, int]:
        """Of the state of a matrix that is stepped by rows, which dimension of each tensor is that of the rows.

        It is the one that grows with the matrix's rows; what does not is the same on all ranks.
        """
        place = self._cut[param]
        taller = torch.empty((2 * place.shape[0], *place.shape[1:]), dtype=place.dtype, device="meta")
        grown = self._initial_state("", taller, group, rank)
        found = {}
        for key, value in whole.items():
            dims = [i for i, (a, b) in enumerate(zip(value.shape, grown[key].shape, strict=True)) if a != b]
            if dims:
                found[key] = dims[0]
        return found

    def _here(self, param: Tensor, whole: State, group: dict[str, Any], rank: int | float | None) -> State:
        """This rank's part of a whole state."""
        place = self._cut[param]
        span = place.spans[self._carrier.rank]
        if place.way == "piece":
            return {
                key: value if key == "step" else value.reshape(-1)[slice(*_blocks(key, span))]
                for key, value in whole.items()
            }
        if place.way != "rows":
            return whole
        along = self._along(param, whole, group, rank)
        columns = math.prod(place.shape[1:])
        return {
            key: value.narrow(along[key], span[0] // columns, length(span) // columns) if key in along else value
            for key, value in whole.items()
        }

    def _state_of_piece(
        self, name: str, param: Tensor, group: dict[str, Any], rank: int | float | None, device: torch.device
    ) -> State:
        """What `_here` would leave of the initial state of a weight that is stepped element by element: zeros."""
        place = self._cut[param]
        like = torch.empty(place.shape, dtype=place.dtype, device="meta")
        part = self._here(param, self._initial_state(name, like, group, rank), group, rank)
        return {
            key: torch.zeros(value.shape, dtype=value.dtype, device="cpu" if key == "step" else device)
            for key, value in part.items()
        }

    def _chunked(self, owned: Iterable[Tensor]) -> list[list[Tensor]]:
        """What is brought together: weights of all owners alike, so that they have something to do at the same time."""
        queues: list[list[Tensor]] = [[] for _ in range(self._carrier.ranks)]
        for param in owned:
            owner = self._cut[param].owner
            assert owner is not None
            queues[owner].append(param)
        chunks: list[list[Tensor]] = [[p for p, place in self._cut.items() if place.owner is None]]
        held = [0] * len(queues)
        for place in range(max(map(len, queues))):
            for owner, queue in enumerate(queues):
                if place < len(queue):
                    size = 4 * math.prod(self._cut[queue[place]].shape)
                    if held[owner] and held[owner] + size > CHUNK_BYTES:
                        chunks.append([])
                        held = [0] * len(queues)
                    chunks[-1].append(queue[place])
                    held[owner] += size
        return chunks

    def _mine(self, param: Tensor) -> bool:
        """True when this rank steps `param`, or its piece of it."""
        return self._shards is None or self._cut[param].owner in (None, self._carrier.rank)

    def _has_place(self, param: Tensor) -> bool:
        """True when `param` has a place in what this rank steps."""
        return self._mine(param)

    def _held_back(self, bucket: Bucket, active: Sequence[int], rule: MatrixRule, update: Update, state: State) -> bool:
        """True when somebody else sees to it that an update reaches the weights."""
        return False

    # --- a step -------------------------------------------------------------------------------------------------------

    def step_of(self, params: Iterable[Tensor], *, last: bool = True) -> None:
        """One step of some of the parameters, for a framework that asks for one group after the other.

        Args:
            last: no others will follow in this step; what `measure` asks for is then complete.
        """
        assert self._shards is not None
        self._run(set(params), last=last)

    @abstractmethod
    def _run(self, only: Collection[Tensor] | None = None, *, last: bool = True) -> None: ...

    def _gradient(self, param: Tensor) -> Tensor | None:
        if param in self._brought:
            return self._brought[param][0]
        return super()._gradient(param) if self._shards is None else None

    def _take_image(self, param: Tensor) -> None:
        if self._shards is None or param not in self._images:  # of a piece, replicas have left an image of the whole
            super()._take_image(param)

    def _let_go(self, param: Tensor) -> None:
        if self._shards is None:
            super()._let_go(param)

    def _weight(self, param: Tensor) -> Tensor:
        """What a step of `param` changes."""
        return self._brought[param][1] if param in self._brought else param

    def _in_chunks(self, only: Collection[Tensor] | None, probe: Probe | None) -> None:
        """Steps everything that has a gradient, or `only` what is in there."""
        if self._shards is None:
            self._step_layouts(probe)
            return
        for chunk in self._chunks:
            params = [p for p in chunk if (only is None or p in only) and self._shards.gradient(p) is not None]
            self._bring(params)
            self._step_layouts(probe)
            self._give(params)
            self._brought.clear()

    def _bring(self, params: Sequence[Tensor]) -> None:
        assert self._shards is not None
        parcels: list[Parcel] = []
        for param in params:
            place, weight, grad = self._cut[param], self._shards.weight(param), self._shards.gradient(param)
            assert grad is not None
            if place.way == "rows":
                columns = math.prod(place.shape[1:])
                self._brought[param] = (grad.view(-1, columns), weight.view(-1, columns))
            elif place.owner is None:
                self._brought[param] = (grad, weight)
            elif place.way == "here" and self._mine(param):
                self._brought[param] = (grad.view(place.shape), weight.view(place.shape))
            elif place.way != "here":
                parcels.append(Parcel(place.owner, place.spans, grad.dtype, "gradients", piece=grad))
                if place.way == "whole":
                    parcels.append(Parcel(place.owner, place.spans, place.dtype, "weights", piece=weight))
        whole = iter(self._carrier.bring(parcels))
        for param in params:
            place = self._cut[param]
            if place.owner is None or place.way == "here":
                continue
            grad = next(whole)
            weight = next(whole) if place.way == "whole" else None
            if grad is not None:
                if weight is None:  # a step from nothing: what it leaves is what is to be added
                    weight = torch.zeros(place.shape, dtype=torch.float32, device=grad.device)
                self._brought[param] = (grad.view(place.shape), weight.view(place.shape))

    def _give(self, params: Sequence[Tensor]) -> None:
        assert self._shards is not None
        away = [p for p in params if self._cut[p].way in ("delta", "whole")]
        parcels = []
        for param in away:
            place = self._cut[param]
            assert place.owner is not None
            whole = self._brought[param][1].view(-1) if self._mine(param) else None
            kind = "updates" if place.way == "delta" else "weights"
            parcels.append(Parcel(place.owner, place.spans, place.dtype, kind, whole=whole))
        for param, piece in zip(away, self._carrier.give(parcels), strict=True):
            place, weight = self._cut[param], self._shards.weight(param)
            if place.way == "whole":
                weight.copy_(piece)
                continue
            group, rank = self._group_of(param)
            rule, _ = self.rules(group, 0, rank)
            assert rule is not None  # what is stepped element by element is no delta
            keep, _ = rule.decay.factors(float(group["lr"]), float(group["weight_decay"]))
            if keep != 1.0:
                weight.mul_(keep)
            weight.add_(piece)

    def _agreed(self, here: bool) -> bool:
        """True where it is true on any rank that holds pieces; a message, so every rank must ask."""
        return here if self._shards is None else anywhere(here, self._carrier.device, self._carrier.group)

    def _together(self, probe: Probe) -> Probe:
        """What all ranks have measured."""
        if not self._apart:
            return probe
        found = gathered(probe, self._carrier.group)
        for other in found[1:]:
            found[0].join(other)
        return found[0]

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        if not self._apart:
            return super().gradient_norm()
        self._meet()
        norm = torch.nn.utils.get_total_norm([*self._once(), *self._visible()])
        return summed(norm.to(self._carrier.device).square(), self._carrier.group).sqrt()

    def _once(self) -> list[Tensor]:
        """Gradients that lie here and that no other rank counts in the norm of all."""
        if self._shards is None or not self._images:
            return self._gradients()
        grads = [self._shards.gradient(param) for _, param in self._named() if param not in self._images]
        return [grad for grad in grads if grad is not None]

    def _gradients(self) -> list[Tensor]:
        if self._shards is None:
            return super()._gradients()
        grads = [self._shards.gradient(param) for _, param in self._named()]
        return [grad for grad in grads if grad is not None]

    # --- replicas of what is sharded ----------------------------------------------------------------------------------

    def replicate(
        self,
        group: Group | None = None,
        *,
        messages: str = "auto",
        dtype: torch.dtype | None = None,
        check_every: int | None = 100,
        bucket_bytes: int = BUCKET_BYTES,
        **others: Any,
    ) -> None:
        """As `Replicated.replicate`. Of a model that went through `fully_shard`, `group` are the ranks that hold the
        same pieces and other data: one of each of several groups of ranks over which the model is sharded.

        What travels between those is what a step needs of the gradients' pieces: coordinates of matrices that are
        stepped by rows, gradients of everything else. It leaves when gradients are asked for, after backward.
        """
        if self._shards is None:
            super().replicate(
                group,
                messages=messages,
                dtype=dtype,
                check_every=check_every,
                bucket_bytes=bucket_bytes,
                **others,
            )
            return
        if others or not isinstance(self._shards, DTensorShards) or group is None:
            raise ValueError(
                "replicas of a model that went through fully_shard need the group of ranks that hold the same pieces, "
                "and no more than messages, dtype, check_every and bucket_bytes: give mesh['replicate'].get_group(), "
                "where it is sharded over mesh['shard']"
            )
        choice("messages", messages, MESSAGES)
        if check_every is not None:
            whole_steps("check_every", check_every)
        self._whole_messages = messages == "full"
        self._check_every, self._steps = check_every, 0
        self._replicas = _Replicas(group, dtype, bucket_bytes)
        broadcast((self._shards.weight(param) for _, param in self._named()), group)

    @torch.no_grad()
    def _meet(self) -> None:
        if self._shards is None or self._replicas is None:
            super()._meet()
            return
        if self._met:
            return
        self._met = True
        parts: list[Part] = []
        takers: list[tuple[Tensor, list[Part]]] = []
        for _, param in self._named():
            grad = self._shards.gradient(param)
            if grad is not None:
                takers.append((param, self._parts_of(param, grad)))
                parts += takers[-1][1]
        means = iter(self._replicas.mean(parts, self._wire))
        for param, own in takers:
            for part in own:
                if part.place:
                    self._images.add(param, part.place[0], {part.place[1]: next(means)})
                else:
                    part.value.copy_(next(means))

    def _parts_of(self, param: Tensor, grad: Tensor) -> list[Part]:
        """What replicas are sent of a piece of a gradient: its rows' coordinates where these are enough."""
        if self._cut[param].way != "rows":
            return [Part("dense" if self._cut[param].way == "piece" else "gradients", grad)]
        ((group, bucket, i),) = self._homes[param]
        rule, _ = self.rules(group, bucket.section, bucket.rank)
        step, state = bucket.step([i], group, self.axis, None), bucket.state([i])
        if not isinstance(rule, LowRank) or not self._sends_coordinates(rule):
            return [Part("gradients", grad)]
        if rule.chooses(state, step):
            return [Part("renewals", grad)]
        with fast_products(grad.device):
            image = rule.image(local.bring([grad.view(bucket.view.stored)], bucket.view), state, step, first=False)
        return [Part("coordinates", value, (bucket.prefix, key)) for key, value in image.items()]

    def _stepped(self) -> None:
        if self._shards is None or self._replicas is None:
            super()._stepped()
            return
        self._met = False
        self._steps += 1
        if self._check_every is not None and self._steps % self._check_every == 0:
            self.check_replicas()

    def check_replicas(self) -> None:
        """As `Replicated.check_replicas`; of what is sharded, the pieces and the state that lie here."""
        if self._shards is None or self._replicas is None:
            super().check_replicas()
            return
        held: dict[str, Tensor] = {}
        for name, param in self._named():
            held[name] = self._shards.weight(param)
            held |= {f"{key} of {name}": value for key, value in self.state[param].items()}
        self._refuse_drift(difference({k: v for k, v in held.items() if v.numel()}, self._replicas.group))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._met = False

    # --- what does not go together ------------------------------------------------------------------------------------

    def in_backward(self, mode: str, *, max_norm: float | None = None) -> None:
        if mode != "off" and self._shards is not None:
            raise ValueError(
                f"mode {mode!r} takes gradients before the framework that shards weights has averaged them: leave it "
                "'off'"
            )
        super().in_backward(mode, max_norm=max_norm)

    def allocate_ranks(self, spectra: str, *, every: int | None = None) -> None:
        if self._apart and spectra != "uniform":
            self._refuse_allocation(Allocation(spectra, every), now=True)
        super().allocate_ranks(spectra, every=every)

    def _refuse_allocation(self, allocation: Allocation | None, *, now: bool = False) -> None:
        if allocation is not None and (now or allocation.spectra == "gradient" or allocation.every is not None):
            raise ValueError(
                "ranks are shared out by what one rank alone does not hold here: share them out by weights before "
                "the model is sharded (allocated_ranks), once, and give the result as ranks"
            )

    # --- state --------------------------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of all state tensors as they are; of sharded weights, those that this rank holds."""
        return sum(v.numel() * v.element_size() for state in self.state.values() for v in state.values())

    def full_state_dict(self) -> dict[str, Any]:
        """What `state_dict` of one process would be, on the CPU of the group's first rank; {} on the others.

        Every rank must call it. `load_state_dict` takes it on any number of ranks, sharded in any way, or not at all.
        """
        if not self._apart:
            return super().state_dict()
        carrier = Carrier(self._carrier.group, Wire(), self._carrier.device)
        held = dict(self.state)
        whole: dict[Tensor, State] = {}
        for name, param, group, rank in self._members():
            place, device = self._cut[param], carrier.device
            parcels = []
            names = self._initial_state(name, self._like(param).to("meta"), group, rank)
            along = self._along(param, names, group, rank) if place.way == "rows" else {}
            for key, like in names.items():
                spans = self._held_where(place, key, like, along)
                piece = torch.empty(0, dtype=like.dtype, device=device)
                if length(spans[carrier.rank]):
                    piece = _turned(self.state[param][key], along.get(key, 0)).reshape(-1).to(device)
                parcels.append(Parcel(0, spans, like.dtype, "state", piece=piece))
            found = carrier.bring(parcels)
            for (key, like), own in zip(names.items(), found, strict=True):
                if own is not None:
                    rows_first = own.to("cpu", copy=True).view(_turned(like, along.get(key, 0)).shape)
                    whole.setdefault(param, {})[key] = _turned(rows_first, along.get(key, 0), back=True).contiguous()
        if carrier.rank != 0:
            return {}
        try:
            self.state.update(whole)
            return super().state_dict()
        finally:
            self.state.update(held)

    @staticmethod
    def _held_where(place: Place, key: str, like: Tensor, along: Mapping[str, int]) -> Sequence[Span]:
        """Which entries of a tensor of state each rank has, its rows first."""
        if key in along:
            rows, columns = like.shape[along[key]], math.prod(place.shape[1:])
            each = like.numel() // max(rows, 1)
            return [(start // columns * each, stop // columns * each) for start, stop in place.spans]
        if place.way == "piece" and key != "step":
            return [_blocks(key, span) for span in place.spans]
        owner = place.owner or 0  # or it is the same everywhere
        return [(0, like.numel()) if rank == owner else (0, 0) for rank in range(len(place.spans))]

    def state_dict(self) -> dict[str, Any]:
        """As in torch. Of sharded weights, what one process would have, on every rank; every rank must call it then,
        and `full_state_dict` takes less memory."""
        if not self._apart:
            return super().state_dict()
        return from_first(self.full_state_dict(), self._carrier.group)

    def _load(
        self, param: Tensor, state: Mapping[str, Any], own: State, group: dict[str, Any], rank: int | float | None
    ) -> None:
        """Copies of a whole `state` what this rank keeps into `own`."""
        whole = {key: v if isinstance(v, Tensor) else torch.as_tensor(v) for key, v in state.items()}
        for key, value in (self._here(param, whole, group, rank) if self._apart else whole).items():
            if key in own:
                own[key].copy_(value)


def _blocks(key: str, span: Span) -> Span:
    """Which entries of a tensor of state belong to those of the weight: one each, or one scale for a block of codes."""
    return (span[0] // BLOCK, -(-span[1] // BLOCK)) if key.endswith("_scale") else span


def _turned(value: Tensor, dim: int, *, back: bool = False) -> Tensor:
    """`value` with the dimension `dim` first, or one that lies so as it was."""
    if value.ndim == 0:
        return value
    return value.movedim(0, dim) if back else value.movedim(dim, 0)


def cost(shape: tuple[int, ...]) -> float:
    """Of a step of a whole weight, in the order of its products."""
    rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
    return float(rows) * columns * min(rows, columns)
