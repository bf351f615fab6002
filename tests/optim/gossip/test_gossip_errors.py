"""Errors of compressors: their means, their usual sizes, and the bounds that theory has for them."""

import math

import pytest
import torch
from gossip_cases import CASES, bound, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from thinrank.optim.gossip.compress import compressor, key_of

ON_GAUSSIAN = [
    *[("uniform8", 128, 0.0092), ("uniform6", 128, 0.0375), ("uniform4", 128, 0.167), ("uniform3", 128, 0.389)],
    *[("uniform8", 2048, 0.0118), ("uniform6", 2048, 0.048), ("uniform4", 2048, 0.215), ("uniform3", 2048, 0.499)],
    *[("uniform2/unscaled", 128, 1.13), ("uniform2/unscaled", 2048, 1.39)],
    *[("uniform8/nearest", 2048, 0.0084), ("uniform6/nearest", 2048, 0.034)],
    *[("uniform4/nearest", 2048, 0.152), ("uniform3/nearest", 2048, 0.353)],
    ("sign", 2048, math.sqrt(1 - 2 / math.pi)),
]


@pytest.mark.parametrize(("case", "bucket", "alpha"), ON_GAUSSIAN)
def test_the_error_on_gaussian_vectors(case, bucket, alpha):
    """Within 2.5 %: the table has three digits, and a scale rounded up to bfloat16 adds 0.3 % of itself."""
    name, options = CASES[case]
    codec = compressor(name, bucket=bucket, **options).bind(((2**18,),))
    flat = gaussian(2**18)
    lost = (codec.decode(codec.encode(flat, 1), 1) - flat).norm() / flat.norm()
    assert lost == pytest.approx(alpha, rel=0.025)


@pytest.mark.parametrize(("fraction", "energy"), [(0.25, 0.72), (0.1, 0.44), (0.01, 0.085)])
def test_the_largest_entries_hold_what_they_should(fraction, energy):
    codec = compressor("topk", fraction=fraction).bind(((2**18,),))
    flat = gaussian(2**18)
    lost = (codec.decode(codec.encode(flat, 1), 1) - flat).square().sum() / flat.square().sum()
    assert 1 - lost == pytest.approx(energy, rel=0.03)


@pytest.mark.parametrize(("bits", "alpha"), [(2, 0.78), (3, 0.44)])
def test_a_bucket_scaled_by_least_squares_never_moves_away(bits, alpha):
    """Whatever is drawn, in every bucket, and for entries of any distribution."""
    for power in (1, 5):
        flat = gaussian(2**18).pow(power)
        codec = compressor(f"uniform{bits}", scaled=True).bind(((2**18,),))
        decoded = codec.decode(codec.encode(flat, 1), 1)
        lost = (decoded - flat).view(-1, 512).norm(dim=1) / flat.view(-1, 512).norm(dim=1)
        assert lost.max() <= 1.0
        if power == 1:
            assert lost.square().mean().sqrt() < 1.05 * alpha


@pytest.mark.parametrize("case", [c for c in CASES if bound(c, ((64,),)).unbiased and not c.startswith("randomk")])
def test_means_over_the_key_are_the_entries(case):
    """Thirty thousand equal buckets in one vector are as many draws."""
    name, options = CASES[case]
    small = {"bucket": 64} if name.startswith("uniform") else {}
    bucket = gaussian(64, 5)
    bucket[0] = 4.0
    flat = bucket.repeat(30000)
    codec = compressor(name, **{**options, **small}).bind(((flat.numel(),),))
    decoded = codec.decode(codec.encode(flat, 1), 1).view(-1, 64).double()
    off = (decoded.mean(0) - bucket).abs()
    spread = decoded.std(0) / math.sqrt(len(decoded))
    # what 15 random bits and the last bit of float32 leave
    assert (off <= 5 * spread + 2.0**-15 * codec.error * 4.0 + 2.0**-22 * bucket.abs()).all()
    assert name == "float32" or spread.max() > 0


def test_random_entries_are_unbiased_where_they_are_enlarged():
    codec = compressor("randomk", fraction=0.3, unbiased=True).bind(((10,),))
    flat = gaussian(10)
    decoded = torch.stack([codec.decode(codec.encode(flat, key), key) for key in range(4000)]).double()
    assert ((decoded.mean(0) - flat).abs() <= 5 * decoded.std(0) / math.sqrt(len(decoded))).all()


vectors = st.lists(
    st.floats(-1.0, 1.0, width=32).map(lambda x: 0.0 if abs(x) < 1e-30 else x), min_size=16, max_size=16
).filter(lambda entries: any(abs(e) > 1e-10 for e in entries))


@settings(max_examples=150)
@given(st.sampled_from([c for c in CASES if CASES[c][0] not in ("lowrank", "dct")]), vectors, st.integers(0, 3))
def test_no_vector_loses_more_than_the_bound(case, entries, power):
    """The mean over 300 buckets that are equal, each with its own draws, five standard errors allowed."""
    name, options = CASES[case]
    small = {"bucket": 16} if name.startswith("uniform") or name in ("sign", "fp8") else {}
    small = {"chunk": 16, "fraction": 0.2} if name == "topk" else small
    row = torch.tensor(entries) * torch.logspace(0, -2 * power, 16)
    row /= row.abs().max()
    flat = row.repeat(300)
    codec = compressor(name, **{**options, **small}).bind(((flat.numel(),),))
    if name == "randomk":
        decoded = torch.stack([codec.decode(codec.encode(flat, key), key) for key in range(20)])
        lost = (decoded - flat).double().square().sum(1) / flat.double().square().sum()
    else:
        decoded = codec.decode(codec.encode(flat, 1), 1)
        lost = (decoded - flat).view(-1, 16).double().square().sum(1) / row.double().square().sum()
    assert lost.mean() <= codec.error**2 * (1 + 1e-5) + 5 * lost.std() / math.sqrt(len(lost)) + 1e-12


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_bound_is_reached(bits, scaled):
    """Where all entries but the largest have the worst size, so that the bound is not an idle one."""
    bucket, levels = 512, 2 ** (bits - 1) - 1
    spread = (bucket - 1) / levels**2
    row = torch.full((bucket,), (math.sqrt(1 + spread) - 1) / ((bucket - 1) / levels))
    row[0] = 1.0
    flat = row.repeat(500)
    codec = compressor(f"uniform{bits}", scaled=scaled).bind(((flat.numel(),),))
    decoded = codec.decode(codec.encode(flat, 1), 1)
    lost = ((decoded - flat).square().sum() / flat.square().sum()).sqrt().item()
    assert 0.93 * codec.error <= lost <= codec.error * (1 + 1e-2)


def test_nearest_levels_reach_their_bound_halfway():
    row = torch.full((512,), 0.4999 / 127)
    row[0] = 1.0
    codec = compressor("uniform8", stochastic=False).bind(((512,),))
    lost = ((codec.decode(codec.encode(row, 1), 1) - row).norm() / row.norm()).item()
    assert 0.95 * codec.error <= lost <= codec.error


@settings(max_examples=40)
@given(st.sampled_from(["lowrank", "lowrank/1", "dct", "dct/small"]), st.integers(0, 1000), st.floats(0.0, 3.0))
def test_matrices_lose_no_more_than_the_bound(case, seed, decay):
    x = gaussian(48 * 40, seed).view(48, 40) * torch.logspace(0, -decay, 40)
    codec = bound(case, ((48, 40),))
    keys = range(seed, seed + 20)
    lost = torch.tensor([(codec.decode(codec.encode(x.view(-1), k), k) - x.view(-1)).norm() / x.norm() for k in keys])
    assert lost.square().mean() <= codec.error**2 + 5 * lost.square().std() / math.sqrt(len(lost)) + 1e-6


def test_flat_spectra_lose_just_the_bound_of_low_rank():
    codec = compressor("lowrank", rank=4).bind(((32, 32),))
    flat = torch.linalg.qr(gaussian(1024).view(32, 32))[0].reshape(-1)
    lost = (codec.decode(codec.encode(flat, 1), 1) - flat).norm() / flat.norm()
    assert lost == pytest.approx(codec.error, rel=1e-4)


def test_ranks_round_independently():
    codec = compressor("uniform2", scaled=False).bind(((2**16,),))
    flat = gaussian(2**16)
    errors = [codec.decode(codec.encode(flat, k), k) - flat for k in (key_of(0, 0, 5, 0), key_of(0, 1, 5, 0))]
    cosine = torch.dot(*errors) / (errors[0].norm() * errors[1].norm())
    assert cosine.abs() < 5 / math.sqrt(2**16)


def test_draws_of_neighbouring_entries_are_independent():
    codec = compressor("uniform2", scaled=False, bucket=64).bind(((2**16,),))
    flat = torch.full((2**16,), 0.5)
    flat[::64] = 1.0
    up = (codec.decode(codec.encode(flat, 1), 1) != 0).double() - 0.5
    for lag in (1, 2, 3, 4, 8, 64 * 7 + 1, 2**15 + 1):
        pairs = (up[lag:] * up[:-lag])[flat[lag:] * flat[:-lag] < 0.3]
        assert pairs.mean().abs() < 5 * 0.25 / math.sqrt(len(pairs))
