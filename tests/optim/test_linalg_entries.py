"""The entries that GaLore+ steps by themselves: which ones, found without sorting them all, taken and carried over."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, seeded
from reference.galore_plus import best
from torch.utils._python_dispatch import TorchDispatchMode

from thinrank.optim.linalg.entries import _places, carry_entries, largest_entries, take_entries
from thinrank.optim.lowrank.sparse import SparseResidual
from thinrank.optim.lowrank.subspace import PowerIteration
from thinrank.optim.rule import Step

CPU = torch.device("cpu")


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
