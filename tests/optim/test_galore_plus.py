"""GaLore+ against its equations, and the methods that it is in its limits."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from cases import equal
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, decaying, seeded
from reference.galore_plus import best, galore_plus
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from thinrank.optim import GaLore, GaLorePlus
from thinrank.optim.axis import Axis
from thinrank.optim.inner.adam import Adam
from thinrank.optim.linalg.entries import _places, carry_entries, largest_entries, take_entries
from thinrank.optim.linalg.heads import head_norms, largest_heads, take_heads
from thinrank.optim.lowrank.heads import SharedHead
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.sparse import SparseResidual
from thinrank.optim.lowrank.subspace import PowerIteration, Svd
from thinrank.optim.lowrank.transport import Rotate
from thinrank.optim.rule import Step

STEPS, GAP = 17, 5
BETAS = (0.9, 0.99)
CPU = torch.device("cpu")


def moved(start, end):
    return float((end.detach().double() - start.detach().double()).norm())


def train(start, grads, **options):
    """The weight after a step on each of `grads`, and its optimizer."""
    weight = nn.Parameter(start.clone())
    optimizer = GaLorePlus([weight], **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight, optimizer


# --- entries ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 24), st.booleans())
@LAW
def test_the_largest_entries_and_the_lower_of_equal_ones(seed, k, ties):
    score = seeded(3, 24, seed=seed)
    score = score.round() if ties else score
    assert largest_entries(score, k).tolist() == [best(row, k) for row in score]


def by_sorting(score, k):
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(1, 3), st.sampled_from([None, 0, 1, 2]))
@LAW
def test_the_largest_of_many_entries_are_exact(seed, k, batch, digits):
    """Where a sample suggests what to look at, with and without ties, and with any bound that is one."""
    score = seeded(batch, 4096, seed=seed) * torch.tensor([1.0, 1e20, 1e-20])[:batch, None]
    if digits is not None:
        score = (score / score.std(-1, keepdim=True)).round(decimals=digits)
    expected = by_sorting(score, k)
    assert torch.equal(largest_entries(score, k), expected)
    reached = score.gather(-1, expected).amin(-1, keepdim=True)
    for floor in (reached, reached - reached.abs() * 0.3, torch.full_like(reached, -math.inf)):
        assert torch.equal(largest_entries(score, k, floor=floor), expected)


@pytest.mark.parametrize("kind", ["zero", "only seen", "never seen", "sparse", "one row", "rising", "infinite"])
@pytest.mark.parametrize("k", [3, 41, 512])
def test_a_sample_that_misleads_makes_no_difference(kind, k):
    """Large entries only where the sample looks or only where it does not, fewer than are wanted, and ties."""
    score = seeded(2, 4096).abs()
    if kind == "zero":
        score[0] = 0.0
    elif kind == "only seen":
        score[0, ::7] += 100.0
    elif kind == "never seen":
        score[0, 1::7] += 100.0
    elif kind == "sparse":
        score[0, torch.arange(4096) % 1000 != 3] = 0.0
    elif kind == "one row":
        score[0, 640:704] = 7.0
    elif kind == "rising":
        score[0] = torch.arange(4096.0)
    else:
        score[0, 5:4000:13] = math.inf
    assert torch.equal(largest_entries(score, k), by_sorting(score, k))


@given(st.integers(0, 1000), st.integers(1, 20))
@LAW
def test_places_without_waiting_are_those_of_nonzero(seed, k):
    """What takes the place of `nonzero` on a GPU, here on a CPU."""
    chosen = torch.zeros(3, 20, dtype=torch.bool).scatter_(-1, by_sorting(seeded(3, 20, seed=seed), k), True)
    assert torch.equal(_places(chosen, k), chosen.nonzero()[:, 1].reshape(3, k))


class Sorted(TorchDispatchMode):
    """Counts the numbers that go through `topk`, which is what a search of a large matrix costs on a CPU."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.topk.default:
            self.total += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_a_step_of_the_warm_up_sorts_few_of_the_entries():
    """First a sample and what it suggests, later what reaches the least of the candidates."""
    rule = SparseResidual(density=0.01, warmup=9)
    subspace = PowerIteration(rank=1)
    state = rule.init((2, 128, 128), CPU) | subspace.init((2, 128, 128), CPU)
    low, size = torch.zeros(2, 128, 1), 2 * 128 * 128
    for t in range(4):
        with Sorted() as counted:
            rule(seeded(2, 128, 128, seed=t), low, low, subspace, state, Step(count=[t, t]))
        assert 0 < counted.total < (size / 5 if t == 0 else size / 20)


@given(st.integers(0, 1000))
@LAW
def test_entries_taken_from_any_strides(seed):
    x = seeded(2, 5, 7, seed=seed).mT
    index = largest_entries(seeded(2, 35, seed=seed + 1), 6)
    assert torch.equal(take_entries(x, index.int()), x.reshape(2, -1).gather(-1, index))


@given(st.integers(0, 1000), st.integers(1, 12))
@LAW
def test_what_stays_keeps_its_value_and_what_is_new_has_none(seed, k):
    old, new = (largest_entries(seeded(2, 12, seed=seed + i), k) for i in range(2))
    value = seeded(2, k, seed=seed + 2)
    full = torch.zeros(2, 12).scatter(-1, old, value)
    assert torch.equal(carry_entries(old, new, value), full.gather(-1, new))


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e25, 1e-30])
def test_the_loudest_heads_come_first_and_the_lower_of_equal_ones(size):
    blocks = [[0.5, 3.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0]]
    x = torch.stack([torch.cat([torch.full((2, 5), value * size) for value in row]) for row in blocks])
    assert largest_heads(x, 4, 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    expected = torch.tensor(blocks, dtype=torch.float64) * size * 10**0.5
    torch.testing.assert_close(head_norms(x, 4), expected, rtol=1e-6, atol=0.0)
    assert torch.equal(take_heads(x, 4, torch.tensor([[2], [0]])), torch.stack([x[0, 4:6], x[1, :2]]))


def heads_rule(rank, heads, *, exact=False, select="max_norm", every=GAP):
    inner = Svd(rank=rank, every=every, signs="fixed") if exact else PowerIteration(rank=rank, every=every)
    return SharedHead(inner=inner, heads=heads, select=select)


@pytest.mark.parametrize(
    ("rank", "heads", "exact", "pooled"),
    [(4, 3, False, 1), (6, 3, True, 1), (6, 3, False, 1), (7, 3, True, 2), (7, 3, False, 3), (18, 3, True, 3)],
)
def test_as_many_heads_as_the_rank_needs(rank, heads, exact, pooled):
    """Of 18 rows: a head of 6 has 6 directions, and power iteration 8 columns to spare."""
    subspace = heads_rule(rank, heads, exact=exact)
    assert subspace.pooled((1, 18, 20)) == pooled
    x = seeded(2, 18, 20)
    state = subspace.init((2, 18, 20), CPU)
    subspace.renew(x, state, Step(count=[0, 0]))
    gram = state["basis"].mT @ state["basis"]
    torch.testing.assert_close(gram, torch.eye(rank).expand(2, -1, -1), rtol=0.0, atol=1e-5)
    # all of the directions are in the rows that were shown
    shown = take_heads(x, heads, largest_heads(x, heads, pooled))
    rows = torch.linalg.qr(shown.mT).Q
    torch.testing.assert_close(rows @ (rows.mT @ state["basis"]), state["basis"], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_one_head_is_the_plain_rule(exact):
    x, plain, shared = seeded(2, 12, 8), heads_rule(3, 1, exact=exact).inner, heads_rule(3, 1, exact=exact)
    states = [rule.init((2, 12, 8), CPU) for rule in (plain, shared)]
    for count in (0, GAP):
        for rule, state in zip((plain, shared), states, strict=True):
            rule.renew(x, state, Step(count=[count] * 2, keys=[3, 4]))
        assert torch.equal(states[0]["basis"], states[1]["basis"])


def test_heads_are_drawn_for_each_matrix_and_renewal_or_taken_in_turn():
    x = seeded(2, 24, 8)
    drawn = heads_rule(3, 8, select="random")
    choices = [tuple(drawn.choose(x, Step(count=[c, c], keys=[3, 4])).flatten().tolist()) for c in range(0, 40, 5)]
    assert len(set(choices)) > 4  # of 64
    assert any(a != b for a, b in choices)
    again = drawn.choose(x, Step(count=[5, 5], keys=[3, 4])).flatten().tolist()
    assert again == list(choices[1])
    turns = heads_rule(6, 8, exact=True, select="round_robin")
    found = [turns.choose(x, Step(count=[c, c + 5])).tolist() for c in (0, 5, 20)]
    assert found == [[[0, 1], [2, 3]], [[2, 3], [4, 5]], [[0, 1], [2, 3]]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_both_sides_have_their_heads_in_the_rows_of_the_view(side):
    """A weight whose third head alone has a gradient: the basis is that head's, whichever way it lies."""
    grad = torch.zeros(12, 10)
    grad[6:9] = decaying(3, 10)
    grad = grad if side == "right" else grad.T.contiguous()
    _, optimizer = train(seeded(*grad.shape), [grad], rank=3, proj_type=side, heads=4, svd="exact", density=0.0)
    basis = next(iter(optimizer.state.values()))["basis"]
    own = torch.linalg.svd(decaying(3, 10), full_matrices=False)[2].T
    torch.testing.assert_close((own.T @ basis).abs(), torch.eye(3), rtol=0.0, atol=1e-4)


def test_heads_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"heads must divide the 12 rows .*, got 5: correct it"):
        GaLorePlus([nn.Parameter(seeded(12, 10))], rank=2, proj_type="right", heads=5)
    with pytest.raises(
        ValueError, match=r"GaLorePlus: heads must be one number for each of the 1 sections, got \(2, 3"
    ):
        GaLorePlus([nn.Parameter(seeded(12, 10))], rank=2, proj_type="right", heads=(2, 3))


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "stored transposed"])
def test_sections_have_heads_of_their_own(transposed):
    """A fused weight with 4 query heads and 2 of keys is stepped as the two weights apart."""
    parts = [seeded(12, 10), seeded(6, 10, seed=1)]
    grads = [[decaying(p.shape[0], 10, seed=9 * t + i) for i, p in enumerate(parts)] for t in range(8)]
    options = {"lr": 0.01, "rank": 2, "update_proj_gap": 3, "svd": "exact", "density": 0.1, "warmup": 2}
    apart = [
        train(part, [grad[i] for grad in grads], proj_type="right", heads=(4, 2)[i], **options)[0]
        for i, part in enumerate(parts)
    ]
    fused = torch.cat(parts)
    weight = nn.Parameter(fused.T.contiguous() if transposed else fused)
    group = {
        "params": [weight], "sections": (12, 6), "heads": (4, 2), "proj_type": "left" if transposed else "right",
        "sections_along": "columns" if transposed else "rows",
    }  # fmt: skip
    optimizer = GaLorePlus([group], **options)
    for grad in grads:
        whole = torch.cat(grad)
        weight.grad = whole.T.contiguous() if transposed else whole
        optimizer.step()
    both = weight.detach().T if transposed else weight.detach()
    torch.testing.assert_close(both, torch.cat([a.detach() for a in apart]), rtol=1e-5, atol=1e-6)


# --- the method and its limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("gap", [1, 4])
@pytest.mark.parametrize("shape", [(14, 9), (8, 15)], ids=["tall", "wide"])
def test_with_all_entries_it_is_adamw(shape, gap, rank):
    """Whatever the basis is and however often it changes."""
    start, grads = seeded(*shape), [seeded(*shape, seed=i + 1) for i in range(STEPS)]
    options = {"lr": 0.01, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}
    weight, _ = train(start, grads, rank=rank, update_proj_gap=gap, density=1.0, warmup=0, scale=1.0, **options)
    twin = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([twin], **options)
    for grad in grads:
        twin.grad = grad.clone()
        adamw.step()
    assert moved(weight, twin) <= 1e-6 * moved(torch.zeros(()), twin)
    assert moved(weight, twin) <= 1e-5 * moved(start, twin)


class Plain:
    """Gradient descent as an inner rule."""

    def init(self, shape, device):
        return {}

    def direction(self, low, state, step):
        return low


@pytest.mark.parametrize("heads", [1, 3])
def test_in_the_full_space_rotation_is_all_there_is(heads):
    """r = short: gradient descent is itself, and Adam is Adam in rotated coordinates, which is not Adam."""
    grads = [seeded(1, 12, 6, seed=t) for t in range(6)]
    rule = LowRank(subspace=heads_rule(6, heads, every=10**6), inner=Plain())
    state = rule.init((1, 12, 6), CPU)
    for t, grad in enumerate(grads):
        update = rule.update(grad, state, Step(count=[t])).materialise()
        torch.testing.assert_close(update, grad, rtol=1e-4, atol=1e-5)
    rule = LowRank(subspace=heads_rule(6, heads, every=10**6), inner=Adam(betas=BETAS, eps=1e-6))
    state = rule.init((1, 12, 6), CPU)
    rotated, plain = Adam(betas=BETAS, eps=1e-6), Adam(betas=BETAS, eps=1e-6)
    states = rotated.init((1, 12, 6), CPU), plain.init((1, 12, 6), CPU)
    for t, grad in enumerate(grads):
        step = Step(count=[t])
        update = rule.update(grad, state, step).materialise()
        basis = state["basis"]
        expected = rotated.direction(grad @ basis, states[0], step) @ basis.mT
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(update, plain.direction(grad, states[1], step), atol=0.1)


COMPATIBLE = {"svd": "exact", "transport": "keep", "convention": "galore", "density": 0.0, "eps": 1e-6, "scale": 0.25}


def pairs(side):
    """Three matrices and two vectors each, with galore-torch's groups."""
    start = [seeded(*shape, seed=i) * 0.1 for i, shape in enumerate([(24, 10), (9, 31), (12, 12), (13,), (4, 6)])]
    ends = [[nn.Parameter(x.clone()) for x in start] for _ in range(2)]
    projected = {"rank": 4, "update_proj_gap": 6, "scale": 0.25, "proj_type": side}
    return start, ends, [[{"params": own[3:]}, {"params": own[:3], **projected}] for own in ends]


def together(ends, optimizers, steps=20):
    for step in range(steps):
        for params, optimizer in zip(ends, optimizers, strict=True):
            for i, p in enumerate(params):
                p.grad = decaying(*p.shape, seed=100 * step + i) if p.ndim > 1 else seeded(*p.shape, seed=step)
            optimizer.step()


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_without_what_is_new_it_is_galore_to_the_bit(side):
    _, ends, groups = pairs(side)
    options = {"lr": 0.01, "betas": BETAS, "weight_decay": 0.1}
    together(ends, [GaLorePlus(groups[0], **options, **COMPATIBLE), GaLore(groups[1], **options, eps=1e-6)])
    assert equal(*ends)


def test_without_what_is_new_it_follows_galore_torch():
    package = pytest.importorskip("galore_torch", reason="galore-torch (extra `compare`) is not installed")
    start, ends, groups = pairs("std")
    options = {"lr": 0.01, "betas": BETAS, "weight_decay": 0.1}
    theirs = package.GaLoreAdamW(groups[1], **options, eps=1e-6, no_deprecation_warning=True)
    together(ends, [GaLorePlus(groups[0], **options, **COMPATIBLE), theirs])
    for x, a, b in zip(start, *ends, strict=True):
        assert moved(a, b) <= 1e-4 * moved(x, b), tuple(x.shape)


@pytest.mark.parametrize("reselect", ["never", "renewal"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 5])
@pytest.mark.parametrize("transport", ["rotate", "reset"])
@pytest.mark.parametrize(("side", "shape"), [("std", (14, 9)), ("std", (8, 15)), ("right", (6, 10)), ("left", (9, 6))])
def test_equals_the_equations_in_float64(side, shape, transport, warmup, reselect):
    """With an exact SVD, three heads where there are some, over three renewals and the end of the warm-up."""
    start, grads = seeded(*shape), [decaying(*shape, ratio=0.8, seed=i + 1) for i in range(STEPS)]
    options = {
        "lr": 0.01, "rank": 3, "scale": 0.5, "density": 0.1, "warmup": warmup, "reselect": reselect,
        "transport": transport, "betas": BETAS, "eps": 1e-4, "weight_decay": 0.1, "heads": 3 if side != "std" else 1,
    }  # fmt: skip
    weight, optimizer = train(start, grads, update_proj_gap=GAP, proj_type=side, svd="exact", **options)
    expected, chosen = galore_plus(start, grads, gap=GAP, side=side, **options)
    assert optimizer.state[weight]["entries"].tolist() == chosen
    assert moved(weight, expected) <= 1e-4 * moved(start, expected)


def test_subspace_iteration_is_the_svd_where_the_spectrum_falls():
    start, grads = seeded(20, 12), [decaying(20, 12, ratio=0.3, seed=i + 1) for i in range(STEPS)]
    options = {"lr": 0.01, "rank": 3, "density": 0.1, "warmup": 3, "eps": 1e-4}
    weight, _ = train(start, grads, update_proj_gap=GAP, **options)
    expected, _ = galore_plus(start, grads, gap=GAP, scale=0.25, **options)
    assert moved(weight, expected) <= 1e-2 * moved(start, expected)


def test_the_warm_up_finds_what_is_always_missed():
    """Candidates take the place of a full sum: entries that a subspace misses at every step are in S in the end."""
    rule = SparseResidual(density=8 / 600, warmup=12)
    subspace = PowerIteration(rank=1)
    places = torch.tensor([[3, 77, 140, 222, 301, 408, 433, 599]])
    state = rule.init((1, 30, 20), CPU) | subspace.init((1, 30, 20), CPU)
    low = torch.zeros(1, 30, 1)
    for t in range(12):
        x = 0.3 * seeded(1, 600, seed=t)
        x = x.scatter_add(-1, places, seeded(1, 8, seed=t + 50).sign() * 1.5).view(1, 30, 20)
        update = rule(x, low, low, subspace, state, Step(count=[t]))
        assert update.entries is None
    assert torch.equal(state["entries"].long(), places)
    assert not state["entry_avg"].any()  # the sums make way for the moments
    assert not state["entry_avg_sq"].any()
    x = seeded(1, 30, 20, seed=99)
    update = rule(x, low, low, subspace, state, Step(count=[12]))
    assert update.entries is not None
    torch.testing.assert_close(update.entries.values, take_entries(x, places).sign(), rtol=1e-4, atol=0.0)


def test_matrices_that_are_not_at_one_count_do_not_disturb_each_other():
    """One is still in its warm-up, one has its entries, one chooses them anew: as each does alone."""
    rule = LowRank(
        subspace=PowerIteration(rank=2, every=3),
        inner=Adam(betas=BETAS, eps=1e-4),
        lift=SparseResidual(density=0.1, warmup=2, reselect="renewal", betas=BETAS, eps=1e-4),
    )
    ahead = [0, 2, 5]
    alone = [rule.init((1, 8, 5), CPU) for _ in ahead]

    def grad(t, i):
        return decaying(8, 5, ratio=0.8, seed=10 * t + i)

    for i, count in enumerate(ahead):
        for t in range(count):
            rule.update(grad(t, i)[None], alone[i], Step(count=[t], keys=[i]))
    batch = {key: torch.cat([state[key] for state in alone]) for key in alone[0]}
    for t in range(6):
        x = torch.stack([grad(t + count, i) for i, count in enumerate(ahead)])
        step = Step(count=[t + count for count in ahead], keys=[0, 1, 2])
        update = rule.update(x, batch, step).materialise()
        for i, state in enumerate(alone):
            own = rule.update(x[i : i + 1], state, Step(count=[step.count[i]], keys=[i])).materialise()
            torch.testing.assert_close(update[i : i + 1], own, rtol=1e-4, atol=1e-5)
    assert torch.equal(batch["entries"], torch.cat([state["entries"] for state in alone]))


@pytest.mark.parametrize("broken", [False, True])
def test_a_gradient_that_is_no_number_has_no_say_in_the_choice(broken):
    """Neither in the warm-up (1) nor when the entries are chosen anew (6); others change both choices."""
    rule = SparseResidual(density=0.2, warmup=2, reselect="renewal")
    subspace = PowerIteration(rank=1, every=3)
    state = rule.init((1, 6, 5), CPU) | subspace.init((1, 6, 5), CPU)
    low = torch.zeros(1, 6, 1)
    choices = []
    for t in (0, 1, 6):
        grad = seeded(1, 6, 5, seed=t)
        if broken and t:
            grad[0, 2, 2] = float("nan")
        rule(grad, low, low, subspace, state, Step(count=[t]))
        choices.append(state["entries"].tolist())
    assert (choices[0] == choices[1] == choices[2]) is broken
    assert choices[0] != choices[2] or broken


def test_captured_energy_grows_with_the_rank():
    found = []
    for rank in range(1, 9):
        weight = nn.Parameter(seeded(24, 8))
        optimizer = GaLorePlus([("w", weight)], rank=rank, proj_type="right", heads=3)
        weight.grad, optimizer.measure = decaying(24, 8), True
        optimizer.step()
        found.append(optimizer.measured["captured_energy"]["w"])
    assert all(0.0 <= a <= b + 1e-4 <= 1.0 + 2e-4 for a, b in itertools.pairwise(found))
    assert found[-1] == pytest.approx(1.0, abs=1e-4)
    assert found[0] < 0.9


@pytest.mark.parametrize("when", range(8))
def test_saved_and_loaded_at_any_step_it_goes_on_to_the_bit(when):
    """In the warm-up, at its end, at renewals with and without a new choice, with heads drawn at random."""
    options = {
        "rank": 2, "update_proj_gap": 3, "proj_type": "right", "heads": 3, "head_select": "random", "density": 0.2,
        "warmup": 4, "reselect": "renewal",
    }  # fmt: skip
    grads = [seeded(12, 6, seed=t + 1) for t in range(11)]
    whole, _ = train(seeded(12, 6), grads, **options)
    weight, optimizer = train(seeded(12, 6), grads[:when], **options)
    other = nn.Parameter(weight.detach().clone())
    fresh = GaLorePlus([other], **options)
    fresh.load_state_dict(optimizer.state_dict())
    for grad in grads[when:]:
        other.grad = grad.clone()
        fresh.step()
    assert torch.equal(other, whole)


# --- ranks ------------------------------------------------------------------------------------------------------------

RULE = LowRank(
    subspace=SharedHead(inner=PowerIteration(rank=3, every=3), heads=4, select="random"),
    transport=Rotate(BETAS),
    inner=Adam(betas=BETAS, eps=1e-3),
    lift=SparseResidual(density=0.1, warmup=2, reselect="renewal", betas=BETAS, eps=1e-3),
)


def local_gradients(rank):
    return [torch.stack([decaying(12, 8, seed=1000 * rank + 10 * t + b) for b in range(2)]) for t in range(9)]


def steps(grads, axis):
    state = RULE.init((2, 12, 8), CPU)
    updates = [
        RULE.update(grad, state, Step(count=[t, t], keys=[5, 6], seed=3, axis=axis)).materialise()
        for t, grad in enumerate(grads)
    ]
    return torch.stack(updates), state["entries"]


def on_a_rank():
    """Projections, entries and what is scored are averaged; the optimizer under averaged gradients, as DDP's are."""
    mine = local_gradients(dist.get_rank())
    found = steps(mine, Axis(replicas=dist.group.WORLD))
    averaged = []
    for grad in mine:
        total = grad.clone()
        dist.all_reduce(total)
        averaged.append(total[0] / 2)
    weight, _ = train(seeded(12, 8), averaged, rank=3, update_proj_gap=3, warmup=2, density=0.1, reselect="renewal")
    return *found, weight.detach()


def test_two_ranks_equal_one(ranks):
    mean = [(a + b) / 2 for a, b in zip(local_gradients(0), local_gradients(1), strict=True)]
    updates, entries = steps(mean, Axis())
    weight, _ = train(
        seeded(12, 8), [grad[0] for grad in mean], rank=3, update_proj_gap=3, warmup=2, density=0.1, reselect="renewal"
    )
    for own, chosen, trained in ranks(2).run(on_a_rank):
        torch.testing.assert_close(own, updates, rtol=1e-3, atol=1e-4)
        assert torch.equal(chosen, entries)
        torch.testing.assert_close(trained, weight.detach(), rtol=1e-5, atol=1e-6)


def refusals():
    sentences = []
    axis = Axis(rows=dist.group.WORLD)
    for rule in (
        LowRank(subspace=heads_rule(2, 2), inner=Adam()),
        LowRank(subspace=PowerIteration(rank=2), inner=Adam(), lift=SparseResidual(density=0.1)),
    ):
        state = rule.init((1, 4, 3), CPU)
        try:
            rule.update(torch.ones(1, 4, 3), state, Step(count=[0], axis=axis))
        except RuntimeError as error:
            sentences.append(str(error))
    return sentences


def test_sharded_rows_are_refused_with_the_remedy(ranks):
    for sentences in ranks(2).run(refusals):
        assert "cross_heads=[]" in sentences[0]
        assert "density=0" in sentences[1]
