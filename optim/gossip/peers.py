"""Ranks in processes of their own: rounds of messages from one to another by torch's process groups."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from thinrank.optim.exchange.wire import Count
from thinrank.optim.gossip.mixing import listed
from thinrank.optim.gossip.rounds import Mean, PeerLost, Step, Swap

TAGS = 2**20
"""So many rounds before their tags come again: more than are ever under way at one time."""

BRIEFLY = datetime.timedelta(seconds=0.1)
"""How long the others are waited for once somebody has failed: a connection that is closed says so at once."""


class Peers:
    """Carries one rank's messages, round by round; every rank of the group must take part in every round.

    In each round all receives are posted before the first send, so that no graph can lead to a deadlock.

    Args:
        group: of the ranks; None: all processes.
        wire: where bytes are counted, those of messages as `kind`.
        kind: the name of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, wire: Count | None = None, kind: str = "gossip") -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("ranks need a process group: call torch.distributed.init_process_group before")
        self.group, self.wire, self.kind = group, Count() if wire is None else wire, kind
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._tags: Iterator[int] = itertools.cycle(range(TAGS))

    def begin(self, step: Step) -> Flight:
        """Drives an exchange until its rank's new weights are known, and leaves what is then under way."""
        return Flight(self, step)

    def run(self, step: Step) -> Tensor:
        """Drives an exchange to its end: the rank's new weights."""
        return self.begin(step).finish()

    def post(self, ask: Swap | Mean) -> _Swapping | _Averaging:
        """Puts messages on their way."""
        return _Swapping(self, ask, next(self._tags)) if isinstance(ask, Swap) else _Averaging(self, ask)

    def travels_by(self, device: torch.device) -> torch.device:
        """Where messages of tensors on `device` are sent from: there, or from the processor for want of a backend."""
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        try:
            group._get_backend(device)
        except RuntimeError:  # torch says that there is none in no other way
            return torch.device("cpu")
        return device


class Flight:
    """An exchange under way.

    Attributes:
        weights: the rank's weights after it; None while they are not known.
    """

    def __init__(self, peers: Peers, step: Step) -> None:
        self._peers, self._step = peers, step
        self.weights: Tensor | None = None
        self._post: _Swapping | _Averaging | None = None
        self._ended = False
        self._go_on(None)
        while self.weights is None:
            self._turn()

    def finish(self) -> Tensor:
        """Waits for all messages; the weights after the exchange."""
        while not self._ended:
            self._turn()
        assert self.weights is not None
        return self.weights

    def _turn(self) -> None:
        assert self._post is not None
        self._go_on(self._post.wait())

    def _go_on(self, answer: Mapping[int, Tensor | None] | Tensor | None) -> None:
        try:
            ask = self._step.send(answer)
        except StopIteration as end:
            self.weights, self._post, self._ended = end.value, None, True
            return
        self.weights = ask.weights
        self._post = self._peers.post(ask)


class _Swapping:
    """Messages between this rank and some others."""

    def __init__(self, peers: Peers, ask: Swap, tag: int) -> None:
        self._peers = peers
        self._device = next((message.device for message in ask.sends.values()), torch.device("cpu"))
        carrier, group = peers.travels_by(self._device), peers.group
        self._into = {j: torch.empty(n, dtype=torch.uint8, device=carrier) for j, n in sorted(ask.expects.items())}
        self._out = {j: message.to(carrier) for j, message in sorted(ask.sends.items())}
        self._failed: dict[tuple[int, ...], RuntimeError] = {}
        self._under_way: list[tuple[tuple[int, ...], dist.Work | None]] = []
        if carrier.type == "cpu":  # one by one, so that each failure has a name
            for j, into in self._into.items():
                self._post((j,), lambda j=j, into=into: [dist.irecv(into, group=group, tag=tag, group_src=j)])
            for j, out in self._out.items():
                self._post((j,), lambda j=j, out=out: [dist.isend(out, group=group, tag=tag, group_dst=j)])
        else:
            ops = [dist.P2POp(dist.irecv, into, group=group, tag=tag, group_peer=j) for j, into in self._into.items()]
            ops += [dist.P2POp(dist.isend, out, group=group, tag=tag, group_peer=j) for j, out in self._out.items()]
            if ops:  # of NCCL it is one work for all
                self._post(tuple(sorted({*self._into, *self._out})), lambda: dist.batch_isend_irecv(ops))
        for message in self._out.values():
            peers.wire.sent([(peers.kind, message.numel())])

    def _post(self, whom: tuple[int, ...], begin: Callable[[], Sequence[dist.Work | None]]) -> None:
        try:
            self._under_way += [(whom, work) for work in begin()]
        except RuntimeError as error:  # a connection that is closed already; others still get their messages
            self._failed[whom] = error

    def wait(self) -> dict[int, Tensor | None]:
        """All that is waited for; a `PeerLost` that names everybody whose connection has failed.

        One that has ended because of another's end is named beside it, and not in its place.
        """
        for whom, work in self._under_way:
            self._wait(whom, work)
        if self._failed:
            ranks, error = sorted({j for whom in self._failed for j in whom}), next(iter(self._failed.values()))
            raise PeerLost(
                f"rank {self._peers.rank} could not exchange messages with {listed(ranks)} ({_first_line(error)}): see "
                "what was said there last, and go on from the last checkpoint",
                tuple(ranks),
            ) from error
        return {j: into.to(self._device) for j, into in self._into.items()}

    def _wait(self, whom: tuple[int, ...], work: dist.Work | None) -> None:
        try:
            if work is not None:
                work.wait(BRIEFLY) if self._failed else work.wait()
        except RuntimeError as error:
            if not self._failed or "timed out" not in str(error).lower():
                self._failed.setdefault(whom, error)


class _Averaging:
    """A mean over all ranks by the backend's all-reduce."""

    def __init__(self, peers: Peers, ask: Mean) -> None:
        self._device, self._rank, self._ranks = ask.values.device, peers.rank, peers.size
        self._flat = ask.values.to(peers.travels_by(self._device), copy=True)
        with _unnamed(self._rank):
            self._work = dist.all_reduce(self._flat, group=peers.group, async_op=True)
        peers.wire.note([(peers.kind, self._flat.nbytes)], peers.size)

    def wait(self) -> Tensor:
        assert self._work is not None
        with _unnamed(self._rank):
            self._work.wait()
        return self._flat.div_(self._ranks).to(self._device)


@contextmanager
def _unnamed(rank: int) -> Iterator[None]:
    """Turns the backend's error into a `PeerLost` without names: where all act together nobody knows who is missing."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            f"rank {rank} could not average with all ranks ({_first_line(error)}): see which of them has ended and "
            "what it said last, and go on from the last checkpoint",
            (),
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
