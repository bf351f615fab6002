"""A mean over ranks that costs a bit an entry on the way up: mean of signs, times mean of sizes, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from thinrank.optim.exchange.bits import MOST, digits, pack_bits, pack_counts, unpack_bits, unpack_counts


class Signs:
    """Matrices on their way to `mean(a) ∘ mean(sign)`, `a` being each rank's mean magnitude of a row.

    Every rank is sent one piece of all others' signs, counts the positive ones, and sends the counts to all, as many to
    a byte as fit; sizes go to all. A row of zeros has no vote. What comes out is the same on every rank to the bit, and
    not finite where any rank's row is not.

    Args:
        values: (..., short) of equal shapes on every rank; not kept.
        group: of at most `MOST` ranks.
    """

    def __init__(self, values: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        self._group, self._ranks = group, dist.get_world_size(group)
        if self._ranks > MOST:
            raise ValueError(f"signs are counted in a byte, and there are {self._ranks} ranks: use at most {MOST}")
        self._shapes = [(value.numel() // value.shape[-1], value.shape[-1]) for value in values]
        sizes = torch.cat([value.float().abs().mean(-1).flatten() for value in values])
        entries = sum(value.numel() for value in values)
        unit = math.lcm(8, digits(self._ranks))
        piece = -(-entries // (self._ranks * unit)) * unit
        flags = torch.zeros(self._ranks * piece, dtype=torch.bool, device=sizes.device)
        turn, start = dist.get_rank(group), 0
        for value in values:
            own = flags[start : start + value.numel()].view(value.shape)
            own.view(-1)[(start + turn) & 1 :: 2] = True  # zeros: for and against, no two neighbouring ranks alike
            own.logical_and_((value == 0) & value.any(-1, keepdim=True)).logical_or_(value > 0)
            start += value.numel()
        self._bits = pack_bits(flags)
        self._sizes = sizes.new_empty(self._ranks * sizes.numel())
        self._counts = self._bits.new_empty(self._ranks * piece // digits(self._ranks))
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
        tensors = {"signs": self._bits, "votes": self._counts, "sizes": self._sizes}
        return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}

    def turn(self) -> None:
        if self._turned:
            return
        self._wait()
        votes = unpack_bits(self._arrived.view(self._ranks, -1)).sum(0, dtype=torch.uint8)
        self._piece = pack_counts(votes, self._ranks)
        self._work = [self._gather(self._counts, self._piece)]
        self._turned = True

    def mean(self) -> Tensor:
        """All matrices, flat, float32."""
        self._wait()
        votes = unpack_counts(self._counts, self._ranks)
        total, voters = torch.zeros_like(self._own), torch.zeros_like(self._own)
        for sizes in self._sizes.view(self._ranks, -1):  # one after the other: torch may add up in another order
            total.add_(sizes)
            voters.add_(sizes != 0)
        scale, found, row, start = total / (self._ranks * voters.clamp(min=1.0)), [], 0, 0
        for rows, short in self._shapes:
            counts = votes[start : start + rows * short].view(rows, short).float()
            own = slice(row, row + rows)
            found.append(((2.0 * counts - voters[own, None]) * scale[own, None]).view(-1))
            row, start = row + rows, start + rows * short
        return torch.cat(found)

    def _gather(self, into: Tensor, own: Tensor) -> dist.Work | None:
        return dist.all_gather(list(into.view(self._ranks, -1).unbind()), own, group=self._group, async_op=True)

    def _wait(self) -> None:
        for work in self._work:
            if work is not None:
                work.wait()
        self._work = []
