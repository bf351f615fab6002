"""Ranks that hold other data: how what they found becomes their mean, in few messages, and how much that costs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from thinrank.optim.exchange.signs import TALLIES, Signs
from thinrank.optim.exchange.sums import Scattered, Sum, summed
from thinrank.optim.exchange.wire import Count, Wire

Group = dist.ProcessGroup
Span = tuple[int, int]
"""Entries `start` to `stop` of a tensor, flattened row by row; (0, 0) where there is nothing."""
T = TypeVar("T")

BUCKET_BYTES = 2**20
"""Least payload of a message, but for the last one: small enough to leave while backward goes on, and since messages do
not wait for each other's hops their number costs little. torch's DDP takes 25 MiB, after a first one of this size."""


def batches(items: Iterable[T], size: Callable[[T], int], least: int) -> Iterator[list[T]]:
    """`items` in their order, in lists whose sizes add up to `least` or just above, but for the last one."""
    some: list[T] = []
    held = 0
    for item in items:
        some.append(item)
        held += size(item)
        if held >= least:
            yield some
            some, held = [], 0
    if some:
        yield some


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a message.

    Attributes:
        kind: what it is, for the count.
        value: of any shape.
        place: what its sender will know it by.
        spans: which of its entries each rank is to have the mean of, as a piece in one dimension; None: all have all.
        tally: a name in `TALLIES`: in place of the mean all have what it makes of signs, times the mean of sizes
            (`Signs`); None: the mean. The same of all parts of a letter that have one.
    """

    kind: str
    value: Tensor
    place: tuple[str, ...] = ()
    spans: Sequence[Span] | None = None
    tally: str | None = None


class Letter:
    """Parts on their way to their mean over the ranks; every rank of the group sends the same shapes.

    By the backend's all-reduce or, from a CPU's memory and up to `DIRECT_BYTES`, in two hops (`Direct`): every rank
    sums up one piece of the message, which all others send it, and sends all others the sum. As many bytes leave a rank
    as in a ring of N, whose 2 (N−1) hops follow each other.
    """

    def __init__(self, parts: Sequence[Part], group: Group | None, dtype: torch.dtype | None, wire: Count):
        self._ranks = dist.get_world_size(group)
        self._like = [(part.value.shape, part.value.dtype) for part in parts]
        self._pieces = [None if part.spans is None else part.spans[dist.get_rank(group)] for part in parts]
        places: dict[tuple[torch.dtype, torch.device, bool], list[int]] = {}
        self._sent: list[tuple[list[int], Sum]] = []
        signed = [i for i, part in enumerate(parts) if part.tally]
        for i, part in enumerate(parts):
            if not part.tally:
                places.setdefault((dtype or part.value.dtype, part.value.device, part.spans is None), []).append(i)
        for (own, _, shared), which in places.items():
            if not shared:
                self._sent.append((which, self._scattered([parts[i] for i in which], own, group, wire)))
                continue
            flat = torch.cat([parts[i].value.reshape(-1).to(own) for i in which])
            wire.note(((parts[i].kind, parts[i].value.numel() * flat.element_size()) for i in which), self._ranks)
            self._sent.append((which, summed(flat, group, self._ranks)))
        if signed:
            signs = Signs([parts[i].value for i in signed], group, TALLIES[parts[signed[0]].tally or ""])
            for kind, size in signs.bytes.items():
                wire.note([(kind, size)], self._ranks, passes=1)
            self._sent.append((signed, signs))

    def _scattered(self, parts: Sequence[Part], dtype: torch.dtype, group: Group | None, wire: Count) -> Scattered:
        kept = dist.get_rank(group)
        spans = [part.spans or () for part in parts]
        wire.sent(
            (part.kind, sum(length(span) for i, span in enumerate(own) if i != kept) * dtype.itemsize)
            for part, own in zip(parts, spans, strict=True)
        )
        flat = [part.value.reshape(-1).to(dtype) for part in parts]
        pieces = [
            [own[slice(*span[rank])] for own, span in zip(flat, spans, strict=True)] for rank in range(self._ranks)
        ]
        return Scattered(pieces, group)

    def turn(self) -> None:
        """Begins the second hop, where there is one; waits for the first."""
        for _, each in self._sent:
            each.turn()

    def open(self) -> list[Tensor]:
        """Waits, and gives the means in the order, the shapes and the dtypes of the parts."""
        self.turn()
        found: list[Tensor] = [torch.empty(0)] * len(self._like)
        for which, each in self._sent:
            sizes = [length(self._pieces[i] or (0, self._like[i][0].numel())) for i in which]
            for i, size, piece in zip(which, sizes, each.mean().split(sizes), strict=True):
                shape, dtype = self._like[i]
                found[i] = piece.to(dtype).view(shape if size == shape.numel() else (size,))
        return found


def length(span: Span) -> int:
    return span[1] - span[0]


class Meeting:
    """Sends what is wanted of gradients in letters of a fixed composition and order, as soon as backward has them.

    A letter leaves when the gradients of all of its parameters are there and all letters before it have left; the rest
    leaves in `finish`. So every rank sends the same letters in the same order, whatever its graph was. A parameter
    without a gradient on this rank counts as zero, and stays without one where no rank has one.

    Args:
        params: in the order in which their gradients may be expected.
        sizes: bytes that each of them will send at most of the time.
        pack: what to send of a parameter, whose gradient is `param.grad` (zeros where it had none); the gradient is
            the callee's to free. The kinds and shapes must be the same on every rank.
        unpack: takes the means in the same order.
        group: the replicas; None: all processes.
        dtype: of the messages; None: each tensor's own.
        overlap: letters may leave before `finish`.
        wire: where letters are counted.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        sizes: Sequence[int],
        pack: Callable[[torch.nn.Parameter], list[Part]],
        unpack: Callable[[torch.nn.Parameter, list[Part]], None],
        *,
        group: Group | None = None,
        dtype: torch.dtype | None = None,
        overlap: bool = True,
        bucket_bytes: int = BUCKET_BYTES,
        wire: Wire,
    ):
        self.group, self.dtype, self.overlap, self.bucket_bytes = group, dtype, overlap, bucket_bytes
        self.wire = wire
        self._pack, self._unpack = pack, unpack
        sized = batches(zip(params, sizes, strict=True), lambda pair: pair[1], bucket_bytes)
        self._letters = [[param for param, _ in letter] for letter in sized]
        self._home = {param: i for i, letter in enumerate(self._letters) for param in letter}
        self._start()

    def _start(self) -> None:
        self._missing = [set(letter) for letter in self._letters]
        self._away: list[_Sent] = []
        self._heard = self._met = False

    def __contains__(self, param: Tensor) -> bool:
        return param in self._home

    @property
    def under_way(self) -> bool:
        """True from the first gradient of a step until `begin`."""
        return self._heard or self._met

    def begin(self) -> None:
        """Makes ready for the gradients of another step; what is on its way is thrown away."""
        for sent in self._away:
            sent.letter.open()  # every rank takes part in what has begun
        if self.under_way:
            self._start()

    def ready(self, param: torch.nn.Parameter) -> None:
        """To be called when backward has finished the gradient of `param` for this step."""
        if self._met or self._home[param] < len(self._away):
            raise RuntimeError(
                "a gradient came after its mean over the replicas had been asked for: set optimizer.accumulating = "
                "True during every backward but the last one before step()"
            )
        self._heard = True
        self._missing[self._home[param]].discard(param)
        while self.overlap and len(self._away) < len(self._letters) and not self._missing[len(self._away)]:
            self._send()

    def finish(self) -> None:
        """Sends what has not been sent, waits, and hands the means over; once for each `begin`."""
        if self._met:
            return
        while len(self._away) < len(self._letters):
            self._send()
        for sent in self._away:
            sent.letter.turn()
        for sent in self._away:
            # A mean of zero says that nobody had a gradient. The host looks only where this rank had none, so that a
            # GPU is seldom waited for.
            means = iter(sent.letter.open())
            present = next(means)
            for i, (param, parts) in enumerate(zip(sent.params, sent.parts, strict=True)):
                values = [replace(part, value=next(means)) for part in parts]
                if sent.had[i] or float(present[i]) > 0.0:
                    self._unpack(param, values)
        self._away = []
        self._met = True

    def _send(self) -> None:
        params = self._letters[len(self._away)]
        had = [param.grad is not None for param in params]
        packed: list[list[Part]] = []
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            packed.append(self._pack(param))
            param.grad = None
        flags = torch.tensor(had, dtype=torch.float32)
        if params and params[0].is_cuda:
            flags = flags.pin_memory().to(params[0].device, non_blocking=True)
        parts = [Part("present", flags), *(part for own in packed for part in own)]
        empty = [[replace(part, value=flags) for part in own] for own in packed]  # of what has been copied, the names
        self._away.append(_Sent(params, had, empty, Letter(parts, self.group, self.dtype, self.wire)))


@dataclass(frozen=True, slots=True)
class _Sent:
    params: list[torch.nn.Parameter]
    had: list[bool]
    parts: list[list[Part]]
    letter: Letter


def broadcast(tensors: Iterable[Tensor], wire: Count, group: Group | None = None) -> None:
    """Gives every rank the values of the group's first."""
    first, ranks = _first(group), dist.get_world_size(group)
    for tensor in tensors:
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        dist.broadcast(whole, src=first, group=group)
        wire.note([("start", whole.numel() * whole.element_size())], ranks, passes=1)
        if whole is not tensor:
            tensor.copy_(whole)


def _first(group: Group | None) -> int:
    return dist.get_global_rank(group, 0) if group is not None else 0


def connected() -> int:
    """How many processes there are; 0 where they have not been connected."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


def gathered(value: T, kind: str, device: torch.device, wire: Count, group: Group | None = None) -> list[T]:
    """What each rank has, in the order of the ranks; anything that can be pickled, which travels by way of `device`."""
    ranks, own = dist.get_world_size(group), _pickled(value, device)
    sizes = torch.empty(ranks, dtype=torch.int64, device=device)
    dist.all_gather(list(sizes.view(ranks, 1).unbind()), sizes.new_full((1,), own.numel()), group=group)
    each = int(sizes.max())
    filled, everyone = own.new_zeros(each), own.new_empty(ranks, each)
    filled[: own.numel()] = own
    dist.all_gather(list(everyone.unbind()), filled, group=group)
    for sent in (sizes, everyone):
        wire.note([(kind, sent.numel() * sent.element_size())], ranks, passes=1)
    return [_unpickled(flat[:size]) for flat, size in zip(everyone, sizes.tolist(), strict=True)]


def from_first(value: T, kind: str, device: torch.device, wire: Count, group: Group | None = None) -> T:
    """What the group's first rank has, on every rank; of whatever can be pickled, by way of `device`."""
    mine = dist.get_rank(group) == 0
    own = _pickled(value if mine else None, device)
    size = torch.tensor([own.numel()], device=device)
    dist.broadcast(size, src=_first(group), group=group)
    whole = own if mine else own.new_empty(int(size))
    dist.broadcast(whole, src=_first(group), group=group)
    for sent in (size, whole):
        wire.note([(kind, sent.numel() * sent.element_size())], dist.get_world_size(group), passes=1)
    return value if mine else _unpickled(whole)


def _pickled(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)


def _unpickled(flat: Tensor) -> Any:
    return pickle.loads(flat.cpu().numpy().tobytes())


def anywhere(here: bool, device: torch.device, wire: Count, group: Group | None = None) -> bool:
    """True where it is true on any rank; the host waits."""
    flag = torch.full((), int(here), dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    wire.note([("checks", flag.element_size())], dist.get_world_size(group))
    return bool(flag)


def rows_anywhere(x: Tensor, wire: Count, group: Group | None = None) -> Tensor:
    """Numbers of the rows of `x` (rows, columns) that are not zero on some rank, rising: (k,) int64; the host waits."""
    mask = x.ne(0).any(-1).to(torch.uint8)
    dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=group)
    wire.note([("present", mask.numel())], dist.get_world_size(group))
    return mask.nonzero().flatten()


def norm_of_all(norm: Tensor, wire: Count, group: Group | None = None) -> Tensor:
    """The norm (scalar, float32) of what lies on all ranks, from that of what lies here."""
    # of one type on all ranks: a norm is as precise as what is here, which elsewhere may be coordinates, or nothing
    square = norm.double().square()
    dist.all_reduce(square, group=group)
    wire.note([("norms", square.element_size())], dist.get_world_size(group))
    return square.sqrt().float()


SAMPLE = 4096
"""Entries of a tensor by which replicas are compared."""


def fingerprint(tensor: Tensor) -> Tensor:
    """A number (int64, scalar) that changes with any bit of the entries that are looked at: at most `SAMPLE`, evenly
    spread, and always the first."""
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, -(-flat.numel() // SAMPLE))].contiguous()
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).long()
    odd = torch.arange(1, 2 * bits.numel(), 2, dtype=torch.int64, device=bits.device)  # odd factors lose no bit
    return (bits * odd).sum()


def difference(
    named: Mapping[str, Tensor], wire: Count, group: Group | None = None, *, device: torch.device | None = None
) -> str | None:
    """The name of the first tensor of which two ranks hold different values; None where all are equal.

    Every rank must give the same names in the same order; one message travels, of two numbers a tensor.

    Args:
        wire: counts it, as `checks`.
        device: from which it leaves; None: that of the first tensor.
    """
    if not named:
        return None
    device = next(iter(named.values())).device if device is None else device
    mine = torch.stack([fingerprint(tensor).to(device) for tensor in named.values()])
    both = torch.stack([mine, mine.bitwise_not()])  # the greatest complement is the complement of the least
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    wire.note([("checks", both.nbytes)], dist.get_world_size(group))
    differ = (both[0] != both[1].bitwise_not()).tolist()
    return next((name for name, other in zip(named, differ, strict=True) if other), None)


def refuse_other_models(params: Mapping[str, Tensor], wire: Count, group: Group | None) -> None:
    """Raises a ValueError, with its name, for the first parameter that differs between ranks, or is in pieces."""
    for name, param in params.items():
        if type(param.data) is not Tensor:
            raise ValueError(
                f"replicas hold whole parameters, and {name} is a {type(param.data).__name__}: leave the parameters "
                "unsharded, or replicate out"
            )
    mine = {name: (tuple(param.shape), str(param.dtype), param.requires_grad) for name, param in params.items()}
    device = next(param.device for param in params.values())
    for rank, theirs in enumerate(gathered(mine, "start", device, wire, group)):
        names = [name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name)]
        if names or list(mine) != list(theirs):
            name = names[0] if names else "the order of parameters"
            raise ValueError(
                f"replicas must have the same parameters; {name} differs between rank {rank} and this one: build the "
                "same model and optimizer on every rank"
            )
