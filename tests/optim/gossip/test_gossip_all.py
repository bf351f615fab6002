"""Laws of exchanges among all ranks, on a simulator: all-reduce, DiLoCo, SparseLoCo, DeMo."""

import math

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

from thinrank.optim.gossip.compress import compressor
from thinrank.optim.gossip.compress.dct import DctCodec
from thinrank.optim.gossip.message import HEADER_BYTES
from thinrank.optim.gossip.simulator import Chance, Simulator
from thinrank.optim.gossip.topology import topology

FOUR = topology("ring", 4)
SHAPES = [(9, 8), (24,)]  # 96 in all, as `SIZE`
SHARE = compressor("topk", fraction=0.25)
COSINE = compressor("dct", chunk=8, k=16)

ALIKE = [
    ("allreduce", "float32", {}),
    ("allreduce", "uniform4", {}),
    ("allreduce", "sign", {}),
    ("diloco", "float32", {}),
    ("diloco", "uniform8", {}),
    ("sparseloco", SHARE, {}),
    ("sparseloco", "uniform2", {}),
    ("demo", COSINE, {}),
    ("demo", COSINE, {"step": "mean"}),
]
LOSSY = [each for each in ALIKE if each[1] != "float32"]  # that mean does not travel as messages


def following(name, codec, graph=FOUR, steps=6, **options):
    return followed(name, graph, codec, steps=steps, shapes=SHAPES, **options)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec", "options"), ALIKE)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_ranks_have_the_same_weights_to_the_bit(name, codec, options, n):
    """Also where the vector of 96 cannot be cut into equal pieces, and where there is one rank."""
    found, _, _ = following(name, codec, topology("complete", n), check_every=2, **options)
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert bool((found[1:] != found[:-1]).any(2).all())


@pytest.mark.parametrize(("name", "codec", "options"), ALIKE)
def test_the_graph_does_not_matter(name, codec, options):
    found = [following(name, codec, topology(graph, 4), steps=3, **options)[0] for graph in ("ring", "star")]
    assert torch.equal(*found)


@pytest.mark.parametrize(("name", "codec", "options"), LOSSY)
def test_the_same_seed_sends_the_same_bytes(name, codec, options):
    def messages(seed):
        return heard(schemes(name, FOUR, codec, shapes=SHAPES, seed=seed, **options))

    first = messages(0)
    assert first == messages(0)
    if codec in ("uniform4", "uniform8", "uniform2"):  # others have no chance in them
        assert first != messages(1)


@pytest.mark.parametrize(("name", "codec", "options"), ALIKE)
def test_an_update_that_is_not_finite_is_left_out_on_all_ranks(name, codec, options):
    """The mean is then over the others: what three ranks without the bad one would find."""
    ranks = schemes(name, FOUR, codec, shapes=SHAPES, **options)
    weights, simulator = started(ranks), Simulator(4)
    fewer = schemes(name, topology("complete", 3), codec, shapes=SHAPES, **options)
    without, smaller = started(fewer), Simulator(3)
    for step in range(3):
        moves = [*updates(3, step), torch.full((96,), float("inf" if step == 1 else "nan"))]
        weights = step_all(simulator, ranks, weights, moves)
        without = step_all(smaller, fewer, without, moves[:3])
        assert all(torch.equal(w, weights[0]) for w in weights)
    assert [rank.tally.skipped for rank in ranks] == [0, 0, 0, 3]
    if not (codec in ("uniform4", "uniform8", "sign") and name != "sparseloco"):  # whose pieces are others among three
        torch.testing.assert_close(weights[0], without[0], **CLOSE)
    assert bool(weights[0].isfinite().all())
    moved = step_all(simulator, ranks, weights, [torch.full((96,), float("nan"))] * 4)
    assert all(torch.equal(w, moved[0]) and bool(w.isfinite().all()) for w in moved)


@pytest.mark.parametrize(("name", "codec", "options"), LOSSY)
def test_what_lost_messages_leave_apart_is_the_same_again_after_a_check(name, codec, options):
    ranks = schemes(name, FOUR, codec, shapes=SHAPES, check_every=5, **options)
    weights, lossy, apart_once = started(ranks), Simulator(4, faults=Chance(drop=0.1, corrupt=0.1)), False
    for step in range(14):
        weights = step_all(lossy, ranks, weights, updates(4, step))
        apart_once |= apart(weights) > 0
    assert apart_once
    simulator = Simulator(4)
    for step in range(14, 19):  # a check is the first thing, and what comes after it is of the same memories
        weights = step_all(simulator, ranks, weights, updates(4, step))
    assert all(torch.equal(w, weights[0]) for w in weights)
    assert sum(rank.tally.counts["repaired"] for rank in ranks) > 0
    assert float(weights[0].abs().max()) < 10.0


@pytest.mark.parametrize(("name", "codec", "options"), ALIKE)
def test_ranks_with_different_weights_begin_at_their_mean(name, codec, options):
    own = spread(4)
    weights = introduced(schemes(name, FOUR, codec, shapes=SHAPES, **options), own)
    for each in weights:
        torch.testing.assert_close(each, torch.stack(own).mean(0), **CLOSE)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("allreduce", "float32", {}),
        ("allreduce", "uniform4", {}),
        ("diloco", "float32", {"outer_lr": 1.0, "outer_momentum": 0.0}),
        ("diloco", "float32", {"fragments": 2, "mixing": 0.5, "outer_lr": 1.0, "outer_momentum": 0.0}),
        ("diloco", "uniform8", {"outer_lr": 1.0, "outer_momentum": 0.0}),
        ("sparseloco", SHARE, {}),
        ("sparseloco", SHARE, {"decay": 1.0}),
    ],
)
def test_ranks_find_what_uncompressed_ones_find(name, codec, options):
    """Rank i's quadratic has another minimum: a mean of fewer than all would be off by about 0.6 of what is sought."""
    problem = Quadratics(4)
    _, exact = problem.train(schemes("dpsgd", topology("complete", 4)), 100)
    _, found = problem.train(schemes(name, FOUR, codec, shapes=SHAPES, **options), 100)
    assert exact < 0.15
    assert found < 1.6 * exact


@pytest.mark.parametrize("options", [{"step": "mean", "decay": 0.9}, {"decay": 0.9}, {"decay": 0.9, "lr": 0.02}])
def test_demo_finds_what_ranks_seek_in_common(options):
    """Better than a rank alone could, whose noise is √8 as large. What one rank alone has sent of a place counts as if
    all had, so that ranks which seek other things than each other are led astray."""
    problem = Quadratics(8)
    problem.targets = problem.targets[:1].expand(8, -1)
    _, exact = problem.train(schemes("dpsgd", "complete"), 150)
    _, found = problem.train(schemes("demo", "ring", COSINE, shapes=SHAPES, **options), 150)
    assert found < math.sqrt(8.0) * exact


@pytest.mark.parametrize(
    ("name", "codec", "options"), [*ALIKE, ("diloco", "uniform8", {"fragments": 2, "delay": 1, "mixing": 0.5})]
)
def test_it_goes_on_from_its_state_to_the_bit(name, codec, options):
    ranks, others = (schemes(name, FOUR, codec, shapes=SHAPES, **options) for _ in range(2))
    weights, simulator = started(ranks), Simulator(4)
    for step in range(5):
        weights = step_all(simulator, ranks, weights, updates(4, step))
    for rank, other in zip(ranks, others, strict=True):
        other.load({key: value.clone() for key, value in rank.state().items()}, rank.steps)
    again = weights
    for step in range(5, 9):
        weights = step_all(simulator, ranks, weights, updates(4, step))
        again = step_all(simulator, others, again, updates(4, step))
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


@pytest.mark.parametrize(("name", "codec", "options"), ALIKE)
def test_what_is_held_and_sent_is_known_before(name, codec, options):
    """But for a filled-up bucket of a piece, which here is most of it, and the places of DeMo's entries."""
    _, ranks, simulator = following(name, codec, steps=4, **options)
    kind, settings = type(ranks[0]), (FOUR, 0, ranks[0].codec, options)
    pieces = name in ("allreduce", "diloco") and codec != "float32"
    assert simulator.sent[0] / 4 == pytest.approx(kind.sends(*settings), rel=0.05 if pieces else 1e-6)
    held = sum(tensor.nbytes for tensor in ranks[0].state().values())
    assert kind.holds(*settings) - held == (2 * 96 if name == "demo" else 0)


# --- all-reduce -------------------------------------------------------------------------------------------------------


def test_allreduce_is_the_mean_of_updates():
    found, ranks, _ = following("allreduce", "float32")
    x = started(ranks)[0].double()
    for step, after in enumerate(found):
        x = x + torch.stack(updates(4, step)).double().mean(0)
        torch.testing.assert_close(after[0].double(), x, **CLOSE)


@pytest.mark.parametrize("good", [4, 3])
def test_allreduce_in_pieces_errs_by_two_roundings(good):
    """Each rank's piece, and then the mean of them, by a step of 8 bits at most; also without one rank's update."""
    ranks = schemes("allreduce", FOUR, "uniform8", shapes=SHAPES)
    weights = started(ranks)
    moves = updates(4, 0)[:good]
    left_out = [torch.full_like(weights[0], float("nan"))] * (4 - good)
    found = step_all(Simulator(4), ranks, weights, moves + left_out)[0] - weights[0]
    largest = max(float(u.abs().max()) for u in moves)
    off = float((found - torch.stack(moves).mean(0)).abs().max())
    assert 0 < off < 2 * 1.01 * largest / 127


def test_allreduce_of_codes_sends_what_a_ring_would():
    _, _, simulator = following("allreduce", "uniform4", steps=5)
    piece = compressor("uniform4").bind([(24,)])
    assert simulator.sent == [5 * 2 * 3 * (HEADER_BYTES + piece.nbytes)] * 4


@pytest.mark.parametrize(("name", "codec", "options"), [each for each in ALIKE if each[0] in ("sparseloco", "demo")])
def test_gathering_sends_a_message_to_everyone(name, codec, options):
    _, ranks, simulator = following(name, codec, steps=5, check_every=5, **options)
    own = 5 * 3 * (HEADER_BYTES + ranks[0].codec.nbytes)
    assert simulator.sent == [own + 3 * HEADER_BYTES] + [own + HEADER_BYTES] * 3  # of the check


# --- DiLoCo ---------------------------------------------------------------------------------------------------------


def test_diloco_without_an_outer_optimizer_is_the_mean_of_weights():
    found, _, _ = following("diloco", "float32", outer_lr=1.0, outer_momentum=0.0)
    expected, _, _ = following("allreduce", "float32")
    torch.testing.assert_close(found, expected, **CLOSE)


def test_dilocos_outer_optimizer_is_torchs():
    found, ranks, _ = following("diloco", "float32", steps=10)
    x = started(ranks)[0].double().requires_grad_()
    outer = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    for step, after in enumerate(found):
        x.grad = -torch.stack(updates(4, step)).double().mean(0)
        outer.step()
        torch.testing.assert_close(after[0].double(), x.detach(), **CLOSE)


@pytest.mark.parametrize("delay", [0, 1])
def test_streaming_diloco_is_its_definition(delay):
    """Tensors of each fragment, by their own outer optimizer, in float64."""
    shapes = [(4, 6), (24,), (3, 8), (24,)]
    ranks = schemes("diloco", FOUR, shapes=shapes, fragments=2, delay=delay, mixing=0.25)
    weights, simulator = started(ranks), Simulator(4)
    entries = torch.arange(96) // 24 % 2
    theta, momentum = weights[0].double(), torch.zeros(96, dtype=torch.float64)
    x = torch.stack(weights).double()
    for step in range(9):
        moves = updates(4, step)
        x = x + torch.stack(moves).double()
        part = entries == step % 2
        if delay and step:
            x[:, ~part] = 0.25 * x[:, ~part] + 0.75 * theta[~part]
        outer = (theta - x.mean(0))[part]
        momentum[part] = 0.9 * momentum[part] + outer
        theta[part] -= 0.7 * (outer + 0.9 * momentum[part])
        if not delay:
            x[:, part] = 0.25 * x[:, part] + 0.75 * theta[part]
        weights = step_all(simulator, ranks, weights, moves)
        torch.testing.assert_close(torch.stack(weights).double(), x, **CLOSE)
    assert apart(weights) > 0.01


def test_with_a_delay_weights_are_known_before_a_message_comes():
    for codec in ("float32", "uniform8"):
        rank = schemes("diloco", FOUR, codec, shapes=SHAPES, fragments=2, delay=1)[0]
        (weights,) = started([rank])
        ask = next(rank.step(weights, updates(4, 0)[0]))
        assert ask.weights is not None


# --- SparseLoCo and DeMo ----------------------------------------------------------------------------------------------


def test_sparseloco_is_its_definition():
    """e ← β e + u, of which the largest quarter of each tensor is taken out and meant."""
    ranks = schemes("sparseloco", FOUR, compressor("topk", fraction=0.25, values="float32"), decay=0.8, outer_lr=0.6)
    weights, simulator = started(ranks), Simulator(4)
    x, left = weights[0].double(), torch.zeros(4, 96, dtype=torch.float64)
    for step in range(8):
        moves = updates(4, step)
        left = 0.8 * left + torch.stack(moves).double()
        least = left.abs().topk(24, dim=1).values[:, -1:]
        sent = torch.where(left.abs() >= least, left, 0.0)
        left = left - sent
        x = x + 0.6 * sent.mean(0)
        weights = step_all(simulator, ranks, weights, moves)
        torch.testing.assert_close(weights[0].double(), x, **CLOSE)
    assert float(left.abs().max()) > 0


def cosine(n):
    """The orthonormal DCT-II: rows are frequencies."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = math.sqrt(2.0 / n) * torch.cos(math.pi * (i + 0.5) * k / n)
    matrix[0] /= math.sqrt(2.0)
    return matrix


@pytest.mark.parametrize("options", [{"step": "mean"}, {"lr": 0.01}, {}])
def test_demo_is_its_definition(options):
    """A matrix of two chunks by one, in float64; each place's mean is over the ranks that sent it."""
    codec = compressor("dct", chunk=8, k=9, values="float32")
    ranks = schemes("demo", FOUR, codec, shapes=[(16, 6)], decay=0.9, **options)
    assert isinstance(ranks[0].codec, DctCodec)
    weights, simulator = started(ranks), Simulator(4)
    left, right = cosine(8), cosine(6)
    keep = ranks[0].codec.parts[0].keep
    x, slow = weights[0].double(), torch.zeros(4, 96, dtype=torch.float64)
    fewer = False
    for step in range(6):
        moves = updates(4, step)
        slow = 0.9 * slow + torch.stack(moves).double()
        rows = (left @ slow.view(4, 2, 8, 6) @ right.mT).flatten(2)
        sent = torch.where(rows.abs() >= rows.abs().topk(keep, dim=2).values[..., -1:], rows, 0.0)
        slow = slow - (left.mT @ sent.view(4, 2, 8, 6) @ right).flatten(1)
        count = (sent != 0).sum(0)
        fewer |= bool(((count > 0) & (count < 4)).any())
        found = (left.mT @ (sent.sum(0) / count.clamp(min=1)).view(2, 8, 6) @ right).flatten()
        size = options.get("lr", float(found.abs().mean()))
        x = x + (found if options.get("step") == "mean" else size * found.sign())
        weights = step_all(simulator, ranks, weights, moves)
        torch.testing.assert_close(weights[0].double(), x, rtol=1e-4, atol=1e-5)
    assert fewer


@pytest.mark.parametrize(
    ("name", "codec", "options", "sentence"),
    [
        ("diloco", "float32", {"outer_lr": 0.0}, "outer_lr must be above 0 and finite, got 0.0: use 0.7"),
        ("diloco", "float32", {"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\), got 1.0: .+"),
        ("diloco", "float32", {"fragments": 3}, "fragments must be at most the 2 tensors, got 3: use fewer"),
        ("diloco", "float32", {"fragments": 0}, "fragments must be a whole number of at least 1, got 0: .+"),
        ("diloco", "float32", {"fragments": 2, "delay": 2}, "delay must be 0 or 1, got 2: .+"),
        ("diloco", "float32", {"delay": 1}, "delay needs fragments of at least 2, got 1: .+"),
        ("diloco", "float32", {"mixing": 1.0}, r"mixing must be in \[0, 1\), got 1.0: .+"),
        ("sparseloco", SHARE, {"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5: .+"),
        ("sparseloco", SHARE, {"outer_lr": float("nan")}, "outer_lr must be .+ got nan: use 1"),
        ("demo", COSINE, {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0: use 0.999"),
        ("demo", COSINE, {"step": "half"}, "step must be sign or mean, got 'half': .+"),
        ("demo", COSINE, {"lr": 0.0}, "lr must be above 0 and finite, got 0.0: .+"),
        ("demo", SHARE, {}, "demo shares coefficients of cosine transforms: use compressor=dct"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, codec, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        schemes(name, FOUR, codec, shapes=SHAPES, **options)


def test_where_nobody_has_anything_to_say_weights_stay():
    for name, codec in (("allreduce", "uniform4"), ("sparseloco", SHARE), ("demo", COSINE), ("diloco", "float32")):
        ranks = schemes(name, FOUR, codec, shapes=SHAPES)
        weights = started(ranks)
        for each in still(ranks, weights, 3):
            assert torch.equal(each, weights[0])
