"""Compressors of what ranks send each other, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thinrank.optim.gossip.compress.base import Codec, Compressor, Measured, finite, key_of
from thinrank.optim.gossip.compress.cast import Float32
from thinrank.optim.gossip.compress.uniform import BITS, Uniform

__all__ = [
    "COMPRESSORS",
    "Codec",
    "Compressor",
    "Float32",
    "Measured",
    "Uniform",
    "compressor",
    "finite",
    "identity_of",
    "key_of",
]

_KINDS: dict[str, tuple[int, Callable[..., Compressor], dict[str, Any]]] = {
    "float32": (1, Float32, {}),
    **{f"uniform{bits}": (16 + bits, Uniform, {"bits": bits}) for bits in BITS},
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
