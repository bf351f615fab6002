"""Moments in 8 bits: the codes' laws, what they do to Adam's direction, and Adam on them in every place it has."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import copies, equal, make, run, small
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, seeded
from reference.codes import neighbours
from torch import nn

from thinrank.optim import AdamW, GaLore
from thinrank.optim.inner import elementwise
from thinrank.optim.inner.adam import Adam
from thinrank.optim.inner.auon import AuON
from thinrank.optim.inner.moments import MOMENTUM, moments, zeros
from thinrank.optim.inner.polar import Polar
from thinrank.optim.linalg.orthogonal import YOU, newton_schulz
from thinrank.optim.linalg.quantise import block_shape, compand8, dequantise8, dither, expand8, quantise8
from thinrank.optim.lowrank.transport import Reset, Rotate, Rotation, Slots
from thinrank.optim.rule import Decay, Step

BLOCK = 256
CPU = torch.device("cpu")
MODES = [(signed, dithered) for signed in (True, False) for dithered in (True, False)]
modes = pytest.mark.parametrize(("signed", "dithered"), MODES, ids=str)
WIDTHS = st.sampled_from([1, 2, 5, 255, 256, 257, 600])


def values(width, seed, decades, signed, rows=3):
    """Numbers over many decades, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = seeded(rows, width, seed=seed) * 10.0 ** (-decades * torch.rand(rows, width, generator=generator))
    x[torch.rand(rows, width, generator=generator) < 0.2] = 0.0
    return x if signed else x.abs()


def noise_of(dithered, width, count):
    return dither([count], width, CPU) if dithered else None


# --- the codes --------------------------------------------------------------------------------------------------------


@modes
@LAW
@given(width=WIDTHS, seed=st.integers(0, 2**20), decades=st.integers(0, 12), count=st.integers(0, 10**6))
def test_numbers_become_one_of_their_two_levels(signed, dithered, width, seed, decades, count):
    """Beside a search in a float64 table. Zero exact, shapes of `block_shape`; unsigned numbers stay above zero."""
    x = values(width, seed, decades, signed)
    codes, scale = compand8(x, noise_of(dithered, width, count), signed=signed)
    assert codes.shape == x.shape
    assert codes.dtype is (torch.int8 if signed else torch.uint8)
    assert scale.shape == block_shape(x.shape)
    back = expand8(codes, scale)
    assert bool((back[x == 0] == 0).all())
    if not signed:
        assert bool((back[x > 0] > 0).all())
    for row, found in zip(x, back, strict=True):
        for start in range(0, width, BLOCK):
            part = row[start : start + BLOCK].tolist()
            between = neighbours(part, signed)
            for value, got, (low, high) in zip(part, found[start : start + BLOCK].tolist(), between, strict=True):
                close = [abs(got - level) <= 1e-6 * abs(level) for level in (low, high)]
                assert any(close) or (not signed and value > 0 and low == 0.0 and close[1]), (value, got, low, high)


@modes
@LAW
@given(width=WIDTHS, seed=st.integers(0, 2**20), decades=st.integers(0, 12), count=st.integers(0, 10**6))
def test_codes_are_a_fixed_point(signed, dithered, width, seed, decades, count):
    """To the bit, whatever the step: what nobody has touched does not drift."""
    x = 1e-12 * values(width, seed, decades, signed)
    codes, scale = compand8(x, noise_of(dithered, width, count), signed=signed)
    for later in (count + 1, count + 2, count + 77):
        again, scale_again = compand8(expand8(codes, scale), noise_of(dithered, width, later), signed=signed)
        assert torch.equal(again, codes)
        assert torch.equal(scale_again, scale)


@modes
@pytest.mark.parametrize("width", [7, 256, 600, 1024])
def test_where_it_is_computed_does_not_matter(signed, dithered, width):
    """Memory that was given is written over, nothing of what was in it counts, and the numbers to code stay."""
    x, noise = values(width, 3, 6, signed), noise_of(dithered, width, 5)
    spare = [torch.full_like(x, torch.nan) for _ in range(2)]
    before = x.clone()
    codes, scale = compand8(x, noise, signed=signed, spare=spare)
    assert torch.equal(x, before)
    plain = compand8(x, noise, signed=signed)
    assert torch.equal(codes, plain[0])
    assert torch.equal(scale, plain[1])
    spare = [torch.full_like(x, torch.nan) for _ in range(2)]
    assert torch.equal(expand8(codes, scale, spare=spare), expand8(codes, scale))


def test_numbers_below_all_levels():
    """Codes of what is too small to have one: roots are taken of normal numbers alone, and no code shows it."""
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([[1.0, tiny, tiny / 4, tiny * 2.0**-23, 0.0]])
    for noise in (None, torch.zeros(5), torch.full((5,), 1.0 - 2.0**-24)):
        assert compand8(x, noise)[0].tolist() == [[127, 0, 0, 0, 0]]
        assert compand8(x, noise, signed=False)[0].tolist() == [[255, 1, 1, 1, 0]]
    assert compand8(-x)[0].tolist() == [[-127, 0, 0, 0, 0]]


def test_every_code_is_its_own_fixed_point():
    """All levels, at scales whose quotients round differently, with the dithers nearest to either end."""
    ends = torch.tensor([0.0, 1.0 - 2.0**-24])
    for signed in (True, False):
        codes = torch.arange(-127 if signed else 0, 128 if signed else 256).to(torch.int8 if signed else torch.uint8)
        for scale in seeded(200).abs().tolist():
            x = expand8(codes, torch.tensor([scale]))
            for end in ends:
                again, _ = compand8(x, end.expand(BLOCK)[: len(codes)], signed=signed)
                assert torch.equal(again, codes)


@modes
def test_the_error_is_what_the_docstring_says(signed, dithered):
    """`(1 + 1/c)⁴ − 1` with dither, and half of it in codes without."""
    levels = 127.0 if signed else 255.0
    x = torch.logspace(0, -8, 4001, dtype=torch.float64).float().unsqueeze(-1)
    x = torch.cat([torch.ones_like(x), x], -1)
    for count in range(5):
        codes, scale = compand8(x, noise_of(dithered, 2, count), signed=signed)
        error = (expand8(codes, scale) / x - 1.0)[:, 1].abs().double()
        c = (x[:, 1].double() ** 0.25 * levels).floor()
        known = c >= 1
        bound = (1.0 + (1.0 if dithered else 0.5) / c) ** 4 - 1.0
        assert bool((error[known] <= bound[known] + 1e-6).all())
        near_top, hundredth = x[:, 1] > 0.99, x[:, 1] > 0.01
        assert float(error[near_top].max()) < (0.032 if signed else 0.016)
        assert float(error[hundredth].max()) < (0.106 if signed else 0.051)
        if not signed:
            assert bool((codes > 0).all())


@modes
@LAW
@given(seed=st.integers(0, 2**20), count=st.integers(0, 1000))
def test_order_is_kept(signed, dithered, seed, count):
    """At one place in a block of one scale."""
    x = values(1, seed, 4, signed, rows=200).sort(0).values
    top = torch.full_like(x, float(x.abs().max()))
    codes, _ = compand8(torch.cat([x, top], -1), noise_of(dithered, 2, count), signed=signed)
    assert bool((codes[1:, 0].int() >= codes[:-1, 0].int()).all())


@pytest.mark.parametrize("signed", [True, False])
def test_dither_is_right_on_average(signed):
    """Over 1000 steps the mean code is the exact level to the sequence's discrepancy, about log(n)/n."""
    x = values(40, 7, 2, signed=True).abs()
    top = 127.0 if signed else 255.0
    level = (x / x.amax(-1, keepdim=True)) ** 0.25 * top
    mean = torch.stack([compand8(x, dither([t], 40, CPU), signed=signed)[0].float() for t in range(1000)]).mean(0)
    inner = (x == 0) | (level > 1)  # below, unsigned numbers are all moved up
    assert float((mean - level)[inner].abs().max()) < 0.01


def test_a_slow_average_moves_only_with_dither():
    """Second moments change by 0.1 % a step, which is less than half a code: to the nearest, they never follow."""
    start, target = torch.ones(1, 8), torch.full((1, 8), 0.5)
    target[0, 0] = start[0, 0]  # the largest of the block keeps the scale
    ends = {}
    for dithered in (True, False):
        codes, scale = compand8(start, signed=False)
        for t in range(3000):
            v = expand8(codes, scale).lerp_(target, 0.001)
            codes, scale = compand8(v, noise_of(dithered, 8, t), signed=False)
        ends[dithered] = expand8(codes, scale)
    exact = 0.5 + 0.5 * 0.999**3000
    assert bool(((ends[True][0, 1:] - exact).abs() < 0.05 * exact).all())
    assert torch.equal(ends[False], start)


def test_dither_is_the_same_alone_and_in_a_batch():
    together = dither([3, 5], 300, CPU)
    assert together.shape == (2, 1, 1, BLOCK)
    for i, count in enumerate((3, 5)):
        torch.testing.assert_close(together[i, 0, 0], dither([count], 300, CPU), rtol=0, atol=1e-5)
    assert dither([4, 4], 3, CPU).shape == (3,)


def test_infinite_and_missing_numbers():
    x = torch.tensor([[1.0, float("inf"), 3.0], [1.0, float("nan"), 2.0], [0.0, 0.0, 0.0]])
    for signed in (True, False):
        back = expand8(*compand8(x, signed=signed))
        assert float(back[0, 1]) == torch.finfo(torch.float32).max
        assert bool(back[0].isfinite().all())
        assert bool(back[1].isnan().all())
        assert bool((back[2] == 0).all())


def moments_of_a_run(steps=300):
    """Moments of gradients whose columns and entries differ in size, as coordinates in singular directions do."""
    size = torch.logspace(0, -2, BLOCK) * seeded(8, BLOCK, seed=1).exp()
    mean = size * seeded(8, BLOCK, seed=2)
    grads = [0.3 * mean + size * seeded(8, BLOCK, seed=10 + t) for t in range(steps)]
    m, v = torch.zeros(8, BLOCK), torch.zeros(8, BLOCK)
    for grad in grads:
        m.lerp_(grad, 0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=0.001)
    return m, v, grads


def test_the_direction_suffers_a_tenth_of_what_linear_codes_do():
    """Both moments quantised once. With linear codes small second moments become zero and divide."""
    m, v, _ = moments_of_a_run(60)
    exact = m / (v.sqrt() + 1e-8)
    linear_m, linear_v = dequantise8(*quantise8(m)), dequantise8(*quantise8(v))
    linear = linear_m / (linear_v.clamp(min=0).sqrt() + 1e-8)
    noise = dither([3], BLOCK, CPU)
    ours = expand8(*compand8(m, noise)) / (expand8(*compand8(v, noise, signed=False)).sqrt() + 1e-8)
    error = {name: float((x - exact).norm() / exact.norm()) for name, x in (("linear", linear), ("ours", ours))}
    assert error["ours"] < 0.1
    assert error["linear"] > 10 * error["ours"]


# --- the moments in the state -----------------------------------------------------------------------------------------


def coded(m, v):
    state = zeros(tuple(m.shape), CPU, bits=8)
    with moments(state, [0] * m.shape[0]) as (a, b):
        a.copy_(m)
        b.copy_(v)
    return state


def test_what_is_opened_and_not_touched_stays_to_the_bit():
    m, v, _ = moments_of_a_run(20)
    state = coded(m[None], v[None])
    before = {key: value.clone() for key, value in state.items()}
    for count in range(5):
        with moments(state, [count]):
            pass
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_transports_act_on_codes():
    m, v = seeded(2, 6, 4), seeded(2, 6, 4, seed=1).square()
    turn = torch.linalg.qr(seeded(2, 4, 4, seed=2)).Q
    kept = torch.tensor([[True, False, True, True], [True, True, False, False]])
    cases = (
        (Reset(), Slots(kept), ("ages",)),
        (Rotate((0.9, 0.99)), Slots(kept), ("ages",)),
        (Rotate((0.9, 0.99)), Rotation(turn), ()),
    )
    for transport, change, ages in cases:
        state = coded(m, v)
        with moments(state, [5, 9]) as (a, b):
            full = {"exp_avg": a.clone(), "exp_avg_sq": b.clone()}
        for each in (state, full):
            if ages:
                each["age"] = torch.full((2, 4), 5.0)
            transport.carry(each, change, [5, 9])
        with moments(state, [5, 9]) as (a, b):
            # one level of 127 at these sizes, 20 % of an entry or 1 % of the row's largest
            torch.testing.assert_close(a, full["exp_avg"], rtol=0.2, atol=0.01)
            torch.testing.assert_close(b, full["exp_avg_sq"], rtol=0.2, atol=0.01)
            if isinstance(change, Slots):
                assert torch.equal(a == 0, full["exp_avg"] == 0)
        if ages:
            assert torch.equal(state["age"], full["age"])


def test_adam_on_codes_follows_adam():
    """300 steps of one sample path; the error of one quantisation is 5 %, and the averages do not add it up."""
    _, _, grads = moments_of_a_run()
    directions = {}
    for bits in (32, 8):
        inner = Adam(bits=bits)
        state = inner.init((1, 8, BLOCK), CPU)
        for t, grad in enumerate(grads):
            directions[bits] = inner.direction(grad[None], state, Step(count=[t]))
    error = (directions[8] - directions[32]).norm() / directions[32].norm()
    assert float(error) < 0.25
    cosine = torch.nn.functional.cosine_similarity(directions[8].flatten(), directions[32].flatten(), dim=0)
    assert float(cosine) > 0.97


def gradients_of_columns(spread, steps=60):
    """Gradients (1, 256, 128) around a mean with singular values over one decade, columns of sizes `exp(±spread)`."""
    left = torch.linalg.qr(seeded(256, 128, seed=1)).Q * torch.logspace(0, -1, 128)
    right = torch.linalg.qr(seeded(128, 128, seed=2)).Q * (spread * seeded(128, seed=3)).exp()
    for t in range(steps):
        noise = 0.3 * left @ seeded(128, 128, seed=900 + t) / 11.0
        yield ((left * (1.0 + 0.5 * seeded(128, seed=100 + t)) + noise) @ right)[None]


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("spread", [0.0, 1.5])
@pytest.mark.parametrize("inner", [Polar(coefficients=YOU, nesterov=False), Polar(coefficients=YOU), AuON(steps=5)])
def test_momentum_on_codes_follows_momentum(inner, spread):
    """A code's levels are 4/c of the number apart, at a third of the block's largest (c = 96) 4.2 %, and dither is off
    by 0.41 of that in the root mean square: 1.7 %. A mean with μ = 0.95 gathers sqrt(1/(1−μ²)) = 3.2 of such errors
    when they are independent, fewer when they cancel: 5.5 %. Newton-Schulz makes the error in a singular direction
    larger by what it makes the direction larger, here up to ten times, so that the update is held to a cosine, one of
    an error of 14 %."""
    ends = {}
    for bits in (32, 8):
        own = replace(inner, bits=bits)
        state = own.init((1, 256, 128), CPU)
        steps = [
            own.direction(grad, state, Step(count=[t])).clone() for t, grad in enumerate(gradients_of_columns(spread))
        ]
        with moments(state, [60], MOMENTUM) as (momentum,):
            ends[bits] = momentum.clone(), steps[-1]
    assert 0.0 < distance(ends[8][0], ends[32][0]) < 0.055
    cosine = torch.nn.functional.cosine_similarity(ends[8][1].flatten(), ends[32][1].flatten(), dim=0)
    assert float(cosine) > 0.99


def test_codes_of_powers_serve_columns_of_different_sizes():
    """Linear codes lose small columns beside large ones of the same block, which the update makes as long as those."""
    mean, linear = torch.zeros(1, 256, 128), quantise8(torch.zeros(1, 256, 128))
    state = zeros((1, 256, 128), CPU, 8, MOMENTUM)
    for t, grad in enumerate(gradients_of_columns(1.5)):
        mean.lerp_(grad, 0.05)
        linear = quantise8(dequantise8(*linear).lerp_(grad, 0.05))
        with moments(state, [t], MOMENTUM) as (momentum,):
            momentum.lerp_(grad, 0.05)
    with moments(state, [60], MOMENTUM) as (momentum,):
        exact, ours, theirs = (newton_schulz(x, YOU) for x in (mean, momentum, dequantise8(*linear)))
    assert distance(ours, exact) < 0.15
    assert distance(theirs, exact) > 2.0 * distance(ours, exact)


# --- optimizers -------------------------------------------------------------------------------------------------------

WEIGHT = (64, 80)  # 5120 entries, the last of them in a block of full length


def large(dtype=torch.float32):
    shapes = (WEIGHT, (70, 61), (5000,), (30, 30))  # 4270 entries: the last block is short
    return [nn.Parameter(seeded(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def test_which_tensors_have_codes():
    optimizer = AdamW(large(), state_bits=8)
    keys = [set(optimizer.state[p]) for p in optimizer.param_groups[0]["params"]]
    codes = {"step", "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale"}
    assert keys == [codes, codes, {"step", "exp_avg", "exp_avg_sq"}, {"step", "exp_avg", "exp_avg_sq"}]
    double = [nn.Parameter(seeded(*WEIGHT, dtype=torch.float64))]
    assert AdamW(double, state_bits=8).state[double[0]]["exp_avg"].dtype is torch.float64


@pytest.mark.parametrize("cls", [AdamW, GaLore])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_elementwise_codes_follow_full_precision(cls, dtype):
    """Also GaLore's arithmetic for what it does not project: eps before the correction, decay after the update.

    In bfloat16 with masters, because torch's arithmetic there rounds more than the codes do.
    """
    ends = []
    for bits in (32, 8):
        params = large(dtype)
        others = [{"params": params}, {"params": [nn.Parameter(seeded(8, 8))], "rank": 2}] if cls is GaLore else params
        run(cls(others, lr=0.01, weight_decay=0.1, state_bits=bits, half_weights="master"), params, 0, 6)
        ends.append(params)
    for start, a, b in zip(large(dtype), *ends, strict=True):
        moved = (a.detach() - start.detach()).float().norm()
        assert float((a.detach() - b.detach()).float().norm()) < (0.05 if dtype is torch.float32 else 0.2) * moved
        assert torch.equal(a, b) == (a.ndim == 1 or a.numel() < 4096)


@pytest.mark.parametrize("cls", [AdamW, GaLore])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pieces_do_not_matter(monkeypatch, cls, dtype):
    """GaLore's decay comes after the update, and before the rounding to 16 bits."""
    ends = []
    for size in (2**18, 256, 1024):
        monkeypatch.setattr(elementwise, "CPU_PIECE", size)
        params = large(dtype)
        others = [{"params": params}, {"params": [nn.Parameter(seeded(8, 8))], "rank": 2}] if cls is GaLore else params
        run(cls(others, lr=0.01, weight_decay=0.1, state_bits=8), params, 0, 4)
        ends.append(params)
    assert equal(ends[0], ends[1])
    assert equal(ends[0], ends[2])


@pytest.mark.parametrize("after", [False, True])
def test_sixteen_bits_are_stepped_in_float32_and_rounded_once(after):
    """As a float32 copy would be, weight by weight."""
    weight, gradient = (seeded(*WEIGHT, seed=i).bfloat16() for i in (0, 1))
    rule = elementwise.ElementwiseAdamW(betas=(0.9, 0.99), eps=1e-8, bits=8, decay=Decay(after=after))
    wide = weight.float()
    states = [rule.init(weight), rule.init(wide)]
    rule.step_([weight], [gradient], states[:1], lr=0.01, weight_decay=0.1)
    rule.step_([wide], [gradient.float()], states[1:], lr=0.01, weight_decay=0.1)
    assert torch.equal(weight, wide.bfloat16())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_memory_order_does_not_matter():
    """Codes lie in the order of a contiguous weight; a transposed or channels-last one is read and written right."""
    for convert in (
        lambda x: nn.Parameter(x.t().contiguous().t()),
        lambda x: nn.Parameter(x.view(64, 5, 4, 4).to(memory_format=torch.channels_last)),
    ):
        odd, plain = convert(seeded(*WEIGHT)), nn.Parameter(seeded(*WEIGHT))
        for p in (odd, plain):
            optimizer = AdamW([p], lr=0.01, state_bits=8)
            for step in range(4):
                p.grad = seeded(*WEIGHT, seed=step + 1).view(p.shape)
                optimizer.step()
        assert torch.equal(odd.detach().reshape(WEIGHT), plain.detach())


@pytest.mark.parametrize("half", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "galore", "dct_adamw", "subspace_adamw", "muon", "auon"])
def test_resumes_to_the_bit(name, dtype, half):
    config = small(name, state_bits=8, half_weights=half)
    params = large(dtype)
    optimizer = make(config, params)
    run(optimizer, params, 0, 4)
    others = copies(params)
    other = make(config, others)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, 4, 8)
    run(other, others, 4, 8)
    assert equal(params, others)
    mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert all(torch.equal(mine[i][key], theirs[i][key]) for i in mine for key in mine[i])


def test_gradients_of_any_size_keep_large_weights_finite():
    for size in (1e30, 1e-30, 0.0):
        params = large()
        optimizer = AdamW(params, lr=0.01, state_bits=8)
        before = copies(params)
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = seeded(*p.shape, seed=10 * step + i) * (size if step in (0, 3) else 1.0)
            optimizer.step()
            if step == 0 and size == 0.0:
                assert equal(params, before)
        assert all(bool(p.isfinite().all()) for p in params)
