"""Compressors of what ranks send each other, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thinrank.optim.gossip.compress.base import Codec, Compressor, Measured, finite, key_of
from thinrank.optim.gossip.compress.cast import BFloat16, Float8, Float32
from thinrank.optim.gossip.compress.dct import Dct
from thinrank.optim.gossip.compress.lowrank import LowRank
from thinrank.optim.gossip.compress.natural import Natural
from thinrank.optim.gossip.compress.sign import Sign
from thinrank.optim.gossip.compress.sparse import RandomK, TopK
from thinrank.optim.gossip.compress.uniform import BITS, Uniform

__all__ = [
    "COMPRESSORS",
    "BFloat16",
    "Codec",
    "Compressor",
    "Dct",
    "Float8",
    "Float32",
    "LowRank",
    "Measured",
    "Natural",
    "RandomK",
    "Sign",
    "TopK",
    "Uniform",
    "compressor",
    "finite",
    "identity_of",
    "key_of",
]

_KINDS: dict[str, tuple[int, Callable[..., Compressor], dict[str, Any]]] = {
    "float32": (1, Float32, {}),
    "bf16": (2, BFloat16, {}),
    "fp8": (3, Float8, {}),
    **{f"uniform{bits}": (16 + bits, Uniform, {"bits": bits}) for bits in BITS},
    "sign": (17, Sign, {}),
    "natural": (32, Natural, {}),
    "topk": (33, TopK, {}),
    "randomk": (34, RandomK, {}),
    "lowrank": (35, LowRank, {}),
    "dct": (36, Dct, {}),
}
"""By name: its number in a message's header, never to be given to another; its class; what the name says of it."""

COMPRESSORS = tuple(_KINDS)
"""The names that `compressor` takes."""


def compressor(name: str, **options: Any) -> Compressor:
    """The compressor `name` with its class's options, such as `compressor("uniform4", bucket=128)`."""
    if name not in _KINDS:
        raise ValueError(f"compressor must be one of {', '.join(COMPRESSORS)}, got {name!r}")
    _, kind, said = _KINDS[name]
    twice = sorted(options.keys() & said.keys())
    if twice:
        raise ValueError(f"{name} says what {', '.join(twice)} is; leave it out")
    try:
        return kind(**said, **options)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options: {error}") from None


def identity_of(name: str) -> int:
    """The number by which a message's header names a compressor, 1 to 255."""
    if name not in _KINDS:
        raise ValueError(f"compressor must be one of {', '.join(COMPRESSORS)}, got {name!r}")
    return _KINDS[name][0]
