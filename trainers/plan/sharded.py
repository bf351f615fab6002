"""Strategies that divide what DDP repeats: whole matrices stepped by one owner each, everything else split evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thinrank.optim.grouping import Row
from thinrank.trainers.plan.held import Held
from thinrank.trainers.plan.wire import Traffic, gradient_bytes, steady


@dataclass(frozen=True, slots=True)
class Sharded:
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, §5 and §7): state divided, then gradients, then weights.

    Bytes held are the mean over the processes. Whole matrices cannot be dealt out quite evenly, so that the fullest has
    more, and never less than the state of the largest matrix.

    Attributes:
        stage: 1: state; 2: gradients too; 3: weights too, as FSDP2 has them.
    """

    stage: int

    def held(self, rows: Sequence[Row], frozen: int, world: int, in_backward: str = "off") -> Held:
        gradients = gradient_bytes(rows)
        kept = gradients if self.stage < 2 else _share(gradients, world)
        weights = frozen + gradients
        return Held(
            weights=weights if self.stage < 3 else _share(weights, world),
            gradients=kept,
            state=_share(sum(row.state_bytes for row in rows), world),
            bases=_share(sum(row.bases_bytes for row in rows), world),
            arriving=kept,
        )

    def sent(self, rows: Sequence[Row], world: int) -> Traffic:
        """Gradients to those who keep a part of their sum, weights to all, in stage 3 twice, before the forward and
        before the backward pass. A matrix is gathered by its owner, who sends its update back: a process sends its
        parts of all matrices, one in `world` of the whole, and as much of its own.
        """
        weights = gradient_bytes(rows)  # of the weights' type
        matrices = gradient_bytes([row for row in rows if row.matrices])
        found = [steady("gradients", weights, 1), steady("weights", (2 if self.stage == 3 else 1) * weights, 1)]
        if matrices:
            part = _share(matrices, world)
            found += [steady("to owners", part, 1), steady("from owners", part, 1)]
        return Traffic(tuple(found))


def _share(size: int, world: int) -> int:
    return -(-size // world)
