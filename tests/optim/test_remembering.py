"""Replicas that remember of their own gradients what an update did not use, and exchange what updates are made of."""

import copy

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, small
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, seeded
from test_replicated import STEPS, alone, apart, bound, loss, mine, run, seeded_model, shares
from torch import nn

from thinrank.optim import build, route
from thinrank.optim.linalg.norms import SKETCH, signed_sums
from thinrank.optim.owned import own
from thinrank.optim.remembering import Remembering
from thinrank.optim.replicated import ReplicaDrift, replicate
from thinrank.trainers.plan.wire import averaged_images

REMEMBER = {name: CONFIGS[name] for name in ("dion", "dion/qr", "ldadam", "ldadam/8bit", "dct_adamw/feedback")}
MEMORY = {"dion": "momentum", "dion/qr": "momentum", "ldadam": "error", "dct_adamw/feedback": "error"}


@LAW
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 5))
def test_a_sketch_is_linear(rows, columns, seed):
    x, y = seeded(rows, columns, seed=1), seeded(rows, columns, seed=2)
    together = signed_sums(x + 3 * y, SKETCH, seed)
    torch.testing.assert_close(
        together, signed_sums(x, SKETCH, seed) + 3 * signed_sums(y, SKETCH, seed), rtol=1e-4, atol=1e-4
    )
    assert together.numel() == min(SKETCH, x.numel())
    if x.numel() <= SKETCH:
        assert signed_sums(x, SKETCH, seed).norm() == x.norm()


def test_a_sketch_is_the_same_in_however_many_parts(monkeypatch):
    x = seeded(300, 50)
    whole = signed_sums(x, SKETCH, 3)
    for size in (1, 4 * 50 * 7, 4 * 50 * 299):
        monkeypatch.setattr("thinrank.optim.linalg.norms.PART_BYTES", size)
        torch.testing.assert_close(signed_sums(x, SKETCH, 3), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["normal", "few columns", "few rows", "rank one"])
def test_the_norm_of_a_sketch_is_nearly_that_of_the_matrix(kind):
    """Its square has the mean of the squared norm and the deviation sqrt(2/width), whatever a matrix is like."""
    x = seeded(512, 256)
    if kind == "few columns":
        x[:, 3:] *= 1e-3
    if kind == "few rows":
        x[5:] *= 1e-3
    if kind == "rank one":
        x = x[:, :1] * x[:1]
    squares = torch.stack([signed_sums(x, SKETCH, seed).square().sum() for seed in range(200)]) / x.square().sum()
    sigma = (2 / SKETCH) ** 0.5
    assert float(squares.mean()) == pytest.approx(1.0, abs=4 * sigma / 200**0.5)
    assert float(squares.std()) <= 1.25 * sigma


def test_what_is_no_number_shows_in_a_sketch():
    for value in (torch.nan, torch.inf):
        x = seeded(64, 48)
        x[13, 7] = value
        assert not bool(signed_sums(x, SKETCH, 0).isfinite().all())


def trained(config, how, steps=range(STEPS), clip=None):
    """Weights, what every tensor of state is, and what was sent."""
    model = seeded_model(dist.get_rank())
    optimizer = build(model, config)
    replicate(model, optimizer, check_every=4, **how)
    weights = run(model, optimizer, mine(), steps=steps, clip=clip)
    assert optimizer.wire is not None
    state = {k: v.clone() for k, v in optimizer.state[model.square.weight].items()}
    return weights, state, dict(optimizer.wire.payload)


@pytest.mark.parametrize("name", REMEMBER)
@pytest.mark.parametrize("every", [3, None])
def test_memories_are_apart_and_may_be_shared_at_any_time(ranks, name, every):
    """They change nothing but rounding, and drift is looked for in the rest."""
    config = REMEMBER[name]
    answers = ranks(2).run(trained, config, {"memories_every": every})
    key = MEMORY.get(name)
    for weights, _, payload in answers:
        assert apart(weights, alone(config, 2)) <= bound(name)
        assert "gradients" not in payload
        assert bool(payload.get("memories")) == (every is not None)
    (first, one, _), (second, two, _) = answers
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(one[k], two[k]) for k in one if k != key and "error" not in k)
    if key is not None:  # 20 steps: with every=3 the last two have been apart again
        assert not torch.equal(one[key], two[key])


@pytest.mark.parametrize("name", ["dion", "ldadam", "dct_adamw/feedback"])
def test_the_mean_of_memories_is_that_of_one_process(ranks, name):
    config = REMEMBER[name]
    answers = ranks(4).run(trained, config, {"memories_every": None})
    model = seeded_model()
    optimizer = build(model, config)
    run(model, optimizer, shares(4))
    expected = optimizer.state[model.square.weight][MEMORY[name]]
    found = torch.stack([state[MEMORY[name]] for _, state, _ in answers]).mean(0)
    assert float((found - expected).norm()) <= 2e-6 * float(expected.norm()) + 1e-7
    assert float((answers[0][1][MEMORY[name]] - expected).norm()) > 0.05 * float(expected.norm())


def saved(config, then):
    """A state from replicas, and where those end who go on by themselves."""
    model = seeded_model()
    optimizer = build(model, config)
    replicate(model, optimizer)
    run(model, optimizer, mine(), steps=range(9))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    ends = run(model, optimizer, mine(), steps=range(9, STEPS))
    other = seeded_model(4)
    other.load_state_dict(weights)
    after = build(other, config)
    then(other, after)
    after.load_state_dict(state)
    return weights, state, ends, run(other, after, mine(), steps=range(9, STEPS))


@pytest.mark.parametrize("name", REMEMBER)
def test_what_is_saved_is_one_state_with_which_all_go_on(ranks, name):
    """As many replicas to the bit, and one process, or owners, up to rounding."""
    config = REMEMBER[name]
    answers = ranks(2).run(saved, config, replicate)
    (weights, state, ends, again), (_, other, *_) = answers
    assert all(torch.equal(ends[n], again[n]) for n in ends)
    for i, tensors in state["state"].items():
        assert all(torch.equal(value, other["state"][i][key]) for key, value in tensors.items())
    model = seeded_model(5)
    model.load_state_dict(weights)
    optimizer = build(model, config)
    optimizer.load_state_dict(state)
    assert apart(run(model, optimizer, shares(2), steps=range(9, STEPS)), ends) <= bound(name)
    owned = ranks(2).run(saved, config, own)[0]
    assert apart(owned[3], ends) <= bound(name)


class Large(nn.Module):
    """Matrices with far more entries than a sketch has sums."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(96, 160, bias=False), nn.Tanh(), nn.Linear(160, 96, bias=False))

    def forward(self, x):
        return self.layers(x)


def norms(config, messages):
    model = Large()
    optimizer = build(model, config)
    replicate(model, optimizer, messages=messages)
    x = seeded(12, 96, seed=dist.get_rank())
    model(x).square().mean().backward()
    before = optimizer.gradient_norm()
    clipped = optimizer.clip_grad_norm_(float(before) / 2)
    after = optimizer.gradient_norm()
    optimizer.step()
    return float(before), float(clipped), float(after), [p.detach().clone() for p in model.parameters()]


def test_the_norm_of_the_mean_gradient_is_known_nearly(ranks):
    """Within five standard deviations, the same on every rank, and halved by clipping to half of it."""
    (found, clipped, half, weights), other = ranks(2).run(norms, small("dion"), "auto")
    exact = ranks(2).run(norms, small("dion"), "full")[0][0]
    assert found == pytest.approx(exact, rel=5 * (2 / SKETCH) ** 0.5 / 2)
    assert found != exact
    assert (found, clipped, half) == other[:3]
    assert half == pytest.approx(clipped * found / 2 / (found + 1e-6), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(weights, other[3], strict=True))


@pytest.mark.parametrize("name", ["dion", "ldadam", "dct_adamw/feedback"])
def test_clipping_is_by_the_norm_of_all_gradients(ranks, name):
    """Of matrices as small as these a sketch shows all there is."""
    config = REMEMBER[name]
    found = ranks(2).run(trained, config, {}, clip=0.3)[0][0]
    expected = alone(config, 2, clip=0.3, joint=True)
    assert apart(found, expected) <= bound(name)
    assert apart(alone(config, 2), expected) > 1e-3


def a_step_is_thrown_away(config, bad):
    """One rank's gradients are no numbers: everybody sees it in the norm, throws the step away and goes on."""
    model = seeded_model()
    optimizer = build(model, config)
    replicate(model, optimizer)
    run(model, optimizer, mine(), steps=range(2))
    (loss(model, 2, *mine()) * (torch.nan if bad and dist.get_rank() == 1 else 1.0)).backward()
    finite = bool(optimizer.gradient_norm().isfinite())
    optimizer.zero_grad()
    optimizer.step()
    return finite, run(model, optimizer, mine(), steps=range(3, 6))


@pytest.mark.parametrize("name", ["dion", "ldadam", "dct_adamw/feedback"])
def test_a_step_that_one_rank_cannot_take_is_taken_by_none(ranks, name):
    bad, good = (ranks(2).run(a_step_is_thrown_away, REMEMBER[name], bad) for bad in (True, False))
    for (finite, found), (fine, expected) in zip(bad, good, strict=True):
        assert (finite, fine) == (False, True)
        assert all(torch.equal(found[n], value) for n, value in expected.items())


def without_a_guard(config):
    """Of one matrix one rank's gradient is no number, and the step is taken."""
    model = nn.Sequential(nn.Linear(8, 24, bias=False), nn.Tanh(), nn.Linear(24, 8, bias=False))
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(seeded(*param.shape, seed=i) * 0.3)
    optimizer = build(model, config)
    replicate(model, optimizer)
    first = next(model.parameters())
    spoil = first.register_hook(lambda grad: grad * (torch.nan if step == 2 and dist.get_rank() == 1 else 1.0))
    for step in range(5):
        optimizer.zero_grad()
        model(seeded(6, 8, seed=10 * step + dist.get_rank())).square().mean().backward()
        optimizer.step()
    spoil.remove()
    assert isinstance(optimizer, Remembering)
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["dion", "ldadam"])
def test_a_gradient_that_is_no_number_counts_as_zero_on_all(ranks, name):
    """As in one process: what one rank remembered of it would stay for ever."""
    one, two = ranks(2).run(without_a_guard, REMEMBER[name])
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(one, two, strict=True))


def drifts():
    model = seeded_model()
    optimizer = build(model, REMEMBER["dion"])
    replicate(model, optimizer, check_every=2)
    run(model, optimizer, mine(), steps=range(2))
    if dist.get_rank() == 1:
        with torch.no_grad():
            basis = optimizer.state[model.square.weight]["basis"].view(-1)
            basis[5:6].copy_(torch.nextafter(basis[5:6], torch.tensor([9.0])))
    try:
        optimizer.check_replicas()
    except ReplicaDrift as drift:
        return str(drift)
    return None


def test_what_replicas_share_must_be_the_same(ranks):
    for sentence in ranks(2).run(drifts):
        assert "drifted apart: basis of square.weight is not the same" in sentence


def counted(config, how):
    model = Large()
    optimizer = build(model, config)
    replicate(model, optimizer, **how)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        model(seeded(5, 96, seed=step)).square().mean().backward()
        optimizer.step()
        assert optimizer.wire is not None
        found.append(optimizer.wire.payload.copy())
        optimizer.wire.payload.clear()
    return found


@pytest.mark.parametrize("name", REMEMBER)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_travels_is_what_the_formula_says(ranks, name, dtype):
    config = REMEMBER[name]
    first, second, third = ranks(2).run(counted, config, {"memories_every": 3, "dtype": dtype})[0]
    rows = route(Large(), config).rows
    assert all(row.asked for row in rows)
    said = averaged_images(rows, dtype=dtype, memories_every=3).kinds()
    assert set(said) == {"factors", "norms", "memories", "present"}
    for kind in ("factors", "norms", "present"):
        assert first[kind] == said[kind]["renewal"]
        assert second[kind] == said[kind]["between"]
    assert "memories" not in second
    assert third["memories"] / 3 == pytest.approx(said["memories"]["averaged"])


def zero_steps():
    try:
        build(seeded_model(), REMEMBER["dion"]).replicate(memories_every=0)
    except ValueError as error:
        return str(error)
    return ""


def test_never_is_none(ranks):
    assert "memories_every must be at least 1 step" in ranks(1).run(zero_steps)[0]
