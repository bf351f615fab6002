"""How a strategy divides weights, gradients and state among processes, and what travels for a step.

A strategy is one small class; `STRATEGIES` has them by the names that configurations use. Those that share out the
optimizer's state are in `thinrank.trainers.plan.owners`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from thinrank.optim.divided import length
from thinrank.optim.gossip.parts import Exchanged, expected, graph_of
from thinrank.optim.grouping import Row
from thinrank.optim.messages import BUCKET_BYTES, COARSE
from thinrank.optim.remembering import MEMORIES_EVERY, SIDE_BY_SIDE_BYTES
from thinrank.trainers.errors import UserError
from thinrank.trainers.plan.held import Around, Held, Strategy, images_left
from thinrank.trainers.plan.owners import Owners, Pieces, Zero
from thinrank.trainers.plan.wire import (
    FLOAT,
    WHENS,
    Traffic,
    Transfer,
    averaged_gradients,
    averaged_images,
    gradient_bytes,
    sketched,
    width,
)
from thinrank.trainers.strategies.config import MESSAGE_DTYPES, GossipConfig, norms_travel


@dataclass(frozen=True, slots=True)
class Alone:
    """One process, or several that do not meet."""

    def held(self, rows: Sequence[Row], frozen: int, world: int, in_backward: str = "off") -> Held:
        everything = gradient_bytes(rows)
        left = {"off": everything, "project": images_left(rows), "step": 0}[in_backward]
        return Held(
            weights=frozen + everything,
            gradients=left,
            state=sum(row.state_bytes for row in rows),
            bases=sum(row.bases_bytes for row in rows),
            arriving=left,
        )

    def sent(self, rows: Sequence[Row], world: int) -> Traffic:
        return Traffic()


@dataclass(frozen=True, slots=True)
class Averaged:
    """torch's DDP: everything everywhere, gradients summed up in buckets that are as large as they are and stay."""

    def held(self, rows: Sequence[Row], frozen: int, world: int, in_backward: str = "off") -> Held:
        alone = Alone().held(rows, frozen, world, in_backward)
        return replace(alone, buffers=gradient_bytes(rows), lasting=gradient_bytes(rows))

    def sent(self, rows: Sequence[Row], world: int) -> Traffic:
        return averaged_gradients(rows)


@dataclass(frozen=True, slots=True)
class Replicas:
    """`MatrixOptimizer.replicate`: everything everywhere; gradients are freed once they are sent.

    Attributes:
        messages: `auto`, `full`, `signs` or `majority`.
        dtype: of the messages.
        memories_every: steps between two messages of what replicas remember apart; None: none are sent.
        embeddings: how their gradients travel.
        norms: sketches travel, by which the norm of gradients is known.
    """

    messages: str = "auto"
    dtype: torch.dtype | None = None
    memories_every: int | None = MEMORIES_EVERY
    embeddings: str = "dense"
    norms: bool = True

    def held(self, rows: Sequence[Row], frozen: int, world: int, in_backward: str = "off") -> Held:
        alone = Alone().held(rows, frozen, world)
        sends = [row for row in rows if row.sends_image and self.messages != "full"]
        left = images_left(sends) + gradient_bytes([row for row in rows if row not in sends])
        letters = self.letters(rows)
        if self.dtype is None:  # gradients are views of what came, but for rounded ones
            rounded = sum(row.elements * row.itemsize for row in rows if width(row, self.embeddings) != row.itemsize)
            arriving = letters + images_left(sends) + rounded
        else:
            arriving = letters + left + max((row.elements * row.itemsize for row in sends), default=0)
        brought = max(self._side_by_side(rows), default=0)
        return replace(alone, gradients=left, buffers=self.largest_letter(rows), arriving=arriving, brought=brought)

    def _asks(self, row: Row) -> bool:
        return bool(row.asked) and self.messages != "full"

    def _side_by_side(self, rows: Sequence[Row]) -> Iterator[int]:
        """Bytes of what replicas that remember apart hold of gradients, and of what they ask for, at one time."""
        held = asked = 0
        for row in rows:
            if self._asks(row):
                held, asked = held + 4 * row.elements, asked + 4 * row.asked["usual"]
                yield held + 2 * asked
                if asked >= SIDE_BY_SIDE_BYTES:
                    held = asked = 0

    def sent(self, rows: Sequence[Row], world: int) -> Traffic:
        how = {"dtype": self.dtype, "messages": self.messages, "memories_every": self.memories_every}
        return averaged_images(rows, world=world, embeddings=self.embeddings, norms=self.norms, **how)

    def letters(self, rows: Sequence[Row]) -> int:
        """Bytes of the messages in a step that renews."""
        return sum(
            FLOAT * sketched(row, self.norms)
            if self._asks(row)
            else row.elements * (self.dtype.itemsize if self.dtype else width(row, self.embeddings))
            for row in rows
        )

    def largest_letter(self, rows: Sequence[Row]) -> int:
        """Bytes of the largest letter in a step that renews; letters are filled in the order of backward."""
        largest = letter = usual = 0
        for row in reversed(rows):
            if usual >= BUCKET_BYTES:
                letter = usual = 0
            if self.messages in COARSE and row.remainder:
                usual += row.elements // 8
            elif self._asks(row):
                usual += FLOAT * sketched(row, self.norms)
            elif row.sends_image and self.messages != "full":
                usual += FLOAT * (row.image["coordinates"] + (row.sketch if self.norms else 0))
            else:
                usual += row.elements * width(row, self.embeddings)
            letter += self.letters([row])
            largest = max(largest, letter)
        return largest


@dataclass(frozen=True)
class Islands(Pieces):
    """`MatrixOptimizer.replicate` of weights in pieces: replicas exchange what a step needs of gradients' pieces.

    Attributes:
        dtype: of what they send.
        norms: sketches travel, by which the norm of gradients is known.
    """

    dtype: torch.dtype | None = None
    norms: bool = True

    def rank(self, rows: Sequence[Row], frozen: int, rank: int) -> Held:
        """What one process holds. Gradients at a renewal are what has come."""
        found, pieces = super().rank(rows, frozen, rank), self._pieces(rows, rank)
        afar = Replicas(dtype=self.dtype, norms=self.norms)
        came = found.gradients if self.dtype is None else found.gradients + afar.letters(pieces)
        return replace(found, buffers=afar.largest_letter(pieces), arriving=came)

    def sent(self, rows: Sequence[Row], world: int) -> Traffic:
        near, ranks = super().sent(rows, world), self.divided.ranks
        how = {"dtype": self.dtype, "norms": self.norms}
        each = [averaged_images(self._pieces(rows, rank), **how).transfers for rank in range(ranks)]
        afar = []
        for of_kind in zip(*each, strict=True):
            between, renewal, averaged = (sum(own.size(when) for own in of_kind) / ranks for when in WHENS)
            mean = replace(of_kind[0], between=between, renewal=renewal, averaged=averaged)
            afar.append(replace(mean, ranks=of_kind * self.replicas, among=self.replicas))
        return Traffic((*near.transfers, *afar), near.framework)

    def _pieces(self, rows: Sequence[Row], rank: int) -> list[Row]:
        """What `rank` has of each weight, as if it were one."""
        found = []
        for row, member in zip(rows, self.divided, strict=True):
            place, here = member.place, length(member.place.spans[rank])
            image = row.image if row.sends_image and place.way in ("rows", "here") else {}
            own = {kind: numbers * here // max(place.size, 1) for kind, numbers in image.items()}
            matrices = 0 if place.way == "piece" else 1
            piece = replace(row, elements=here, image=own, sends_image=bool(own), matrices=matrices)
            found.append(replace(piece, asked={}, remainder={}))
        return found


@dataclass(frozen=True, slots=True)
class Gossips:
    """`Gossip`: everything everywhere, gradients stay; weights are exchanged, and copies of neighbours kept.

    Attributes:
        exchanged: what an exchange is.
        interval: steps of the optimizer between two.
    """

    exchanged: Exchanged
    interval: int

    def held(self, rows: Sequence[Row], frozen: int, world: int, in_backward: str = "off") -> Held:
        alone = Alone().held(rows, frozen, world, in_backward)
        return replace(alone, buffers=self.exchanged.held, lasting=self.exchanged.held)

    def sent(self, rows: Sequence[Row], world: int) -> Traffic:
        """Each message goes to one other; nothing of it is shared out."""
        sizes = [size / self.interval for size in self.exchanged.sent]
        each = tuple(Transfer(kind="gossip", between=n, renewal=n, averaged=n, passes=1) for n in sizes)
        mean = sum(sizes) / len(sizes)
        return Traffic((Transfer(kind="gossip", between=mean, renewal=mean, averaged=mean, passes=1, ranks=each),))


def _gossip(config: GossipConfig, world: int, around: Around) -> Strategy:
    graph, shapes = graph_of(config.made_topology(), world), around.routing.shapes()
    return Gossips(
        expected(graph, config.scheme, config.made_compressor(), shapes, config.scheme_options), config.interval
    )


def _rows(config: Any, world: int, around: Around) -> Strategy:
    settings = {"replicas": config.replicas, "reshard": config.reshard_after_forward}
    if config.messages == "full":
        return Pieces.of_rows(around, world, **settings)
    islands = Islands.of_rows(around, world, averages=False, **settings)
    return replace(islands, dtype=MESSAGE_DTYPES[config.dtype], norms=norms_travel(config.norms, around.clips))


def _zero(stage: int, config: Any, world: int, around: Around) -> Strategy:
    return Zero.of(around, world, stage=stage)


STRATEGIES: dict[str, Callable[[Any, int, Around], Strategy]] = {
    "ddp": lambda config, world, around: Averaged(),
    "thinrank_ddp": lambda config, world, around: Replicas(
        config.messages,
        MESSAGE_DTYPES[config.dtype],
        config.memories_every,
        config.embeddings,
        norms_travel(config.norms, around.clips),
    ),
    "thinrank_owned": lambda config, world, around: Owners.of(
        around,
        world,
        messages=config.messages,
        dtype=MESSAGE_DTYPES[config.dtype],
        embeddings=config.embeddings,
        norms=norms_travel(config.norms, around.clips),
    ),
    "thinrank_fsdp2": _rows,
    "thinrank_gossip": _gossip,
    "gossip": _gossip,
    **{f"thinrank_zero{stage}": partial(_zero, stage) for stage in (1, 2, 3)},
}
"""From a strategy's configuration, the number of processes and what is around it to what it holds and sends, by `name`;
`auto` stands for one of them."""


def is_planned(config: Any) -> bool:
    """Whether somebody has said what the strategy holds and sends."""
    return config.name == "auto" or config.name in STRATEGIES


def strategy_of(config: Any, world: int, around: Around | None = None) -> Strategy:
    """What `config` holds and sends on `world` processes.

    Raises:
        UserError: nobody has said yet.
    """
    if config.name == "auto":
        return Averaged() if world > 1 else Alone()
    if not is_planned(config):
        raise UserError(
            f"there is no plan for strategy={config.name} yet: choose one of auto, {', '.join(STRATEGIES)}, or run it "
            "without a plan"
        )
    return STRATEGIES[config.name](config, world, around or Around())
