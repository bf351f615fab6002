"""Compressors: payloads of known length, chance by the key alone, and errors as theory has them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinrank.optim.gossip.compress import COMPRESSORS, Codec, Measured, compressor, finite, identity_of, key_of
from thinrank.optim.gossip.compress.packing import GROUP, pack, packed_bytes, unpack
from thinrank.optim.gossip.compress.scales import BF16_MAX, SMALLEST, bf16_above

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in COMPRESSORS},
    **{f"{name}/nearest": (name, {"stochastic": False}) for name in COMPRESSORS if name.startswith("uniform")},
    **{f"{name}/scaled": (name, {"scaled": True}) for name in ("uniform8", "uniform6", "uniform4", "uniform3", "natural")},
    "uniform2/unscaled": ("uniform2", {"scaled": False}),
    "uniform8/small": ("uniform8", {"bucket": 8}),
    "uniform3/wide": ("uniform3", {"bucket": 2**17}),
    "sign/small": ("sign", {"bucket": 16}),
    "bf16/stochastic": ("bf16", {"stochastic": True}),
    "topk/chunks": ("topk", {"chunk": 100, "fraction": 0.13, "values": "float32"}),
    "randomk/unbiased": ("randomk", {"fraction": 0.3, "unbiased": True}),
    "randomk/bf16": ("randomk", {"fraction": 0.3, "values": "bf16"}),
    "lowrank/1": ("lowrank", {"rank": 1}),
    "dct/small": ("dct", {"chunk": 8, "k": 5, "values": "float32"}),
}  # fmt: skip
SHAPES = {
    "none": (),
    "empty": ((0,), (3, 0)),
    "scalar": ((),),
    "one": ((1,),),
    "tail": ((513,),),
    "many": ((40, 30), (0,), (7,), (3, 4, 5), ()),
    "prime": ((67, 131), (131,)),
    "blocks": ((2**16 + 9,),),
}
CHANCE = ("uniform8", "uniform2", "natural", "bf16/stochastic", "randomk", "randomk/unbiased", "lowrank")


def bound(case: str, shapes: tuple[tuple[int, ...], ...]) -> Codec:
    name, options = CASES[case]
    return compressor(name, **options).bind(shapes)


def gaussian(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def length(case: str, shapes: tuple[tuple[int, ...], ...]) -> int:
    """Bytes of a payload, worked out by hand."""
    name, options = CASES[case]
    n = sum(math.prod(shape) for shape in shapes)
    matrices = [(s[0], math.prod(s[1:])) if len(s) > 1 else (1, math.prod(s)) for s in shapes if math.prod(s)]
    size = {"bf16": 2, "float32": 4}
    buckets = math.ceil(n / options.get("bucket", 512))
    if name in ("float32", "bf16"):
        return n * size[name]
    if name == "fp8":
        return 2 * buckets + n
    if name.startswith("uniform"):
        entries, filled = GROUP[int(name[-1])]
        return 2 * buckets + math.ceil(n / entries) * filled
    if name == "sign":
        return 2 * buckets + math.ceil(n / 8)
    if name == "natural":
        return n + math.ceil(n / 8)
    if name == "topk":
        chunk, fraction = options.get("chunk", 2**16), options.get("fraction", 0.01)
        sizes = [min(chunk, n - start) for start in range(0, n, chunk)]
        return sum(math.ceil(fraction * s) for s in sizes) * (2 + size[options.get("values", "bf16")])
    if name == "randomk":
        return math.ceil(options.get("fraction", 0.01) * n) * size[options.get("values", "float32")]
    if name == "lowrank":
        return 4 * sum(min(m * k, options.get("rank", 4) * (m + k)) for m, k in matrices)
    chunk, k, kept = options.get("chunk", 64), options.get("k", 32), 0
    for sides in matrices:
        counts = [math.ceil(side / chunk) for side in sides]
        edges = [math.ceil(side / count) for side, count in zip(sides, counts, strict=True)]
        counts = [math.ceil(side / edge) for side, edge in zip(sides, edges, strict=True)]
        kept += math.prod(counts) * math.ceil(k * math.prod(edges) / chunk**2)
    return kept * (2 + size[options.get("values", "bf16")])


# --- what every codec promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_payloads_have_the_length_that_the_shapes_say(case, shapes):
    codec = bound(case, shapes)
    flat = gaussian(codec.numel)
    payload = codec.encode(flat, 3)
    assert codec.shapes == shapes
    assert codec.numel == sum(math.prod(s) for s in shapes)
    assert payload.dtype is torch.uint8
    assert payload.shape == (codec.nbytes,)
    assert codec.nbytes == length(case, shapes)
    decoded = codec.decode(payload, 3)
    assert decoded.dtype is torch.float32
    assert decoded.shape == flat.shape
    assert decoded.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_the_key_alone_decides(case):
    """Neither the global generator nor a payload's place in memory matters, and the generator stays where it was."""
    codec = bound(case, ((70, 50), (33,)))
    flat = gaussian(codec.numel)
    torch.manual_seed(1)
    first = codec.encode(flat, 3)
    value = codec.decode(first, 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(codec.encode(flat, 3), first)
    for offset in (0, 1, 2, 13):
        message = torch.zeros(offset + codec.nbytes, dtype=torch.uint8)
        message[offset:] = first
        assert torch.equal(codec.decode(message[offset:], 3), value)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(codec.encode(flat, 4), first) == (not moved_by_key(case))


def moved_by_key(case: str) -> bool:
    name, options = CASES[case]
    by_default = name.startswith("uniform") or name in ("natural", "randomk", "lowrank")
    return options.get("stochastic", by_default)


@pytest.mark.parametrize("case", CASES)
def test_an_encoded_vector_is_not_changed(case):
    codec = bound(case, ((70, 50), (33,)))
    flat = gaussian(codec.numel)
    codec.encode(flat, 3)
    assert torch.equal(flat, gaussian(codec.numel))


@pytest.mark.parametrize("case", CASES)
def test_zeros_stay_zeros(case):
    codec = bound(case, ((60, 50), (33,)))
    assert not codec.decode(codec.encode(torch.zeros(codec.numel), 3), 3).any()


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][0] not in ("topk", "randomk", "lowrank", "dct")])
def test_a_bucket_of_zeros_stays_zeros_beside_others(case):
    codec = bound(case, ((2048,),))
    flat = gaussian(2048)
    flat[512:1024] = 0
    decoded = codec.decode(codec.encode(flat, 3), 3)
    if CASES[case][1].get("bucket", 512) <= 512:
        assert not decoded[512:1024].any()
    assert decoded[:512].any()
    assert decoded[1024:].any()


@pytest.mark.parametrize("case", CASES)
def test_a_strided_vector_is_as_good(case):
    codec = bound(case, ((40, 30),))
    wide = gaussian(2 * codec.numel)
    assert torch.equal(codec.encode(wide[::2], 3), codec.encode(wide[::2].clone(), 3))


@pytest.mark.parametrize("case", CASES)
def test_other_shapes_and_dtypes_are_refused(case):
    codec = bound(case, ((8,),))
    with pytest.raises(ValueError, match=r"expected float32 of shape \(8,\)"):
        codec.encode(torch.zeros(9), 0)
    with pytest.raises(ValueError, match="expected float32"):
        codec.encode(torch.zeros(8, dtype=torch.bfloat16), 0)
    with pytest.raises(ValueError, match="expected uint8"):
        codec.decode(torch.zeros(codec.nbytes + 1, dtype=torch.uint8), 0)


# --- sizes at the ends of float32's range -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][0] not in ("lowrank", "dct")])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 2.0**-118, 1e-20, 1e20, 1e38, torch.finfo(torch.float32).max])
def test_any_finite_entry_gives_finite_ones(case, size):
    """A step of the smallest scale may be lost, or 0.4 % of what lies above bfloat16's range."""
    codec = bound(case, ((1030,),))
    flat = gaussian(1030).clamp_(-3, 3).div_(3).mul_(size)
    flat[0] = size
    decoded = codec.decode(codec.encode(flat, 3), 3)
    assert decoded.isfinite().all()
    if size >= 2.0**-100 and CASES[case][0] not in ("randomk", "topk"):
        lost = (decoded / size - flat / size).norm() / (flat / size).norm()
        assert lost <= 2 * codec.error + 0.004


@pytest.mark.parametrize("case", ["lowrank", "lowrank/1", "dct", "dct/small"])
@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e20, 1e35])
def test_products_of_huge_and_tiny_entries_are_finite(case, size):
    codec = bound(case, ((64, 48),))
    decoded = codec.decode(codec.encode(gaussian(codec.numel).mul_(size), 3), 3)
    assert decoded.isfinite().all()
    assert size < 1e-30 or decoded.any()


@given(st.floats(min_value=0.0, max_value=torch.finfo(torch.float32).max, width=32))
def test_scales_are_rounded_up(value):
    x = torch.tensor([value])
    above = bf16_above(x)
    assert torch.equal(above.to(torch.bfloat16).float(), above)
    if value <= BF16_MAX:
        assert value <= above.item() <= max(value * (1 + 2.0**-7), 2.0**-126)
    else:
        assert above.item() == BF16_MAX


def test_largest_entries_are_not_exceeded_by_more_than_their_scale():
    for case in CASES:
        if CASES[case][0].startswith("uniform") and not CASES[case][1].get("scaled", case == "uniform2"):
            flat = gaussian(4096)
            codec = bound(case, ((4096,),))
            decoded = codec.decode(codec.encode(flat, 3), 3)
            assert decoded.abs().max() <= bf16_above(flat.abs().max().view(1))


# --- codes and bits ---------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(GROUP)), st.integers(1, 40), st.integers(0, 2**32))
def test_packing_is_undone(bits, groups, seed):
    n = groups * GROUP[bits][0]
    low, high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.numel() == packed_bytes(n, bits)
    found = unpack(packed, bits)
    assert torch.equal(found >> (8 - bits), codes)


def test_lower_entries_lie_in_lower_bits():
    """The bytes of the wire format, which two versions must share."""
    assert pack(torch.tensor([1, -2], dtype=torch.int8), 4).tolist() == [0xE1]
    assert pack(torch.tensor([1, 0, -1, -2], dtype=torch.int8), 2).tolist() == [0b10_11_00_01]
    assert pack(torch.tensor([-1, 0, 0, 0, 0, 0, -1, 0], dtype=torch.int8), 1).tolist() == [0b0100_0001]
    number = sum((code & 63) << 6 * i for i, code in enumerate([1, -2, 31, -32]))
    assert pack(torch.tensor([1, -2, 31, -32], dtype=torch.int8), 6).tolist() == list(number.to_bytes(3, "little"))
    number = sum((code & 7) << 3 * i for i, code in enumerate([1, -1, 3, -3, 0, 2, -2, 1]))
    codes = torch.tensor([1, -1, 3, -3, 0, 2, -2, 1], dtype=torch.int8)
    assert pack(codes, 3).tolist() == list(number.to_bytes(3, "little"))


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("numel", [*range(1, 34), 511, 512, 513, 2**16 + 5])
def test_decoded_numbers_are_levels_next_to_their_entries(bits, numel):
    flat = gaussian(numel, numel)
    for stochastic in (False, True):
        config = compressor(f"uniform{bits}", bucket=512, stochastic=stochastic, scaled=False)
        codec = config.bind(((numel,),))
        decoded = codec.decode(codec.encode(flat, 5), 5)
        top = torch.nn.functional.pad(flat, (0, -numel % 512)).view(-1, 512).abs().amax(1)
        step = (bf16_above(top) / (2 ** (bits - 1) - 1)).repeat_interleave(512)[:numel]
        levels = decoded / step
        assert (levels - levels.round()).abs().max() <= 2.0**-16  # two roundings of numbers up to 127
        assert ((decoded - flat).abs() / step).max() <= (1.0 if stochastic else 0.5) + 2.0**-14


def test_equal_entries_stay_equal():
    for bits in (8, 6, 4, 3, 2):
        codec = compressor(f"uniform{bits}", scaled=False).bind(((600,),))
        flat = torch.full((600,), -0.75)  # a bfloat16, so the last level
        assert torch.allclose(codec.decode(codec.encode(flat, 1), 1), flat, rtol=2.0**-23, atol=0)


def test_powers_of_two_are_natural():
    flat = torch.tensor([2.0**e * s for e in range(-126, 128) for s in (1, -1)] + [0.0])
    codec = compressor("natural").bind((tuple(flat.shape),))
    assert torch.equal(codec.decode(codec.encode(flat, 1), 1), flat)


def test_the_largest_entries_are_kept_as_they_are():
    codec = compressor("topk", fraction=0.1, chunk=1000, values="float32").bind(((2500,),))
    flat = gaussian(2500)
    decoded = codec.decode(codec.encode(flat, 0), 0)
    for part, own in zip(flat.split(1000), decoded.split(1000), strict=True):
        keep = part.numel() // 10
        assert torch.equal(own != 0, part.abs() >= part.abs().topk(keep).values[-1])
        assert torch.equal(own[own != 0], part[own != 0])


def test_places_above_32767_are_kept():
    flat = torch.zeros(2**16)
    flat[[0, 2**15, 2**16 - 1]] = torch.tensor([1.0, -2.0, 3.0])
    codec = compressor("topk", fraction=3 / 2**16).bind(((2**16,),))
    assert torch.equal(codec.decode(codec.encode(flat, 0), 0), flat)


def test_each_run_gives_one_entry_by_chance():
    codec = compressor("randomk", fraction=0.3).bind(((10,),))
    ends = [0, 3, 6, 10]
    flat = torch.arange(1.0, 11.0)
    chosen = torch.stack([codec.decode(codec.encode(flat, key), key) != 0 for key in range(3000)])
    for a, b in zip(ends, ends[1:], strict=False):
        assert (chosen[:, a:b].sum(1) == 1).all()
        share = 1 / (b - a)
        off = chosen[:, a:b].double().mean(0) - share
        assert off.abs().max() < 5 * math.sqrt(share * (1 - share) / len(chosen))


def test_low_rank_is_exact_where_the_rank_is_low():
    left, right = gaussian(60 * 3).view(60, 3), gaussian(3 * 50, 1).view(3, 50)
    flat = torch.cat([(left @ right).view(-1), gaussian(20)])
    codec = compressor("lowrank", rank=3).bind(((60, 50), (20,)))
    decoded = codec.decode(codec.encode(flat, 2), 2)
    assert (decoded - flat).norm() < 1e-5 * flat.norm()
    assert torch.equal(decoded[-20:], flat[-20:])


def test_small_matrices_are_sent_as_they_are():
    codec = compressor("lowrank", rank=4).bind(((8, 8), (5, 7)))
    assert codec.nbytes == 4 * (64 + 35)
    assert codec.error == 0.0


def test_cosines_are_found_by_their_one_coefficient():
    rows, columns = torch.arange(130).unsqueeze(1), torch.arange(64)
    wave = torch.cos(math.pi * 3 * (2 * (rows % 44) + 1) / 88) * torch.cos(math.pi * 5 * (2 * columns + 1) / 128)
    codec = compressor("dct", k=1, values="float32").bind(((130, 64),))  # chunks of 44 by 64, the last cut off at 42
    decoded = codec.decode(codec.encode(wave.reshape(-1), 0), 0).view(130, 64)
    assert torch.allclose(decoded[:88], wave[:88], atol=1e-5)
    assert not torch.allclose(decoded[88:], wave[88:], atol=1e-5)


def test_chunks_are_equal_parts_of_a_side():
    assert compressor("dct").bind(((5461, 64),)).nbytes == 86 * 4 * 32  # 86 chunks of 64 by 64, not 127 of 43
    assert compressor("dct").bind(((67, 64),)).nbytes == 2 * 4 * 17  # two of 34 by 64, 17/32 of a whole chunk


# --- errors -----------------------------------------------------------------------------------------------------------

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


# --- measuring, keys, names -------------------------------------------------------------------------------------------


def test_what_is_lost_is_averaged_over_steps():
    measured = Measured(decay=0.5)
    assert math.isnan(measured.alpha)
    z = torch.tensor([3.0, 4.0])
    measured.add(torch.zeros(2), torch.ones(2))
    measured.add(z, torch.full((2,), math.inf))
    assert math.isnan(measured.alpha)
    measured.add(z, torch.zeros(2))
    assert measured.alpha == pytest.approx(1.0)
    measured.add(z, z)
    assert measured.alpha == pytest.approx(math.sqrt(1 / 3))  # weights 1/4 and 1/2
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        Measured(decay=1.0)


@pytest.mark.parametrize("numel", [0, 1, 2**16, 2**16 + 1])
def test_infinities_and_nans_are_found(numel):
    flat = gaussian(numel)
    assert finite(flat)
    for bad in (math.inf, -math.inf, math.nan):
        for place in {0, numel - 1} & set(range(numel)):
            broken = flat.clone()
            broken[place] = bad
            assert not finite(broken)


def test_keys_of_counters_differ_even_in_their_lower_half():
    keys = [key_of(s, r, t, p) for s in range(4) for r in range(16) for t in range(64) for p in range(4)]
    assert all(0 <= key < 2**63 for key in keys)
    assert len({key & 0xFFFFFFFF for key in keys}) == len(keys)


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


def test_names_and_numbers():
    assert {"float32", "bf16", "fp8", "sign", "natural", "topk", "randomk", "lowrank", "dct"} < set(COMPRESSORS)
    assert all(compressor(name).name == name for name in COMPRESSORS)
    numbers = {name: identity_of(name) for name in COMPRESSORS}
    assert len(set(numbers.values())) == len(numbers)
    assert (numbers["float32"], numbers["uniform8"], numbers["uniform4"], numbers["sign"]) == (1, 24, 20, 17)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gzip", {}, "compressor must be one of float32"),
        ("uniform8", {"bits": 4}, "uniform8 says what bits is"),
        ("uniform8", {"buckets": 4}, "uniform8 does not take these options"),
        ("uniform8", {"bucket": 12}, "bucket must be a positive multiple of 8, got 12"),
        ("sign", {"bucket": 0}, "bucket must be a positive multiple of 8, got 0"),
        ("fp8", {"bucket": -8}, "bucket must be a positive multiple of 8, got -8"),
        ("topk", {"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ("topk", {"chunk": 65537}, "chunk must be from 1 to 65536, got 65537"),
        ("topk", {"values": "fp4"}, "values must be one of bf16, float32, got 'fp4'"),
        ("randomk", {"unbiased": True, "values": "bf16"}, "values must be float32 to be unbiased, got 'bf16'"),
        ("lowrank", {"rank": 0}, "rank must be at least 1, got 0"),
        ("dct", {"chunk": 257}, "chunk must be from 1 to 256, got 257"),
        ("dct", {"k": 4097}, "k must be from 1 to chunk² = 4096, got 4097"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        compressor(name, **options)


def test_the_smallest_scale_leaves_room():
    """Its inverse times the most levels is finite, and the smallest step is a normal number."""
    assert 448 / SMALLEST < torch.finfo(torch.float32).max
    assert SMALLEST / 127 > torch.finfo(torch.float32).tiny


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_decodes_what_it_encoded_as_well(case):
    codec = bound(case, ((70, 50), (33,)))
    flat = gaussian(codec.numel).cuda()
    payload = codec.encode(flat, 3)
    decoded = codec.decode(payload, 3)
    assert payload.is_cuda
    assert decoded.is_cuda
    assert torch.equal(codec.decode(payload, 3), decoded)
    if CASES[case][0] not in ("randomk", "lowrank", "dct"):
        assert torch.equal(codec.decode(payload.cpu(), 3), decoded.cpu())
    if not moved_by_key(case) and CASES[case][0] not in ("sign", "dct"):
        assert torch.equal(codec.encode(flat.cpu(), 3), payload.cpu())
