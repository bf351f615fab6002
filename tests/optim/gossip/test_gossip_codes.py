"""Codes of compressors: the bytes of the wire format, and the numbers that they stand for."""

import math
from itertools import pairwise

import pytest
import torch
from gossip_cases import gaussian
from hypothesis import given
from hypothesis import strategies as st

from thinrank.optim.gossip.compress import compressor
from thinrank.optim.gossip.compress.packing import GROUP, pack, packed_bytes, unpack
from thinrank.optim.gossip.compress.scales import bf16_above


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


def test_any_float8_decodes_as_torch_has_it():
    codec = compressor("fp8", bucket=256).bind(((256,),))
    codes = torch.arange(256).to(torch.uint8)
    own = codes.view(torch.float8_e4m3fn).float()
    scale = torch.tensor([448.0]).to(torch.bfloat16).view(torch.uint8)
    decoded = codec.decode(torch.cat([scale, codes]), 0)
    assert torch.equal(decoded[own.isfinite()], own[own.isfinite()])


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
    for a, b in pairwise(ends):
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
