"""What `gossip.py` compares: by name, how ranks train, and what they should send and take by the cost model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gossip_clocks import BACKWARD
from gossip_means import GAP, RANK, coordinates, exact, low_numbers, powersgd, projected, quantised
from gossip_ranks import Apart, Average, Learner, Recipe, Replicas, Training

from thinrank.optim import GaLoreConfig
from thinrank.optim.gossip.cost import (
    Network,
    all_reduce_bytes,
    coded_bytes,
    neighbour_bytes,
    neighbours,
    ring_all_reduce,
    step_seconds,
    tree_all_reduce,
)
from thinrank.optim.gossip.schemes import SCHEMES

BUCKET = 512  # entries of a compressor's, with one scale
INTERVAL = 15  # of DiLoCo


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What formulas are of.

    Attributes:
        shapes: of the parameters.
        low: of each, whether it is projected.
    """

    shapes: list[tuple[int, ...]]
    low: list[bool]

    @property
    def numbers(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def factors(self, ranks: int) -> tuple[int, int]:
        """Numbers of both factors of matrices at rank `ranks`, and of what is no matrix of more."""
        low = [shape for shape in self.shapes if len(shape) > 1 and ranks < min(shape)]
        both = sum(ranks * (shape[0] + math.prod(shape[1:])) for shape in low)
        return both, self.numbers - sum(math.prod(shape) for shape in low)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the tables.

    Attributes:
        about: for people.
        make: the ranks' training.
        message: bytes of what a rank says in an exchange: once to each neighbour, or all ranks reduce it.
        among: `neighbours`; `all`, who reduce it; or `pieces`, one from each rank to each other, there and back.
        collectives: one after the other.
        interval: steps between two exchanges.
        behind: the share of a step's computation behind which the exchange runs.
        early: it runs behind the next step.
        optimizer: with which one its seconds of computation are.
        needs: the scheme that it is of.
    """

    about: str
    make: Callable[[Recipe], Training]
    message: Callable[[Sizes, int], float]
    among: str = "neighbours"
    collectives: int = 1
    interval: int = 1
    behind: float = 0.0
    early: bool = False
    optimizer: str = "adamw"
    needs: str | None = None

    def bytes(self, sizes: Sizes, ranks: int) -> float:
        """That leave a rank in a step, headers and checks left out."""
        message = self.message(sizes, ranks)
        degree = min(2, ranks - 1)
        sent = neighbour_bytes(degree, message) if self.among == "neighbours" else all_reduce_bytes(ranks, message)
        return sent / self.interval

    def seconds(
        self, sizes: Sizes, ranks: int, network: Network, *, compute: float, codec: float, reduce: str = "ring"
    ) -> float:
        """Of a step, by the cost model."""
        message = self.message(sizes, ranks)
        if self.among == "neighbours":
            exchange = neighbours(min(2, ranks - 1), message, network)
        elif self.among == "pieces":  # two rounds of a piece to each other rank
            exchange = 2 * network.latency + all_reduce_bytes(ranks, message) / network.bandwidth
        else:
            each = ring_all_reduce if reduce == "ring" else tree_all_reduce
            exchange = each(ranks, message, network, self.collectives)
        behind = 1.0 if self.early else self.behind
        if self.interval > 1:
            return compute + (codec + exchange) / self.interval
        return codec + step_seconds(compute, exchange, behind)


def _adamw(average: Callable[[Recipe], Callable[[Learner], Average]]) -> Callable[[Recipe], Training]:
    return lambda recipe: Replicas(recipe, average(recipe))


def _galore(recipe: Recipe) -> Training:
    config = GaLoreConfig(rank=0.25, svd="power", update_proj_gap=GAP, lr=0.02, embedding_lr=0.04)
    return Replicas(recipe, coordinates, config)


def _apart(scheme: str, codec: str, interval: int = 1, **options: Any) -> Callable[[Recipe], Training]:
    return lambda recipe: Apart(recipe, scheme, codec, interval, options)


def _coded(bits: int) -> Callable[[Sizes, int], float]:
    return lambda sizes, ranks: coded_bytes(sizes.numbers, bits, BUCKET)


def _low(sizes: Sizes, ranks: int) -> float:
    return 4 * sum(sizes.factors(RANK))


def _halves(sizes: Sizes, ranks: int) -> float:
    both, rest = sizes.factors(RANK)
    return 4 * (both / 2 + rest)


def _coordinates(sizes: Sizes, ranks: int) -> float:
    return (2 * low_numbers(sizes.shapes, sizes.low) * (GAP - 1) + 4 * sizes.numbers) / GAP


_METHODS: dict[str, Method] = {
    "allreduce": Method(
        about="all-reduce of gradients in float32, as DDP",
        make=_adamw(lambda recipe: exact(None)),
        message=lambda sizes, ranks: 4 * sizes.numbers,
        among="all",
        behind=BACKWARD,
    ),
    "allreduce-bf16": Method(
        about="all-reduce of gradients in bfloat16",
        make=_adamw(lambda recipe: exact(torch.bfloat16)),
        message=lambda sizes, ranks: 2 * sizes.numbers,
        among="all",
        behind=BACKWARD,
    ),
    "allreduce-8": Method(
        about="all-reduce of gradients in 8 bits, pieces compressed twice",
        make=_adamw(lambda recipe: quantised(recipe.ranks, recipe.seed)),
        message=_coded(8),
        among="pieces",
        behind=BACKWARD,
        needs="allreduce",
    ),
    "powersgd-4": Method(
        about="PowerSGD of rank 4 as torch's hook has it, from the third step on",
        make=_adamw(lambda recipe: powersgd(recipe.ranks, recipe.seed)),
        message=_low,
        among="all",
        collectives=3,
        behind=BACKWARD,
    ),
    "thinrank": Method(
        about="thinrank_ddp, GaLore of rank 1/4 with a new subspace every 50 steps, coordinates in bfloat16",
        make=_galore,
        message=_coordinates,
        among="all",
        behind=BACKWARD,
        optimizer="galore",
    ),
    "updates": Method(
        about="all-reduce of updates in float32: each rank's own AdamW, weights that stay equal",
        make=_apart("allreduce", "float32"),
        message=lambda sizes, ranks: 4 * sizes.numbers,
        among="all",
        needs="allreduce",
    ),
    "dpsgd": Method(
        about="D-PSGD, weights in float32, a ring",
        make=_apart("dpsgd", "float32"),
        message=lambda sizes, ranks: 4 * sizes.numbers,
        early=True,
        needs="dpsgd",
    ),
    "dcd-8": Method(
        about="DCD-PSGD in 8 bits, a ring", make=_apart("dcd", "uniform8"), message=_coded(8), early=True, needs="dcd"
    ),
    "ecd-8": Method(
        about="ECD-PSGD in 8 bits, a ring", make=_apart("ecd", "uniform8"), message=_coded(8), early=True, needs="ecd"
    ),
    "ecd-8-restart": Method(
        about="ECD-PSGD in 8 bits, a ring, whose time begins anew every 10 steps",
        make=_apart("ecd", "uniform8", restart=10),
        message=_coded(8),
        early=True,
        needs="ecd",
    ),
    "choco-4": Method(
        about="CHOCO-SGD in 4 bits, a ring", make=_apart("choco", "uniform4"), message=_coded(4), needs="choco"
    ),
    "choco-4-with": Method(
        about="CHOCO-SGD in 4 bits that steps by the copies it has, a ring",
        make=_apart("choco", "uniform4", order="with"),
        message=_coded(4),
        early=True,
        needs="choco",
    ),
    "powergossip-4": Method(
        about="PowerGossip of rank 4, a ring",
        make=_apart("powergossip", "float32", rank=RANK),
        message=_halves,
        early=True,
        needs="powergossip",
    ),
    "diloco": Method(
        about=f"DiLoCo, {INTERVAL} steps of AdamW between two means of the weights in float32",
        make=_apart("diloco", "float32", INTERVAL),
        message=lambda sizes, ranks: 4 * sizes.numbers,
        among="all",
        interval=INTERVAL,
        needs="diloco",
    ),
}
METHODS = {name: method for name, method in _METHODS.items() if method.needs is None or method.needs in SCHEMES}
"""By name; those whose schemes there are."""


def sizes_of(recipe: Recipe) -> Sizes:
    learner = Learner(recipe)
    return Sizes(shapes=learner.shapes, low=projected(learner))


def typical(seconds: Sequence[float]) -> float:
    """The median, 0 of none."""
    return statistics.median(seconds) if seconds else 0.0
