"""Weights that lie in pieces on several ranks: each matrix is stepped whole by one of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.allocation import Allocation
from thinrank.optim.axis import Axis
from thinrank.optim.bucket import Bucket
from thinrank.optim.exchange.dtensors import DTensorShards, here, is_sharded
from thinrank.optim.exchange.replicas import anywhere, from_first, gathered, norm_of_all
from thinrank.optim.exchange.shards import Carrier, Move, Parcel, Shards, Span, length
from thinrank.optim.exchange.wire import Count, Wire
from thinrank.optim.inner.half import HalfWeights
from thinrank.optim.matrix import MatrixView
from thinrank.optim.own_ranks import OwnRanks, ranks_of
from thinrank.optim.places import Place, Stepped, blocks, chunks, held_where, of_pieces
from thinrank.optim.rule import ByRows, MatrixRule, Probe, State, Step, Tells
from thinrank.optim.update import Update


class Sharded(OwnRanks):
    """What an optimizer of matrices does where a framework has cut the weights into pieces.

    Matrices are brought to owners, whole, in chunks; an owner steps its matrices as one process would, and holds their
    state; what its update adds goes back to the pieces. What is stepped element by element is stepped where it lies.
    So N ranks give what one process gives, for every method, and each rank holds about an N-th of the state.
    """

    _shards: Shards | None = None
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
            ValueError: with `replicate`, `in_backward`, ranks that are to be shared out later, when steps have been
                taken, and where shapes are not those that the optimizer was built for.
        """
        if self._meeting is not None or self._hooks is not None:
            raise ValueError(
                "replicate and in_backward take gradients before the framework that shards weights has had its say: "
                "leave them out"
            )
        self._refuse_allocation(self._allocation)
        self._refuse_stepped()
        self._shards = shards
        self._wire = shards.wire
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
    def shards(self) -> Shards | None:
        """Where weights lie that a framework has cut into pieces."""
        return self._shards

    @property
    def wire(self) -> Wire | None:
        return super().wire if self._shards is None else self._wire

    @property
    def _rare(self) -> Count:
        """What is sent beside steps."""
        assert self.wire is not None  # where there are pieces, or owners
        return self.wire.rare

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
        members, weights, spans = self._members(), [], []
        for name, param, group, rank in members:
            weights.append(self._stepped_by(param, group, rank))
            spans.append(self._shards.spans(param))
            there = sum(map(length, spans[-1]))
            if weights[-1].size != there:
                raise ValueError(f"{name} has {weights[-1].size:,} entries, and its pieces {there:,}")
        places = of_pieces(weights, spans)
        params = [param for _, param, *_ in members]
        self._cut: dict[Tensor, Place] = dict(zip(params, places, strict=True))
        self._chunks = [[params[i] for i in chunk] for chunk in chunks(places, self._carrier.ranks)]

    def _stepped_by(self, param: Tensor, group: dict[str, Any], rank: int | float | None) -> Stepped:
        """What of `param` and of its rule decides who steps it."""
        like = self._like(param)
        views, shape = self._views(like, group, rank), tuple(like.shape)
        coded = not views and "exp_avg" not in self.rules(group)[1].init(like.to("meta"))
        rules = [(view, self.rules(group, i, rank)[0]) for i, view in enumerate(views)]
        first = Step(count=[0])
        return Stepped(
            shape=shape,
            dtype=like.dtype,
            matrix=bool(views),
            looks=HalfWeights(group["half_weights"]).apply(like),
            coded=coded,  # in blocks of the whole
            columns=_columns(views[0], rules[0][1]) if len(views) == 1 else 0,
            tells=bool(rules)
            and all(
                isinstance(rule, Tells) and rule.told((view.blocks, *view.shape), first) is not None
                for view, rule in rules
            ),
            flat=param.is_contiguous(),
        )

    def _axis(self, param: Tensor) -> Axis | None:
        """The ranks that `param` is stepped together with, where these are several."""
        if self._shards is None or self._cut[param].way != "rows":
            return None
        return Axis(rows=self._carrier.everybody, note=lambda size, ranks: self._wire.note([("sums", size)], ranks))

    def _cut_at(self, param: Tensor) -> tuple[Span, ...]:
        """Every rank's piece of a matrix that is stepped by rows, with others that are cut alike; () of all others.

        Under ZeRO-1 and ZeRO-2 equal matrices are cut at different rows.
        """
        return () if self._axis(param) is None else tuple(self._cut[param].steps)

    def _rows_here(self, param: Tensor, view: MatrixView) -> MatrixView:
        """The view of this rank's rows of a matrix that is stepped by rows."""
        return replace(view, stop=length(self._cut[param].steps[self._carrier.rank]) // view.columns)

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
        span = place.steps[self._carrier.rank]
        if place.way == "piece":
            return {
                key: value if key == "step" else value.reshape(-1)[slice(*blocks(key, span))]
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
            params = [p for p in chunk if (only is None or p in only) and self._is_given(p)]
            self._bring(params)
            self._step_layouts(probe)
            self._give(params)
            self._brought.clear()

    def _is_given(self, param: Tensor) -> bool:
        """True where there is something to step `param` by."""
        assert self._shards is not None
        return self._shards.gradient(param) is not None

    def _shaped(self, param: Tensor, flat: Tensor) -> Tensor:
        """What lies here of a matrix that is stepped by rows, or lies here whole, as a matrix."""
        place = self._cut[param]
        return flat.view(-1, math.prod(place.shape[1:])) if place.way == "rows" else flat.view(place.shape)

    def _bring(self, params: Sequence[Tensor]) -> None:
        assert self._shards is not None
        parcels: list[Parcel] = []
        moves: list[Move] = []
        for param in params:
            place, weight, grad = self._cut[param], self._shards.weight(param), self._shards.gradient(param)
            assert grad is not None
            if place.rows is not None:
                moves.append(Move(grad, place.spans, place.rows, "gradients"))
            elif place.way == "rows" or (place.way == "here" and self._mine(param)):
                self._brought[param] = (self._shaped(param, grad), self._shaped(param, weight))
            elif place.owner is None:
                self._brought[param] = (grad, weight)
            elif place.way != "here":
                parcels.append(Parcel(place.owner, place.spans, grad.dtype, "gradients", piece=grad))
                if place.way == "whole":
                    parcels.append(Parcel(place.owner, place.spans, place.dtype, "weights", piece=weight))
        whole, rows = iter(self._carrier.bring(parcels)), iter(self._carrier.move(moves))
        for param in params:
            place = self._cut[param]
            if place.way not in ("delta", "whole") and place.rows is None:
                continue
            grad = next(whole) if place.rows is None else next(rows)
            weight = next(whole) if place.way == "whole" else None
            if grad is not None:
                shape = place.shape if place.rows is None else (-1, math.prod(place.shape[1:]))
                if weight is None:  # a step from nothing: what it leaves is what is to be added
                    weight = torch.zeros_like(grad, dtype=torch.float32)
                self._brought[param] = (grad.view(shape), weight.view(shape))

    def _give(self, params: Sequence[Tensor]) -> None:
        assert self._shards is not None
        away = [p for p in params if self._cut[p].way in ("delta", "whole") or self._cut[p].rows is not None]
        parcels: list[Parcel] = []
        moves: list[Move] = []
        for param in away:
            place = self._cut[param]
            if place.rows is not None:
                own = self._brought[param][1].view(-1).to(place.dtype)
                moves.append(Move(own, place.rows, place.spans, "updates"))
                continue
            assert place.owner is not None
            whole = self._brought[param][1].view(-1) if self._mine(param) else None
            kind = "updates" if place.way == "delta" else "weights"
            parcels.append(Parcel(place.owner, place.spans, place.dtype, kind, whole=whole))
        given, rows = iter(self._carrier.give(parcels)), iter(self._carrier.move(moves))
        for param in away:
            place, weight = self._cut[param], self._shards.weight(param)
            piece = next(given) if place.rows is None else next(rows)
            if place.way == "whole":
                weight.copy_(piece)
                continue
            group, rank = self._group_of(param)
            rule, _ = self.rules(group, 0, rank)
            assert rule is not None  # what is stepped element by element is no delta
            keep, _ = rule.decay.factors(*self._rates(group, param))
            if keep != 1.0:
                weight.mul_(keep)
            weight.add_(piece)

    def _agreed(self, here: bool) -> bool:
        """True where it is true on any rank that holds pieces; a message, so every rank must ask."""
        return here if self._shards is None else anywhere(here, self._carrier.device, self._rare, self._carrier.group)

    def _together(self, probe: Probe) -> Probe:
        """What all ranks have measured."""
        if not self._apart:
            return probe
        found = gathered(probe, "measured", self._carrier.device, self._rare, self._carrier.group)
        for other in found[1:]:
            found[0].join(other)
        return found[0]

    def _norm_left(self) -> Tensor:
        if not self._apart:
            return super()._norm_left()
        self._meet()
        norm = torch.nn.utils.get_total_norm([*self._once(), *self._visible()])
        return norm_of_all(norm.to(self._carrier.device), self._carrier.wire, self._carrier.group)

    def _lying_here(self) -> list[Tensor]:
        return [here(grad) for grad in super()._lying_here()]

    def _gradients(self) -> list[Tensor]:
        if self._shards is None:
            return super()._gradients()
        grads = [self._shards.gradient(param) for _, param in self._named()]
        return [grad for grad in grads if grad is not None]

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

    def _refuse_stepped(self) -> None:
        for name, param, *_ in self._members():
            count = self.state[param].get("step")  # none of what another rank steps already
            if count is None or (not count.is_meta and float(count) > 0.0):
                raise ValueError(
                    f"{name} has been stepped already, and its state would be lost: share state out before the first "
                    "step, or load full_state_dict() into a new optimizer"
                )

    def _refuse_allocation(self, allocation: Allocation | None, *, now: bool = False) -> None:
        if allocation is not None and (now or allocation.spectra == "gradient" or allocation.every is not None):
            raise ValueError(
                "ranks are shared out by what one rank alone does not hold here: share them out by weights before "
                "the model is sharded (allocated_ranks), once, and give the result as ranks"
            )

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def state_ranks(self) -> int:
        """On how many ranks the state lies in parts; 1 where every rank has all of it."""
        return self._carrier.ranks if self._apart else 1

    def state_bytes(self) -> int:
        """Bytes of all state tensors as they are; of sharded weights, those that this rank holds."""
        return sum(v.numel() * v.element_size() for state in self.state.values() for v in state.values())

    def full_state_dict(self) -> dict[str, Any]:
        """What `state_dict` of one process would be, on the CPU of the group's first rank; {} on the others.

        Every rank must call it. `load_state_dict` takes it on any number of ranks, sharded in any way, or not at all.
        """
        if not self._apart:
            return super().state_dict()
        carrier = Carrier(self._carrier.group, self._rare, self._carrier.device)
        held = dict(self.state)
        whole: dict[Tensor, State] = {}
        for name, param, group, rank in self._members():
            place, device = self._cut[param], carrier.device
            parcels = []
            names = self._initial_state(name, self._like(param).to("meta"), group, rank)
            along = self._along(param, names, group, rank) if place.way == "rows" else {}
            for key, like in names.items():
                spans = held_where(place, key, like, along)
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

    def state_dict(self) -> dict[str, Any]:
        """As in torch. Of sharded weights, what one process would have, on every rank; every rank must call it then,
        and `full_state_dict` takes less memory."""
        if not self._apart:
            return super().state_dict()
        return from_first(self.full_state_dict(), "state", self._carrier.device, self._rare, self._carrier.group)

    def _load(
        self, param: Tensor, state: Mapping[str, Any], own: State, group: dict[str, Any], rank: int | float | None
    ) -> None:
        """Copies of a whole `state` what this rank keeps into `own`."""
        whole = {key: v if isinstance(v, Tensor) else torch.as_tensor(v) for key, v in state.items()}
        for key, value in (self._here(param, whole, group, rank) if self._apart else whole).items():
            if key in own:
                own[key].copy_(value)


def _turned(value: Tensor, dim: int, *, back: bool = False) -> Tensor:
    """`value` with the dimension `dim` first, or one that lies so as it was."""
    if value.ndim == 0:
        return value
    return value.movedim(0, dim) if back else value.movedim(dim, 0)


def _columns(view: MatrixView, rule: MatrixRule | None) -> int:
    """The columns of a matrix whose rows, the long side, may lie on several ranks, under a rule that is content."""
    if view.transposed or view.blocks > 1 or not (isinstance(rule, ByRows) and rule.by_rows):
        return 0
    return 0 if view.shape[0] < view.shape[1] else view.columns  # there may be fewer rows than directions
