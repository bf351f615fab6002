"""From names and options to one rank's side of an exchange, and what that will hold and send."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thinrank.optim.gossip.compress import Compressor, Measured, compressor
from thinrank.optim.gossip.schemes import Place, Scheme, scheme_class
from thinrank.optim.gossip.topology import Topology, topology

_log = logging.getLogger(__name__)


def graph_of(what: Any, ranks: int) -> Topology:
    """A `Topology` of so many ranks, by its name or as one gives it; None: complete, for schemes among all ranks."""
    what = "complete" if what is None else what
    graph = what if isinstance(what, Topology) else topology(what, ranks)
    if graph.size != ranks:
        raise ValueError(
            f"the topology {graph.name} is of {graph.size} ranks, and there are {ranks}: make it for all of them"
        )
    return graph


def codec_of(scheme: str, what: str | Compressor | None) -> Compressor:
    """A `Compressor`, by its name or as one gives it, or the one that a scheme usually has."""
    if isinstance(what, Compressor):
        return what
    return compressor(scheme_class(scheme).USUAL if what is None else what)


def made(
    scheme: str,
    place: Place,
    codec: Compressor,
    shapes: list[tuple[int, ...]],
    strict: bool,
    options: Mapping[str, Any],
) -> Scheme:
    """One rank's side of an exchange, or a ValueError where its parts do not go together."""
    kind, graph = scheme_class(scheme), place.topology
    if kind.STATIC and not graph.static:
        raise ValueError(
            f"scheme={scheme} keeps a copy of each neighbour, which must hear every message, and topology="
            f"{graph.name} changes neighbours from step to step: use a static graph, or scheme=dpsgd or powergossip"
        )
    if kind.SYMMETRIC and not graph.symmetric:
        raise ValueError(
            f"scheme={scheme} needs weights that are the same in both directions, and topology={graph.name} has "
            "others: use ring, torus, hypercube, complete or Metropolis–Hastings weights (a list of edges)"
        )
    if kind.LINEAR and codec.name not in ("float32", "bf16"):
        raise ValueError(
            f"scheme={scheme} sends weights themselves, of which compressor={codec.name} would leave too little: use "
            "float32 or bf16, or a scheme that sends differences (dcd, choco)"
        )
    kind.refuse_options(options)
    limit, what = kind.limit(graph)
    error = usual_error(codec) if math.isfinite(limit) else 0.0
    if error > limit:
        sentence = (
            f"compressor={codec.name} errs by {error:.3g} of a vector of normal numbers, and {what} of scheme={scheme} "
            f"on topology={graph.name} with {graph.size} ranks ends at {limit:.3g}: use more bits, smaller buckets or "
            "a denser graph"
        )
        if strict:
            raise ValueError(sentence)
        _log.warning("%s", sentence)
    return kind(place, codec.bind(shapes), **options)


@functools.cache
def usual_error(codec: Compressor) -> float:
    """√(‖C(z) − z‖² / ‖z‖²) of a matrix (128, 128) of normal numbers: what to expect, far below the worst case."""
    bound, measured = codec.bind([(128, 128)]), Measured()
    z = torch.randn(bound.numel, generator=torch.Generator().manual_seed(0))
    for key in range(4):
        measured.add(z, bound.decode(bound.encode(z, key), key))
    return measured.alpha


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What an exchange will be.

    Attributes:
        sentence: for people.
        sent: bytes that leave each rank in an exchange, by rank; in the mean over the rounds of a schedule.
        held: bytes that a rank remembers for it beside its weights, of the one that has most of them.
    """

    sentence: str
    sent: tuple[float, ...]
    held: int


def expected(
    graph: Topology, scheme: str, codec: Compressor, shapes: Sequence[Sequence[int]], options: Mapping[str, Any]
) -> Exchanged:
    """What an exchange of tensors of these shapes will be, from its parts alone."""
    kind, bound = scheme_class(scheme), codec.bind(shapes)
    limit, what = kind.limit(graph)
    sent = tuple(kind.sends(graph, rank, bound, options) for rank in range(graph.size))
    held = max(kind.holds(graph, rank, bound, options) for rank in range(graph.size))
    error = f"; {codec.name} errs by {usual_error(codec):.2g} of normal numbers" if codec.name != "float32" else ""
    if math.isfinite(limit):
        error += f", {what} ends at {limit:.2g}" if error else ""
    sentence = (
        f"{scheme} on {graph.name} of {graph.size} ranks, spectral gap {graph.gap:.3g}; "
        f"{max(sent) / 2**20:.3g} MiB leave a rank in an exchange{error}"
    )
    return Exchanged(sentence, sent, held + 4 * bound.numel)
