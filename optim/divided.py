"""Who holds what of an optimizer's state on many ranks, and what they tell each other, without any of them.

The optimizer lies on the meta device and is asked what it would do as each of the ranks: its own decisions
(`thinrank.optim.places`), its own states, its own messages. No process group is needed and nothing is allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.exchange.replicas import Group
from thinrank.optim.exchange.shards import SPREAD_BYTES, Carrier, Span, common, even, length, rows_of
from thinrank.optim.exchange.wire import Wire
from thinrank.optim.lowrank.renewals import Renewals
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.places import EVEN_FROM, Place
from thinrank.optim.rule import MatrixRule, State, Step, Tells

__all__ = ["SPREAD_BYTES", "Cuts", "Divided", "Member", "Nobody", "Span", "common", "even", "length", "rows_of"]


class Nobody(Carrier):
    """One of `ranks` ranks that are not there; may become another one of them."""

    def __init__(self, ranks: int) -> None:
        self.group, self.wire, self.device = None, Wire(), torch.device("meta")
        self.rank, self.ranks = 0, ranks


@dataclass(frozen=True)
class Cuts:
    """Pieces of weights on the meta device (`Shards`), for the rank that `carrier` is just now.

    Attributes:
        spans_of: by parameter; those that are left out are cut into rows, as FSDP2 cuts them.
        master: the dtype of what is stepped; None: the weights' own.
    """

    carrier: Nobody
    spans_of: Mapping[Tensor, Sequence[Span]]
    master: torch.dtype | None = None

    @property
    def group(self) -> Group | None:
        return None

    @property
    def wire(self) -> Wire:
        return Wire()

    @property
    def replicas(self) -> Group | None:
        return None

    def shape(self, param: Tensor) -> tuple[int, ...]:
        return tuple(param.shape)

    def spans(self, param: Tensor) -> Sequence[Span]:
        return self.spans_of.get(param) or rows_of(tuple(param.shape), self.carrier.ranks)

    def weight(self, param: Tensor) -> Tensor:
        size = length(self.spans(param)[self.carrier.rank])
        return torch.empty(size, dtype=self.master or param.dtype, device="meta")

    def gradient(self, param: Tensor) -> Tensor | None:
        return self.weight(param)


@dataclass(frozen=True)
class Member:
    """A parameter, how it is stepped, and where.

    Attributes:
        place: who steps it.
        matrices: the rule and the shape (blocks, long, short) of each matrix that it is seen as.
        sends_image: between renewals, less of its gradient than all travels.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    rank: int | float | None
    place: Place
    matrices: Sequence[tuple[MatrixRule, tuple[int, int, int]]]
    sends_image: bool

    def told(self, count: int, dtype: torch.dtype | None) -> int:
        """Bytes of what its owner tells of an update after `count` updates; floating numbers travel as `dtype`."""
        total = 0
        for rule, shape in self.matrices:
            forms = rule.told(shape, Step(count=[count])) if isinstance(rule, Tells) else None
            for form, own in (forms or {}).values():
                wide = dtype if dtype is not None and own.is_floating_point else own
                total += torch.Size(form).numel() * wide.itemsize
        return total

    @cached_property
    def chosen(self) -> int:
        """Bytes of what its owner tells of a choice."""
        total = 0
        for rule, shape in self.matrices:
            if isinstance(rule, Tells) and (self.sends_image or self.place.way == "told"):
                state = rule.init(shape, torch.device("meta"))
                total += sum(state[key].numel() * state[key].element_size() for key in rule.shared(shape))
        return total

    def steady(self) -> tuple[MatrixRule, tuple[int, int, int]]:
        """Its one matrix, whose renewals come when the gap is over and not as its place among others says."""
        ((rule, shape),) = self.matrices
        return (replace(rule, renewals=Renewals()) if isinstance(rule, LowRank) else rule), shape


class Divided:
    """An optimizer on the meta device whose state is shared out among so many ranks.

    Args:
        optimizer: on the meta device; it is not changed.
        ranks: how many.
    """

    def __init__(self, optimizer: MatrixOptimizer, ranks: int) -> None:
        self.ranks = ranks
        self._carrier = Nobody(ranks)
        self._optimizer = copy.copy(optimizer)
        self._optimizer._carrier = self._carrier
        self._states: dict[tuple[Tensor, bool, Span], State] = {}

    @classmethod
    def owned(
        cls, optimizer: MatrixOptimizer, ranks: int, *, messages: str = "auto", even_from: int = EVEN_FROM
    ) -> Divided:
        """As `MatrixOptimizer.own` shares it out."""
        found = cls(optimizer, ranks)
        found._optimizer._owning, found._optimizer._whole_messages = True, messages == "full"
        found._optimizer._deal_out(even_from)
        return found

    @classmethod
    def pieces(
        cls,
        optimizer: MatrixOptimizer,
        ranks: int,
        spans: Mapping[Tensor, Sequence[Span]] | None = None,
        master: torch.dtype | None = None,
    ) -> Divided:
        """As `MatrixOptimizer.shard` shares it out where weights lie in pieces.

        Args:
            spans: of each parameter, every rank's piece; those that are left out are cut into rows, as FSDP2 does it.
            master: the dtype of what is stepped; None: the weights' own.
        """
        found = cls(optimizer, ranks)
        found._optimizer._shards = Cuts(found._carrier, spans or {}, master)
        found._optimizer._decide()
        return found

    @cached_property
    def members(self) -> list[Member]:
        """Every parameter, in order."""
        optimizer, found = self._optimizer, []
        shown = [each for index in range(len(optimizer.param_groups)) for each in optimizer.matrices(index)]
        for (name, param, group, rank), matrices in zip(optimizer._members(), shown, strict=True):
            sends = bool(matrices) and all(optimizer._sends_coordinates(rule) for rule, _ in matrices)
            found.append(Member(name, param, group, rank, optimizer._cut[param], matrices, sends))
        return found

    @property
    def chunks(self) -> list[list[Tensor]]:
        """Which pieces are brought together at a time."""
        return self._optimizer._chunks

    def state(self, member: Member, rank: int) -> State:
        """What `rank` keeps of the state of a parameter, on the meta device."""
        key = member.param, member.place.owner in (None, rank), member.place.steps[rank]
        if key not in self._states:
            self._carrier.rank = rank
            self._states[key] = self._optimizer._own_state(member.name, member.param, member.group, member.rank)
        return self._states[key]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)
