"""What travels between two ranks: a header of 32 bytes and a compressor's payload in one tensor of bytes."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Scratch, spans

MAGIC = 0x504F4854
"""`THOP` as bytes."""

VERSION = 1

HEADER_BYTES = 32
"""A multiple of 16, so that what follows lies where wider numbers may begin."""

_LAYOUT = struct.Struct("<IBBBBIHHQII")
"""magic, version, codec, flags, options, step, part, source, numel, replica, checksum"""

_VALID, _HAS_REPLICA, _WANTS_REPAIR, _WHOLE = 1, 2, 4, 8


class BadMessage(Exception):
    """A message that must not be used, for the reason that its one sentence gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a message says about itself.

    Attributes:
        codec: the compressor's number (`identity_of`), 0 to 255.
        options: `Compressor.digest` of its options, 0 to 255, because other ones may give a payload of the same length.
        step: the sender's step, below 2³².
        part: which part of the model, below 2¹⁶.
        source: the sender's rank, below 2¹⁶.
        numel: entries of the vector that the payload stands for.
        valid: False where the sender had nothing fit to send (an infinity or a NaN); the payload is then zeros.
        wants_repair: the sender asks for a whole copy in return.
        whole: the payload is a whole copy, not a difference.
        replica: `fingerprint` of the sender's public copy, where it sends one.
    """

    codec: int
    options: int = 0
    step: int
    part: int
    source: int
    numel: int
    valid: bool = True
    wants_repair: bool = False
    whole: bool = False
    replica: int | None = None


def pack(header: Header, payload: Tensor | None, *, nbytes: int | None = None, out: Tensor | None = None) -> Tensor:
    """One tensor of a header and a payload.

    Args:
        payload: uint8, one-dimensional; None sends zeros and a header that says that they are not valid.
        nbytes: bytes after the header where there is no payload: what the receiver waits for. Default 0.
        out: uint8 of the message's length, to write into. A payload that already lies in it behind the header
            (`codec.encode(..., out=out[HEADER_BYTES:])`) stays where it is.

    Returns:
        uint8 (`HEADER_BYTES` + payload's bytes,) on the payload's device (without one on out's, else the CPU).
    """
    if payload is None:
        payload = torch.zeros(nbytes or 0, dtype=torch.uint8, device=None if out is None else out.device)
        valid = False
    elif payload.dtype is not torch.uint8 or payload.ndim != 1:
        raise ValueError(f"expected a flat uint8 payload, got {payload.dtype} of {tuple(payload.shape)}")
    elif nbytes is not None and nbytes != payload.numel():
        raise ValueError(f"nbytes is {nbytes}, but the payload has {payload.numel()}")
    else:
        valid = header.valid
    flags = valid * _VALID | (header.replica is not None) * _HAS_REPLICA
    flags |= header.wants_repair * _WANTS_REPAIR | header.whole * _WHOLE
    try:
        head = _LAYOUT.pack(
            MAGIC, VERSION, header.codec, flags, header.options, header.step, header.part, header.source, header.numel,
            header.replica or 0, 0,
        )  # fmt: skip
    except struct.error as error:
        raise ValueError(f"{header} does not fit into a message: {error}") from None
    head = head[:-4] + struct.pack("<I", _checksum(head[:-4], payload))
    length = HEADER_BYTES + payload.numel()
    message = torch.empty(length, dtype=torch.uint8, device=payload.device) if out is None else out
    if message.dtype is not torch.uint8 or message.shape != (length,):
        raise ValueError(f"out must be uint8 of shape ({length},), got {message.dtype} of {tuple(message.shape)}")
    message[:HEADER_BYTES] = torch.frombuffer(bytearray(head), dtype=torch.uint8).to(payload.device)
    if message[HEADER_BYTES:].data_ptr() != payload.data_ptr():
        message[HEADER_BYTES:] = payload
    return message


def unpack(
    message: Tensor,
    *,
    nbytes: int | None = None,
    codec: int | None = None,
    options: int | None = None,
    step: int | None = None,
    part: int | None = None,
    source: int | None = None,
    numel: int | None = None,
) -> tuple[Header, Tensor]:
    """The header and the payload (a view) of a message.

    Args:
        message: uint8, one-dimensional.
        nbytes: bytes that the payload must have.
        codec, options, step, part, source, numel: what the header must say, where given.

    Raises:
        BadMessage: bytes are missing or were changed on the way (any change of one bit, or of one word of 32, is seen,
            any other but for one in 2³²), or the message is not the expected one.
    """
    if message.dtype is not torch.uint8 or message.ndim != 1:
        raise ValueError(f"expected a flat uint8 message, got {message.dtype} of {tuple(message.shape)}")
    if message.numel() < HEADER_BYTES:
        raise BadMessage(f"the message has {message.numel()} bytes, fewer than a header's {HEADER_BYTES}")
    head = bytes(message[:HEADER_BYTES].tolist())
    payload = message[HEADER_BYTES:]
    if nbytes is not None and payload.numel() != nbytes:
        raise BadMessage(f"the payload has {payload.numel()} bytes where {nbytes} were expected")
    magic, version, its_codec, flags, its_options, *place, replica, checksum = _LAYOUT.unpack(head)
    if magic != MAGIC:
        raise BadMessage(f"the message begins with {magic:#010x} where {MAGIC:#010x} was expected")
    if version != VERSION:
        raise BadMessage(f"the message has version {version}, but only version {VERSION} is understood")
    if checksum != _checksum(head[:-4], payload):
        raise BadMessage("the checksum does not fit: bytes were changed on the way")
    if flags >= 2 * _WHOLE:
        raise BadMessage(f"the message has flags {flags:#x}, which version {VERSION} does not know")
    header = Header(
        codec=its_codec,
        options=its_options,
        step=place[0],
        part=place[1],
        source=place[2],
        numel=place[3],
        valid=bool(flags & _VALID),
        wants_repair=bool(flags & _WANTS_REPAIR),
        whole=bool(flags & _WHOLE),
        replica=replica if flags & _HAS_REPLICA else None,
    )
    expected = {"codec": codec, "options": options, "step": step, "part": part, "source": source, "numel": numel}
    for name, value in expected.items():
        if value is not None and getattr(header, name) != value:
            raise BadMessage(f"the message's {name} is {getattr(header, name)} where {value} was expected")
    return header, payload


def fingerprint(x: Tensor) -> int:
    """A 32-bit number that depends on all bits of a tensor and on their places; the same on every kind of device.

    Each word of 32 bits is mixed with its place by a one-to-one map and the results are summed, whose order does not
    matter. A change of one word therefore always shows, any other (two entries swapped, a piece moved) but for about
    one in 2³². No floating-point arithmetic, so that -0 is not 0 and a NaN equals itself. Not for adversaries. Waits
    for the device once.

    Args:
        x: of any dtype and shape; bytes that do not fill the last word are followed by zeros.
    """
    flat = x.detach().contiguous().view(-1).view(torch.uint8)
    tail = flat.numel() % 4
    if tail:
        flat = torch.nn.functional.pad(flat, (0, 4 - tail))
    elif flat.storage_offset() % 4:
        flat = flat.clone()
    words = flat.view(torch.int32)
    total = torch.zeros((), dtype=torch.int32, device=x.device)
    places: Tensor | None = None
    room = Scratch(x.device)
    for start, stop in spans(words.numel(), 1, x.device):
        count = stop - start
        if places is None:
            places = torch.arange(1, count + 1, dtype=torch.int32, device=x.device).mul_(_PLACE)
        mixed = torch.add(words[start:stop], places[:count], out=room("mixed", torch.int32, count))
        mixed.add_(_wrapped(start * _PLACE))
        for shift, factor in _MIX:
            moved = torch.bitwise_right_shift(mixed, shift, out=room("moved", torch.int32, count))
            # a shift to the right brings ones into a negative number, which must not stay
            mixed.bitwise_xor_(moved.bitwise_and_(2 ** (32 - shift) - 1))
            if factor != 1:
                mixed.mul_(factor)
        total += mixed.sum(dtype=torch.int32)
    return int(total.item()) & 0xFFFFFFFF


_PLACE = 0x1E3779B1
_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1))
"""Shifts and odd factors of lowbias32 (Wellons 2018): `x ^ x >> shift` and such a product are one-to-one on 32 bits."""


def _wrapped(n: int) -> int:
    """An integer as 32 bits hold it."""
    return (n + 2**31) % 2**32 - 2**31


def _checksum(head: bytes, payload: Tensor) -> int:
    """CRC-32 of the header, and of the payload's length and fingerprint, which a GPU finds without giving it away."""
    return zlib.crc32(struct.pack("<QI", payload.numel(), fingerprint(payload)), zlib.crc32(head))
