"""Messages: what is packed comes back, and nothing that was changed on the way is taken for a message."""

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinrank.optim.gossip.message import HEADER_BYTES, BadMessage, Header, fingerprint, pack, unpack

HEADER = Header(codec=24, options=0xAB, step=70000, part=3, source=5, numel=40, replica=0xDEADBEEF)


def payload_of(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


headers = st.builds(
    Header,
    codec=st.integers(0, 255),
    options=st.integers(0, 255),
    step=st.integers(0, 2**32 - 1),
    part=st.integers(0, 2**16 - 1),
    source=st.integers(0, 2**16 - 1),
    numel=st.integers(0, 2**64 - 1),
    valid=st.booleans(),
    wants_repair=st.booleans(),
    whole=st.booleans(),
    replica=st.none() | st.integers(0, 2**32 - 1),
)


@given(headers, st.integers(0, 70))
def test_what_is_packed_comes_back(header, nbytes):
    payload = payload_of(nbytes)
    message = pack(header, payload)
    assert message.dtype is torch.uint8
    assert message.shape == (HEADER_BYTES + nbytes,)
    found, its = unpack(message, nbytes=nbytes)
    assert found == header
    assert torch.equal(its, payload)


def test_the_bytes_of_a_header():
    """What two versions must share; the checksum apart."""
    head = bytes(pack(HEADER, payload_of(3)).tolist())[:28]
    assert head.hex(" ", 4) == "54484f50 011803ab 70110100 03000500 28000000 00000000 efbeadde"
    assert HEADER_BYTES % 16 == 0


def test_a_payload_that_lies_in_its_message_stays():
    message = torch.zeros(HEADER_BYTES + 50, dtype=torch.uint8)
    message[HEADER_BYTES:] = payload_of(50)
    assert pack(HEADER, message[HEADER_BYTES:], out=message) is message
    assert torch.equal(message, pack(HEADER, payload_of(50)))
    assert torch.equal(pack(HEADER, payload_of(50, 1), out=message), pack(HEADER, payload_of(50, 1)))
    assert torch.equal(pack(HEADER, None, nbytes=50, out=message), pack(HEADER, None, nbytes=50))
    with pytest.raises(ValueError, match=r"out must be uint8 of shape \(82,\)"):
        pack(HEADER, payload_of(50), out=message[1:])


def test_a_message_without_payload_is_as_long_and_says_so():
    message = pack(HEADER, None, nbytes=100)
    assert message.shape == (HEADER_BYTES + 100,)
    header, payload = unpack(message, nbytes=100)
    assert not header.valid
    assert not payload.any()
    assert pack(HEADER, None).shape == (HEADER_BYTES,)


@given(st.integers(0, 13), st.data())
def test_any_flipped_bit_is_seen(nbytes, data):
    message = pack(HEADER, payload_of(nbytes, data.draw(st.integers(0, 9))))
    bit = data.draw(st.integers(0, 8 * message.numel() - 1))
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadMessage):
        unpack(message)


def test_every_flipped_bit_of_one_message_is_seen():
    message = pack(HEADER, payload_of(21))
    for bit in range(8 * message.numel()):
        broken = message.clone()
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadMessage):
            unpack(broken)


@given(st.binary(max_size=80))
def test_noise_is_no_message(noise):
    with pytest.raises(BadMessage):
        unpack(torch.tensor(list(noise), dtype=torch.uint8))


@given(st.integers(1, 100), st.data())
def test_bursts_moved_pieces_and_lost_ends_are_seen(nbytes, data):
    message = pack(HEADER, payload_of(nbytes))
    kind = data.draw(st.sampled_from(["cut", "longer", "burst", "swap", "zeros"]))
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, message.numel() - 1)] * 2)))
    broken = message.clone()
    if kind == "cut":
        broken = message[:a]
    elif kind == "longer":
        broken = torch.cat([message, torch.ones(a + 1, dtype=torch.uint8)])
    elif kind == "burst":
        broken[a : b + 1] ^= payload_of(b - a + 1, 7)
    elif kind == "swap":
        broken[a], broken[b] = message[b].clone(), message[a].clone()
    else:
        broken[a : b + 1] = 0
    if torch.equal(broken, message):
        return
    with pytest.raises(BadMessage):
        unpack(broken)


def test_lost_zeros_are_seen():
    """A fingerprint does not tell zeros from the end of the last word, so the length is summed, too."""
    message = pack(HEADER, torch.tensor([1, 2, 3, 4, 5, 0, 0], dtype=torch.uint8))
    for cut in (message[:-1], message[:-2], torch.cat([message, torch.zeros(1, dtype=torch.uint8)])):
        with pytest.raises(BadMessage, match="the checksum does not fit"):
            unpack(cut)


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({"nbytes": 39}, "the payload has 40 bytes where 39 were expected"),
        ({"codec": 20}, "the message's codec is 24 where 20 was expected"),
        ({"options": 0}, "the message's options is 171 where 0 was expected"),
        ({"step": 69999}, "the message's step is 70000 where 69999 was expected"),
        ({"part": 0}, "the message's part is 3 where 0 was expected"),
        ({"source": 4}, "the message's source is 5 where 4 was expected"),
        ({"numel": 0}, "the message's numel is 40 where 0 was expected"),
    ],
)
def test_another_message_than_the_expected_one(expected, says):
    message = pack(HEADER, payload_of(40))
    with pytest.raises(BadMessage, match=says):
        unpack(message, **expected)
    assert unpack(message, nbytes=40, codec=24, options=0xAB, step=70000, part=3, source=5, numel=40)[0] == HEADER


def test_reasons_for_what_is_no_message():
    message = pack(HEADER, payload_of(4))
    with pytest.raises(BadMessage, match="has 31 bytes, fewer than a header's 32"):
        unpack(message[:31])
    with pytest.raises(BadMessage, match="begins with 0x00000000 where 0x504f4854 was expected"):
        unpack(torch.zeros(40, dtype=torch.uint8))
    broken = message.clone()
    broken[4] = 9
    with pytest.raises(BadMessage, match="has version 9, but only version 1 is understood"):
        unpack(broken)
    broken = message.clone()
    broken[-1] ^= 1
    with pytest.raises(BadMessage, match="the checksum does not fit"):
        unpack(broken)


def test_flags_of_a_later_version_are_not_ignored():
    message = pack(HEADER, payload_of(4))
    head = bytearray(message[:28].tolist())
    head[6] |= 0x10
    end = (4).to_bytes(8, "little") + fingerprint(message[32:]).to_bytes(4, "little")
    head += zlib.crc32(end, zlib.crc32(head)).to_bytes(4, "little")
    message[:32] = torch.tensor(list(head), dtype=torch.uint8)
    with pytest.raises(BadMessage, match="flags 0x13, which version 1 does not know"):
        unpack(message)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit into a message"):
        pack(Header(codec=256, step=0, part=0, source=0, numel=0), None)
    with pytest.raises(ValueError, match="expected a flat uint8 payload"):
        pack(HEADER, torch.zeros(4))
    with pytest.raises(ValueError, match="nbytes is 5, but the payload has 4"):
        pack(HEADER, payload_of(4), nbytes=5)
    with pytest.raises(ValueError, match="expected a flat uint8 message"):
        unpack(torch.zeros(4))


# --- fingerprints -----------------------------------------------------------------------------------------------------


def reference(data: bytes) -> int:
    """`fingerprint` in Python's integers."""
    data += bytes(-len(data) % 4)
    total = 0
    for i in range(0, len(data), 4):
        word = int.from_bytes(data[i : i + 4], "little") + 0x1E3779B1 * (i // 4 + 1) & 0xFFFFFFFF
        word = (word ^ word >> 16) * 0x7FEB352D & 0xFFFFFFFF
        word = (word ^ word >> 15) * 0x846CA68B & 0xFFFFFFFF
        total += word ^ word >> 16
    return total & 0xFFFFFFFF


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4, 17, 4 * 2**16 - 4, 4 * 2**16 + 3])
def test_fingerprints_are_those_of_the_reference(nbytes):
    data = payload_of(nbytes)
    assert fingerprint(data) == reference(bytes(data.tolist()))


def test_fingerprints_see_bits_not_numbers():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    own = fingerprint(x)
    assert fingerprint(x.clone().view(10, 100)) == own
    assert fingerprint(x.view(torch.uint8)) == own
    nan = torch.tensor([math.nan, 1.0])
    assert fingerprint(nan) == fingerprint(nan.clone())
    assert fingerprint(torch.zeros(2)) != fingerprint(-torch.zeros(2))
    assert fingerprint(torch.zeros(2)) != fingerprint(torch.zeros(3))


@given(st.integers(0, 499), st.integers(0, 499), st.sampled_from(["gaussian", "powers", "constant"]))
def test_fingerprints_see_swapped_entries(i, j, kind):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    if kind == "powers":  # their words differ in few bits, all of them high
        x = 2.0 ** (x * 4).round()
    elif kind == "constant":
        x = torch.ones(500)
        x[j] = 2.0
    swapped = x.clone()
    swapped[i], swapped[j] = x[j], x[i]
    assert (fingerprint(swapped) == fingerprint(x)) == torch.equal(swapped, x)


@given(st.integers(0, 255), st.integers(0, 31))
def test_fingerprints_see_any_bit(word, bit):
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    own = fingerprint(x)
    x.view(torch.int32)[word] ^= -(2**31) if bit == 31 else 1 << bit
    assert fingerprint(x) != own


def test_fingerprints_hardly_ever_agree():
    found = {fingerprint(torch.tensor([float(a), float(b)])) for a in range(100) for b in range(100)}
    assert len(found) >= 10**4 - 2  # of 10⁸ / 2 pairs one in 2³² agrees by chance


@pytest.mark.gpu
def test_a_gpu_has_the_same_fingerprints_and_messages():
    for nbytes in (0, 3, 40, 2**20 + 1):
        payload = payload_of(nbytes)
        message = pack(HEADER, payload.cuda())
        assert message.is_cuda
        assert torch.equal(message.cpu(), pack(HEADER, payload))
        assert unpack(message)[0] == HEADER
