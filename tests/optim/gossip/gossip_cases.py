"""Compressors with options, shapes, and vectors, for the tests of decentralised exchange."""

from typing import Any

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import COMPRESSORS, Codec, compressor

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in COMPRESSORS},
    **{f"{name}/nearest": (name, {"stochastic": False}) for name in COMPRESSORS if name.startswith("uniform")},
    **{f"uniform{bits}/scaled": (f"uniform{bits}", {"scaled": True}) for bits in (8, 6, 4, 3)},
    "natural/scaled": ("natural", {"scaled": True}),
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


def bound(case: str, shapes: tuple[tuple[int, ...], ...]) -> Codec:
    name, options = CASES[case]
    return compressor(name, **options).bind(shapes)


def gaussian(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def moved_by_key(case: str) -> bool:
    name, options = CASES[case]
    by_default = name.startswith("uniform") or name in ("natural", "randomk", "lowrank")
    return options.get("stochastic", by_default)
