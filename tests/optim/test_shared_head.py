"""Heads that share a basis: which of them it is taken from, and on which side of a weight they lie."""

from functools import partial

import pytest
import torch
from cases import stepped
from laws import decaying, seeded
from torch import nn

from thinrank.optim import GaLorePlus
from thinrank.optim.linalg.heads import head_norms, largest_heads, take_heads
from thinrank.optim.lowrank.heads import SharedHead
from thinrank.optim.lowrank.subspace import PowerIteration, Svd
from thinrank.optim.rule import Step

GAP = 5
BETAS = (0.9, 0.99)
CPU = torch.device("cpu")
train = partial(stepped, GaLorePlus)


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
