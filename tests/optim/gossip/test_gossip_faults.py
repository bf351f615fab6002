"""What becomes of lost and damaged messages, parted networks, late and dead ranks: on ranks of a simulator."""

import functools

import pytest
import torch
from simulated_ranks import (
    SIZE,
    Quadratics,
    attempt,
    diverged,
    flipped,
    reformed,
    schemes,
    spread,
    started,
    step_all,
    updates,
)

from thinrank.optim.gossip.compress import compressor, identity_of
from thinrank.optim.gossip.mail import Mail
from thinrank.optim.gossip.message import HEADER_BYTES
from thinrank.optim.gossip.rounds import PeerLost
from thinrank.optim.gossip.schemes import Place, scheme_class
from thinrank.optim.gossip.simulator import Chance, Simulator, run
from thinrank.optim.gossip.topology import among, from_edges, ring, topology

COPIES = {"dcd": "uniform8", "ecd": "uniform8", "choco": "uniform4"}
ALL = {"dpsgd": "float32", **COPIES}
CHECK, STEPS = 10, 130


class Once:
    """One message of one round is lost or damaged."""

    def __init__(self, count, source, target, kind):
        self.where, self.kind = (count, source, target), kind

    def carried(self, count, source, target, message):
        if (count, source, target) != self.where:
            return message
        return None if self.kind == "lost" else flipped(message)

    def delay(self, count, source, target):
        return 0.0


def round_of(step, part=0):
    """Rounds before that part of an exchange: each is one, and a check two more."""
    return step + 2 * (step // CHECK) + part


def trained(name, faults=None, steps=STEPS, check_every=CHECK, watch=None, nan_at=None, **options):
    """Quadratics on a ring of 8; the error at the end, the weights and the ranks."""
    problem = Quadratics(8)
    ranks = schemes(name, "ring", ALL[name], check_every=check_every, **options)
    weights, simulator, errors = started(ranks, torch.zeros(SIZE)), Simulator(8, faults=faults), []
    for step in range(steps):
        moves = problem.updates(weights, step)
        if nan_at is not None and step == nan_at[1]:
            moves[nan_at[0]][5] = float("nan")
        weights = step_all(simulator, ranks, weights, moves)
        errors.append(problem.error(weights))
        if watch is not None:
            watch(step, ranks)
    return sum(errors[-30:]) / 30, weights, ranks


@functools.cache
def undisturbed(name):
    return trained(name)[:2]


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lost", "damaged"])
@pytest.mark.parametrize("name", COPIES)
def test_a_message_that_fails_is_made_good_at_the_next_check(name, kind):
    """The copy is wrong from then on, and equal to the bit from the check on."""
    bad = {}
    faults = Once(round_of(13), 4, 5, kind)
    found, _, ranks = trained(name, faults, watch=lambda step, ranks: bad.update({step: diverged(ranks)}))
    assert bad == {step: [(5, 4)] if 13 <= step < 19 else [] for step in range(STEPS)}
    counted = {"corrupt" if kind == "damaged" else kind: 1, "repaired": 1}
    for i, rank in enumerate(ranks):
        assert {key: n for key, n in rank.tally.counts.items() if n} == (counted if i == 5 else {})
    assert found == pytest.approx(undisturbed(name)[0], rel=0.05)


@pytest.mark.parametrize("kind", ["lost", "damaged"])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("name", COPIES)
def test_each_message_of_a_check_may_fail(name, part, kind):
    """The difference that carries the fingerprint, the question, or the copy: at the latest the next check helps."""

    class Twice(Once):
        def carried(self, count, source, target, message):
            if (count, source, target) == (round_of(13), 4, 5):
                return None
            return super().carried(count, source, target, message)

    bad = {}
    direction = (5, 4) if part == 1 else (4, 5)
    faults = Twice(round_of(19, part), *direction, kind)
    trained(name, faults, steps=45, watch=lambda step, ranks: bad.update({step: diverged(ranks)}))
    # a difference that failed is asked for at once, and a question is said three times
    until = 19 if part == 0 or (part == 1 and kind == "damaged") else 29
    assert bad == {step: [(5, 4)] if 13 <= step < until else [] for step in range(45)}


def test_without_checks_dcd_goes_astray():
    """What the two tests before would find without them."""
    faults = Once(1, 4, 5, "lost")
    found, _, ranks = trained("dcd", faults, check_every=10**6)
    usual, _ = undisturbed("dcd")
    assert diverged(ranks) == [(5, 4)]
    assert float((ranks[5].copies[4] - ranks[4].public).norm()) > 0.1
    assert found > 1.2 * usual
    assert trained("dcd", faults)[0] < 1.05 * usual


@pytest.mark.parametrize("name", ALL)
def test_a_network_in_two_parts_grows_together(name):
    """50 exchanges apart, a rank with a NaN meanwhile: copies are right after the first check, the loss comes back."""
    faults = Chance(partitions=[(round_of(25), round_of(75), frozenset({1, 2, 3}))])
    bad = {}
    found, weights, ranks = trained(
        name, faults, nan_at=(2, 50), watch=lambda step, ranks: bad.update({step: diverged(ranks)})
    )
    if name in COPIES:
        apart = [(0, 1), (1, 0), (3, 4), (4, 3)]
        assert bad == {step: apart if 25 <= step < 79 else [] for step in range(STEPS)}
        assert [rank.tally.counts["repaired"] for rank in ranks] == [1, 1, 0, 1, 1, 0, 0, 0]
    assert [rank.tally.skipped for rank in ranks] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert all(rank.tally.counts["lost"] >= 50 for i, rank in enumerate(ranks) if i in (0, 1, 3, 4))
    error, usual = undisturbed(name)
    assert found == pytest.approx(error, rel=0.1)
    far, was = (float((torch.stack(x) - torch.stack(x).mean(0)).norm()) for x in (weights, usual))
    assert far < 1.1 * was


@pytest.mark.parametrize("name", ALL)
def test_heavy_losses_end(name):
    """A tenth of all messages lost and as many damaged for 60 exchanges; then the loss is as if nothing had been."""

    class Until(Chance):
        def carried(self, count, source, target, message):
            return super().carried(count, source, target, message) if count < round_of(60) else message

    found, _, ranks = trained(name, Until(seed=1, drop=0.1, corrupt=0.1))
    assert diverged(ranks) == []
    assert found == pytest.approx(undisturbed(name)[0], rel=0.1)


# --- time -------------------------------------------------------------------------------------------------------------


def timed(name, works, faults=None, steps=20):
    """Weights and clocks of ranks that work for so long before each exchange."""
    ranks = schemes(name, "ring", ALL[name])
    weights, simulator = started(ranks), Simulator(8, rate=1e4, latency=0.02, faults=faults)
    for step in range(steps):
        for rank, seconds in enumerate(works):
            simulator.work(rank, seconds)
        weights = step_all(simulator, ranks, weights, updates(8, step))
    return weights, simulator.clock, (HEADER_BYTES + ranks[0].codec.nbytes) / 1e4


@pytest.mark.parametrize("name", ALL)
def test_a_slow_rank_sets_the_pace_and_changes_nothing(name):
    """It never waits itself; at distance d one hears of its step d exchanges later. A ring's two messages leave in
    turn."""
    usual, clocks, message = timed(name, [0.1] * 8)
    assert max(clocks) == pytest.approx(20 * (0.1 + 2 * message + 0.02))
    assert min(clocks) > max(clocks) - 3 * message
    weights, clocks, message = timed(name, [1.0 if rank == 3 else 0.1 for rank in range(8)])
    assert all(torch.equal(a, b) for a, b in zip(weights, usual, strict=True))
    assert clocks[3] == pytest.approx(20 * 1.0)
    assert clocks[2] == pytest.approx(20 * 1.0 + message + 0.02)
    assert clocks[4] == pytest.approx(20 * 1.0 + 2 * message + 0.02)
    for rank in range(8):
        far = min((rank - 3) % 8, (3 - rank) % 8)
        assert (20 - max(far - 1, 0)) * 1.0 <= clocks[rank] <= 20 * 1.0 + far * (2 * message + 0.02) + 0.1 * far


@pytest.mark.parametrize("name", ALL)
def test_late_messages_change_nothing(name):
    usual, on_time, _ = timed(name, [0.1] * 8)
    weights, clocks, _ = timed(name, [0.1] * 8, Chance(slow={3: 0.5}))
    assert all(torch.equal(a, b) for a, b in zip(weights, usual, strict=True))
    # 3 waits for its neighbours, which have waited for it: half a second every other exchange
    late = [a - b for a, b in zip(clocks, on_time, strict=True)]
    assert late[2] == pytest.approx(5.0, abs=0.4)
    assert late[4] == pytest.approx(5.0, abs=0.4)
    assert all(3.5 < each < 5.2 for each in late)


# --- ranks that are lost, and new ones --------------------------------------------------------------------------------


def with_a_death(name, graph, steps=15, patience=4, dead=3):
    """Until its neighbours have noticed."""
    problem = Quadratics(8)
    ranks = schemes(name, graph, ALL[name], check_every=CHECK, patience=patience)
    weights, simulator = started(ranks, torch.zeros(SIZE)), Simulator(8)
    for step in range(steps):
        weights = step_all(simulator, ranks, weights, problem.updates(weights, step))
    ranks[dead], raised = None, {}
    for late in range(patience + 1):
        weights, raised = attempt(simulator, ranks, weights, problem.updates(weights, steps + late))
        assert bool(raised) == (late == patience)
    return problem, ranks, weights, simulator, raised


@pytest.mark.parametrize("graph", ["ring", "complete"])
@pytest.mark.parametrize("name", ALL)
def test_who_is_silent_is_named_by_its_neighbours(name, graph):
    _, _, _, _, raised = with_a_death(name, graph)
    assert sorted(raised) == ([2, 4] if graph == "ring" else [0, 1, 2, 4, 5, 6, 7])
    for rank, error in raised.items():
        assert error.ranks == (3,)
        assert f"rank {rank} has heard nothing that can be read of rank 3 for 5 exchanges" in str(error)


@pytest.mark.parametrize("new", ["without", "ring"])
@pytest.mark.parametrize("name", ALL)
def test_the_others_go_on_without_it(name, new):
    """On what is left of the graph, or on a new one: to where ranks go that were never more."""
    problem, ranks, weights, simulator, _ = with_a_death(name, "ring")
    left = [rank for rank in range(8) if rank != 3]
    graph = ring(8).without([3]) if new == "without" else among(ring(7), left, 8)
    before = torch.stack([weights[i] for i in left]).mean(0)
    weights, raised = reformed(simulator, ranks, graph, weights)
    assert not raised
    assert diverged(ranks) == []
    torch.testing.assert_close(torch.stack([weights[i] for i in left]).mean(0), before)
    assert {rank.steps for rank in ranks if rank} == {20}
    assert all(set(rank.sources) == set(graph.sources(i)) for i, rank in enumerate(ranks) if rank)

    best, errors = problem.targets[left].mean(0), []
    for step in range(20, 120):
        weights, raised = attempt(simulator, ranks, weights, problem.updates(weights, step))
        assert not raised
        mean = torch.stack([weights[i] for i in left]).mean(0)
        errors.append(float((mean - best).norm() / best.norm()))
    assert diverged(ranks) == []
    fewer = Quadratics(7)
    fewer.targets = problem.targets[left]
    _, never_more = fewer.train(schemes(name, ring(7), ALL[name]), steps=120)
    assert sum(errors[-30:]) / 30 < 1.3 * never_more


@pytest.mark.parametrize("name", ALL)
def test_a_rank_that_joins_gets_weights_from_its_neighbours(name):
    """It begins at their mean, is as near to the mean of all as they are after some exchanges, and counts from then."""
    problem = Quadratics(9)
    codec = compressor(ALL[name])
    ranks = [*schemes(name, among(ring(8), range(8), 9), codec, check_every=CHECK)]
    ranks[8] = None
    weights, simulator = [torch.zeros(SIZE)] * 9, Simulator(9)
    for rank in ranks[:8]:
        rank.start(weights[0])
    for step in range(30):
        weights, _ = attempt(simulator, ranks, weights, problem.updates(weights, step))

    place = Place(rank=8, topology=ring(9), check_every=CHECK, compressor=codec)
    ranks[8] = scheme_class(name)(place, codec.bind([(SIZE,)]))
    before = weights
    weights, raised = reformed(simulator, ranks, ring(9), weights, newcomers={8})
    assert not raised
    assert torch.equal(weights[8], torch.stack([before[0], before[7]]).mean(0))
    assert all(torch.equal(a, b) for a, b in zip(weights[:8], before[:8], strict=True))
    assert diverged(ranks) == []
    assert {rank.steps for rank in ranks} == {30}

    for step in range(30, 45):
        weights, _ = attempt(simulator, ranks, weights, problem.updates(weights, step))
        assert diverged(ranks) == []
    far = (torch.stack(weights) - torch.stack(weights).mean(0)).norm(dim=1)
    assert far[8] < 1.5 * far[:8].max()
    errors = []
    for step in range(45, 120):
        weights, _ = attempt(simulator, ranks, weights, problem.updates(weights, step))
        errors.append(problem.error(weights))
    _, from_the_start = Quadratics(9).train(schemes(name, ring(9), ALL[name]), steps=120)
    assert sum(errors[-30:]) / 30 < 1.2 * from_the_start


def test_who_is_given_nothing_does_not_join():
    ranks = schemes("choco", "ring", patience=2)
    simulator = Simulator(8, faults=Chance(partitions=[(0, 100, frozenset({5}))]))
    weights, raised = reformed(simulator, ranks, ring(8), spread(8), newcomers={5})
    assert list(raised) == [5]
    assert raised[5].ranks == (4, 6)
    assert "rank 5 wants to join, and has got the weights of none of its neighbours (4, 6)" in str(raised[5])
    ranks[5] = None
    for _ in range(3):
        weights, raised = attempt(simulator, ranks, weights, updates(8, 0))
    assert {i: error.ranks for i, error in raised.items()} == {4: (5,), 6: (5,)}


@pytest.mark.parametrize(
    ("graph", "weights", "newcomers", "words"),
    [
        (ring(8).without([0]), torch.zeros(SIZE), (), "rank 0 is gone from the new graph"),
        (ring(8), torch.full((SIZE,), torch.nan), (), "rank 0 has weights that are not finite"),
        (ring(8), None, (), "newcomers, and no others, begin without weights"),
        (ring(8), torch.zeros(SIZE), (0,), "newcomers, and no others, begin without weights"),
        (ring(8).without([3, 6]), torch.zeros(SIZE), (), "ranks must be connected"),
        (topology("exponential", 8), torch.zeros(SIZE), (), "dcd needs symmetric weights"),
        (topology("hypercube", 8), torch.zeros(SIZE), (), "dcd needs the same neighbours"),
    ],
)
def test_graphs_that_cannot_be_reformed(graph, weights, newcomers, words):
    rank = schemes("dcd", "ring")[0]
    with pytest.raises(ValueError, match=words):
        next(rank.reform(graph, weights, steps=0, newcomers=newcomers))
    assert rank.place.topology.name == "ring"
    assert rank.place.topology.gone == ()


def test_a_graph_among_some_ranks():
    graph = among(from_edges(3, [(0, 1), (1, 2)]), [6, 1, 4], 8)
    assert graph.alive == (1, 4, 6)
    assert [graph.sources(rank) for rank in graph.alive] == [(4, 6), (1,), (1,)]
    assert graph.second == pytest.approx(from_edges(3, [(0, 1), (1, 2)]).second)
    for members in ([0, 1], [0, 1, 1], [0, 1, 8]):
        with pytest.raises(ValueError, match="members must be 3 different ranks from 0 to 7"):
            among(ring(3), members, 8)
    with pytest.raises(ValueError, match=r"and \[1\] are gone"):
        among(ring(3).without([1]), [0, 1, 2], 8)


# --- one rank's mail --------------------------------------------------------------------------------------------------


def mail(rank=0, patience=2):
    return Mail(rank, patience, identity_of("float32"), 4)


def given(generator, came):
    """What a round ends with."""
    next(generator)
    try:
        generator.send(came)
    except StopIteration as end:
        return end.value
    raise AssertionError("one round is all")


def test_silence_is_counted_in_exchanges_and_ends_with_what_can_be_read():
    box, message = mail(), mail(rank=1).seal(1, torch.zeros(16, dtype=torch.uint8))
    for _ in range(3):  # rounds of one exchange
        given(box.swap(0, {}, {1: 16}), {1: None})
    assert box.silent[1] == 1
    assert box.counts["lost"] == 3
    given(box.swap(1, {}, {1: 16}), {1: flipped(message)})
    assert box.silent[1] == 2
    given(box.swap(1, {}, {1: 16}), {1: message})
    given(box.swap(1, {}, {1: 16}), {1: None})  # as a copy whose question was lost
    assert box.silent[1] == 0
    for step in (2, 3):
        given(box.swap(step, {}, {1: 16, 2: 16}), {1: None, 2: message})  # of another step
    with pytest.raises(PeerLost, match="heard nothing that can be read of ranks 1, 2 for 3 exchanges") as found:
        given(box.swap(4, {}, {1: 16, 2: 16}), {})
    assert found.value.ranks == (1, 2)
    box.forgive()
    given(box.swap(4, {}, {1: 16, 2: 16}), {})


def test_who_goes_on_alone_after_a_loss_is_noticed():
    """A rank that ignores a broken exchange is a step behind: nothing of it can be read, and its neighbours say so."""
    ranks = schemes("choco", "complete", "uniform4", patience=4)
    weights, simulator, raised = started(ranks), Simulator(8), {}
    ranks[0].steps += 1
    for step in range(5):
        weights, raised = attempt(simulator, ranks, weights, updates(8, step))
        assert bool(raised) == (step == 4)
    assert {i: error.ranks for i, error in raised.items()} == {
        i: (0,) if i else (1, 2, 3, 4, 5, 6, 7) for i in range(8)
    }


@pytest.mark.parametrize("wants", [True, False])
def test_a_question_is_understood_with_one_fault(wants):
    """Both ends must know alike whether a copy follows: on links where messages always arrive, one would hang."""
    asked = next(mail(rank=1).ask(0, [0] if wants else [], [0], [])).sends[0]
    assert len(asked) == 3 * HEADER_BYTES
    for place in range(8 * len(asked)):
        box = mail()
        assert given(box.ask(0, [], [], [1]), {1: flipped(asked, place)}) == [1] * wants
        assert box.counts["corrupt"] == 1
    assert given(mail().ask(0, [], [], [1]), {1: None}) == []


def test_a_question_that_cannot_be_read_is_an_error():
    asked = next(mail(rank=1).ask(0, [0], [0], [])).sends[0]
    for part in range(3):
        asked = flipped(asked, 8 * HEADER_BYTES * part + 200)
    with pytest.raises(PeerLost, match="cannot read whether rank 1 waits for a copy") as found:
        given(mail().ask(0, [], [], [1]), {1: asked})
    assert found.value.ranks == (1,)


def test_what_is_lost_in_an_introduction_is_asked_for_at_the_first_check():
    ranks = schemes("choco", "ring", "uniform4", check_every=5)
    simulator = Simulator(8, faults=Chance(seed=2, drop=0.5))
    weights = run(simulator, [rank.introduce(w) for rank, w in zip(ranks, spread(8), strict=True)])
    assert diverged(ranks)
    simulator.faults = None
    for step in range(5):
        weights = step_all(simulator, ranks, weights, updates(8, step))
    assert diverged(ranks) == []
