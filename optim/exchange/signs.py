"""A mean over ranks that costs a bit an entry on the way up: of signs and of sizes, the latter row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from thinrank.optim.exchange.bits import MOST, digits, pack_bits, pack_counts, unpack_bits, unpack_counts


class Tally(Protocol):
    """What comes back of the votes: one small count an entry."""

    def most(self, ranks: int) -> int:
        """The largest count."""
        ...

    def down(self, votes: Tensor, voters: Callable[[], Tensor]) -> Tensor:
        """Counts (n,) uint8 from the votes in favour, (n,) uint8, of so many `voters` (int16, looked up when asked)."""
        ...

    def share(self, counts: Tensor, voters: Tensor) -> Tensor:
        """From -1 to 1, by counts and voters, both float32."""
        ...


class MeanOfSigns:
    """The votes themselves."""

    def most(self, ranks: int) -> int:
        return ranks

    def down(self, votes: Tensor, voters: Callable[[], Tensor]) -> Tensor:
        return votes

    def share(self, counts: Tensor, voters: Tensor) -> Tensor:
        return (2.0 * counts - voters) / voters.clamp(min=1.0)


class Majority:
    """The sign that more ranks have, or a zero: of the same size with any number of ranks."""

    def most(self, ranks: int) -> int:
        return 2

    def down(self, votes: Tensor, voters: Callable[[], Tensor]) -> Tensor:
        return ((2 * votes.short() - voters()).sign() + 1).to(torch.uint8)

    def share(self, counts: Tensor, voters: Tensor) -> Tensor:
        return counts - 1.0


TALLIES: Mapping[str, Tally] = {"signs": MeanOfSigns(), "majority": Majority()}
ONE_WAY = ("signs", "votes", "sizes")
"""What is counted of `Signs`, each on one way, up, down and to all: half of what a sum of its size costs."""


class Signs:
    """Matrices on their way to `mean(a) ∘ share(votes)`, `a` being each rank's mean magnitude of a row.

    Every rank is sent one piece of all others' signs, counts the positive ones, and sends to all what the tally makes
    of the counts, as many to a byte as fit; sizes go to all. A row of zeros has no vote, and zeros in other rows are
    for and against in turn. What comes out is the same on every rank to the bit, and not finite where any rank's row
    is not.

    Args:
        values: (..., short) of equal shapes on every rank; not kept.
        group: of at most `MOST` ranks.
        tally: what comes down.
    """

    def __init__(self, values: Sequence[Tensor], group: dist.ProcessGroup | None, tally: Tally) -> None:
        self._group, self._ranks = group, dist.get_world_size(group)
        if self._ranks > MOST:
            raise ValueError(f"signs are counted in a byte, and there are {self._ranks} ranks: use at most {MOST}")
        self._shapes = [(value.numel() // value.shape[-1], value.shape[-1]) for value in values]
        of_rows = [value.float().abs().mean(-1, keepdim=True) for value in values]
        sizes = torch.cat([own.flatten() for own in of_rows])
        entries = sum(value.numel() for value in values)
        self._tally, self._most = tally, tally.most(self._ranks)
        unit = math.lcm(8, digits(self._most))
        self._piece = piece = -(-entries // (self._ranks * unit)) * unit
        flags = torch.zeros(self._ranks * piece, dtype=torch.bool, device=sizes.device)
        turn, start = dist.get_rank(group), 0
        for value, size in zip(values, of_rows, strict=True):
            own = flags[start : start + value.numel()].view(value.shape)
            own.view(-1)[(start + turn) & 1 :: 2] = True  # zeros: for and against, no two neighbouring ranks alike
            own.logical_and_(value == 0).logical_or_(value > 0).logical_and_(size != 0)
            start += value.numel()
        self._bits = pack_bits(flags)
        self._sizes = sizes.new_empty(self._ranks * sizes.numel())
        self._counts = self._bits.new_empty(self._ranks * piece // digits(self._most))
        self._arrived = torch.empty_like(self._bits)
        self._own = sizes  # until it has left
        self._work = [
            self._gather(self._sizes, sizes),
            dist.all_to_all_single(self._arrived, self._bits, group=group, async_op=True),
        ]
        self._turned = False

    @property
    def bytes(self) -> dict[str, int]:
        """What all ranks' pieces amount to, each of which leaves a rank but for its own share."""
        tensors = (self._bits, self._counts, self._sizes)
        return {kind: tensor.numel() * tensor.element_size() for kind, tensor in zip(ONE_WAY, tensors, strict=True)}

    def turn(self) -> None:
        if self._turned:
            return
        self._wait()
        votes = unpack_bits(self._arrived.view(self._ranks, -1)).sum(0, dtype=torch.uint8)
        self._packed = pack_counts(self._tally.down(votes, self._voters_of_my_piece), self._most)
        self._work = [self._gather(self._counts, self._packed)]
        self._turned = True

    def mean(self) -> Tensor:
        """All matrices, flat, float32."""
        self._wait()
        votes = unpack_counts(self._counts, self._most)
        total = torch.zeros_like(self._own)
        for sizes in self._sizes.view(self._ranks, -1):  # one after the other: torch may add up in another order
            total.add_(sizes)
        scale, voters = (total / self._ranks).unsqueeze(-1), self._voters().unsqueeze(-1)
        found, row, start = [], 0, 0
        for rows, short in self._shapes:
            counts = votes[start : start + rows * short].view(rows, short).float()
            own = slice(row, row + rows)
            found.append((self._tally.share(counts, voters[own]) * scale[own]).view(-1))
            row, start = row + rows, start + rows * short
        return torch.cat(found)

    def _voters(self) -> Tensor:
        """How many ranks have a row that is not all zeros, for every row; float32."""
        return (self._sizes.view(self._ranks, -1) != 0).sum(0).float()

    def _voters_of_my_piece(self) -> Tensor:
        """The same for every entry of which this rank counts the votes, int16; 0 behind the last."""
        first = dist.get_rank(self._group) * self._piece
        voters, found = self._voters().short(), self._sizes.new_zeros(self._piece, dtype=torch.int16)
        row = start = 0
        for rows, short in self._shapes:
            begin, end = max(start, first), min(start + rows * short, first + self._piece)
            if begin < end:
                some = slice((begin - start) // short, -(-(end - start) // short))
                skipped = begin - start - some.start * short
                of_rows = voters[row : row + rows][some].unsqueeze(-1).expand(-1, short).flatten()
                found[begin - first : end - first] = of_rows[skipped : skipped + end - begin]
            row, start = row + rows, start + rows * short
        return found

    def _gather(self, into: Tensor, own: Tensor) -> dist.Work | None:
        return dist.all_gather(list(into.view(self._ranks, -1).unbind()), own, group=self._group, async_op=True)

    def _wait(self) -> None:
        for work in self._work:
            if work is not None:
                work.wait()
        self._work = []
