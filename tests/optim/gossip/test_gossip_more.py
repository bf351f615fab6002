"""Laws of DeepSqueeze and PowerGossip, on ranks of a simulator."""

import copy

import pytest
import torch
from simulated_ranks import (
    CLOSE,
    Quadratics,
    apart,
    followed,
    heard,
    introduced,
    schemes,
    spread,
    started,
    step_all,
    still,
    updates,
)

from thinrank.optim.gossip.message import HEADER_BYTES
from thinrank.optim.gossip.schemes import PowerGossip
from thinrank.optim.gossip.simulator import Chance, Simulator
from thinrank.optim.gossip.topology import from_edges, topology

SHAPES = [(12, 9), (7,), (10, 3, 4), (3, 20)]
"""With rank 3 a matrix, a vector, three dimensions as a matrix (10, 12), and one too low to gain."""
SHAPED = 12 * 9 + 7 + 120 + 60


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec"), [("deepsqueeze", "uniform4"), ("powergossip", "float32"), ("dpsgd", "float32")]
)
def test_the_mean_stays_for_a_thousand_rounds(name, codec):
    """Each rank rounds its weights once or twice a round, by 2⁻²⁵ of them on average, without a direction.

    They had one: a sum of three times a third in float32 made weights grow by 3e-8 a round.
    """
    ranks = schemes(name, topology("ring", 4), codec, shapes=[(8, 6), (4,)], size=52)
    weights = introduced(ranks, spread(4, 52))
    mean = torch.stack(weights).double().mean(0)
    weights = still(ranks, weights, 1000)
    drift = (torch.stack(weights).double().mean(0) - mean).norm() / mean.norm()
    assert float(drift) < 1e-6
    assert apart(weights) < (0.3 if name == "deepsqueeze" else 1e-5)


@pytest.mark.parametrize(("name", "codec"), [("deepsqueeze", "uniform8"), ("powergossip", "float32")])
def test_the_same_seed_sends_the_same_bytes(name, codec):
    def messages(seed):
        return heard(schemes(name, topology("ring", 4), codec, shapes=SHAPES, seed=seed), SHAPED)

    first = messages(0)
    assert first == messages(0)
    assert first != messages(1)


@pytest.mark.parametrize(("name", "codec"), [("deepsqueeze", "uniform8"), ("powergossip", "float32")])
def test_an_update_that_is_not_finite_is_left_out(name, codec):
    """And its rank averages on: the same as an update of zeros."""
    found = []
    for bad in (float("nan"), 0.0):
        ranks = schemes(name, topology("ring", 4), codec, shapes=SHAPES)
        weights, simulator = started(ranks, size=SHAPED), Simulator(4)
        for step in range(6):
            moves = updates(4, step, SHAPED)
            if step == 3:
                moves[1] = torch.full_like(moves[1], bad)
            weights = step_all(simulator, ranks, weights, moves)
        found.append(torch.stack(weights))
        assert [rank.tally.skipped for rank in ranks] == [0, int(bad != 0.0), 0, 0]
    assert torch.equal(*found)
    assert bool(found[0].isfinite().all())


@pytest.mark.parametrize(
    ("name", "codec", "options", "excess"),
    [
        ("deepsqueeze", "uniform8", {}, 1.05),
        ("deepsqueeze", "uniform4", {}, 1.3),
        ("deepsqueeze", "uniform2", {"gamma": 0.3}, 4.0),
        ("powergossip", "float32", {"shapes": [(8, 12)], "rank": 2}, 4.0),
    ],
)
def test_ranks_find_what_uncompressed_ones_find_and_stay_together(name, codec, options, excess):
    """The mean is the same; how far ranks are from it is more by a factor, where nothing would grow without bound."""
    problem = Quadratics(8)
    exact, best = problem.train(schemes("dpsgd", "ring"), 150)
    weights, found = problem.train(schemes(name, "ring", codec, **options), 150)
    assert found < 1.01 * best
    assert apart(weights) < excess * apart(exact)


# --- DeepSqueeze ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["ring", "one_peer_exponential", "star"])
def test_deepsqueeze_without_compression_is_dpsgd(graph):
    found, _, _ = followed("deepsqueeze", graph)
    expected, _, _ = followed("dpsgd", graph, order="then")
    torch.testing.assert_close(found, expected, **CLOSE)


def test_deepsqueeze_is_its_definition():
    """In float64, with what has been told found from the messages' own codec."""
    graph = topology("ring", 4)
    ranks = schemes("deepsqueeze", graph, "uniform3", gamma=0.4)
    weights, simulator = started(ranks), Simulator(4)
    x = torch.stack(weights).double()
    left = torch.zeros_like(x)
    mixing = graph.weights() - torch.eye(4, dtype=torch.float64)
    for step in range(10):
        u = torch.stack(updates(4, step)).double()
        v = x + u + left
        told = [r.codec.decode(r.codec.encode(row.float(), r.key()), r.key()) for r, row in zip(ranks, v, strict=True)]
        left = v - torch.stack(told).double()
        x = x + u + 0.4 * mixing @ torch.stack(told).double()
        weights = step_all(simulator, ranks, weights, updates(4, step))
        # what differs in the last bit before rounding may be rounded to the next level: restart from what was found
        torch.testing.assert_close(torch.stack(weights).double(), x, rtol=1e-4, atol=1e-5)
        kept = torch.stack([rank.state()["left"] for rank in ranks]).double()
        torch.testing.assert_close(kept, left, rtol=1e-4, atol=1e-5)
        x, left = torch.stack(weights).double(), kept


def test_deepsqueeze_sends_a_message_to_each_neighbour():
    _, ranks, simulator = followed("deepsqueeze", "ring", "uniform4", steps=5)
    assert simulator.sent == [5 * 2 * (HEADER_BYTES + ranks[0].codec.nbytes)] * 8


def test_a_lost_message_of_deepsqueeze_is_over_with_its_step():
    """Constant weights stay what they are, whatever is lost: rows sum to 1. And ranks agree again afterwards."""
    ranks = schemes("deepsqueeze", "ring", "float32")
    same = introduced(ranks, [torch.ones(96)] * 8)
    same = still(ranks, same, 10, Simulator(8, faults=Chance(drop=0.3)))
    assert sum(rank.tally.counts["lost"] for rank in ranks) > 20
    torch.testing.assert_close(torch.stack(same), torch.ones(8, 96), **CLOSE)
    weights = still(ranks, spread(8), 40, Simulator(8, faults=Chance(drop=0.1)))
    assert apart(still(ranks, weights, 60)) < 1e-5


# --- PowerGossip ----------------------------------------------------------------------------------------------------


def by_definition(graph, shapes, rank, ranks, weights, moves, order):
    """PowerGossip by its equations in float64, edge by edge; the bases are those that the ranks begin with."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    wide = [t for t, s in enumerate(shapes) if len(s) > 1 and rank < min(s[0], sizes[t] // s[0])]
    edges = {(i, j): [[b.double() for b in half] for half in ranks[i].edges[j]]
             for i in range(len(ranks)) for j in ranks[i].edges if i < j}  # fmt: skip
    x = [w.double() for w in weights]
    path = []

    def mixed(x, step):
        w, turn = graph.weights(step), step // len(graph.rounds) % 2
        new = [row.clone() for row in x]
        for (a, b), halves in edges.items():
            if not w[a, b]:
                continue
            moved = (x[b] - x[a]).split(sizes)
            change = []
            for t, part in enumerate(moved):
                if t not in wide:
                    change.append(part)
                    continue
                d = part.view(shapes[t][0], -1)
                d = d.mT if turn else d
                basis = torch.linalg.qr(halves[turn][wide.index(t)]).Q
                other = d.mT @ basis
                halves[turn][wide.index(t)], halves[1 - turn][wide.index(t)] = basis, other
                near = basis @ other.mT
                change.append((near.mT if turn else near).reshape(-1))
            new[a] += w[a, b] * torch.cat(change)
            new[b] -= w[a, b] * torch.cat(change)
        return new

    kept = x
    for step, u in enumerate(moves):
        if order == "with":
            x = [row + v.double() for row, v in zip(kept, u, strict=True)]
            kept = mixed(x, step)
        else:
            x = mixed([row + v.double() for row, v in zip(x, u, strict=True)], step)
        path.append(torch.stack(x))
    return torch.stack(path)


@pytest.mark.parametrize("order", ["with", "then"])
@pytest.mark.parametrize("graph", ["ring", "hypercube", "star"])
def test_powergossip_is_its_definition(graph, order):
    graph = topology(graph, 4)
    ranks = schemes("powergossip", graph, shapes=SHAPES, rank=3, order=order)
    weights, simulator = started(ranks, size=SHAPED), Simulator(4)
    # differences of full rank before the first projection, or what an orthonormal basis of rounding is would count
    moves = [updates(4, step, SHAPED) for step in range(10)]
    expected = by_definition(graph, SHAPES, 3, copy.deepcopy(ranks), weights, moves, order)
    for step, u in enumerate(moves):
        weights = step_all(simulator, ranks, weights, u)
        torch.testing.assert_close(torch.stack(weights).double(), expected[step], rtol=1e-4, atol=1e-5)


def test_two_ranks_that_differ_by_rank_r_agree_after_both_halves():
    """The first step finds the rows of the difference, and the second takes all of it."""
    ranks = schemes("powergossip", topology("ring", 2), shapes=[(12, 9)], rank=3, order="then")
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(12, 9, generator=generator)
    far = torch.randn(12, 3, generator=generator) @ torch.randn(3, 9, generator=generator)
    weights = introduced(ranks, [(base + far).view(-1), (base - far).view(-1)])
    weights = still(ranks, weights, 1)
    assert apart(weights) > 0.1
    weights = still(ranks, weights, 1)
    for each in weights:
        torch.testing.assert_close(each.view(12, 9), base, rtol=1e-4, atol=1e-5)


def test_where_nothing_would_be_gained_powergossip_is_dpsgd():
    for order in ("with", "then"):
        found, _, _ = followed("powergossip", "ring", shapes=[(8, 9), (24,)], rank=8, order=order)
        expected, _, _ = followed("dpsgd", "ring", order=order)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_both_ends_of_an_edge_have_the_same_bases_to_the_bit():
    for graph in ("ring", "hypercube"):
        _, ranks, _ = followed("powergossip", graph, steps=7, shapes=SHAPES, size=SHAPED, rank=3)
        for i, rank in enumerate(ranks):
            assert isinstance(rank, PowerGossip)
            for j in rank.edges:
                for side in "pq":
                    assert torch.equal(rank.state()[f"{side}.{j}"], ranks[j].state()[f"{side}.{i}"])
            assert rank.tally.counts["repaired"] == 0


def test_powergossip_brings_ranks_together():
    """By the mean over 1000 half iterations of rank 4 a factor of 0.98 each on these shapes, so 1e-3 after 350."""
    ranks = schemes("powergossip", "ring", shapes=[(60, 40)], rank=4, order="then")
    weights = introduced(ranks, spread(8, 2400))
    first = apart(weights)
    weights = still(ranks, weights, 350)
    assert 1e-5 * first < apart(weights) < 2e-3 * first


@pytest.mark.parametrize("order", ["with", "then"])
def test_powergossip_sends_what_the_formula_says(order):
    """r k and r m numbers of a matrix in turn, and the rest as it is, to each neighbour."""
    _, ranks, simulator = followed("powergossip", "ring", steps=6, shapes=SHAPES, size=SHAPED, rank=3, order=order)
    halves = 4 * (67 + 3 * (9 + 12)), 4 * (67 + 3 * (12 + 10))
    assert simulator.sent == [2 * 3 * (2 * HEADER_BYTES + sum(halves))] * 8
    settings = ranks[0].place.topology, 0, ranks[0].codec, {"rank": 3, "order": order}
    assert PowerGossip.sends(*settings) == sum(halves) + 2 * HEADER_BYTES
    held = sum(tensor.nbytes for tensor in ranks[0].state().values())
    assert PowerGossip.holds(*settings) == held


@pytest.mark.parametrize("graph", ["ring", "hypercube"])
def test_lost_messages_leave_no_edge_of_powergossip_with_two_bases(graph):
    """An end that missed a message has another q, which both find out before they use it: weights stay of their size,
    and ranks agree afterwards."""
    ranks = schemes("powergossip", topology(graph, 8), shapes=SHAPES, rank=3, order="then")
    weights = introduced(ranks, spread(8, SHAPED))
    lossy = Simulator(8, faults=Chance(drop=0.1, corrupt=0.05))
    for step in range(60):
        weights = step_all(lossy, ranks, weights, updates(8, step, SHAPED, scale=0.01))
        assert max(float(w.abs().max()) for w in weights) < 8.0
    assert sum(rank.tally.counts["repaired"] for rank in ranks) > 10
    weights = still(ranks, weights, 150)
    for i, rank in enumerate(ranks):
        assert isinstance(rank, PowerGossip)
        for j in rank.edges:
            for side in "pq":
                assert torch.equal(rank.state()[f"{side}.{j}"], ranks[j].state()[f"{side}.{i}"])
    assert apart(weights) < 1e-3
    before = sum(rank.tally.counts["repaired"] for rank in ranks)
    still(ranks, weights, 10)
    assert sum(rank.tally.counts["repaired"] for rank in ranks) == before


def test_tensors_without_entries_or_matrices_are_no_trouble():
    graph = from_edges(3, [(0, 1), (1, 2)])
    for shapes in ([(5,), ()], [(0, 7), (12, 9), (2, 0)], [(9, 12), (1, 4)]):
        size = sum(torch.Size(shape).numel() for shape in shapes)
        found, _, _ = followed("powergossip", graph, steps=3, shapes=shapes, size=size)
        assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("name", "codec", "options", "sentence"),
    [
        ("deepsqueeze", "uniform8", {"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0: .+"),
        ("deepsqueeze", "uniform8", {"gamma": float("nan")}, r"gamma must be .+, got nan: .+"),
        ("powergossip", "float32", {"rank": 0}, "rank must be a whole number of at least 1, got 0: use 1 to 8"),
        ("powergossip", "float32", {"rank": 1.5}, "rank must be a whole number of at least 1, got 1.5: .+"),
        ("powergossip", "float32", {"order": "first"}, "order must be with or then, got 'first': .+"),
        ("powergossip", "uniform8", {}, "powergossip sends .+ float32: leave the compressor out"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, codec, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        schemes(name, "ring", codec, **options)
