"""The step size of consensus that a simulation finds, with compressors that are written here."""

import math
from typing import Any

import pytest
import torch

from thinrank.optim.gossip.topology import complete, hypercube, ring, star
from thinrank.optim.gossip.tuning import AGREED, consensus_gamma, disagreement, proven_gamma


def exact(x, seed):
    return x


def top(share: float):
    """The largest entries alone."""

    def compress(x, seed):
        kept = x.abs().topk(max(1, int(share * len(x)))).indices
        return torch.zeros_like(x).index_copy_(0, kept, x[kept])

    return compress


def random_share(share: float):
    """Entries drawn anew by each seed, not scaled up."""

    def compress(x, seed):
        drawn = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < share
        return torch.where(drawn, x, 0.0)

    return compress


def start(n: int, size: int = 50):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_without_compression_it_is_plain_averaging():
    """Of gamma 1 what is left after t rounds is W^t, and of others (I + gamma (W - I))^t."""
    made, x = ring(6), start(6)
    before = x.clone()
    for gamma in (1.0, 0.3):
        lazy = torch.eye(6, dtype=torch.float64) + gamma * (made.weights() - torch.eye(6, dtype=torch.float64))
        y = torch.linalg.matrix_power(lazy, 5) @ x
        rounds, left = disagreement(made, exact, gamma, x, 5)
        assert rounds == 5
        assert left == pytest.approx(float((y - y.mean(0)).norm() / (x - x.mean(0)).norm()), rel=1e-12)
    assert torch.equal(x, before)


def test_a_schedule_is_followed():
    assert disagreement(hypercube(8), exact, 1.0, start(8), 10) == (3, pytest.approx(0.0, abs=AGREED))
    assert disagreement(complete(8), exact, 1.0, start(8), 10)[0] == 1


def test_who_agrees_first_wins_and_of_equals_the_largest():
    assert consensus_gamma(complete(4), exact, candidates=(0.25, 0.5, 1.0), size=20) == 1.0
    assert consensus_gamma(ring(4), exact, candidates=(0.5, 3.0), size=20) == 0.5  # 3 overflows soon
    # on a star λ is within [0, 1]: overstepping pays; on two ranks it would swap them for ever
    assert consensus_gamma(star(8), exact, candidates=(0.5, 1.0, 1.5), size=20) == 1.5
    assert consensus_gamma(complete(2), exact, candidates=(0.5, 1.0, 2.0), size=20) == 1.0
    assert consensus_gamma(ring(1), exact, candidates=(0.5, 1.0)) == 1.0


def test_a_harsher_compressor_takes_a_smaller_step():
    """As published: 1 for what is nearly exact, half or so for the largest tenth, 0.0375 for the largest hundredth."""
    options: Any = {"size": 400, "rounds": 150}
    tenth = consensus_gamma(ring(8), top(0.1), **options)
    hundredth = consensus_gamma(ring(8), top(0.01), **options)
    assert consensus_gamma(ring(8), exact, **options) == 1.0
    assert 0.125 <= tenth <= 0.5
    assert 0.015 < hundredth <= 0.125
    assert hundredth < tenth


def test_the_chosen_one_is_the_best_and_the_boldest_diverges():
    options: Any = {"size": 400, "rounds": 150}
    chosen = consensus_gamma(ring(8), top(0.01), **options)
    left = {gamma: disagreement(ring(8), top(0.01), gamma, start(8, 400), 150)[1] for gamma in (1.0, chosen, 1 / 64)}
    assert left[chosen] < 1.0
    assert left[chosen] < left[1.0]
    assert left[1.0] > 1.0


def test_it_is_repeatable_and_gives_every_rank_and_round_its_own_seed():
    seeds = []

    def watched(x, seed):
        seeds.append(seed)
        return random_share(0.3)(x, seed)

    options: Any = {"size": 60, "rounds": 20, "candidates": (1.0, 0.5)}
    first = consensus_gamma(ring(4), watched, seed=3, **options)
    half = len(seeds) // 2
    assert len(set(seeds[:half])) == half == 4 * 20
    assert seeds[:half] == seeds[half:]  # each candidate meets the same draws
    assert consensus_gamma(ring(4), random_share(0.3), seed=3, **options) == first


def test_ranks_that_are_gone_do_not_count():
    left = ring(6).without([2])
    rounds, error = disagreement(left, exact, 1.0, start(5), 400)
    assert rounds < 400
    assert error < AGREED
    assert consensus_gamma(left, exact, size=20, rounds=30) == 1.0


def test_the_proven_step_is_tiny():
    """Of signs (omega 0.64) on a ring of eight, with which 0.45 was used: gap 0.1953, spread 4/3, and the formula."""
    gap, square = 0.1953, 16 / 9
    by_hand = gap**2 * 0.64 / (16 * gap + gap**2 + 4 * square + 2 * gap * square - 8 * gap * 0.64)
    assert proven_gamma(ring(8), 0.64) == pytest.approx(by_hand, rel=1e-3)
    assert by_hand == pytest.approx(0.00245, abs=5e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"no candidate brings ring any closer in 30 rounds, the best is 1 with 1 of"):
        consensus_gamma(ring(4), lambda x, seed: torch.zeros_like(x), size=10, rounds=30)
    with pytest.raises(ValueError, match=r"with inf of the disagreement left: give smaller candidates"):
        consensus_gamma(ring(4), lambda x, seed: x * math.nan, size=10, rounds=30)
    with pytest.raises(ValueError, match=r"size and rounds must be at least 1, got 0 and 200"):
        consensus_gamma(ring(4), exact, size=0)
    with pytest.raises(ValueError, match=r"candidates must be numbers above 0, at least one, got \(\)"):
        consensus_gamma(ring(4), exact, candidates=())
    with pytest.raises(ValueError, match=r"candidates must be numbers above 0, at least one, got \(1.0, 0.0\)"):
        consensus_gamma(ring(4), exact, candidates=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"omega must be above 0 and at most 1, got 1\.1"):
        proven_gamma(ring(4), 1.1)
