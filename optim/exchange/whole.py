"""Weights that may lie in pieces, read and written as one, for who changes them between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinrank.optim.exchange.dtensors import DTensorShards, is_sharded
from thinrank.optim.exchange.replicas import connected, gathered
from thinrank.optim.exchange.shards import Carrier, Parcel, Shards
from thinrank.optim.exchange.wire import Wire
from thinrank.optim.exchange.zero import ZeroShards


class Weights:
    """The weights of a model, wherever a framework has put them; every rank makes the same calls in the same order.

    Args:
        named: names and parameters, some of which may be frozen.
        shards: where those that are trained lie, or None where they say so themselves or are whole.
        wire: counts what travels: sums over columns as `columns`, and in `rare`, as `weights`, whole weights and what
            one rank has computed for all.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], shards: Shards | None = None, wire: Wire | None = None):
        cut = [(name, param) for name, param in named if is_sharded(param)]
        self.shards: Shards | None = DTensorShards(cut) if shards is None and cut else shards
        self.wire = wire if wire is not None else self.shards.wire if self.shards is not None else Wire()

    def _in_pieces(self, param: Tensor) -> bool:
        return self.shards is not None and param in self.shards

    def _carrier(self, device: torch.device) -> Carrier:
        assert self.shards is not None
        return Carrier(self.shards.group, self.wire.rare, device)

    def read(self, *params: Tensor) -> list[Tensor]:
        """Whole weights, the masters where there are some, on every rank; not to be written to."""
        found: dict[int, Tensor] = {}
        cut = [param for param in params if self._in_pieces(param)]
        if cut:
            assert self.shards is not None
            pieces = [self.shards.weight(param) for param in cut]
            parcels = [
                Parcel(0, self.shards.spans(param), piece.dtype, "weights", piece=piece)
                for param, piece in zip(cut, pieces, strict=True)
            ]
            whole = self._carrier(pieces[0].device).spread(parcels)
            found = {id(p): value.view(self.shards.shape(p)) for p, value in zip(cut, whole, strict=True)}
        for param in params:
            if id(param) not in found:
                with _together(param):
                    found[id(param)] = param.detach().clone() if _partitioned(param) else param.detach()
        return [found[id(param)] for param in params]

    def write(self, param: Tensor, whole: Tensor) -> None:
        """Puts `whole`, which is the same on all ranks, in the place of a weight, or what lies here of it."""
        if self._in_pieces(param):
            assert self.shards is not None
            start, stop = self.shards.spans(param)[self._carrier(whole.device).rank]
            self.shards.weight(param).copy_(whole.reshape(-1)[start:stop])
            return
        with _together(param, changed=True):
            param.detach().copy_(whole)

    def squares(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Sums of squares of the columns of matrices (rows, columns), in float32 or float64; one message for all."""
        sums = [self._squares(param) for param in params]
        if self.shards is None or not any(self._in_pieces(param) for param in params):
            return sums
        flat = torch.cat([each.double() for each in sums])
        dist.all_reduce(flat, group=self.shards.group)
        self.wire.note([("columns", flat.nbytes)], dist.get_world_size(self.shards.group))
        whole = flat.split([len(each) for each in sums])
        return [mine.to(each.dtype) for mine, each in zip(whole, sums, strict=True)]

    def _squares(self, param: Tensor) -> Tensor:
        here, columns = self._here(param)
        wide = here.to(torch.promote_types(here.dtype, torch.float32)).square()
        if columns is None:
            return wide.sum(0)
        assert self.shards is not None
        return wide.new_zeros(self.shards.shape(param)[1]).index_add_(0, columns, wide)

    def scale_columns_(self, param: Tensor, factors: Tensor) -> None:
        """Multiplies the columns of a matrix (rows, columns) by `factors` (columns,), in place."""
        here, columns = self._here(param)
        here.mul_(factors if columns is None else factors[columns])

    def publish(self) -> None:
        """To be called when all that is written within a step has been written."""
        if isinstance(self.shards, ZeroShards):
            self.shards.publish()

    def together(self, param: Tensor, values: Tensor) -> Tensor:
        """`values` (n,) of all ranks that hold pieces of `param`, in any order; of a whole one, those of this rank."""
        if not self._in_pieces(param):
            return values
        assert self.shards is not None
        pieces = gathered(values.cpu(), "weights", values.device, self.wire.rare, self.shards.group)
        return torch.cat(pieces).to(values.device)

    def here(self, param: Tensor) -> Tensor:
        """What lies here of a weight, or its master, of any shape, to be changed in place entry by entry."""
        if self._in_pieces(param):
            assert self.shards is not None
            return self.shards.weight(param)
        return param.detach()

    def _here(self, param: Tensor) -> tuple[Tensor, Tensor | None]:
        """What lies here of a matrix: rows of it; or, flat, some entries, and which columns they are of."""
        here = self.here(param)
        if not self._in_pieces(param):
            return here, None
        assert self.shards is not None
        width = self.shards.shape(param)[1]
        start, stop = self.shards.spans(param)[self._carrier(here.device).rank]
        if start % width == 0 and stop % width == 0:
            return here.view(-1, width), None
        return here, torch.arange(start, stop, device=here.device) % width

    def by_owner(
        self, compute: Callable[[], Sequence[Tensor]], shapes: Sequence[Sequence[int]], like: Tensor, owner: int
    ) -> list[Tensor]:
        """What `compute` gives on one rank, on all: factorisations of equal matrices need not be equal on two machines.

        Args:
            compute: called by rank `owner` modulo the number of ranks.
            shapes: of what it gives, in the dtype and on the device of `like`.
        """
        ranks = connected()
        if ranks < 2:
            return list(compute())
        owner %= ranks
        made = list(compute()) if dist.get_rank() == owner else [like.new_empty(tuple(shape)) for shape in shapes]
        flat = torch.cat([each.to(like.dtype).reshape(-1) for each in made])
        dist.broadcast(flat, src=owner)
        self.wire.rare.note([("weights", flat.nbytes)], ranks, passes=1)
        parts = flat.split([each.numel() for each in made])
        return [part.view(each.shape) for part, each in zip(parts, made, strict=True)]


def _partitioned(param: Any) -> bool:
    """True for a frozen parameter whose entries ZeRO-3 has taken away."""
    return hasattr(param, "ds_status") and hasattr(param, "all_gather")


@contextmanager
def _together(param: Any, *, changed: bool = False) -> Iterator[None]:
    """Its entries are here meanwhile, as they are for ZeRO-3's own forward."""
    if not _partitioned(param):
        yield
        return
    param.all_gather()
    try:
        yield
    finally:
        param.partition(has_been_updated=changed)
