"""Weights in pieces: what several ranks hold alike, and whether they still do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.exchange.replicas import Group, anywhere, difference, gathered
from thinrank.optim.exchange.shards import Shards
from thinrank.optim.sharded import Sharded


class Alike(Sharded):
    """What an optimizer of sharded weights does about what must be the same on several ranks, and is sent to nobody.

    Ranks that step a matrix together, each its rows, all have its basis; whoever holds a piece counts its steps; and
    ranks that hold the same pieces (HSDP's replicas, islands) have everything twice.
    """

    def _forget(self) -> None:
        super()._forget()
        self._alike_keys: dict[Tensor, list[str]] = {}

    def shard(self, shards: Shards) -> None:
        super().shard(shards)
        self._steps = 0

    def _stepped(self) -> None:
        super()._stepped()
        if self._shards is not None:
            self._check_if_due()

    @property
    def _same_pieces(self) -> Group | None:
        """The ranks that hold the same pieces as this one; None where it is alone with them."""
        return None if self._shards is None else self._shards.replicas

    @torch.no_grad()
    def check_replicas(self) -> None:
        """As `Replicated.check_replicas`; of sharded weights, what ranks with other pieces hold alike (bases of
        matrices that are stepped by rows, counts of steps), and everything that lies here where others hold the same.
        """
        if self._shards is None:
            super().check_replicas()
            return
        carrier, replicas = self._carrier, self._same_pieces
        rare = self._wire.rare
        name = difference(self._alike() | self._said(), rare, carrier.group, device=carrier.device)
        if replicas is not None:
            other = difference(self._lying_here_too(), rare, replicas, device=carrier.device)
            if anywhere(other is not None, carrier.device, rare, carrier.group):  # who holds other pieces stops as well
                name = name or next(filter(None, gathered(other, "checks", carrier.device, rare, carrier.group)))
        self._refuse_drift(name)

    # --- what somebody measures of weights that lie here --------------------------------------------------------------

    def rows_on_ranks(self, param: Tensor) -> list[tuple[int, int]]:
        """Which whole rows of `param`, all but the first dimension being columns, lie on each rank: (first, stop)."""
        rows, columns = self._sizes(param)
        if self._shards is None:
            return [(0, rows)]
        found = [(-(-start // columns), stop // columns) for start, stop in self._shards.spans(param)]
        return [(first, stop) if first < stop else (0, 0) for first, stop in found]

    def piece_of(self, param: Tensor) -> Tensor:
        """Those on this rank, (rows, columns), to be read; all of them where weights are whole."""
        rows, columns = self._sizes(param)
        if self._shards is None:
            return param.detach().reshape(rows, columns)
        rank = self._carrier.rank
        (start, _), (first, stop) = self._shards.spans(param)[rank], self.rows_on_ranks(param)[rank]
        return self._shards.weight(param)[first * columns - start : stop * columns - start].view(-1, columns)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks that hold other pieces, or other data; the same on all of them to the bit.
        `values` itself where there are no others that this optimizer knows of; else every rank must call it."""
        if self.wire is None:
            return values
        group = self._carrier.group if self._apart or self._meeting is None else self._meeting.group
        device = next(param.device for _, param in self._named())
        found = gathered(values.cpu(), "measured", device, self._rare, group)
        return torch.stack(found).sum(0).to(values.device)

    def _sizes(self, param: Tensor) -> tuple[int, int]:
        shape = tuple(param.shape) if self._shards is None else self._shards.shape(param)
        return shape[0], math.prod(shape[1:])

    def _alike(self) -> dict[str, Tensor]:
        if self._shards is None:
            return super()._alike()
        return {
            f"{key} of {name}": self.state[param][key]
            for name, param, group, rank in self._members()
            for key in self._on_all(name, param, group, rank)
        }

    def _on_all(self, name: str, param: Tensor, group: dict[str, Any], rank: int | float | None) -> list[str]:
        """Names of the state of `param` that every rank with a piece has whole."""
        if param not in self._alike_keys:
            place, keys = self._cut[param], []
            if place.way == "piece":
                keys = ["step"]
            elif place.way == "rows":
                whole = self._initial_state(name, self._like(param), group, rank)
                along = self._along(param, whole, group, rank)
                keys = [key for key, value in whole.items() if key not in along and value.numel()]
            self._alike_keys[param] = keys
        return self._alike_keys[param]

    def _lying_here_too(self) -> dict[str, Tensor]:
        """The pieces and the state that this rank holds, by name."""
        assert self._shards is not None
        held: dict[str, Tensor] = {}
        for name, param in self._named():
            held[name] = self._shards.weight(param)
            held |= {f"{key} of {name}": value for key, value in self.state[param].items()}
        return {name: value for name, value in held.items() if value.numel()}
