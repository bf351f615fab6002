"""Compressors: payloads of known length, chance by the key alone, and errors as theory has them."""

import math

import pytest
import torch
from gossip_cases import CASES, SHAPES, bound, gaussian, moved_by_key
from hypothesis import given
from hypothesis import strategies as st

from thinrank.optim.gossip.compress import COMPRESSORS, Measured, base, compressor, finite, identity_of, key_of
from thinrank.optim.gossip.compress.packing import GROUP
from thinrank.optim.gossip.compress.scales import BF16_MAX, SMALLEST, bf16_above


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


@pytest.mark.parametrize("case", CASES)
def test_blocks_do_not_matter(case, monkeypatch):
    """Neither where a CPU's caches end nor, but for products' rounding, how many rows of chunks are done at once."""
    codec = bound(case, ((300, 70), (8,), (1001,)))
    flat = gaussian(codec.numel)
    payload = codec.encode(flat, 3)
    decoded = codec.decode(payload, 3)
    monkeypatch.setattr(base, "BLOCK", 2**11)
    assert torch.equal(codec.encode(flat, 3), payload)
    assert torch.equal(codec.decode(payload, 3), decoded)


@pytest.mark.parametrize("case", CASES)
def test_results_go_where_they_are_wanted(case):
    codec = bound(case, ((70, 50), (33,)))
    flat = gaussian(codec.numel)
    payload = codec.encode(flat, 3)
    room, back = torch.ones(16 + codec.nbytes, dtype=torch.uint8), torch.full_like(flat, math.nan)
    assert codec.encode(flat, 3, out=room[16:]).data_ptr() == room[16:].data_ptr()
    assert torch.equal(room[16:], payload)
    assert codec.decode(payload, 3, out=back) is back
    assert torch.equal(back, codec.decode(payload, 3))
    with pytest.raises(ValueError, match="expected uint8"):
        codec.encode(flat, 3, out=torch.zeros(codec.nbytes, dtype=torch.int8))
    with pytest.raises(ValueError, match="expected float32"):
        codec.decode(payload, 3, out=torch.zeros(codec.numel + 1))


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


def test_names_and_numbers():
    assert {"float32", "bf16", "fp8", "sign", "natural", "topk", "randomk", "lowrank", "dct"} < set(COMPRESSORS)
    assert all(compressor(name).name == name for name in COMPRESSORS)
    digests = {config.digest for config in (compressor("dct"), compressor("dct", chunk=128, k=128), compressor("sign"))}
    assert len(digests) == 3
    assert all(0 <= digest < 256 for digest in digests)
    assert compressor("dct").digest == compressor("dct", k=32).digest
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
    assert math.isfinite(torch.tensor(448 / SMALLEST).item())
    assert torch.finfo(torch.float32).tiny < SMALLEST / 127


@pytest.mark.gpu
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
