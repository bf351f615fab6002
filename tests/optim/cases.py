"""Every method, and every variant of one whose path through the code is its own, with values small enough for a test.

Methods come from the registry: a new room is in the battery as soon as it is registered.
"""

from __future__ import annotations

from typing import Any

import torch
from laws import seeded
from torch import Tensor, nn

from thinrank.optim import METHODS, OPTIMIZERS, LowRankConfig, MatrixOptimizer, MethodConfig

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore/power": ("galore", {"svd": "power"}),
    "galore/full": ("galore", {"proj_type": "full"}),
    "galore/bfloat16": ("galore", {"svd": "power", "projection_dtype": "bfloat16"}),
    "galore/reverse": ("galore", {"proj_type": "reverse_std"}),
    "dct_adamw/8bit": ("dct_adamw", {"error_feedback": "8bit", "update_proj_gap": 2}),
    "dct_adamw/feedback": ("dct_adamw", {"error_feedback": "full", "basis": "random", "norm": "l2"}),
    "dct_adamw/fft": ("dct_adamw", {"engine": "fft", "column_age": False}),
    "dct_adamw/identity": ("dct_adamw", {"basis": "identity", "transport": "keep"}),
    "dct_adamw/hadamard": ("dct_adamw", {"basis": "hadamard", "transport": "reset"}),
    "subspace_adamw/sign": ("subspace_adamw", {"residual": "sign", "transport": "reset"}),
    "dct_adamw/bfloat16": ("dct_adamw", {"projection_dtype": "bfloat16"}),
    "subspace_adamw/bfloat16": ("subspace_adamw", {"projection_dtype": "bfloat16"}),
    "subspace_adamw/stagger": ("subspace_adamw", {"stagger": True}),
    "galore/8bit": ("galore", {"state_bits": 8}),
    "dct_adamw/8bit moments": ("dct_adamw", {"state_bits": 8}),
    "subspace_adamw/8bit": ("subspace_adamw", {"state_bits": 8}),
    "adamw/8bit": ("adamw", {"state_bits": 8}),
    "adamw/master": ("adamw", {"half_weights": "master"}),
    "galore/stochastic": ("galore", {"half_weights": "stochastic"}),
    "subspace_adamw/master": ("subspace_adamw", {"half_weights": "master", "state_bits": 8}),
    "subspace_adamw/off": ("subspace_adamw", {"residual": "off", "transport": "keep"}),
}


SMALL: dict[str, dict[str, Any]] = {"galore": {"scale": 1.0}}
"""What a method needs to learn something small."""


def small(name: str, **values: Any) -> MethodConfig:
    """The configuration of method `name` with `values` and, where they are fields, rank 3 and gap 3."""
    cls = METHODS[name]
    if issubclass(cls, LowRankConfig):
        values = {"rank": 3, "update_proj_gap": 3, **values}
    return cls(**{"lr": 0.02, "weight_decay": 0.01, **SMALL.get(name, {}), **values})


CONFIGS: dict[str, MethodConfig] = {
    **{name: small(name) for name in METHODS},
    **{label: small(name, **values) for label, (name, values) in VARIANTS.items()},
}
LOW_RANK = {name: config for name, config in CONFIGS.items() if isinstance(config, LowRankConfig)}


def make(config: MethodConfig, params: Any, **options: Any) -> MatrixOptimizer:
    """The optimizer of `config` for `params`, all of whose matrices are projected."""
    cls: Any = OPTIMIZERS[type(config)]
    return cls(params, **{"lr": config.lr, "weight_decay": config.weight_decay, **config.group(), **options})


SHAPES = [(8, 5), (8, 5), (5, 8), (6, 6), (7,), (4, 3, 2, 2), (1, 6), (6, 1)]


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters of all kinds of shapes: two alike, wide, square, a vector, a convolution, one-wide."""
    return [nn.Parameter(seeded(*shape, seed=i).to(dtype)) for i, shape in enumerate(SHAPES)]


def give(params: list[nn.Parameter], step: int, *, without: tuple[int, ...] = ()) -> None:
    """The gradients of `step`; none to the parameters at the places `without`."""
    for i, p in enumerate(params):
        p.grad = None if i in without else seeded(*p.shape, seed=1000 * (step + 1) + i).to(p.dtype)


def run(optimizer: MatrixOptimizer, params: list[nn.Parameter], first: int, stop: int) -> None:
    """Steps `first` to `stop - 1`."""
    for step in range(first, stop):
        give(params, step)
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def equal(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    """Equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def snapshot(optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of all weights and all state."""
    states = [value for p in params for _, value in sorted(optimizer.state[p].items())]
    return [value.detach().clone() for value in (*params, *states)]


def unchanged(before: list[Tensor], optimizer: MatrixOptimizer, params: list[nn.Parameter]) -> bool:
    after = snapshot(optimizer, params)
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
