"""The cost model gives the figures that were worked out by hand for a model of 1.3 billion weights on eight ranks."""

import math

import pytest

from thinrank.optim.gossip.cost import (
    Network,
    all_gather,
    all_gather_bytes,
    all_reduce_bytes,
    coded_bytes,
    neighbour_bytes,
    neighbours,
    ring_all_reduce,
    ring_messages,
    step_seconds,
    tree_all_reduce,
    tree_messages,
    when_gossip_wins,
)
from thinrank.optim.gossip.topology import one_peer_exponential, ring

N_RANKS = 8
LAYERS, HIDDEN, INNER, WORDS = 24, 2048, 5461, 32000
NORMS = (2 * LAYERS + 1) * HIDDEN
DENSE = 2 * WORDS * HIDDEN + NORMS
WEIGHTS = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER) + DENSE
SIDES = LAYERS * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER))  # the sum of both sides of all matrices
LONG = LAYERS * (4 * HIDDEN + 3 * INNER)  # of the longer sides
TABLE_SIDES, TABLE_LONG = 2 * (WORDS + HIDDEN), 2 * WORDS  # of the embedding and the head
MB = 1e6
DEMO_PACKED, DEMO_REFERENCE = 54.33 * MB, 163 * MB


def reduced(numbers: float, size: int) -> float:
    return all_reduce_bytes(N_RANKS, numbers * size)


def around(numbers: float, size: float) -> float:
    return neighbour_bytes(ring(N_RANKS).degree, numbers * size)


def test_the_model_is_the_one_meant():
    assert WEIGHTS == 1_339_082_752
    assert WEIGHTS - DENSE == 1_207_910_400
    assert NORMS == 100_352


@pytest.mark.parametrize(
    ("sent", "megabytes"),
    [
        (reduced(WEIGHTS, 4), "9374"),
        (reduced(WEIGHTS, 2), "4687"),
        (around(WEIGHTS, 4), "10713"),
        (around(WEIGHTS, 2), "5356"),
        (neighbour_bytes(one_peer_exponential(N_RANKS).degree, WEIGHTS * 4), "5356"),
        (neighbour_bytes(one_peer_exponential(N_RANKS).degree, WEIGHTS * 2), "2678"),
        (neighbour_bytes(2, coded_bytes(WEIGHTS, 8, 2048)), "2681"),
        (neighbour_bytes(2, coded_bytes(WEIGHTS, 4, 2048)), "1342"),
        (reduced(4 * SIDES + DENSE, 4), "944"),
        (reduced(4 * SIDES + DENSE, 2), "472"),
        (reduced(4 * (SIDES + TABLE_SIDES) + NORMS, 4), "29"),
        (reduced(4 * (SIDES + TABLE_SIDES) + NORMS, 2), "14.4"),
        (reduced(32 * (SIDES + TABLE_SIDES) + NORMS, 4), "225"),
        (reduced(32 * (SIDES + TABLE_SIDES) + NORMS, 2), "113"),
        (reduced(128 * (SIDES + TABLE_SIDES) + NORMS, 4), "898"),
        (reduced(512 * (SIDES + TABLE_SIDES) + NORMS, 2), "1796"),
        (reduced(512 * LONG + DENSE, 4), "3032"),
        (reduced(512 * LONG + DENSE, 2), "1516"),
        (reduced(128 * LONG + DENSE, 4), "1447"),
        (reduced(128 * (LONG + TABLE_LONG) + NORMS, 2), "293"),
        (reduced(WEIGHTS - DENSE, 4) / 200, "42"),
        (all_gather_bytes(N_RANKS, DEMO_REFERENCE), "1141"),
        (all_gather_bytes(N_RANKS, DEMO_PACKED), "380"),
        (reduced(WEIGHTS, 4) / 100, "94"),
        (all_reduce_bytes(N_RANKS, WEIGHTS * 0.5) / 100, "11.7"),
        (all_gather_bytes(N_RANKS, WEIGHTS * 0.02 * 14 / 8) / 30, "10.9"),
        (around(4 * SIDES / 2 + NORMS, 4), "15.7"),
        (around(1 * SIDES / 2 + NORMS, 4), "4.5"),
    ],
)
def test_bytes_that_leave_a_rank(sent, megabytes):
    """To half of the last digit written down."""
    assert sent / MB == pytest.approx(float(megabytes), abs=0.55 * 10.0 ** -len(megabytes.partition(".")[2]))


GBIT = 1e9 / 8
NETWORKS = [
    Network(latency=latency, bandwidth=gbit * GBIT)
    for gbit, latency in [(100, 1e-5), (10, 1e-4), (1, 1e-3), (1, 0.02), (0.1, 0.02), (0.1, 0.1), (0.01, 0.1)]
]


def tree(numbers: float, collectives: int = 1):
    return lambda network: tree_all_reduce(N_RANKS, 2 * numbers, network, collectives)


def two(message: float):
    return lambda network: neighbours(2, message, network)


@pytest.mark.parametrize(
    ("seconds", "figures"),
    [
        (tree(WEIGHTS), ".375 3.75 37.5 37.6 375 376 3750"),
        (two(2 * WEIGHTS), ".429 4.29 42.9 42.9 429 429 4285"),
        (two(coded_bytes(WEIGHTS, 8, 2048)), ".214 2.14 21.4 21.5 214 215 2145"),
        (two(coded_bytes(WEIGHTS, 4, 2048)), ".107 1.07 10.7 10.8 107 107 1074"),
        (tree(512 * LONG + DENSE), ".121 1.21 12.1 12.2 121 122 1213"),
        (tree(128 * (LONG + TABLE_LONG) + NORMS), ".024 .235 2.35 2.47 23.6 24.1 235"),
        (tree(32 * (SIDES + TABLE_SIDES) + NORMS, 2), ".009 .091 .913 1.14 9.25 10.2 91"),
        (tree(4 * (SIDES + TABLE_SIDES) + NORMS, 2), ".001 .013 .127 .355 1.39 2.35 12.7"),
        (two(4 * (4 * (SIDES + TABLE_SIDES) / 2 + NORMS)), ".001 .014 .136 .155 1.37 1.45 13.6"),
        (lambda network: all_gather(N_RANKS, DEMO_PACKED, network), ".030 .305 3.05 3.18 30.6 31.1 305"),
        (lambda network: all_gather(N_RANKS, DEMO_REFERENCE, network, 438), ".122 1.22 12.2 70.4 153 398 1219"),
        (lambda network: tree(WEIGHTS)(network) / 500, ".001 .008 .075 .075 .75 .75 7.5"),
        (
            lambda network: all_gather(N_RANKS, WEIGHTS * 0.02 * 14 / 8, network) / 30,
            ".001 .009 .088 .092 .88 .90 8.8",
        ),
    ],
)
def test_seconds_of_a_step(seconds, figures):
    """On seven networks, from 100 Gbit/s with 10 µs to 10 Mbit/s with 100 ms, to half of the last digit."""
    for network, figure in zip(NETWORKS, figures.split(), strict=True):
        assert seconds(network) == pytest.approx(float(figure), abs=0.55 * 10.0 ** -len(figure.partition(".")[2]))


@pytest.mark.parametrize(("n", "around_it", "up_and_down"), [(1, 0, 0), (2, 2, 2), (3, 4, 4), (8, 14, 6), (9, 16, 8)])
def test_latencies_of_an_all_reduce(n, around_it, up_and_down):
    assert (ring_messages(n), tree_messages(n)) == (around_it, up_and_down)
    slow = Network(latency=1.0, bandwidth=math.inf)
    assert ring_all_reduce(n, 100.0, slow) == around_it
    assert tree_all_reduce(n, 100.0, slow, collectives=3) == 3 * up_and_down
    assert all_gather(n, 100.0, slow) == n - 1
    assert neighbours(5, 100.0, slow) == 1.0
    assert neighbours(0, 100.0, slow) == 0.0


def test_one_rank_sends_nothing():
    slow = Network(latency=1.0, bandwidth=1.0)
    assert all_reduce_bytes(1, 100.0) == all_gather_bytes(1, 100.0) == neighbour_bytes(0, 100.0) == 0.0
    assert ring_all_reduce(1, 100.0, slow) == tree_all_reduce(1, 100.0, slow) == all_gather(1, 100.0, slow) == 0.0


def test_a_message_in_codes():
    assert coded_bytes(4096, 8, 2048) == 4096 + 2 * 2
    assert coded_bytes(4096, 4, 128, scale_bytes=4) == 2048 + 32 * 4


@pytest.mark.parametrize(
    ("compute", "exchange", "behind", "expected"),
    [(3.0, 2.0, 1.0, 3.0), (3.0, 5.0, 1.0, 5.0), (3.0, 2.0, 0.0, 5.0), (3.0, 5.0, 2 / 3, 6.0), (3.0, 1.0, 2 / 3, 3.0)],
)
def test_what_runs_behind_the_computation(compute, exchange, behind, expected):
    assert step_seconds(compute, exchange, behind) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("latency", "bits_per_second", "megabytes"), [(0.02, 1e8, 5.0), (0.1, 1e8, 25.0), (1e-3, 1e9, 2.5)]
)
def test_below_which_size_two_neighbours_beat_a_tree(latency, bits_per_second, megabytes):
    low, high = when_gossip_wins(8, 2, Network(latency=latency, bandwidth=bits_per_second / 8))
    assert low == 0.0
    assert high == pytest.approx(megabytes * MB)


SLOW = Network(latency=0.02, bandwidth=12.5e6)


def test_one_neighbour_and_half_the_bits_always_win():
    assert when_gossip_wins(8, 1, SLOW) == (0.0, math.inf)
    assert when_gossip_wins(8, 2, SLOW, ratio=0.5) == (0.0, math.inf)


def test_without_latency_only_bytes_count():
    fast = Network(latency=0.0, bandwidth=1e9)
    assert when_gossip_wins(8, 2, fast) == (0.0, 0.0)
    assert when_gossip_wins(8, 1, fast) == (0.0, math.inf)
    assert when_gossip_wins(2, 1, fast) == (0.0, 0.0)  # as many bytes: a tie is no win


@pytest.mark.parametrize("reduce", ["tree", "ring"])
@pytest.mark.parametrize("inflation", [1.0, 1.5, 7.0, 20.0])
@pytest.mark.parametrize("ratio", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 8])
def test_the_interval_is_where_the_seconds_say_so(n, ratio, inflation, reduce):
    low, high = when_gossip_wins(n, 2, SLOW, ratio=ratio, inflation=inflation, reduce=reduce)
    all_reduce = tree_all_reduce if reduce == "tree" else ring_all_reduce
    edges = [edge * near for edge in (low, high) if 0 < edge < math.inf for near in (0.999, 1.001)]
    for message in (1.0, 1e4, 1e6, 1e8, 1e10, *edges):
        wins = inflation * neighbours(2, ratio * message, SLOW) < all_reduce(n, message, SLOW)
        assert wins == (low < message < high)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Network(latency=-1.0, bandwidth=1.0), r"latency must be at least 0 seconds and finite, got -1\.0"),
        (lambda: Network(latency=math.nan, bandwidth=1.0), r"latency must be .* got nan"),
        (lambda: Network(latency=0.0, bandwidth=0.0), r"bandwidth must be above 0 bytes a second, got 0\.0"),
        (lambda: Network(latency=0.0, bandwidth=math.nan), r"bandwidth must be above 0 .*, got nan"),
        (lambda: all_reduce_bytes(0, 1.0), r"at least 1 rank, got 0"),
        (lambda: tree_messages(0), r"at least 1 rank, got 0"),
        (lambda: neighbour_bytes(-1, 1.0), r"degree must be at least 0, got -1"),
        (lambda: coded_bytes(10, 8, 0), r"a bucket must hold at least 1 number, got 0"),
        (lambda: step_seconds(1.0, 1.0, 1.5), r"a share of the compute from 0 to 1, got 1\.5"),
        (lambda: when_gossip_wins(8, 2, SLOW, reduce="star"), r"reduce must be one of tree, ring, got 'star'"),
        (lambda: when_gossip_wins(8, 0, SLOW), r"must be above 0, got 0, 1\.0 and 1\.0"),
        (lambda: when_gossip_wins(8, 2, SLOW, inflation=0.0), r"must be above 0, got 2, 1\.0 and 0\.0"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
