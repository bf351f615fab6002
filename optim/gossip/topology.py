"""The usual topologies, and one's own: rings, tori, exponential graphs, hypercubes, stars, nodes of ranks, edge lists.

All are doubly stochastic; those called directed are not symmetric, which some exchanges need (`require_symmetric`). One
rank is every topology's trivial case. Sizes of gaps below are of `Topology.gap`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.gossip.mixing import Topology

__all__ = [
    "TOPOLOGIES",
    "Topology",
    "among",
    "complete",
    "exponential",
    "from_edges",
    "from_matrix",
    "hierarchical",
    "hypercube",
    "one_peer_exponential",
    "ring",
    "star",
    "topology",
    "torus",
]


def _eye(n: int) -> Tensor:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"a topology must have a whole number of ranks, at least 1, got {n!r}")
    return torch.eye(n, dtype=torch.float64)


def _mean_of_shifts(n: int, hops: Sequence[int]) -> Tensor:
    """The mean of what ranks i - h hold, over the hops h: a circulant (n, n), hops that coincide counted as often."""
    eye = _eye(n)
    return torch.stack([eye.roll(hop, 0) for hop in hops]).sum(0) / len(hops)


def _log2(n: int) -> int:
    """ceil(log2 n), in integers."""
    return (n - 1).bit_length()


def ring(n: int) -> Topology:
    """A third each for oneself and both neighbours; n = 2: halves. Symmetric; λ_k = 1/3 + 2/3 cos(2πk/n), so that the
    gap falls as 4π²/3n².
    """
    return Topology("ring", (_mean_of_shifts(n, (0, 1) if n == 2 else (0, 1, -1)),))


def torus(n: int, rows: int | None = None) -> Topology:
    """A rows × columns grid closed at its ends, a fifth each for oneself and four neighbours. Symmetric;
    λ = 1/5 + 2/5 (cos(2πa/rows) + cos(2πb/columns)). Rank i stands in row i // columns.

    Along a side of two both neighbours are one, whose weight is two fifths then: sides from three on mix better.

    Args:
        rows: a divisor of `n`, with at least two rows and two columns. Default: as square as can be, rows <= columns.
    """
    if n == 1:
        return Topology("torus", (_eye(n),))
    _eye(n)  # refuses what is no size
    if rows is None:
        rows = max(side for side in range(1, math.isqrt(n) + 1) if n % side == 0)
        if rows == 1:
            raise ValueError(f"a torus of {n} ranks, a prime, would be a ring: use ring, or a size with two factors")
    elif rows < 2 or n % rows or n // rows < 2:
        raise ValueError(f"rows must divide the {n} ranks of a torus into rows and columns of two or more, got {rows}")
    down, across = _eye(rows), _eye(n // rows)
    steps = [torch.kron(down.roll(hop, 0), across) for hop in (1, -1)]
    steps += [torch.kron(down, across.roll(hop, 0)) for hop in (1, -1)]
    return Topology("torus", (torch.stack([_eye(n), *steps]).sum(0) / 5.0,))


def exponential(n: int) -> Topology:
    """Equal weights for oneself and the ranks 1, 2, 4, … before: ceil(log2 n) messages a round. Directed (from n = 4
    on); the gap is 2 / (1 + ceil(log2 n)) for even n, and larger for odd ones (Ying et al. 2021).
    """
    _eye(n)
    return Topology("exponential", (_mean_of_shifts(n, (0, *(2**k for k in range(_log2(n))))),))


def one_peer_exponential(n: int) -> Topology:
    """One message a round: in round t the half of oneself and the half of the rank 2^(t mod ceil(log2 n)) before.
    Directed (from n = 3 on).

    For powers of two the ranks agree exactly after a whole schedule (Assran et al. 2019; Ying et al. 2021). For other
    sizes they only come closer: `second` says by how much, such as 0.60 a round for 6 ranks.
    """
    if n == 1:
        return Topology("one_peer_exponential", (_eye(n),))
    _eye(n)
    return Topology("one_peer_exponential", tuple(_mean_of_shifts(n, (0, 2**k)) for k in range(_log2(n))))


def hypercube(n: int) -> Topology:
    """One message a round, in pairs: in round t the halves of oneself and of rank i XOR 2^(t mod log2 n). Symmetric,
    and exact after log2 n rounds; for powers of two alone.
    """
    eye = _eye(n)
    if n & (n - 1):
        better = "one_peer_exponential or ring" if n % 2 else "one_peer_exponential, ring or torus"
        raise ValueError(f"a hypercube pairs a power of two of ranks, got {n}: use {better}")
    ranks = torch.arange(n)
    pairs = [(eye + eye[ranks ^ (1 << t)]) / 2.0 for t in range(_log2(n))]
    return Topology("hypercube", tuple(pairs) or (eye,))


def complete(n: int) -> Topology:
    """Everybody's mean, 1/n each: exact in one round of n - 1 messages. Symmetric."""
    return Topology("complete", (torch.full_like(_eye(n), 1.0 / n),))


def star(n: int) -> Topology:
    """Rank 0 hears all others and they hear it, with Metropolis-Hastings weights of 1/n: a gap of 1/n. Symmetric."""
    _eye(n)
    return Topology("star", from_edges(n, [(0, rank) for rank in range(1, n)]).rounds)


def hierarchical(n: int, per_node: int, between: str | Topology = "ring") -> Topology:
    """The mean within each node of `per_node` consecutive ranks, gossip between nodes: W = W_between ⊗ (1/p)11ᵀ.

    As weights alone: a rank hears every member of its own node and of each node that its node hears, so that the
    messages a round are (d + 1) p - 1 for d neighbours between nodes. Leaders that speak for their nodes send less for
    the same result; that takes an exchange that knows of nodes.

    Args:
        per_node: p, a divisor of n.
        between: the graph of the n / p nodes: a name that needs no options, or a topology of that size.
    """
    _eye(n)
    if per_node < 1 or n % per_node:
        raise ValueError(f"per_node must be a divisor of the {n} ranks, got {per_node}")
    outer = topology(between, n // per_node)
    mean = complete(per_node).rounds[0]
    return Topology(f"hierarchical {outer.name}", tuple(torch.kron(w, mean) for w in outer.rounds))


def from_edges(n: int, edges: Sequence[Sequence[float]]) -> Topology:
    """An undirected graph, named `custom`. Symmetric.

    Args:
        edges: each once, as (i, j), which get Metropolis-Hastings weights 1 / (1 + max(d_i, d_j)) by the ranks' numbers
            of neighbours d (Xiao, Boyd and Lall 2005); or each as (i, j, weight), of which every rank has at most 1 in
            sum. A rank keeps the rest for itself.
    """
    weights = torch.zeros_like(_eye(n))
    weighted = {len(edge) == 3 for edge in edges}
    if len(weighted) > 1:
        raise ValueError("either all edges or none must have a weight, got both: give (i, j) or (i, j, weight)")
    for edge in edges:
        if len(edge) not in (2, 3):
            raise ValueError(f"an edge must be (i, j) or (i, j, weight), got {tuple(edge)}")
        i, j, weight = edge[0], edge[1], edge[2] if len(edge) == 3 else 1.0
        if i != int(i) or j != int(j) or not (0 <= i < n and 0 <= j < n):
            raise ValueError(f"an edge must join two of the ranks 0 to {n - 1}, got {tuple(edge)}")
        i, j = int(i), int(j)
        if i == j:
            raise ValueError(f"an edge must join two different ranks, got {tuple(edge)}: own weights are what remains")
        if weights[i, j]:
            raise ValueError(f"an edge must be listed once, in one direction, got a second one of ranks {i} and {j}")
        if not (math.isfinite(weight) and weight > 0.0):
            raise ValueError(f"the weight of an edge must be above 0 and finite, got {tuple(edge)}: leave others out")
        weights[i, j] = weights[j, i] = weight
    if weighted != {True}:
        degrees = weights.sum(1)
        weights /= 1.0 + torch.maximum(degrees[:, None], degrees)
    given = weights.sum(1)
    most = int(given.argmax())
    if given[most] > 1.0 + n * torch.finfo(given.dtype).eps:
        raise ValueError(
            f"the weights of a rank's edges must sum to at most 1, got {float(given[most]):g} at rank {most}"
        )
    weights.diagonal().copy_((1.0 - given).clamp(min=0.0))
    return Topology("custom", (weights,))


def among(graph: Topology, members: Sequence[int], n: int) -> Topology:
    """`graph` for some ranks of n, the others gone: its rank k is the k-th member.

    Ranks keep their numbers when the graph is formed anew: those that were lost leave gaps, a new one has a new number.

    Args:
        members: as many as the graph has ranks.
        n: numbers that have been given.
    """
    known = sorted(set(members))
    if len(known) != len(members) or graph.size != len(known) or known[0] < 0 or known[-1] >= n:
        raise ValueError(
            f"members must be {graph.size} different ranks from 0 to {n - 1}, one for each of {graph.name}, got "
            f"{list(members)}"
        )
    if graph.gone:
        raise ValueError(f"{graph.name} must be a graph of ranks that are there, and {list(graph.gone)} are gone")
    rounds, places = [], torch.tensor(members)
    for weights in graph.rounds:
        rounds.append(_eye(n))
        rounds[-1][places[:, None], places] = weights
    return Topology(graph.name, tuple(rounds), tuple(rank for rank in range(n) if rank not in known))


def from_matrix(weights: Any, n: int | None = None) -> Topology:
    """One's own weights, named `custom`: a doubly stochastic W (n, n), rows are receivers, or a sequence of them.

    Args:
        weights: a tensor (n, n) or (rounds, n, n), a sequence of tensors (n, n), or nested lists of numbers.
        n: how many ranks they should have, where that is known.
    """
    if isinstance(weights, Tensor):
        rounds = weights.detach().double()
    else:
        try:
            rounds = torch.stack([torch.as_tensor(part, dtype=torch.float64) for part in weights])
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"weights must be numbers in rows of one length, of one or several rounds: {error}"
            ) from None
    made = Topology("custom", tuple(rounds) if rounds.ndim == 3 else (rounds,))
    return made if n is None else _of_size(made, n)


def _of_size(made: Topology, n: int) -> Topology:
    if made.size != n:
        raise ValueError(f"{made.name}: a topology must have as many ranks as the run, {n}, got {made.size}")
    return made


def _custom(n: int, edges: Sequence[Sequence[float]] | None = None, matrix: Any = None) -> Topology:
    if (edges is None) == (matrix is None):
        raise ValueError(
            "a custom topology needs either edges or a matrix, got " + ("none" if edges is None else "both")
        )
    return from_matrix(matrix, n) if edges is None else from_edges(n, edges)


_BUILDERS = {
    "ring": ring,
    "torus": torus,
    "exponential": exponential,
    "one_peer_exponential": one_peer_exponential,
    "hypercube": hypercube,
    "complete": complete,
    "star": star,
    "hierarchical": hierarchical,
    "custom": _custom,
}

TOPOLOGIES = tuple(_BUILDERS)
"""The names that `topology` knows."""


def topology(spec: str | Topology | Mapping[str, Any] | Sequence[Sequence[float]], n: int, **options: Any) -> Topology:
    """The topology of `n` ranks that a configuration names.

    Args:
        spec: one of `TOPOLOGIES`; a mapping of such a `name` and options; an edge list; or a topology, which is
            returned if it has `n` ranks.
        options: of the builder of that name: `rows` of `torus`; `per_node` and `between` of `hierarchical`; `edges` or
            `matrix` of `custom`.
    """
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise ValueError(f"a topology must have a name, one of {', '.join(TOPOLOGIES)}, got {dict(spec)!r}")
        name, options = spec["name"], {**{key: spec[key] for key in spec if key != "name"}, **options}
    elif isinstance(spec, str):
        name = spec
    elif options:
        raise ValueError(f"only a topology that is named takes options, got {', '.join(options)}")
    else:
        return _of_size(spec, n) if isinstance(spec, Topology) else from_edges(n, spec)
    if name not in TOPOLOGIES:
        raise ValueError(f"topology must be one of {', '.join(TOPOLOGIES)}, got {name!r}")
    parameters = list(inspect.signature(_BUILDERS[name]).parameters.values())[1:]
    takes = [parameter.name for parameter in parameters]
    if unknown := [key for key in options if key not in takes]:
        raise ValueError(f"{name} takes {', '.join(takes) or 'no options'}, got {', '.join(unknown)}")
    if missing := [p.name for p in parameters if p.default is p.empty and p.name not in options]:
        raise ValueError(f"{name} needs {', '.join(missing)}, got none")
    return _BUILDERS[name](n, **options)
