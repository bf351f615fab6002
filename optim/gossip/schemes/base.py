"""What every way to exchange weights is: from weights and a local update to new weights, with messages in between."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import Codec, Compressor, Float32, Measured, finite, identity_of, key_of
from thinrank.optim.gossip.mail import Mail
from thinrank.optim.gossip.message import HEADER_BYTES
from thinrank.optim.gossip.rounds import Step
from thinrank.optim.gossip.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands.

    Attributes:
        rank: which it is.
        topology: who averages with whom.
        seed: of all chance; the same on every rank.
        check_every: steps between two looks at whether copies of neighbours still are what they are copies of.
        patience: rounds in a row without a message from a neighbour after which it is lost.
        compressor: what the scheme's codec was made by: for its number in messages' headers, and for a scheme that
            sends pieces of the weights and binds it to them.
    """

    rank: int
    topology: Topology
    seed: int = 0
    check_every: int = 100
    patience: int = 100
    compressor: Compressor = field(default_factory=Float32)


def require(name: str, value: float, holds: Callable[[float], bool], rule: str, remedy: str) -> None:
    """Refuses a number, such as an option of a scheme, that is not what it must be.

    Raises:
        ValueError: in one sentence of the rule, the value and what to do.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}: {remedy}")


def require_whole(name: str, value: int, least: int, remedy: str) -> None:
    """Refuses what is no whole number of at least `least`."""
    require(name, value, lambda n: isinstance(n, int) and n >= least, f"a whole number of at least {least}", remedy)


@dataclass(slots=True)
class Tally:
    """What has happened since a scheme was made.

    Attributes:
        skipped: steps whose own update was not finite.
        counts: messages that were `lost`, `corrupt`, `skipped` by their sender, copies that were `repaired`.
        error: of the compressor, as measured (`Measured.alpha`).
    """

    skipped: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    error: Measured = field(default_factory=Measured)


class Scheme(ABC):
    """One rank's side of an exchange.

    `step(weights, update)` takes the weights (numel,) in float32 as the last step returned them, and the local update
    that the optimizer would add to them, and returns the new weights. It changes neither. A scheme holds whatever else
    it has to remember in tensors, which `state` names.

    An update that is not finite is left out: `weights` are then what this rank has to say, and its message tells so.

    Args:
        place: where this rank stands.
        codec: how messages are made of vectors of the weights' size.
    """

    NAME: ClassVar[str]
    SYMMETRIC: ClassVar[bool] = False
    """Needs weights of the topology that are the same in both directions."""
    STATIC: ClassVar[bool] = False
    """Needs neighbours that stay the same."""
    LINEAR: ClassVar[bool] = False
    """Sends weights and not differences, and takes no compressor but a cast."""
    USUAL: ClassVar[str] = "float32"
    """The compressor where none is asked for."""

    @classmethod
    def sends(cls, graph: Topology, rank: int, codec: Codec, options: Mapping[str, Any]) -> float:
        """Bytes that leave a rank in an exchange, in the mean over the rounds of a schedule; checks left out."""
        rounds = len(graph.rounds)
        messages = sum(len(graph.targets(rank, t)) for t in range(rounds)) / rounds
        return messages * (HEADER_BYTES + codec.nbytes)

    @classmethod
    def holds(cls, graph: Topology, rank: int, codec: Codec, options: Mapping[str, Any]) -> int:
        """Bytes that a rank remembers beside its weights."""
        return 0

    def __init__(self, place: Place, codec: Codec) -> None:
        self.place, self.codec = place, codec
        self.mail = Mail(place.rank, place.patience, identity_of(place.compressor.name), codec.numel)
        self.tally = Tally(counts=self.mail.counts)
        self.steps = 0

    @classmethod
    def refuse_options(cls, options: Mapping[str, Any]) -> None:
        """A ValueError for an option that the scheme does not have."""
        known = [name for name in inspect.signature(cls).parameters if name not in ("place", "codec")]
        for name in options:
            if name not in known:
                has = f"its options are {', '.join(known)}" if known else "it has none"
                raise ValueError(f"scheme={cls.NAME} has no option {name}; {has}: leave it out")

    @classmethod
    def limit(cls, graph: Topology) -> tuple[float, str]:
        """How much a compressor may err (`Codec.error`), and what says so; infinity where nothing does."""
        return math.inf, "nothing"

    @abstractmethod
    def start(self, weights: Tensor) -> None:
        """Begins where all ranks have the same `weights`."""

    def introduce(self, weights: Tensor) -> Step:
        """Begins where ranks have different weights; returns this rank's."""
        self.start(weights)
        return weights
        yield  # a generator, whose rounds are none

    def step(self, weights: Tensor, update: Tensor) -> Step:
        """One exchange. To be driven on all ranks together, and to its end before the next one begins."""
        good = finite(update)
        self.tally.skipped += not good
        new = yield from self._step(weights, update if good else torch.zeros_like(weights), good)
        self.steps += 1
        return new

    @abstractmethod
    def _step(self, weights: Tensor, update: Tensor, good: bool) -> Step: ...

    def state(self) -> dict[str, Tensor]:
        """What the scheme remembers, by name; not copied."""
        return {}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Goes on from what `state` gave on this rank after so many steps."""
        self.steps = steps

    def key(self, part: int = 0, rank: int | None = None) -> int:
        """Of the chance in this step's message of a rank, or of all ranks with rank -1."""
        return key_of(self.place.seed, self.place.rank if rank is None else rank, self.steps, part)

    @property
    def sources(self) -> tuple[int, ...]:
        """Whose messages come here in this step, ascending."""
        return self.place.topology.sources(self.place.rank, self.steps)

    @property
    def targets(self) -> tuple[int, ...]:
        """Whom this rank's messages of this step are for, ascending."""
        return self.place.topology.targets(self.place.rank, self.steps)

    def mixed(self, own: Tensor, others: Mapping[int, Tensor]) -> Tensor:
        """Σⱼ Wᵢⱼ xⱼ, in the order of the ranks, for this step's W; the weight of who is missing falls to one's own."""
        return self.pulled(own, others).add_(own)

    def pulled(self, own: Tensor, others: Mapping[int, Tensor]) -> Tensor:
        """Σⱼ Wᵢⱼ (xⱼ − xᵢ): what `mixed` adds to one's own.

        Of differences, because three thirds in float32 are 1 + 3e-8, by which weights would grow in every step.
        """
        row = self.place.topology.weights(self.steps)[self.place.rank]
        found = torch.zeros_like(own)
        for j in self.sources:
            if j in others:
                found.add_(others[j] - own, alpha=float(row[j]))
        return found
