"""Laws of topologies: closed forms, what averaging keeps and shrinks, exact schedules, lost ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinrank.optim.gossip.topology import (
    TOPOLOGIES,
    Topology,
    complete,
    exponential,
    from_edges,
    from_matrix,
    hierarchical,
    hypercube,
    one_peer_exponential,
    ring,
    star,
    topology,
    torus,
)

LAW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
TIGHT = 64 * torch.finfo(torch.float64).eps
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]

EVERY = [
    *(build(n) for build in (ring, exponential, one_peer_exponential, complete, star) for n in SIZES),
    *(hypercube(n) for n in (1, 2, 4, 8, 16)),
    *(torus(n) for n in (1, 4, 6, 9, 12, 16)),
    *(hierarchical(n, p, between) for n, p in ((8, 2), (6, 3), (4, 4)) for between in ("ring", "one_peer_exponential")),
]


def numbers(*shape: int):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def named(made: Topology) -> str:
    return f"{made.name}-{made.size}"


def averaged(made: Topology, x, rounds: int):
    for t in range(rounds):
        x = made.weights(t) @ x
    return x


def centred(x):
    return x - x.mean(0)


@pytest.mark.parametrize("made", EVERY, ids=named)
def test_averaging_keeps_the_mean_and_shrinks_the_rest_by_rho(made):
    """Both are checked on vectors, not on the eigenvalues from which rho comes."""
    x = numbers(made.size, 5)
    rounds = len(made.rounds)
    y = averaged(made, x, rounds)
    torch.testing.assert_close(y.mean(0), x.mean(0), rtol=0, atol=TIGHT)
    assert centred(y).norm() <= made.second**rounds * centred(x).norm() + 10 * TIGHT
    assert 0.0 <= made.second < 1.0
    assert made.gap == 1.0 - made.second


@pytest.mark.parametrize("made", EVERY, ids=named)
def test_those_who_hear_are_those_who_are_heard(made):
    sent = set()
    for t in range(len(made.rounds)):
        w = made.weights(t)
        for rank in range(made.size):
            sources, targets = made.sources(rank, t), made.targets(rank, t)
            assert rank not in sources
            assert rank not in targets
            assert list(sources) == sorted(sources)
            assert list(targets) == sorted(targets)
            assert all(rank in made.targets(j, t) for j in sources)
            assert float(w[rank, list(sources)].sum() + w[rank, rank]) == pytest.approx(1.0, abs=TIGHT)
            sent.add(len(targets))
            if made.symmetric:
                assert sources == targets
    assert made.degree == max(sent)
    assert made.static == (len(made.rounds) == 1)
    assert torch.equal(made.weights(len(made.rounds)), made.weights(0))


@pytest.mark.parametrize("n", [3, 4, 5, 8, 16, 33])
def test_a_ring_has_its_eigenvalues(n):
    expected = 1 / 3 + 2 / 3 * torch.cos(2 * math.pi * torch.arange(n, dtype=torch.float64) / n)
    found = torch.linalg.eigvalsh(ring(n).weights())
    torch.testing.assert_close(found, expected.sort().values, rtol=0, atol=TIGHT)
    others = expected[1:].abs()
    # in a ring of three nothing is left to shrink
    assert ring(n).second == pytest.approx(float(others.max()), abs=TIGHT)
    assert ring(n).symmetric
    assert ring(n).degree == 2


@pytest.mark.parametrize(("n", "rows", "columns"), [(16, 4, 4), (12, 3, 4), (15, 3, 5), (64, 8, 8), (6, 2, 3)])
def test_a_torus_has_its_eigenvalues(n, rows, columns):
    """Sides of two, where a neighbour counts twice, among them."""
    down = torch.cos(2 * math.pi * torch.arange(rows, dtype=torch.float64) / rows)
    across = torch.cos(2 * math.pi * torch.arange(columns, dtype=torch.float64) / columns)
    expected = (1 / 5 + 2 / 5 * (down[:, None] + across)).flatten()
    found = torch.linalg.eigvalsh(torus(n).weights())
    torch.testing.assert_close(found, expected.sort().values, rtol=0, atol=TIGHT)
    assert torch.equal(torus(n).weights(), torus(n, rows=rows).weights())


def test_a_torus_has_its_neighbours():
    assert torus(12).sources(0) == (1, 3, 4, 8)  # 3 rows of 4
    assert torus(12, rows=4).sources(0) == (1, 2, 3, 9)  # 4 rows of 3
    assert torus(6).sources(0) == (1, 2, 3)
    assert float(torus(6).weights()[0, 3]) == pytest.approx(0.4, abs=TIGHT)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_the_exponential_graph_has_its_gap(k):
    made = exponential(2**k)
    assert made.gap == pytest.approx(2 / (1 + k), abs=TIGHT)
    assert made.degree == k
    assert made.symmetric == (k < 2)


@pytest.mark.parametrize("n", [6, 10, 12, 5, 7, 9, 13])
def test_the_gap_of_other_exponential_graphs(n):
    """Exactly so for even sizes, and larger for odd ones."""
    gap, bound = exponential(n).gap, 2 / (1 + (n - 1).bit_length())
    if n % 2:
        assert gap > bound + 0.01
    else:
        assert gap == pytest.approx(bound, abs=TIGHT)


def test_directed_graphs_hear_those_before():
    assert exponential(8).sources(0) == (4, 6, 7)
    assert exponential(8).targets(0) == (1, 2, 4)
    assert exponential(6).sources(0) == (2, 4, 5)
    assert [one_peer_exponential(8).sources(0, t) for t in range(4)] == [(7,), (6,), (4,), (7,)]
    assert [one_peer_exponential(8).targets(0, t) for t in range(4)] == [(1,), (2,), (4,), (1,)]
    assert [hypercube(8).sources(5, t) for t in range(4)] == [(4,), (7,), (1,), (4,)]


@pytest.mark.parametrize("n", [2, 3, 8, 16])
def test_complete_and_star_have_their_gaps(n):
    assert complete(n).second == 0.0
    assert complete(n).spread == pytest.approx(1.0, abs=TIGHT)
    assert complete(n).degree == n - 1
    assert star(n).gap == pytest.approx(1.0 if n == 2 else 1 / n, abs=TIGHT)
    assert star(n).degree == n - 1
    assert star(n).sources(n - 1) == (0,)


def test_small_rings():
    assert torch.equal(ring(1).weights(), torch.ones(1, 1, dtype=torch.float64))
    assert torch.equal(ring(2).weights(), torch.full((2, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(ring(3).weights(), complete(3).weights(), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", [name for name in TOPOLOGIES if name not in ("hierarchical", "custom")])
def test_one_rank_is_trivial(name):
    made = topology(name, 1)
    assert torch.equal(made.weights(3), torch.ones(1, 1, dtype=torch.float64))
    assert (made.size, made.degree, made.second, made.spread, made.dcd_limit) == (1, 0, 0.0, 0.0, math.inf)
    assert made.sources(0) == made.targets(0) == ()


TABLE = [
    (ring(4), "0.3333 1.333 0.250 0.177"),
    (ring(8), "0.8047 1.333 0.0732 0.0518"),
    (ring(16), "0.9493 1.333 0.0190 0.0135"),
    (ring(32), "0.9872 1.333 0.0048 0.0034"),
    (ring(64), "0.9968 1.333 0.0012 0.0009"),
    (torus(16), "0.600 1.600 0.125 0.088"),
    (torus(64), "0.8828 1.600 0.0366 0.0259"),
    (exponential(8), "0.500 1.18 0.212 0.150"),
    (exponential(16), "0.600 1.24 0.161 0.114"),
    (exponential(64), "0.714 1.31 0.109 0.077"),
    (star(8), "0.875 1.0 0.0625 0.044"),
    (star(16), "0.9375 1.0 0.0312 0.022"),
    (complete(8), "0.000 1.000 0.5 0.354"),
]


@pytest.mark.parametrize(("made", "figures"), TABLE, ids=lambda x: x if isinstance(x, str) else named(x))
def test_limits_of_difference_compression(made, figures):
    """rho, mu and the two limits, computed elsewhere from eigenvalues: to half of the last digit written down."""
    for found, figure in zip((made.second, made.spread, made.dcd_limit, made.dcd_safe), figures.split(), strict=True):
        assert found == pytest.approx(float(figure), abs=0.51 * 10.0 ** -len(figure.partition(".")[2]))


@pytest.mark.parametrize("made", [ring(8), torus(12), star(5)], ids=named)
def test_the_slowest_disagreement_shrinks_by_exactly_rho(made):
    """D-PSGD without gradients: along the slowest eigenvector each round multiplies by ±rho, and nothing goes faster
    than that for long."""
    values, vectors = torch.linalg.eigh(made.weights() - 1.0 / made.size)
    slowest = vectors[:, int(values.abs().argmax())].unsqueeze(1)
    x = numbers(made.size, 3)
    for t in (1, 2, 7):
        assert float(averaged(made, slowest, t).norm()) == pytest.approx(made.second**t, rel=1e-12, abs=TIGHT)
        assert float(centred(averaged(made, x, t)).norm()) <= made.second**t * float(centred(x).norm()) + TIGHT
    late = [float(centred(averaged(made, x, t)).norm()) for t in (30, 31)]
    assert late[1] / late[0] == pytest.approx(made.second, rel=1e-3)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("build", [one_peer_exponential, hypercube])
def test_schedules_are_exact_for_powers_of_two(build, n):
    made = build(n)
    rounds = n.bit_length() - 1
    x = numbers(n, 3)
    assert len(made.rounds) == rounds
    assert made.degree == 1
    torch.testing.assert_close(averaged(made, x, rounds), x.mean(0).expand(n, 3), rtol=0, atol=TIGHT)
    assert centred(averaged(made, x, rounds - 1)).norm() > 0.1  # not sooner
    assert (made.second, made.gap, made.dcd_limit) == (0.0, 1.0, 1 / (2 * made.spread))


@pytest.mark.parametrize(("n", "rounds", "residual"), [(6, 3, 0.083), (12, 4, 0.042)])
def test_one_peer_is_not_exact_for_other_sizes(n, rounds, residual):
    made = one_peer_exponential(n)
    product = averaged(made, torch.eye(n, dtype=torch.float64), rounds)
    assert float((product - 1 / n).abs().max()) == pytest.approx(residual, abs=5e-4)
    second = float(torch.linalg.svdvals(product)[1])
    assert made.second == pytest.approx(second ** (1 / rounds), rel=1e-12)
    assert 0.2 < second < 0.22
    if n == 6:
        assert made.second == pytest.approx(0.60, abs=5e-3)  # as the docstring says


def test_exact_averaging_is_known_in_spite_of_rounding():
    """Two camps of five: everybody takes the other camp's mean, then half of it. What rounding leaves of the
    disagreement, 7e-17, has a root of 8e-9."""
    across = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    fifth = torch.full((5, 5), 1 / 5, dtype=torch.float64)
    swap = torch.kron(across, fifth)
    half = from_edges(10, [(i, 5 + j, 1 / 10) for i in range(5) for j in range(5)]).weights()
    made = from_matrix([swap, half])
    assert made.second == 0.0


def test_rho_of_a_schedule_is_of_its_rounds_in_their_order():
    first = one_peer_exponential(6).weights(0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    second = one_peer_exponential(6).weights(1)[order][:, order]
    third = exponential(6).weights()[:, order][order.argsort()]
    product = third @ second @ first
    expected = float(torch.linalg.svdvals(product)[1])
    assert abs(expected - float(torch.linalg.svdvals(first @ second @ third)[1])) > 0.01  # the order matters
    assert from_matrix([first, second, third]).second == pytest.approx(expected ** (1 / 3), rel=1e-12)


def test_a_hierarchy_is_the_mean_of_nodes_and_gossip_between_them():
    made = hierarchical(12, 3)
    x = numbers(12, 2)
    nodes = x.view(4, 3, 2).mean(1)
    expected = (ring(4).weights() @ nodes).repeat_interleave(3, 0)
    torch.testing.assert_close(averaged(made, x, 1), expected, rtol=0, atol=TIGHT)
    assert made.second == pytest.approx(ring(4).second, abs=TIGHT)
    assert made.degree == (2 + 1) * 3 - 1
    assert made.symmetric
    assert hierarchical(4, 4).second == 0.0
    assert torch.equal(hierarchical(8, 1).weights(), ring(8).weights())
    exact = hierarchical(8, 2, "one_peer_exponential")
    assert (len(exact.rounds), exact.second, exact.symmetric) == (2, 0.0, False)
    assert hierarchical(8, 2, star(4)).name == "hierarchical star"


@st.composite
def graphs(draw, least=2, most=9):
    """A connected graph: a random tree, and some more edges."""
    n = draw(st.integers(least, most))
    edges = {(draw(st.integers(0, i - 1)), i) for i in range(1, n)}
    pairs = [(i, j) for j in range(n) for i in range(j)]
    edges |= set(draw(st.lists(st.sampled_from(pairs), max_size=6)))
    return n, sorted(edges)


def assert_doubly_stochastic(w):
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(0), torch.ones(len(w), dtype=w.dtype), rtol=0, atol=TIGHT)
    torch.testing.assert_close(w.sum(1), torch.ones(len(w), dtype=w.dtype), rtol=0, atol=TIGHT)


@LAW
@given(graph=graphs())
def test_metropolis_hastings_weights_of_any_connected_graph(graph):
    n, edges = graph
    made = from_edges(n, edges)
    w = made.weights()
    assert_doubly_stochastic(w)
    assert torch.equal(w, w.mT)
    assert made.symmetric
    degrees = [sum(rank in edge for edge in edges) for rank in range(n)]
    for i in range(n):
        assert made.sources(i) == tuple(j for j in range(n) if (min(i, j), max(i, j)) in edges)
        for j in made.sources(i):
            assert float(w[i, j]) == pytest.approx(1 / (1 + max(degrees[i], degrees[j])), rel=1e-15)
    assert made.second == pytest.approx(float(torch.linalg.eigvalsh(w).abs().sort().values[-2]), abs=TIGHT)
    assert made.second < 1


@LAW
@given(graph=graphs(least=3), data=st.data())
def test_lost_ranks_leave_the_others_with_their_mean(graph, data):
    """The weights stay symmetric and doubly stochastic, need no new link, and do not depend on the order of losses."""
    n, edges = graph
    made = from_edges(n, edges)
    gone = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    left = made.without(gone)
    w = left.weights()
    assert_doubly_stochastic(w)
    assert torch.equal(w, w.mT)
    assert (left.size, left.gone, left.alive) == (n, tuple(sorted(gone)), tuple(sorted(set(range(n)) - gone)))
    for rank in range(n):
        assert left.sources(rank) == (() if rank in gone else tuple(j for j in made.sources(rank) if j not in gone))
        if rank not in gone:
            lost = sum(float(made.weights()[rank, j]) for j in gone)
            assert float(w[rank, rank]) == pytest.approx(float(made.weights()[rank, rank]) + lost, abs=TIGHT)
        else:
            assert float(w[rank, rank]) == 1.0
    one_by_one = made
    for rank in sorted(gone):
        one_by_one = one_by_one.without([rank])
    torch.testing.assert_close(one_by_one.weights(), w, rtol=0, atol=TIGHT)
    assert one_by_one.digest() == left.digest() != made.digest()


@LAW
@given(n=st.integers(3, 12), build=st.sampled_from([exponential, one_peer_exponential]), data=st.data())
def test_lost_ranks_of_a_directed_graph_are_bridged(n, build, data):
    """Where own weights would take up what is lost, columns would no longer sum to one: the mean would drift."""
    gone = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    left = build(n).without(gone)
    for w in left.rounds:
        assert_doubly_stochastic(w)
        assert all(float(w[rank, rank]) == 1.0 for rank in gone)
    assert left.degree <= max(1, (n - 1).bit_length()) * (len(gone) + 1)
    assert left.second <= 1.0
    if build is one_peer_exponential:
        assert left.degree <= 1


def test_a_bridge_leads_over_the_lost_rank():
    left = one_peer_exponential(8).without([3])
    assert [left.sources(4, t) for t in range(3)] == [(2,), (2,), (0,)]
    assert left.targets(2, 0) == (4,)
    assert left.targets(3, 0) == left.sources(3, 1) == ()
    left.require_connected()


def test_a_bridge_where_the_lost_had_talked_to_each_other_alone():
    """Two ranks before, of six: 0, 2 and 4 are a circle of their own, and I - W_gg cannot be inverted."""
    left = one_peer_exponential(6).without([0, 2, 4])
    w = left.weights(1)
    assert_doubly_stochastic(w)
    assert torch.equal(w[[1, 3, 5]], one_peer_exponential(6).weights(1)[[1, 3, 5]])
    assert left.require_connected().second < 1


def test_without_nobody_is_the_same():
    made = ring(5)
    assert made.without([]) is made
    left = made.without([2])
    assert left.without({2}) is left


def test_rho_after_a_loss_is_of_those_that_remain():
    """A ring of four without one is a path of three: 1/3, with two thirds for themselves at the ends."""
    left = ring(4).without([0])
    path = torch.tensor([[2, 1, 0], [1, 1, 1], [0, 1, 2]], dtype=torch.float64) / 3
    torch.testing.assert_close(left.weights()[1:, 1:], path, rtol=0, atol=TIGHT)
    assert left.second == pytest.approx(2 / 3, abs=TIGHT)
    assert left.require_connected() is left
    assert complete(3).without([0, 1]).second == 0.0


def test_losses_may_split_a_graph_for_a_step_but_not_for_good():
    left = ring(8).without([2, 6])
    assert left.second == pytest.approx(1.0, abs=TIGHT)
    with pytest.raises(ValueError, match=r"nothing of rank 0 ever reaches ranks 3, 4, 5: add edges"):
        left.require_connected()


def test_digests_are_equal_where_all_is_equal():
    assert ring(8).digest() == ring(8).digest()
    assert len(ring(8).digest()) == 64
    same_but_rounding = from_matrix(ring(8).weights() * (1 + 2**-52))
    assert same_but_rounding.digest() == from_matrix(ring(8).weights()).digest()
    others = [ring(8), ring(7), complete(8), one_peer_exponential(8), ring(8).without([1]), ring(8).without([2])]
    others += [from_matrix(ring(8).weights()), from_matrix([ring(8).weights()] * 2)]
    others += [from_edges(3, [(0, 1, 0.3), (1, 2, 0.3)]), from_edges(3, [(0, 1, 0.3), (1, 2, 0.3 + 1e-9)])]
    others += [from_matrix(list(reversed(one_peer_exponential(8).rounds)))]
    others += [from_matrix([ring(8).weights(), complete(8).weights()])]
    assert len({made.digest() for made in others}) == len(others)


def test_a_topology_keeps_its_own_weights():
    given_weights = torch.full((2, 2), 0.5, dtype=torch.float64)
    made = from_matrix(given_weights)
    given_weights.zero_()
    assert float(made.weights()[0, 0]) == 0.5


def test_edges_with_weights():
    made = from_edges(3, [(0, 1, 0.25), (2, 1, 0.5)])
    expected = torch.tensor([[0.75, 0.25, 0.0], [0.25, 0.25, 0.5], [0.0, 0.5, 0.5]], dtype=torch.float64)
    assert torch.equal(made.weights(), expected)
    full = from_edges(4, [(0, 1, 0.33), (0, 2, 0.56), (0, 3, 0.11)])  # their sum is rounded to 1 + 2e-16
    assert float(full.weights()[0, 0]) == 0.0
    assert from_edges(1, []).size == 1


def test_matrices_of_several_forms():
    w = ring(4).weights()
    for spelled in (w, w.tolist(), [w], w.unsqueeze(0), w.numpy(), list(w)):
        assert torch.equal(from_matrix(spelled).weights(), w)
    schedule = one_peer_exponential(4)
    made = from_matrix(list(schedule.rounds), 4)
    assert (len(made.rounds), made.second) == (2, 0.0)


def test_what_is_symmetric_but_for_rounding_becomes_so():
    w = ring(5).weights().clone()
    w[0, 1] += 1e-14
    w[0, 0] -= 1e-14
    assert from_matrix(w).symmetric


def test_a_matrix_that_only_averages_in_several_rounds():
    """De Bruijn's graph: exact in two rounds, though one keeps the length of some vectors; as a schedule it says so."""
    w = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64) / 2
    assert from_matrix(w).second == pytest.approx(1.0, abs=TIGHT)
    assert from_matrix([w, w]).second == 0.0


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        ("ring", {}, ring(8)),
        ("torus", {"rows": 2}, torus(8, rows=2)),
        ({"name": "torus", "rows": 2}, {}, torus(8, 2)),
        ("hierarchical", {"per_node": 2}, hierarchical(8, 2)),
        ("hierarchical", {"per_node": 2, "between": "complete"}, hierarchical(8, 2, "complete")),
        ("hypercube", {}, hypercube(8)),
        ("custom", {"edges": [[0, i] for i in range(1, 8)]}, from_edges(8, [(0, i) for i in range(1, 8)])),
        ("custom", {"matrix": ring(8).weights().tolist()}, from_matrix(ring(8).weights())),
        ([(0, i) for i in range(1, 8)], {}, from_edges(8, [(0, i) for i in range(1, 8)])),
        (star(8), {}, star(8)),
    ],
    ids=str,
)
def test_a_configuration_names_a_topology(spec, options, expected):
    assert topology(spec, 8, **options).digest() == expected.digest()


def test_what_an_exchange_may_need():
    made = ring(6)
    assert made.require_symmetric() is made.require_static() is made.require_connected() is made
    assert hypercube(8).require_symmetric().size == 8
    assert exponential(8).require_static().size == 8
