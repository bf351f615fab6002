"""GaLore+ on gradients that come in parts: what adds up, what the first part alone decides, and what norms count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, decaying, seeded
from torch import nn

from thinrank.optim import GaLorePlus
from thinrank.optim.inner.adam import Adam
from thinrank.optim.linalg.entries import take_entries
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.sparse import SparseResidual
from thinrank.optim.lowrank.subspace import PowerIteration
from thinrank.optim.lowrank.transport import Rotate
from thinrank.optim.rule import Step

LONG, SHORT, GAP, WARMUP = 12, 7, 4, 2
SHAPE = (LONG, SHORT)
EPS = torch.finfo(torch.float32).eps
CPU = torch.device("cpu")
BETAS = (0.9, 0.99)


def rule_with(density=0.15, warmup=WARMUP, reselect="renewal"):
    return LowRank(
        subspace=PowerIteration(rank=3, every=GAP),
        transport=Rotate(BETAS),
        inner=Adam(betas=BETAS, eps=1e-2),
        lift=SparseResidual(density=density, warmup=warmup, reselect=reselect, betas=BETAS, eps=1e-2),
    )


def split(grad, parts, seed):
    """`parts` matrices that add up to `grad`, in float64, each about as large as it."""
    pieces = [seeded(*grad.shape, seed=seed + i, dtype=torch.float64) * 0.3 for i in range(parts - 1)]
    return [*pieces, grad.double() - sum(pieces, torch.zeros_like(grad, dtype=torch.float64))]


def grads_of(t, batch):
    return torch.stack([decaying(*SHAPE, ratio=0.8, seed=10 * t + i) for i in range(batch)])


def brought_to(rule, counts):
    """The state of a batch whose matrices have been stepped so many times, each by itself."""
    alone = [rule.init((1, *SHAPE), CPU) for _ in counts]
    for i, count in enumerate(counts):
        for t in range(count):
            rule.update(decaying(*SHAPE, ratio=0.8, seed=10 * t + i)[None], alone[i], Step(count=[t], keys=[i]))
    return {key: torch.cat([state[key] for state in alone]) for key in alone[0]}


def copied(state):
    return {key: value.clone() for key, value in state.items()}


def image_of(rule, parts, state, step):
    images = [rule.image(part.float(), state, step, first=i == 0) for i, part in enumerate(parts)]
    return {key: torch.stack([image[key] for image in images]).sum(0) for key in images[0]}


@given(st.integers(1, 4), st.integers(0, 1000), st.sampled_from([(2, 3), (3, 7), (5, 5), (2, 2)]))
@LAW
def test_parts_add_up_to_the_whole_between_choices(parts, seed, counts):
    """Updates and states. No tolerance but rounding: each of the sums has at most 4 + 12 terms of about one."""
    rule = rule_with()
    state = brought_to(rule, counts)
    twin, step = copied(state), Step(count=counts, keys=[0, 1])
    grad = grads_of(9, 2)
    update = rule.update_from(image_of(rule, split(grad, parts, seed), state, step), SHORT, state, step).materialise()
    whole = rule.update(grad, twin, step).materialise()
    # the direction divides by at least eps = 1e-2, which rounding of the parts is magnified by
    torch.testing.assert_close(update, whole, rtol=32 * EPS / 1e-2, atol=32 * EPS / 1e-2)
    for key, value in state.items():
        torch.testing.assert_close(value, twin[key], rtol=64 * EPS, atol=64 * EPS, msg=key)


@pytest.mark.parametrize(
    ("warmup", "counts"),
    [(0, (0, 0)), (2, (0, 0)), (2, (1, 1)), (2, (8, 8)), (2, (0, 8)), (2, (1, 5)), (5, (4, 8)), (4, (4, 8))],
    ids=str,
)
def test_the_first_part_alone_chooses(warmup, counts):
    """Bases, entries and what the warm-up has added up: renewal and search on one step, and mixed batches."""
    rule = rule_with(warmup=warmup)
    state = brought_to(rule, counts)
    twin, step = copied(state), Step(count=counts, keys=[0, 1])
    first, second = grads_of(9, 2), seeded(2, *SHAPE, seed=77)
    image = image_of(rule, [first, second], state, step)
    rule.image(first, twin, step, first=True)
    assert torch.equal(state["entries"], twin["entries"])
    assert torch.equal(state["entry_avg"], twin["entry_avg"])
    assert torch.equal(state["basis"], twin["basis"])
    steps = [count >= warmup for count in counts]
    taken = take_entries(first + second, state["entries"])
    expected = torch.where(torch.tensor(steps).unsqueeze(-1), taken, 0.0)  # of entries that are still searched: nothing
    torch.testing.assert_close(image["at_entries"], expected, rtol=4 * EPS, atol=4 * EPS)
    # and the choice is one that the sum would not have made, or this could not fail
    other = rule.init((2, *SHAPE), CPU) if counts == (0, 0) else brought_to(rule, counts)
    rule.image(first + second, other, step, first=True)
    assert not torch.equal(other["entries"], state["entries"])


def test_a_first_part_that_is_no_number_has_no_say():
    rule = rule_with(warmup=3)
    state = brought_to(rule, (1,))
    before = copied(state)
    grad = grads_of(9, 1)
    grad[0, 2, 3] = float("inf")
    rule.image(grad, state, Step(count=[1], keys=[0]), first=True)
    assert all(torch.equal(state[key], before[key]) for key in state)


# --- norms ------------------------------------------------------------------------------------------------------------


@given(st.sampled_from([0.01, 0.2, 0.7, 1.0]), st.integers(0, 1000), st.sampled_from([(3, 3), (1, 3), (0, 1)]))
@LAW
def test_norms_count_the_projection_and_the_entries_it_misses_once(density, seed, counts):
    """Never more than the gradient's norm, all of it with all entries; entries that do not step yet are not counted."""
    rule = rule_with(density=density)
    state = brought_to(rule, counts)
    step = Step(count=counts, keys=[0, 1])
    grad = seeded(2, *SHAPE, seed=seed)
    image = rule.image(grad, state, step, first=False)
    found = float(torch.nn.utils.get_total_norm(rule.visible(image, SHORT, state, step)))
    total = 0.0
    for i, count in enumerate(counts):
        full, basis = grad[i].double(), state["basis"][i].double()
        held = full @ basis @ basis.T
        total += float(held.square().sum())
        if count >= WARMUP:
            total += float((full - held).flatten()[state["entries"][i].long()].square().sum())
    assert found == pytest.approx(total**0.5, rel=1e-5)
    assert found <= float(grad.norm()) * (1 + 1e-6)
    if density == 1.0 and min(counts) >= WARMUP:
        assert found == pytest.approx(float(grad.norm()), rel=1e-5)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def trained(mode, steps, *, micro=1, late=(), options=None, switch=0):
    """Weights after `steps` steps, `mode` from step `switch` on; the parameters `late` have no gradient in the first
    two steps, so that their counts fall behind."""
    params = [nn.Parameter(seeded(*shape, seed=i)) for i, shape in enumerate([(9, 6), (9, 6), (9, 6), (5, 8), (7,)])]
    common = {"lr": 0.05, "eps": 1e-2, "scale": 1.0}
    chosen = {"rank": 2, "update_proj_gap": 100, "density": 0.2, "warmup": 2, **(options or {})}
    groups = [{"params": params[:2]}, {"params": params[2:4], "density": 0.0}, {"params": params[4:]}]
    optimizer = GaLorePlus([{**chosen, **group} for group in groups], **common)
    for t in range(steps):
        if t == switch:
            optimizer.in_backward(mode)
        optimizer.zero_grad()
        for part in range(micro):
            terms = [
                (p * seeded(*p.shape, seed=100 * t + 10 * part + i)).sum() / micro
                for i, p in enumerate(params)
                if t >= 2 or i not in late
            ]
            torch.stack(terms).sum().backward()
        optimizer.step()
    return params, optimizer


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("late", [(), (1,), (0, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"svd": "exact"}, {"reselect": "renewal"}], ids=str)
def test_accumulation_is_that_of_whole_gradients(micro, late, options):
    """From when everything has been chosen on; groups with and without entries, members that are behind."""
    runs = [trained(mode, 9, micro=micro, late=late, options=options, switch=5)[0] for mode in ("off", "project")]
    close(*runs)


def test_without_accumulation_nothing_differs_from_the_first_step_on():
    options = {"update_proj_gap": 3, "reselect": "renewal"}
    close(*(trained(mode, 11, late=(1,), options=options)[0] for mode in ("off", "project")))


def test_clipping_with_all_entries_is_torchs():
    """There nothing of the gradient is lost, so norms and steps are those of whole gradients."""
    ends, norms = [], []
    for mode in ("off", "project"):
        params = [nn.Parameter(seeded(*shape, seed=i)) for i, shape in enumerate([(9, 6), (5, 8)])]
        optimizer = GaLorePlus(params, lr=0.05, eps=1e-2, rank=2, density=1.0, warmup=0)
        optimizer.in_backward(mode)
        for t in range(4):
            optimizer.zero_grad()
            for i, p in enumerate(params):
                (p * seeded(*p.shape, seed=10 * t + i)).sum().backward()
            if mode == "off":
                norms.append(float(nn.utils.clip_grad_norm_(params, 0.1)))
            else:
                norms.append(float(optimizer.clip_grad_norm_(0.1)))
            optimizer.step()
        ends.append(params)
    close(*ends)
    assert norms[:4] == pytest.approx(norms[4:], rel=1e-5)


def test_clipping_scales_entries_and_coordinates_together():
    params = [nn.Parameter(seeded(9, 6)), nn.Parameter(seeded(6, seed=1))]
    optimizer = GaLorePlus(params, lr=0.1, rank=2, density=0.3, warmup=0)
    optimizer.in_backward("project")
    (params[0] * seeded(9, 6, seed=2)).sum().backward()
    before = optimizer._images.of(params[0], "")
    old = {key: value.clone() for key, value in before.items()}
    norm = float(optimizer.clip_grad_norm_(0.5))
    assert norm > 0.5
    for key, value in optimizer._images.of(params[0], "").items():
        torch.testing.assert_close(value, old[key] * (0.5 / norm), rtol=1e-5, atol=0.0)
    assert float(optimizer.gradient_norm()) == pytest.approx(0.5, rel=1e-5)


def test_a_gradient_thrown_away_leaves_weights_moments_and_counts_as_they_were():
    params, optimizer = trained("project", 5)
    weight = params[0]
    weights, state = [p.detach().clone() for p in params], copied(optimizer.state[weight])
    optimizer.zero_grad()
    (weight * seeded(9, 6, seed=5)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, params, strict=True))
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in state.items())


@pytest.mark.parametrize("when", [0, 1, 3, 7])
def test_saved_between_steps_it_goes_on_to_the_bit(when):
    options = {"rank": 2, "update_proj_gap": 3, "density": 0.2, "warmup": 2, "reselect": "renewal", "lr": 0.05}

    def steps(weight, optimizer, first, last):
        for t in range(first, last):
            optimizer.zero_grad()
            for part in range(2):
                (weight * seeded(9, 6, seed=10 * t + part)).sum().backward()
            optimizer.step()

    whole = nn.Parameter(seeded(9, 6))
    optimizer = GaLorePlus([whole], **options)
    optimizer.in_backward("project")
    steps(whole, optimizer, 0, 10)
    weight = nn.Parameter(seeded(9, 6))
    before = GaLorePlus([weight], **options)
    before.in_backward("project")
    steps(weight, before, 0, when)
    other = nn.Parameter(weight.detach().clone())
    after = GaLorePlus([other], **options)
    after.load_state_dict(before.state_dict())
    after.in_backward("project")
    steps(other, after, when, 10)
    assert torch.equal(other, whole)
