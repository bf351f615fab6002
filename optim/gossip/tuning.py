"""The step size of consensus under compression, found on random vectors before the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thinrank.optim.gossip.mixing import Topology

CANDIDATES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625)
"""From no damping down to what the harshest sparsifiers of the CHOCO papers' experiments took (0.0375 for 1 %)."""

AGREED = 1e-12
"""A disagreement, over the first one, that counts as none: beyond it float64 rounds, and less says nothing."""

HOPELESS = 1e6
"""A disagreement, over the first one, from which no run comes back."""


def proven_gamma(topology: Topology, omega: float) -> float:
    """The step size for which CHOCO-Gossip is proven to converge (Koloskova, Stich and Jaggi 2019, theorem 2).

    δ²ω / (16δ + δ² + 4β² + 2δβ² - 8δω), δ the gap and β the spread; some hundred times smaller than what works.

    Args:
        omega: the compressor's quality in (0, 1], E||C(x) - x||² <= (1 - omega) ||x||².
    """
    if not 0.0 < omega <= 1.0:
        raise ValueError(f"omega must be above 0 and at most 1, got {omega}: scale the compressor to contract")
    gap, spread = topology.gap, topology.spread
    return gap**2 * omega / (16.0 * gap + gap**2 + 4.0 * spread**2 + 2.0 * gap * spread**2 - 8.0 * gap * omega)


def disagreement(
    topology: Topology,
    compress: Callable[[Tensor, int], Tensor],
    gamma: float,
    start: Tensor,
    rounds: int,
    seed: int = 0,
) -> tuple[int, float]:
    """CHOCO-Gossip without any gradient, until the ranks agree or the rounds are over.

    x_i <- x_i + gamma · sum_j W_ij (x̂_j - x̂_i), where each x̂_i, from zero, takes in C(x_i - x̂_i) at first.

    Args:
        start: (ranks, size), of the ranks that take part, in any floating dtype; not changed.

    Returns:
        after how many rounds they agreed, or `rounds`; and the distance from the mean then, over that at the start,
        infinite where it diverged.
    """
    alive = list(topology.alive)
    x, public = start.clone(), torch.zeros_like(start)
    first = float((x - x.mean(0)).norm())
    if not first:
        return 0, 0.0
    error = 1.0
    for t in range(rounds):
        for i in range(len(x)):
            public[i] += compress(x[i] - public[i], seed + t * len(x) + i)
        weights = topology.weights(t)[alive][:, alive].to(x)
        x += gamma * (weights @ public - public)
        error = float((x - x.mean(0)).norm()) / first
        if not error < HOPELESS:
            return rounds, math.inf
        if error < AGREED:
            return t + 1, error
    return rounds, error


def consensus_gamma(
    topology: Topology,
    compress: Callable[[Tensor, int], Tensor],
    *,
    size: int = 1000,
    rounds: int = 200,
    candidates: Sequence[float] = CANDIDATES,
    seed: int = 0,
) -> float:
    """CHOCO's step size gamma for a graph and a compressor: the candidate with which random vectors agree best.

    The recipe of the authors' code (Koloskova et al. 2019), as a simulation in float64 on the CPU. Of equally
    good ones the largest is taken, since gradients, of which a simulation knows nothing, drive the ranks apart anew.

    Args:
        compress: of a difference (size,) and a seed, which is another one for each rank and round: what the receivers
            make of it, (size,), in float64. It must contract, ||C(x) - x|| < ||x||: an unbiased one with variance
            v ||x||² does when divided by 1 + v.
        size: of the vectors. Default 1000 (ours); take a layer's, if the compressor's effect depends on it.
        rounds: after how many the disagreement is compared; where some candidates agree to rounding before, the first
            to do so wins. Default 200 (ours); a graph with a small gap needs several times 1 / gap.
        candidates: above 0. Default: halves from 1 to 1/64 (ours).

    Raises:
        ValueError: where no candidate brings the ranks any closer.
    """
    if size < 1 or rounds < 1:
        raise ValueError(f"size and rounds must be at least 1, got {size} and {rounds}")
    if not candidates or not all(math.isfinite(gamma) and gamma > 0.0 for gamma in candidates):
        raise ValueError(f"candidates must be numbers above 0, at least one, got {tuple(candidates)}")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(topology.alive), size, generator=generator, dtype=torch.float64)
    falling = sorted(candidates, reverse=True)
    found = {gamma: disagreement(topology, compress, gamma, start, rounds, seed) for gamma in falling}
    best = min(falling, key=lambda gamma: found[gamma])
    if not found[best][1] < 1.0:
        least = min(falling, key=lambda gamma: found[gamma][1])
        raise ValueError(
            f"no candidate brings {topology.name} any closer in {rounds} rounds, the best is {least:g} with "
            f"{found[least][1]:.3g} of the disagreement left: give smaller candidates or a finer compressor"
        )
    return best
