"""16-bit weights: rounding's laws, and what becomes of updates below half of a weight's spacing."""

import copy
import math

import pytest
import torch
from cases import copies, equal, make, run, small
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, seeded
from torch import nn

from thinrank.optim import AdamW, SubspaceAdamW
from thinrank.optim.linalg.rounding import noise16, stochastic_round

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
NOISE = torch.arange(2**16, dtype=torch.int32)
"""Every noise there is: a mean over it is the exact expectation."""


# --- rounding ---------------------------------------------------------------------------------------------------------


@halves
def test_what_is_representable_stays(dtype):
    """All 2¹⁶ numbers of the format, infinities and NaN among them, for the ends of the noise and one between."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for noise in (0, 2**16 - 1, 12345):
        rounded = stochastic_round(every.float(), dtype, torch.full(every.shape, noise, dtype=torch.int32))
        assert torch.equal(rounded.isnan(), every.isnan())
        numbers = ~every.isnan()
        assert torch.equal(rounded[numbers].view(torch.int16), every[numbers].view(torch.int16))


@halves
@LAW
@given(seed=st.integers(0, 2**20), exponent=st.integers(-30, 4))
def test_one_of_two_neighbours_and_the_mean(dtype, seed, exponent):
    """The expectation is exact for bfloat16, and for float16 to 2⁻¹³ of a spacing."""
    for x in (seeded(3, seed=seed) * 2.0**exponent).tolist():
        value = torch.tensor(x)
        rounded = stochastic_round(value.expand(2**16), dtype, NOISE).double()
        low, high = rounded.min(), rounded.max()
        assert float(low) <= float(value) <= float(high)
        found = torch.unique(rounded)
        assert len(found) <= 2
        if len(found) == 2:  # neighbours: nothing representable between them
            middle = ((low + high) / 2).to(dtype).double()
            assert middle in (low, high)
        spacing = float(high - low)
        assert abs(float(rounded.mean()) - float(value)) <= spacing * (0.0 if dtype is torch.bfloat16 else 2.0**-12)


@halves
def test_beyond_the_largest_number(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([math.inf, -math.inf, math.nan, largest, -largest])
    rounded = stochastic_round(x, dtype, torch.full((5,), 2**16 - 1, dtype=torch.int32))
    torch.testing.assert_close(rounded, x.to(dtype), equal_nan=True, rtol=0, atol=0)


def test_noise_is_uniform_and_depends_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    noise = noise16(torch.Size((333, 301)), 5, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(noise, noise16(torch.Size((333, 301)), 5, CPU))
    assert not torch.equal(noise, noise16(torch.Size((333, 301)), 6, CPU))
    assert noise.shape == (333, 301)
    assert 0 <= int(noise.min()) < 100
    assert 2**16 - 100 < int(noise.max()) < 2**16
    # five standard deviations of a mean of uniform numbers, and the same for each bit
    count = noise.numel()
    assert abs(float(noise.float().mean()) - (2**16 - 1) / 2) < 5 * 2**16 / math.sqrt(12 * count)
    for bit in range(16):
        share = float(((noise >> bit) & 1).float().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(count)


# --- updates below the spacing ----------------------------------------------------------------------------------------

STEPS, LR = 200, 2.0**-12  # a weight of 1 in bfloat16 has neighbours at 1 − 2⁻⁸ and 1 + 2⁻⁷


def pushed(kind, way, dtype=torch.bfloat16):
    """A weight of ones after updates of about LR that all point down, and how far float32 went."""
    cls, options = {
        "elementwise": (AdamW, {}),
        "elementwise, 8 bit": (AdamW, {"state_bits": 8}),
        "projected": (SubspaceAdamW, {"rank": 8, "residual": "off"}),
    }[kind]
    weight = nn.Parameter(torch.ones(80, 64, dtype=dtype))
    optimizer = cls([weight], lr=LR, half_weights=way, **options)
    left, right = 1.0 + seeded(80, 1).abs(), 1.0 + seeded(1, 64, seed=1).abs()
    for _ in range(STEPS):
        weight.grad = (left @ right).to(torch.bfloat16).to(dtype)
        optimizer.step()
    return weight.detach().float(), optimizer, weight


@pytest.mark.parametrize("kind", ["elementwise", "elementwise, 8 bit", "projected"])
def test_small_updates_are_lost_kept_on_average_or_kept(kind):
    exact, *_ = pushed(kind, "nearest", torch.float32)
    way = 1.0 - exact.mean()
    assert float(way) > 10 * LR
    nearest, *_ = pushed(kind, "nearest")
    assert torch.equal(nearest, torch.ones_like(nearest))
    stochastic, *_ = pushed(kind, "stochastic")
    # a weight below 1 has spacing 2⁻⁸; a step's rounding has a variance of at most step · spacing, so all of them
    # together at most way · spacing, and the mean over all weights five standard deviations of that
    deviation = math.sqrt(float(way) * 2.0**-8 / exact.numel())
    assert abs(float(stochastic.mean() - exact.mean())) < 5 * deviation + 0.002 * float(way)
    master, optimizer, weight = pushed(kind, "master")
    kept = optimizer.state[weight]["master"]
    assert kept.dtype is torch.float32
    assert torch.equal(kept.to(torch.bfloat16).float(), master)
    torch.testing.assert_close(kept, exact, rtol=1e-5, atol=1e-5)


@halves
@pytest.mark.parametrize("name", ["adamw", "galore", "dct_adamw", "subspace_adamw"])
def test_a_master_follows_float32(name, dtype):
    """From weights that the format can represent and its gradients: the rounding of the float32 run, to the bit."""
    shapes = [(8, 5), (5, 8), (7,), (4, 3, 2, 2)]
    narrow = [nn.Parameter(seeded(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizers = [make(small(name, half_weights="master"), params) for params in (narrow, wide)]
    for step in range(8):
        for i, (p, q) in enumerate(zip(narrow, wide, strict=True)):
            p.grad = seeded(*p.shape, seed=100 * step + i).to(dtype)
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(narrow, wide, strict=True):
        master = optimizers[0].state[p]["master"]
        # a convolution's float32 gradient and a 16-bit one may meet other kernels
        torch.testing.assert_close(master, q.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(p.detach(), master.to(dtype))
    assert all("master" not in optimizers[1].state[q] for q in wide)


@pytest.mark.parametrize("way", ["stochastic", "master"])
@pytest.mark.parametrize("name", ["adamw", "galore", "subspace_adamw"])
def test_float32_weights_do_not_notice(name, way):
    ends, states = [], []
    for each in ("nearest", way):
        params = [nn.Parameter(seeded(9, 6)), nn.Parameter(seeded(6))]
        optimizer = make(small(name, half_weights=each), params)
        run(optimizer, params, 0, 5)
        ends.append(params)
        states.append(optimizer.state_bytes())
    assert equal(*ends)
    assert states[0] == states[1]


# --- everything a parameter may be ------------------------------------------------------------------------------------


def several():
    return [nn.Parameter(seeded(*shape, seed=i).bfloat16()) for i, shape in enumerate([(9, 6), (9, 6), (6,), (6, 9)])]


@pytest.mark.parametrize("way", ["stochastic", "master"])
@pytest.mark.parametrize("name", ["adamw", "galore", "subspace_adamw"])
def test_stacked_weights_equal_single_ones(name, way):
    """Also where some have no gradient in some steps; names decide the random numbers."""
    params, alone = several(), several()
    config = small(name, half_weights=way)
    together = make(config, [(f"p{i}", p) for i, p in enumerate(params)])
    apart = [make(config, [(f"p{i}", p)]) for i, p in enumerate(alone)]
    for step in range(6):
        for i, (p, a) in enumerate(zip(params, alone, strict=True)):
            p.grad = None if (step + i) % 4 == 3 else seeded(*p.shape, seed=50 * step + i).bfloat16()
            a.grad = None if p.grad is None else p.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    for p, a in zip(params, alone, strict=True):
        # rounding of a batched product may, rarely, choose the other neighbour
        torch.testing.assert_close(p, a, rtol=2.0**-7, atol=1e-5)
        assert float((p != a).float().mean()) < 0.05


def test_the_seed_decides_and_nothing_else():
    ends = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(noise)
        params = several()
        run(make(small("subspace_adamw", half_weights="stochastic"), params, seed=seed), params, 0, 5)
        ends.append(params)
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])


@pytest.mark.parametrize("way", ["stochastic", "master"])
def test_fused_blocked_and_strided_weights(way):
    """A fused weight's sections share one master, heads lie in one, channels-last memory is no obstacle."""
    fused, heads = nn.Parameter(seeded(15, 4).bfloat16()), nn.Parameter(seeded(12, 5, seed=1).bfloat16())
    conv = nn.Parameter(seeded(6, 4, 3, 3, seed=2).bfloat16().to(memory_format=torch.channels_last))
    turned = nn.Parameter(seeded(5, 9, seed=3).bfloat16().t())
    narrow = [fused, heads, conv, turned]
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    masters = []
    for params in (narrow, wide):
        groups = [
            {"params": params[:1], "sections": (8, 4, 3)},
            {"params": params[1:2], "blocks": 3},
            {"params": params[2:]},
        ]
        optimizer = SubspaceAdamW(groups, lr=0.02, rank=2, half_weights=way)
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = seeded(*p.shape, seed=10 * step + i).bfloat16().to(p.dtype)
            optimizer.step()
        masters.append([optimizer.state[p].get("master") for p in params])
    for p, q, master in zip(narrow, wide, masters[0], strict=True):
        if way == "master":
            torch.testing.assert_close(master, q.detach(), rtol=1e-3, atol=1e-3)
            assert torch.equal(master.bfloat16(), p.detach())
        else:  # five roundings to one of the neighbours of a number below 4
            assert float((p.detach().float() - q.detach()).abs().max()) < 5 * 2.0**-6


# --- who else writes to weights and state -----------------------------------------------------------------------------


def test_a_weight_changed_by_others_wins_where_it_changed():
    """A model loaded after the optimizer was built, or in between; the other entries keep what is below rounding."""
    weight = nn.Parameter(torch.ones(4, 6).bfloat16())
    optimizer = AdamW([weight], lr=2.0**-12, weight_decay=0.0, half_weights="master")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    master = optimizer.state[weight]["master"]
    assert torch.equal(weight.detach(), torch.ones_like(weight))
    below = master.clone()
    assert bool((below < 1.0).all())
    with torch.no_grad():
        weight[0] = 2.0
    optimizer.step()
    torch.testing.assert_close(master[0], torch.full((6,), 2.0 - 2.0**-12), rtol=1e-6, atol=0)
    torch.testing.assert_close(master[1:], below[1:] - 2.0**-12, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["adamw", "galore", "subspace_adamw"])
def test_resuming_keeps_what_is_below_the_rounding(name):
    """Against a resumed run that loses its masters, so that the test could fail."""
    config = small(name, lr=1e-3, half_weights="master")
    params = several()
    optimizer = make(config, params)
    run(optimizer, params, 0, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    ends = {}
    for kept in (True, False):
        others = copies(params)
        other = make(config, others)
        other.load_state_dict(saved)
        if not kept:
            for p in others:
                other.state[p]["master"].copy_(p)
        run(other, others, 5, 9)
        ends[kept] = others
    run(optimizer, params, 5, 9)
    assert equal(params, ends[True])
    assert not equal(params, ends[False])


def test_a_step_at_lr_zero_and_a_missing_gradient_change_no_bit():
    for way in ("stochastic", "master"):
        params = several()
        optimizer = make(small("subspace_adamw", half_weights=way, weight_decay=0.0), params)
        run(optimizer, params, 0, 2)
        optimizer.param_groups[0]["lr"] = 0.0
        before = copies(params)
        run(optimizer, params, 2, 4)
        assert equal(params, before)
        for p in params:
            p.grad = None
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        assert equal(params, before)
