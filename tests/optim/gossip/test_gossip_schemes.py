"""Laws of ways to exchange weights, on ranks of a simulator."""

import copy
from typing import Any

import pytest
import torch
from simulated_ranks import SIZE, Quadratics, introduced, schemes, spread, started, step_all, updates

from thinrank.optim.gossip.compress import compressor
from thinrank.optim.gossip.message import HEADER_BYTES
from thinrank.optim.gossip.schemes import ECD, SCHEMES
from thinrank.optim.gossip.simulator import Simulator
from thinrank.optim.gossip.topology import from_edges, topology

COPIES = ("dcd", "ecd", "choco")
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}  # float32, some hundred sums


def followed(name, graph, codec="float32", steps=12, seed=0, **options):
    """All ranks' weights after each step of the same updates."""
    ranks = schemes(name, graph, codec, seed=seed, **options)
    weights, simulator, path = started(ranks), Simulator(len(ranks)), []
    for step in range(steps):
        weights = step_all(simulator, ranks, weights, updates(len(ranks), step))
        path.append(torch.stack(weights))
    return torch.stack(path), ranks, simulator


def by_matrix(graph, order, steps=12):
    """The definition, with all ranks' weights in one matrix, in float64."""
    n = graph.size
    x = torch.stack(started(schemes("dpsgd", graph))).double()
    path = []
    for step in range(steps):
        u = torch.stack(updates(n, step)).double()
        # what is averaged beside a step has left after the one before; all are equal at the first
        x = graph.weights(max(step - 1, 0)) @ x + u if order == "with" else graph.weights(step) @ (x + u)
        path.append(x)
    return torch.stack(path)


@pytest.mark.parametrize("order", ["with", "then"])
@pytest.mark.parametrize("graph", ["ring", "exponential", "one_peer_exponential", "complete", "star"])
def test_dpsgd_is_its_definition(graph, order):
    graph = topology(graph, 8)
    found, _, _ = followed("dpsgd", graph, order=order)
    torch.testing.assert_close(found, by_matrix(graph, order).float(), **CLOSE)


@pytest.mark.parametrize(("name", "order"), [("dcd", "with"), ("ecd", "with"), ("choco", "then")])
@pytest.mark.parametrize("graph", ["ring", "torus", "star"])
def test_without_compression_it_is_dpsgd(name, order, graph):
    """CHOCO with γ = 1 adapts and then combines, W (X + u); the other two W X + u."""
    graph = topology(graph, 9)
    found, _, _ = followed(name, graph)
    torch.testing.assert_close(found, by_matrix(graph, order).float(), **CLOSE)


@pytest.mark.parametrize("name", COPIES)
def test_on_a_complete_graph_it_is_the_mean_of_all(name):
    found, ranks, _ = followed(name, "complete")
    x = started(ranks)[0]
    for step, after in enumerate(found):
        u = torch.stack(updates(8, step))
        torch.testing.assert_close(after.mean(0), x + u.mean(0), **CLOSE)
        x = after.mean(0)
        own = u if name != "choco" else u.mean(0).expand_as(u)
        torch.testing.assert_close(after, x - u.mean(0) + own, **CLOSE)


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("codec", ["uniform8", "uniform4", "sign", "topk"])
def test_copies_are_what_they_are_copies_of_to_the_bit(name, codec):
    _, ranks, _ = followed(name, "ring", codec, steps=30)
    for rank in ranks:
        for j, copied in rank.copies.items():
            assert torch.equal(copied, ranks[j].public)
    assert not torch.equal(ranks[0].public, ranks[1].public)


def test_dcd_tells_all_there_is_of_its_weights():
    found, ranks, _ = followed("dcd", "ring", "uniform4")
    for rank, weights in zip(ranks, found[-1], strict=True):
        assert torch.equal(rank.public, weights)


def test_compression_never_touches_the_mean_of_choco():
    """As opposed to DCD's, whose mean moves by what has been told."""
    shift = {}
    for name in ("choco", "dcd"):
        found, ranks, _ = followed(name, "ring", "uniform3", steps=40)
        mean = started(ranks)[0] + sum(torch.stack(updates(8, step)).mean(0) for step in range(40))
        shift[name] = float((found[-1].mean(0) - mean).abs().max())
    assert shift["choco"] < 1e-5 < 1e-3 < shift["dcd"]


@pytest.mark.parametrize(("name", "order"), [("dpsgd", "with"), ("choco", "then"), ("dcd", "with")])
def test_ranks_agree_as_fast_as_the_graph_lets_them(name, order):
    """Without updates the distance from the mean goes down by ρ a step at least, and the mean stays."""
    graph = topology("ring", 8)
    ranks = schemes(name, graph)
    weights = introduced(ranks, spread(8))
    mean, simulator = torch.stack(weights).mean(0), Simulator(8)
    first = far = float((torch.stack(weights) - mean).norm())
    for step in range(1, 40):
        weights = step_all(simulator, ranks, weights, [torch.zeros(SIZE)] * 8)
        far = float((torch.stack(weights) - mean).norm())
        ahead = step - (name == "dpsgd" and order == "with") * 0
        assert far <= first * graph.second**ahead * (1 + 1e-4) + 1e-5
    torch.testing.assert_close(torch.stack(weights).mean(0), mean, **CLOSE)
    assert far > 0.3 * first * graph.second**39  # and no faster: this is the slowest direction


def test_one_peer_schedules_agree_exactly_after_three_steps():
    ranks = schemes("dpsgd", "one_peer_exponential", order="then")
    weights, simulator = spread(8), Simulator(8)
    mean = torch.stack(weights).mean(0)
    for _ in range(3):
        weights = step_all(simulator, ranks, weights, [torch.zeros(SIZE)] * 8)
    torch.testing.assert_close(torch.stack(weights), mean.expand(8, -1), **CLOSE)


def test_the_error_of_ecds_copies_follows_its_recursion():
    """e' = (1 − 2/t) e + (2/t)(C(z) − z), of which C(z) − z is found from the message."""
    ranks = schemes("ecd", "ring", "uniform4")
    weights, simulator = started(ranks), Simulator(8)
    error = [torch.zeros(SIZE, dtype=torch.float64) for _ in ranks]
    for step in range(25):
        before, t = [w.double() for w in weights], step + 1
        old = [rank.public.double() for rank in ranks]
        weights = step_all(simulator, ranks, weights, updates(8, step))
        for i, rank in enumerate(ranks):
            z = (1 - t / 2) * before[i] + t / 2 * weights[i].double()
            told = (rank.public.double() - (1 - 2 / t) * old[i]) * t / 2
            error[i] = (1 - 2 / t) * error[i] + 2 / t * (told - z)
            # both sides hold numbers of float32 that t enlarges
            torch.testing.assert_close(rank.public.double() - weights[i], error[i], rtol=1e-3, atol=2e-6 * t)
    assert max(float(e.abs().max()) for e in error) > 1e-2


def test_ecd_begins_again():
    rank = schemes("ecd", "ring", restart=4)[0]
    assert isinstance(rank, ECD)
    times = []
    for rank.steps in range(9):
        times.append(rank.time)
    assert times == [1, 2, 3, 4, 1, 2, 3, 4, 1]


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("codec", ["uniform8", "uniform4"])
def test_bytes_are_what_the_formula_says(name, codec):
    _, ranks, simulator = followed(name, "ring", codec, steps=10)
    assert simulator.sent == [10 * 2 * (HEADER_BYTES + ranks[0].codec.nbytes)] * 8


@pytest.mark.parametrize("name", ["dpsgd", *COPIES])
def test_the_same_seed_sends_the_same_bytes(name):
    codec = "float32" if name == "dpsgd" else "uniform4"

    def messages(seed):
        heard = []

        class Listen:
            def carried(self, count, source, target, message):
                heard.append((source, target, bytes(message.tolist())))
                return message

            def delay(self, count, source, target):
                return 0.0

        ranks = schemes(name, "ring", codec, seed=seed)
        weights, simulator = started(ranks), Simulator(8, faults=Listen())
        torch.manual_seed(seed + 5)  # is not used
        before = torch.get_rng_state()
        for step in range(4):
            weights = step_all(simulator, ranks, weights, updates(8, step))
        assert torch.equal(torch.get_rng_state(), before)
        return heard

    assert messages(0) == messages(0)
    if name != "dpsgd":
        assert messages(0) != messages(1)


@pytest.mark.parametrize("name", [*SCHEMES])
def test_it_goes_on_from_its_state_to_the_bit(name):
    kind = SCHEMES[name]
    shapes = [(8, 10), (16,)]

    def new():
        return schemes(name, "ring", kind.USUAL, shapes=shapes)

    ranks, simulator = new(), Simulator(8)
    weights = started(ranks)
    for step in range(7):
        weights = step_all(simulator, ranks, weights, updates(8, step))
    kept = [(copy.deepcopy(rank.state()), rank.steps) for rank in ranks]
    again, others = [w.clone() for w in weights], new()
    for rank, (state, steps) in zip(others, kept, strict=True):
        rank.load(state, steps)
    for step in range(7, 14):
        weights = step_all(simulator, ranks, weights, updates(8, step))
        again = step_all(simulator, others, again, updates(8, step))
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("dcd", "uniform8", {}),
        ("dcd", "uniform4", {}),
        ("ecd", "uniform8", {}),
        ("choco", "uniform8", {}),
        ("choco", "uniform4", {}),
        ("choco", "uniform4", {"order": "with"}),
        ("choco", "uniform2", {}),
        ("choco", "sign", {"gamma": 0.5}),
        ("choco", "topk", {"gamma": 0.5}),
    ],
)
def test_compressed_ranks_find_what_uncompressed_ones_find(name, codec, options):
    problem = Quadratics(8)
    _, exact = problem.train(schemes("dpsgd", "ring"))
    _, found = problem.train(schemes(name, "ring", codec, **options))
    assert found < 1.25 * exact


def test_ecd_needs_more_bits_than_dcd():
    """What it sends grows with t, and the error of a scale for each bucket with what is sent."""
    problem = Quadratics(8)
    _, dcd = problem.train(schemes("dcd", "ring", "uniform4"))
    _, ecd = problem.train(schemes("ecd", "ring", "uniform4"))
    assert ecd > 2 * dcd


def test_a_compressor_that_is_not_contractive_diverges_in_dcd_and_not_when_scaled():
    problem = Quadratics(8)
    _, scaled = problem.train(schemes("dcd", "ring", compressor("uniform2", bucket=96, scaled=True)))
    _, raw = problem.train(schemes("dcd", "ring", compressor("uniform2", bucket=96, scaled=False)))
    assert scaled < 0.3
    assert not raw < 2 * scaled


@pytest.mark.parametrize("name", ["dpsgd", *COPIES])
def test_an_update_that_is_not_finite_is_left_out_on_both_ends(name):
    codec = "float32" if name == "dpsgd" else "uniform4"
    ranks = schemes(name, "ring", codec, check_every=5)
    weights, simulator = started(ranks), Simulator(8)
    for step in range(20):
        moves = updates(8, step)
        if step in (4, 11):
            moves[3][7] = float("nan") if step == 4 else float("inf")
        weights = step_all(simulator, ranks, weights, moves)
        assert all(bool(w.isfinite().all()) for w in weights)
    assert [rank.tally.skipped for rank in ranks] == [0, 0, 0, 2, 0, 0, 0, 0]
    told = [0, 0, 2, 0, 2, 0, 0, 0] if name in COPIES else [0] * 8  # D-PSGD sends the weights that it has
    assert [rank.tally.counts["skipped"] for rank in ranks] == told
    assert all(rank.tally.counts["repaired"] == 0 for rank in ranks)
    if name in COPIES:
        assert all(torch.equal(c, ranks[j].public) for rank in ranks for j, c in rank.copies.items())


def test_a_graph_of_ones_own():
    graph = from_edges(5, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2)])
    found, ranks, _ = followed("choco", graph, "uniform8")
    assert set(ranks[0].copies) == {0, 1, 2, 4}
    torch.testing.assert_close(found, by_matrix(graph, "then").float(), rtol=0.02, atol=0.02)
