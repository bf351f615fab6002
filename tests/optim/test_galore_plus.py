"""GaLore+ against its equations, and the methods that it is in its limits."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import equal, moved, stepped
from laws import decaying, seeded
from reference.galore_plus import galore_plus
from torch import nn

from thinrank.optim import GaLore, GaLorePlus
from thinrank.optim.axis import Axis
from thinrank.optim.inner.adam import Adam
from thinrank.optim.linalg.entries import take_entries
from thinrank.optim.lowrank.heads import SharedHead
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.sparse import SparseResidual
from thinrank.optim.lowrank.subspace import PowerIteration
from thinrank.optim.lowrank.transport import Rotate
from thinrank.optim.rule import Step

STEPS, GAP = 17, 5
BETAS = (0.9, 0.99)
CPU = torch.device("cpu")
train = partial(stepped, GaLorePlus)


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
    rule = LowRank(
        subspace=SharedHead(inner=PowerIteration(rank=6, every=10**6), heads=heads, select="max_norm"), inner=Plain()
    )
    state = rule.init((1, 12, 6), CPU)
    for t, grad in enumerate(grads):
        update = rule.update(grad, state, Step(count=[t])).materialise()
        torch.testing.assert_close(update, grad, rtol=1e-4, atol=1e-5)
    rule = LowRank(
        subspace=SharedHead(inner=PowerIteration(rank=6, every=10**6), heads=heads, select="max_norm"),
        inner=Adam(betas=BETAS, eps=1e-6),
    )
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
@pytest.mark.parametrize("transport", ["rotate", "keep", "reset"])
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
    """Under averaged gradients, as DDP's are."""
    mine = local_gradients(dist.get_rank())
    averaged = []
    for grad in mine:
        total = grad.clone()
        dist.all_reduce(total)
        averaged.append(total[0] / 2)
    weight, _ = train(seeded(12, 8), averaged, rank=3, update_proj_gap=3, warmup=2, density=0.1, reselect="renewal")
    return weight.detach()


def test_two_ranks_equal_one(ranks):
    mean = [(a + b) / 2 for a, b in zip(local_gradients(0), local_gradients(1), strict=True)]
    weight, _ = train(
        seeded(12, 8), [grad[0] for grad in mean], rank=3, update_proj_gap=3, warmup=2, density=0.1, reselect="renewal"
    )
    for trained in ranks(2).run(on_a_rank):
        torch.testing.assert_close(trained, weight.detach(), rtol=1e-5, atol=1e-6)


def refusals():
    sentences = []
    axis = Axis(rows=dist.group.WORLD)
    for rule in (
        LowRank(subspace=SharedHead(inner=PowerIteration(rank=2, every=GAP), heads=2, select="max_norm"), inner=Adam()),
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
