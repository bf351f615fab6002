"""How a renewal is computed: where subspace iteration starts, how often it multiplies, which engine has the DCT.

Results alone would not show it: a worse start gives nearly the same basis, only not as cheaply.
"""

import pytest
import torch
from laws import seeded

from thinrank.optim.lowrank import subspace as module
from thinrank.optim.lowrank.subspace import FixedColumns, PowerIteration
from thinrank.optim.rule import Step

RANK, LONG, SHORT = 4, 20, 16


@pytest.fixture
def iterations(monkeypatch):
    """Every call of subspace iteration: its starting columns and how often it multiplies by xᵀx."""
    calls = []
    found = module.subspace_iteration

    def watched(x, start, rank, *, iterations, **how):
        calls.append((start.clone(), iterations))
        return found(x, start, rank, iterations=iterations, **how)

    monkeypatch.setattr(module, "subspace_iteration", watched)
    return calls


def test_the_defaults_are_those_of_the_method():
    rule = PowerIteration(rank=RANK)
    assert (rule.oversample, rule.cold, rule.warm) == (8, 2, 1)


def test_a_first_renewal_starts_at_random_and_later_ones_from_the_basis(iterations):
    rule = PowerIteration(rank=RANK)
    state = rule.init((2, LONG, SHORT), torch.device("cpu"))
    rule.renew(seeded(2, LONG, SHORT, seed=0), state, Step(count=[0, 0], keys=[1, 2]))
    old = state["basis"].clone()
    rule.renew(seeded(2, LONG, SHORT, seed=1), state, Step(count=[7, 7], keys=[1, 2]))
    (cold, twice), (warm, once) = iterations
    assert (twice, once) == (2, 1)
    assert cold.shape == warm.shape == (2, SHORT, RANK + 8)
    assert torch.equal(warm[..., :RANK], old)
    assert not torch.equal(cold[0], cold[1])  # matrices draw for themselves
    assert not torch.equal(warm[..., RANK:], cold[..., RANK:])  # and anew each time


def test_oversampling_ends_at_the_short_side(iterations):
    rule = PowerIteration(rank=12)
    rule.renew(seeded(1, LONG, SHORT), rule.init((1, LONG, SHORT), torch.device("cpu")), Step(count=[0], keys=[1]))
    assert iterations[0][0].shape == (1, SHORT, SHORT)


@pytest.mark.parametrize(
    ("short", "fast", "by"),
    [(128, True, "matmul"), (512, True, "fft"), (128, False, "fft"), (512, False, "fft")],
)
def test_the_engine_is_chosen_by_size_and_library(monkeypatch, short, fast, by):
    """On a CPU: the product below 512 columns where oneDNN computes it, and the FFT otherwise (both were measured)."""
    used = []
    found = module.dct_rows_fft
    monkeypatch.setattr(module, "pays", lambda: fast)
    monkeypatch.setattr(module, "dct_rows_fft", lambda x: used.append("fft") or found(x))
    rule = FixedColumns(rank=RANK)
    state = rule.init((1, short, short), torch.device("cpu"))
    rule.renew(seeded(1, short, short), state, Step(count=[0], keys=[1]))
    assert (used or ["matmul"]) == [by]
