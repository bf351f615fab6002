"""Strategies under which processes share out the optimizer's state and work: owners of matrices, weights in pieces.

Who steps what is asked of the optimizer itself, without memory (`thinrank.optim.divided`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import Self

from thinrank.optim.axis import Axis
from thinrank.optim.build import BASES
from thinrank.optim.divided import SPREAD_BYTES, Divided, Member, Span, common, even, length, rows_of
from thinrank.optim.grouping import Row
from thinrank.optim.places import EVEN_FROM
from thinrank.optim.rule import Step
from thinrank.trainers.plan.held import Around, Held
from thinrank.trainers.plan.live import Live
from thinrank.trainers.plan.wire import FLOAT, Traffic, Transfer, gradient_bytes, image, steady, width

ENGINE_DTYPES = {"bf16-mixed": (2, 4), "bf16-true": (2, 4)}
"""Bytes of an entry as `thinrank_fsdp2` gathers weights and scatters gradients, by precision; others: the weights'."""


NORM = 8
"""Bytes by which all ranks know the norm of gradients, once a step: a sum of squares."""


class Tally:
    """Adds up what travels, by kind: what all processes sum up, and what goes from one to another."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._summed: dict[str, list[float]] = {}
        self._sent: dict[str, list[list[float]]] = {}

    def summed(self, kind: str, gap: int, *, between: float, renewal: float, first: float | None = None) -> None:
        """Something that every process has the sum of."""
        _add(self._summed.setdefault(kind, [0.0] * 4), gap, between, renewal, first)

    def sent(
        self, kind: str, rank: int, gap: int, *, between: float, renewal: float, first: float | None = None
    ) -> None:
        """Something that leaves `rank`."""
        empty = [[0.0] * 4 for _ in range(self._ranks)]
        _add(self._sent.setdefault(kind, empty)[rank], gap, between, renewal, first)

    def transfers(self, copies: int = 1) -> tuple[Transfer, ...]:
        """All of it, in processes that are there `copies` times."""
        found = [replace(_transfer(kind, own), among=self._ranks) for kind, own in self._summed.items()]
        for kind, ranks in self._sent.items():
            mean = [sum(own) / self._ranks for own in zip(*ranks, strict=True)]
            found.append(_transfer(kind, mean, tuple(_transfer(kind, own) for own in ranks) * copies))
        return tuple(found)


def _add(into: list[float], gap: int, between: float, renewal: float, first: float | None) -> None:
    values = (between, renewal, between + (renewal - between) / gap, renewal if first is None else first)
    for i, value in enumerate(values):
        into[i] += value


def _transfer(kind: str, own: Sequence[float], ranks: tuple[Transfer, ...] = ()) -> Transfer:
    between, renewal, averaged, first = own
    return Transfer(kind=kind, between=between, renewal=renewal, averaged=averaged, first=first, ranks=ranks)


def _counts(row: Row) -> tuple[int, int, int]:
    """Updates before a first step, before a step that renews, and before one that does not."""
    renewal = (max(row.searches, 1) // row.gap + 1) * row.gap
    return 0, renewal, renewal + 1


def _state(divided: Divided, rank: int) -> tuple[int, int]:
    """Bytes of state that `rank` keeps, and of the part of it that says where subspaces are."""
    state = bases = 0
    for member in divided:
        for key, value in divided.state(member, rank).items():
            size = value.numel() * value.element_size()
            state += size
            bases += size if key.rpartition(".")[2] in BASES else 0
    return state, bases


@dataclass(frozen=True, slots=True)
class Owners:
    """`MatrixOptimizer.own`: all weights and bases everywhere, gradients and the rest of the state where it steps them.

    Attributes:
        divided: the optimizer, shared out.
        dtype: of the messages.
        norms: sketches travel, by which the norm of gradients is known.
    """

    divided: Divided
    dtype: torch.dtype | None = None
    embeddings: str = "dense"
    norms: bool = True

    @classmethod
    def of(
        cls,
        around: Around,
        world: int,
        *,
        messages: str = "auto",
        dtype: torch.dtype | None = None,
        even_from: int = EVEN_FROM,
        embeddings: str = "dense",
        norms: bool = True,
    ) -> Owners:
        assert around.routing.stand_in is not None  # of `route`
        divided = Divided.owned(around.routing.stand_in, world, messages=messages, even_from=even_from)
        return cls(divided, dtype, embeddings, norms)

    def held(self, rows: Sequence[Row], frozen: int, world: int, in_backward: str = "off") -> Held:
        each = [self.rank(rows, frozen, rank) for rank in range(world)]
        return _most(each)

    def rank(self, rows: Sequence[Row], frozen: int, rank: int) -> Held:
        """What one process holds."""
        gradients = letters = pieces = told = largest = 0
        ranks, bounded = self.divided.ranks, SPREAD_BYTES
        for row, member in zip(rows, self.divided, strict=True):
            place = member.place
            sent = row.elements * (self.dtype.itemsize if self.dtype else width(row, self.embeddings))
            share = place.size if place.way == "all" else length(place.spans[rank])
            kept = 4 * sum(row.image.values()) if member.sends_image else share * row.itemsize
            gradients += kept if share else 0
            letters += sent
            pieces += ranks * sent * share // max(row.elements, 1) if place.way != "all" else 0
            message = sum(self._told(row, member, 0)) if place.owner is not None else 0
            message = place.size * row.itemsize if place.way == "piece" else message
            told, largest = told + message, max(largest, message)
        state, bases = _state(self.divided, rank)
        return Held(
            weights=frozen + sum(row.elements * row.itemsize for row in rows),
            gradients=gradients,
            state=state,
            bases=bases,
            arriving=letters + pieces + gradients,
            # all of what is told, and of one letter of it what leaves and what comes
            brought=told + 2 * min(told, bounded + largest) if ranks > 1 else 0,
        )

    def _told(self, row: Row, member: Member, count: int) -> tuple[int, int]:
        """Bytes that the owner tells each of the others: the update, or the weight, and a choice if it makes one."""
        told = member.place.size * row.itemsize if member.place.way == "whole" else member.told(count, self.dtype)
        return told, member.chosen

    def sent(self, rows: Sequence[Row], world: int) -> Traffic:
        tally, own = Tally(world), None if self.dtype is None else self.dtype.itemsize
        for row, member in zip(rows, self.divided, strict=True):
            place, gap = member.place, row.gap if member.sends_image else 1
            whole = row.elements * (own or width(row, self.embeddings))
            parts = [("gradients" if row.matrices else "dense", whole, whole)]
            if member.sends_image:
                images = [(kind, numbers * (own or FLOAT), 0) for kind, numbers in image(row, self.norms).items()]
                parts = [("renewals", 0, whole), *images]
            for kind, between, renewal in parts:
                if place.way == "all":
                    tally.summed(kind, gap, between=between, renewal=renewal)
                    continue
                for rank in range(world):
                    away, size = place.size - length(place.spans[rank]), max(place.size, 1)
                    tally.sent(kind, rank, gap, between=between * away // size, renewal=renewal * away // size)
            self._tells(tally, row, member, world - 1)
        flags = len(rows) * (own or FLOAT)
        tally.summed("present", 1, between=flags, renewal=flags)
        tally.summed("norms", 1, between=NORM, renewal=NORM)
        return Traffic(tally.transfers())

    def _tells(self, tally: Tally, row: Row, member: Member, others: int) -> None:
        place = member.place
        if place.way == "piece":
            for rank, span in enumerate(place.spans):
                size = length(span) * row.itemsize * others
                tally.sent("weights", rank, 1, between=size, renewal=size)
        if place.owner is None:
            return
        (first, chosen), (renewal, _), (between, _) = (self._told(row, member, count) for count in _counts(row))
        kind = "weights" if place.way == "whole" else "updates"
        tally.sent(kind, place.owner, row.gap, between=between * others, renewal=renewal * others, first=first * others)
        if chosen:
            tally.sent("bases", place.owner, row.gap, between=0, renewal=chosen * others)


class Counted(Axis):
    """An axis over ranks that are not there; counts what it would have summed up over them."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "bytes", 0)

    @property
    def whole(self) -> bool:
        return False

    def sum(self, x: Tensor) -> Tensor:
        object.__setattr__(self, "bytes", self.bytes + x.numel() * x.element_size())
        return x.clone()


@dataclass(frozen=True)
class Pieces:
    """`MatrixOptimizer.shard`: weights, gradients and state in pieces; matrices are brought to owners, chunk by chunk.

    Attributes:
        divided: the optimizer, shared out among the processes that hold one model together.
        replicas: groups of such processes, between which the framework averages gradients.
        engine: what the framework sends by itself.
        gathered: bytes of whole weights and gradients that a rank has at one time in the passes.
    """

    divided: Divided
    replicas: int = 1
    engine: tuple[Transfer, ...] = ()
    gathered: int | None = None
    _known: dict[tuple[int, tuple[int, int, int], int], int] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls, around: Around, world: int, *, replicas: int = 1, reshard: bool = True, averages: bool = True
    ) -> Self:
        """FSDP2's rows, of groups of `world // replicas` processes.

        Args:
            averages: the framework averages gradients over these groups.
        """
        assert around.routing.stand_in is not None  # of `route`
        ranks = world // replicas
        rows = around.routing.rows
        engine, gathered = _fsdp2(
            rows, ranks, replicas, around.precision, around.accumulate, reshard=reshard, averages=averages
        )
        return cls(Divided.pieces(around.routing.stand_in, ranks), replicas, engine, gathered)

    def held(self, rows: Sequence[Row], frozen: int, world: int, in_backward: str = "off") -> Held:
        return _most([self.rank(rows, frozen, rank) for rank in range(self.divided.ranks)])

    def rank(self, rows: Sequence[Row], frozen: int, rank: int) -> Held:
        """What one process holds."""
        piece = sum(length(m.place.spans[rank]) * row.itemsize for row, m in zip(rows, self.divided, strict=True))
        whole = sum(row.elements * row.itemsize for row in rows)
        state, bases = _state(self.divided, rank)
        return Held(
            weights=piece - -frozen // self.divided.ranks,
            gradients=piece,
            state=state,
            bases=bases,
            arriving=piece,
            brought=self._brought(rows, rank),
            spared=0 if self.gathered is None else max(0, whole - piece - self.gathered),
        )

    def _brought(self, rows: Sequence[Row], rank: int) -> int:
        """Most bytes of a chunk on `rank`: what leaves, what comes, and what these make together on owners."""
        own = {member.param: (row, member) for row, member in zip(rows, self.divided, strict=True)}
        most = 0
        for chunk in self.divided.chunks:
            leaves = comes = made = 0
            for row, member in (own[param] for param in chunk):
                place = member.place
                size, grad = place.size, self._gradient(row, member)
                if place.rows is not None:
                    leaves += grad * _away(place.spans, place.rows, rank)
                    comes += grad * _away(place.rows, place.spans, rank)
                    made += length(place.rows[rank]) * (grad + 4)
                if place.way not in ("delta", "whole"):
                    continue
                each = grad + (place.dtype.itemsize if place.way == "whole" else 0)
                here = length(place.spans[rank])
                if place.owner == rank:
                    comes += (size - here) * each
                    made += size * (each + (4 if place.way == "delta" else 0))
                else:
                    leaves += here * each
            most = max(most, leaves + comes + made)
        return most

    def _gradient(self, row: Row, member: Member) -> int:
        return row.itemsize if member.place.dtype.itemsize <= row.itemsize else member.place.dtype.itemsize

    def sent(self, rows: Sequence[Row], world: int) -> Traffic:
        tally = Tally(self.divided.ranks)
        for row, member in zip(rows, self.divided, strict=True):
            place, grad = member.place, self._gradient(row, member)
            if place.way == "rows":
                first, renewal, between = (self._sums(member, count) for count in _counts(row))
                tally.summed("sums", row.gap, between=between, renewal=renewal, first=first)
            for rank in range(self.divided.ranks) if place.rows is not None else ():
                there, back = _away(place.spans, place.steps, rank), _away(place.steps, place.spans, rank)
                tally.sent("gradients", rank, 1, between=there * grad, renewal=there * grad)
                size = back * place.dtype.itemsize
                tally.sent("updates", rank, 1, between=size, renewal=size)
            if place.way not in ("delta", "whole"):
                continue
            assert place.owner is not None
            there, back = [("gradients", grad)], ("updates", place.dtype.itemsize)
            if place.way == "whole":
                there.append(("weights", place.dtype.itemsize))
                back = ("weights", place.dtype.itemsize)
            for rank, span in enumerate(place.spans):
                for kind, wide in there if rank != place.owner else ():
                    size = length(span) * wide
                    tally.sent(kind, rank, 1, between=size, renewal=size)
            size = (place.size - length(place.spans[place.owner])) * back[1]
            tally.sent(back[0], place.owner, 1, between=size, renewal=size)
        for kind, size in self._small(rows).items():
            tally.summed(kind, 1, between=size, renewal=size)
        return Traffic(tally.transfers(self.replicas), self.engine)

    def _small(self, rows: Sequence[Row]) -> dict[str, int]:
        """Bytes of what all sum up in every step, whoever steps what."""
        return {"norms": NORM}

    def _sums(self, member: Member, count: int) -> int:
        """Bytes that a matrix which is stepped by rows sums up in a step: the rule's own step, without memory."""
        rule, (_, long, short) = member.steady()
        key = id(member.matrices[0][0]), (1, long, short), count
        if key not in self._known:
            here = max(map(length, member.place.steps)) // max(short, 1)
            meta, axis = torch.device("meta"), Counted()
            state = rule.init((1, here, short), meta)
            grad = torch.empty(1, here, short, dtype=member.place.dtype, device=meta)
            with torch.no_grad(), Live([grad, *state.values()], number=float(count)):
                step = Step(count=[count], keys=[0], axis=axis, notes=[], held=[], overlaps=[])
                rule.update(grad, state, step)
            self._known[key] = axis.bytes
        return self._known[key]


@dataclass(frozen=True)
class Zero(Pieces):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, §5 and §7): state and float32 masters in pieces,
    from stage 2 on gradients, in stage 3 weights. Stages 1 and 2 cut groups, stage 3 every parameter by itself.

    Attributes:
        stage: 1, 2 or 3.
    """

    stage: int = 1

    @classmethod
    def of(cls, around: Around, world: int, *, stage: int) -> Zero:
        optimizer, rows = around.routing.stand_in, around.routing.rows
        assert optimizer is not None  # of `route`
        groups = [[p for p in group["params"] if p.numel()] for group in optimizer.param_groups]
        spans: dict[Tensor, Sequence[Span]] = {}
        for group in groups:
            if stage == 3:
                spans |= {p: even(p.numel(), world) for p in group}
            else:
                spans |= dict(zip(group, in_a_row([p.numel() for p in group], world), strict=True))
        weights = gradient_bytes(rows)
        again = around.accumulate
        gathers, scatters = (2 * again, again) if stage == 3 else (1, again if stage == 2 else 1)
        sizes = {"weights gathered": gathers * weights, "gradients scattered": scatters * weights}
        engine = tuple(steady(kind, size, 1) for kind, size in sizes.items())
        divided = Divided.pieces(optimizer, world, spans, torch.float32)
        return cls(divided=divided, engine=engine, stage=stage)

    def rank(self, rows: Sequence[Row], frozen: int, rank: int) -> Held:
        """What one process holds; of weights and gradients that ranks hold alike, all."""
        found = super().rank(rows, frozen, rank)
        entries = sum(length(member.place.spans[rank]) for member in self.divided)
        whole = gradient_bytes(rows)
        return replace(
            found,
            weights=found.weights if self.stage == 3 else frozen + whole,
            gradients=found.gradients if self.stage > 1 else whole,
            arriving=found.gradients if self.stage > 1 else whole,
            masters=4 * entries,
            brought=found.brought + 4 * entries,  # DeepSpeed steps by float32 copies of its piece of gradients
        )

    def _small(self, rows: Sequence[Row]) -> dict[str, int]:
        groups = len({id(member.group) for member in self.divided if member.place.size})
        return {"present": FLOAT * len(rows), "norms": groups * (NORM if self.stage == 3 else FLOAT)}


def _away(lies: Sequence[Span], goes: Sequence[Span], rank: int) -> int:
    """Entries that leave `rank` where pieces are to lie elsewhere."""
    return length(lies[rank]) - length(common(lies[rank], goes[rank]))


def in_a_row(sizes: Sequence[int], ranks: int) -> list[list[Span]]:
    """Each rank's piece of tensors that lie one after the other and are cut evenly wherever that is, as ZeRO-1 and 2 do
    it; the whole is a multiple of twice the number of ranks long, for the alignment of messages."""
    total = sum(sizes)
    each = -(-total // (2 * ranks)) * 2
    found, start = [], 0
    for size in sizes:
        cuts = ((max(start, rank * each), min(start + size, (rank + 1) * each)) for rank in range(ranks))
        found.append([(low - start, high - start) if low < high else (0, 0) for low, high in cuts])
        start += size
    return found


def _most(each: Sequence[Held]) -> Held:
    """Each figure of the process that has most of it."""
    return Held(**{name: max(getattr(held, name) for held in each) for name in Held.__dataclass_fields__})


def _fsdp2(
    rows: Sequence[Row],
    ranks: int,
    replicas: int,
    precision: str,
    accumulate: int,
    *,
    reshard: bool,
    averages: bool,
) -> tuple[tuple[Transfer, ...], int]:
    """What FSDP2 sends by itself, and what of it is whole on a rank at a time: the root's weights, of two blocks those,
    and of one the gradients.

    Of every block the weights are gathered before forward and again before backward, of the rest once; gradients are
    scattered; all in every micro-batch. Pieces are padded to equal size.
    """
    units: dict[str, list[int]] = {}
    for row in rows:
        found = re.match(r"(.*?\.\d+)\.", row.name)
        gathers, scatters = ENGINE_DTYPES.get(precision, (row.itemsize, row.itemsize))
        padded = max(map(length, rows_of(row.shape, ranks))) * ranks
        unit = units.setdefault(found[1] if found else "", [0, 0, 0])
        for i, size in enumerate((padded * gathers, padded * scatters, padded * row.itemsize)):
            unit[i] += size
    root = units.pop("", [0, 0, 0])
    share = (ranks - 1) / ranks * accumulate
    gathered = (2 if reshard else 1) * sum(unit[0] for unit in units.values()) + root[0]
    scattered = sum(unit[1] for unit in (root, *units.values()))
    sizes = {"weights gathered": gathered * share, "gradients scattered": scattered * share}
    if replicas > 1 and averages:
        sizes["gradients over replicas"] = 2 * (replicas - 1) / replicas * scattered / ranks * accumulate
    everybody = ranks * replicas
    transfers = []
    for kind, size in sizes.items():
        one = Transfer(kind=kind, between=size, renewal=size, averaged=size)
        transfers.append(Transfer(kind=kind, between=size, renewal=size, averaged=size, ranks=(one,) * everybody))
    largest = max((unit[1] + 2 * unit[0] for unit in units.values()), default=0)
    kept = sum(unit[0] for unit in units.values()) if not reshard else 0
    return tuple(transfers), root[0] + largest + kept
