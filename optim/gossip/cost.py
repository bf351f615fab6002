"""What an exchange costs: bytes that leave a rank, seconds by the alpha-beta model, and when gossip is the faster one.

The model (Hockney 1994; collectives as in Thakur, Rabenseifner and Gropp 2005): a message takes `latency` seconds,
whatever its size, and its bytes over `bandwidth`. A link carries both directions at once, as network cards do, and no
two messages of different ranks share one. Messages are in bytes, of one rank and one step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALL_REDUCES = ("tree", "ring")


@dataclass(frozen=True, kw_only=True)
class Network:
    """What lies between two ranks.

    Args:
        latency: seconds of a message one way, however small, with what software adds; at least 0.
        bandwidth: bytes a second that a rank can send, while it receives as many; above 0. 1 Gbit/s are 125e6.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency) and self.latency >= 0.0):
            raise ValueError(f"latency must be at least 0 seconds and finite, got {self.latency}")
        if not self.bandwidth > 0.0:
            raise ValueError(f"bandwidth must be above 0 bytes a second, got {self.bandwidth}")


def _ranks(n: int) -> int:
    if n < 1:
        raise ValueError(f"there must be at least 1 rank, got {n}")
    return n


def coded_bytes(count: int, bits: float, bucket: int, scale_bytes: float = 2.0) -> float:
    """A message of `count` numbers in `bits` each, with a scale for each `bucket` of them: in bytes, not rounded up.

    Args:
        count: numbers that are sent. Of a sparse message those alone, and `bits` are of an index and a value.
        scale_bytes: of a scale. Default: 2, a 16-bit one (ours).
    """
    if bucket < 1:
        raise ValueError(f"a bucket must hold at least 1 number, got {bucket}")
    return count * (bits / 8.0 + scale_bytes / bucket)


def all_reduce_bytes(n: int, message: float) -> float:
    """Bytes that leave a rank in an all-reduce of `message` bytes by reduce-scatter and all-gather: 2(n-1)/n of it."""
    return 2.0 * (_ranks(n) - 1) / n * message


def all_gather_bytes(n: int, message: float) -> float:
    """Bytes that leave a rank where each of `n` sends its `message` bytes to all: n - 1 times as many."""
    return (_ranks(n) - 1) * message


def neighbour_bytes(degree: int, message: float) -> float:
    """Bytes that leave a rank that sends `message` bytes to each of `degree` neighbours (`Topology.degree`)."""
    if degree < 0:
        raise ValueError(f"degree must be at least 0, got {degree}")
    return degree * message


def ring_messages(n: int) -> int:
    """Messages that follow one another in a ring all-reduce: 2(n-1)."""
    return 2 * (_ranks(n) - 1)


def tree_messages(n: int) -> int:
    """Messages that follow one another in an all-reduce by halving and doubling: 2 ceil(log2 n)."""
    return 2 * (_ranks(n) - 1).bit_length()


def ring_all_reduce(n: int, message: float, network: Network, collectives: int = 1) -> float:
    """Seconds of an all-reduce around a ring: 2(n-1) latencies, and 2(n-1)/n of the message over the bandwidth.

    Args:
        collectives: in how many, one after the other, the `message` bytes are sent; each pays the latencies.
    """
    return collectives * ring_messages(n) * network.latency + all_reduce_bytes(n, message) / network.bandwidth


def tree_all_reduce(n: int, message: float, network: Network, collectives: int = 1) -> float:
    """Seconds of an all-reduce by halving and doubling: as `ring_all_reduce` with 2 ceil(log2 n) latencies each."""
    return collectives * tree_messages(n) * network.latency + all_reduce_bytes(n, message) / network.bandwidth


def all_gather(n: int, message: float, network: Network, collectives: int = 1) -> float:
    """Seconds of an all-gather around a ring of each rank's `message` bytes: n - 1 latencies and as many messages."""
    return collectives * (_ranks(n) - 1) * network.latency + all_gather_bytes(n, message) / network.bandwidth


def neighbours(degree: int, message: float, network: Network, collectives: int = 1) -> float:
    """Seconds of an exchange with `degree` neighbours, all posted together: one latency, `degree` messages.

    A rank without neighbours spends none.
    """
    latencies = collectives * network.latency if degree else 0.0
    return latencies + neighbour_bytes(degree, message) / network.bandwidth


def step_seconds(compute: float, exchange: float, behind: float = 1.0) -> float:
    """Seconds of a step whose `exchange` runs behind a share of its `compute`.

    Args:
        behind: that share, from 0 (first one, then the other) to 1, the longer of the two, as for gossip with the
            neighbours' weights of the step before. Gradients are averaged behind the backward pass alone: about 2/3.
    """
    if not 0.0 <= behind <= 1.0:
        raise ValueError(f"behind must be a share of the compute from 0 to 1, got {behind}")
    return compute + max(0.0, exchange - behind * compute)


def when_gossip_wins(
    n: int, degree: int, network: Network, *, ratio: float = 1.0, inflation: float = 1.0, reduce: str = "tree"
) -> tuple[float, float]:
    """Between which sizes of its message, in bytes, an all-reduce takes longer than gossip in its place.

    From inflation (latency + degree · ratio · M / bandwidth) < L latency + 2(n-1)/n · M / bandwidth, L being the
    all-reduce's messages in turn. Gossip in the same precision with two neighbours sends more bytes than an all-reduce,
    and wins for small messages alone; with one, or half the bits, it wins for all.

    Args:
        ratio: bytes of a message between neighbours over those of the all-reduce's: 0.5 for 8 bits against bfloat16.
            Compare with an all-reduce that is quantised, too, before believing the result.
        inflation: steps that gossip needs, over those of the all-reduce, for the same loss: measured, and at least 1
            as a rule.
        reduce: `tree` or `ring`, the all-reduce.

    Returns:
        low and high: it wins where low < M < high. (0, inf) is always; (0, 0) is never.
    """
    if reduce not in ALL_REDUCES:
        raise ValueError(f"reduce must be one of {', '.join(ALL_REDUCES)}, got {reduce!r}")
    if not (degree > 0 and ratio > 0.0 and inflation > 0.0):
        raise ValueError(f"degree, ratio and inflation must be above 0, got {degree}, {ratio} and {inflation}")
    messages = tree_messages(n) if reduce == "tree" else ring_messages(n)
    more = inflation * degree * ratio - all_reduce_bytes(n, 1.0)  # bytes that gossip sends more, for each of M
    ahead = network.latency * network.bandwidth * (messages - inflation)  # the latencies that it saves, as bytes
    if more > 0.0:
        return 0.0, max(0.0, ahead / more)
    if more < 0.0:
        return max(0.0, ahead / more), math.inf
    return 0.0, math.inf if ahead > 0.0 else 0.0
