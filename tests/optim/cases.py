"""Every method, and every variant of one whose path through the code is its own, with values small enough for a test.

Methods come from the registry: a new room is in the battery as soon as it is registered.
"""

from __future__ import annotations

from typing import Any

import torch
from laws import seeded
from torch import Tensor, nn

from thinrank.optim import METHODS, OPTIMIZERS, LowRankConfig, MatrixOptimizer, MethodConfig, RankedConfig
from thinrank.optim.inner.base import Whole

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore/power": ("galore", {"svd": "power"}),
    "galore/full": ("galore", {"proj_type": "full"}),
    "galore/bfloat16": ("galore", {"svd": "power", "projection_dtype": "bfloat16"}),
    "galore/reverse": ("galore", {"proj_type": "reverse_std"}),
    "dct_adamw/8bit": ("dct_adamw", {"error_feedback": "8bit", "update_proj_gap": 2}),
    "dct_adamw/feedback": ("dct_adamw", {"error_feedback": "full", "basis": "random", "norm": "l2"}),
    "dct_adamw/fft": ("dct_adamw", {"engine": "fft", "column_age": False}),
    "dct_adamw/always": ("dct_adamw", {"update_proj_gap": 1}),
    "dct_adamw/identity": ("dct_adamw", {"basis": "identity", "transport": "keep"}),
    "dct_adamw/hadamard": ("dct_adamw", {"basis": "hadamard", "transport": "reset"}),
    "dct_adamw/residual": ("dct_adamw", {"residual": "full"}),
    "dct_adamw/sign": ("dct_adamw", {"residual": "sign", "update_proj_gap": 1}),
    "ldadam/8bit": ("ldadam", {"error_feedback": "8bit", "svd": "power"}),
    "ldadam/4bit": ("ldadam", {"error_feedback": "4bit"}),
    "ldadam/off": ("ldadam", {"error_feedback": "off", "negative_variance": "absolute"}),
    "ldadam/8bit moments": ("ldadam", {"state_bits": 8}),
    "ldadam/bfloat16": ("ldadam", {"projection_dtype": "bfloat16"}),
    "mfac/adam": ("mfac", {"finish": "adam", "window": 4}),
    "mfac/whole": ("mfac", {"space": "whole", "window": 4}),
    "subspace_adamw/sign": ("subspace_adamw", {"residual": "sign", "transport": "reset"}),
    "dct_adamw/bfloat16": ("dct_adamw", {"projection_dtype": "bfloat16"}),
    "subspace_adamw/bfloat16": ("subspace_adamw", {"projection_dtype": "bfloat16"}),
    "subspace_adamw/stagger": ("subspace_adamw", {"stagger": True}),
    "subspace_adamw/lazy": ("subspace_adamw", {"lazy_overlap": 0.4, "update_proj_gap": 2}),
    "galore_plus/lazy": ("galore_plus", {"density": 0.2, "reselect": "renewal", "lazy_overlap": 0.4}),
    "fira/power": ("fira", {"svd": "power", "transport": "rotate"}),
    "apollo/svd": ("apollo", {"proj": "svd"}),
    "apollo_mini/one": ("apollo_mini", {"rank": 1, "disable_nl": True}),
    "galore_plus/dense": ("galore_plus", {"density": 1.0, "warmup": 0}),
    "galore_plus/warmup": ("galore_plus", {"density": 0.2, "warmup": 4, "head_select": "random", "stagger": True}),
    "galore_plus/reselect": ("galore_plus", {"density": 0.2, "reselect": "renewal", "transport": "reset"}),
    "galore_plus/no_entries": ("galore_plus", {"density": 0.0, "svd": "exact", "transport": "keep"}),
    "dct_adamw/4bit": ("dct_adamw", {"error_feedback": "4bit"}),
    "dion/qr": ("dion", {"orthogonalizer": "qr", "right_factor": "qr", "adjust_lr": "match_rms_adamw"}),
    "dion/orth": ("dion", {"right_factor": "qr", "adjust_lr": "none"}),
    "dion/bfloat16": ("dion", {"projection_dtype": "bfloat16"}),
    "trion/random": ("trion", {"basis": "random", "norm": "l2", "orthogonalizer": "you", "adjust_lr": "spectral"}),
    "trion/bfloat16": ("trion", {"basis": "hadamard", "projection_dtype": "bfloat16"}),
    "galore/8bit": ("galore", {"state_bits": 8}),
    "dct_adamw/8bit moments": ("dct_adamw", {"state_bits": 8}),
    "subspace_adamw/8bit": ("subspace_adamw", {"state_bits": 8}),
    "adamw/8bit": ("adamw", {"state_bits": 8}),
    "adamw/master": ("adamw", {"half_weights": "master"}),
    "galore/stochastic": ("galore", {"half_weights": "stochastic"}),
    "subspace_adamw/master": ("subspace_adamw", {"half_weights": "master", "state_bits": 8}),
    "subspace_adamw/off": ("subspace_adamw", {"residual": "off", "transport": "keep"}),
    "muon/you": ("muon", {"orthogonalizer": "you", "nesterov": False, "adjust_lr": "match_rms_adamw"}),
    "muon/polar_express": ("muon", {"orthogonalizer": "polar_express", "adjust_lr": "spectral"}),
    "muon/bfloat16": ("muon", {"ns_dtype": "bfloat16", "adjust_lr": "none"}),
    "muon/8bit": ("muon", {"state_bits": 8}),
    "muon/8bit mean": ("muon", {"state_bits": 8, "nesterov": False}),
    "auon/8bit": ("auon", {"state_bits": 8}),
    "dion/8bit": ("dion", {"state_bits": 8}),
    "trion/8bit": ("trion", {"state_bits": 8}),
    "mfac/8bit": ("mfac", {"state_bits": 8}),
    "mfac/adam 8bit": ("mfac", {"state_bits": 8, "finish": "adam", "window": 4}),
    "auon/code": ("auon", {"normalize_update": False}),
    "auon/hybrid": ("auon", {"newton_schulz_steps": 1}),
    "auon/hybrid code": ("auon", {"newton_schulz_steps": 5, "normalize_update": False}),
}


SMALL: dict[str, dict[str, Any]] = {
    "galore": {"scale": 1.0},
    "mfac": {"scale": 3.0},
    "apollo_mini": {"scale": 1.0},
    "galore_plus": {"scale": 1.0, "warmup": 2},
    "muon": {"embedding_lr": 0.02},
    "auon": {"lr": 0.3, "embedding_lr": 0.02},
    "dion": {"embedding_lr": 0.02},
    "trion": {"embedding_lr": 0.02, "scale": 2.0},
    "dion2": {"embedding_lr": 0.02, "scale": 2.0},
}
"""What a method needs to learn something small."""


def small(name: str, **values: Any) -> MethodConfig:
    """The configuration of method `name` with `values` and, where they are fields, rank 3 and gap 3."""
    cls = METHODS[name]
    if issubclass(cls, LowRankConfig):
        values = {"update_proj_gap": 3, **values}
    if issubclass(cls, RankedConfig):
        values = {"rank": 3, **values}
    return cls(**{"lr": 0.02, "weight_decay": 0.01, **SMALL.get(name, {}), **values})


CONFIGS: dict[str, MethodConfig] = {
    **{name: small(name) for name in METHODS},
    **{label: small(name, **values) for label, (name, values) in VARIANTS.items()},
}


def projects(config: MethodConfig) -> bool:
    """True when a method steps its matrices in a subspace."""
    return isinstance(config, RankedConfig) and not isinstance(config.matrix_rule(), Whole)


LOW_RANK = {name: config for name, config in CONFIGS.items() if projects(config)}


def captures(config: MethodConfig) -> bool:
    """True when a share of the gradient's energy can be said to be held: not by a random projection."""
    subspace = getattr(config.matrix_rule(), "subspace", None)
    return projects(config) and getattr(subspace, "orthonormal", True)


CAPTURING = {name: config for name, config in CONFIGS.items() if captures(config)}


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


def stepped(cls: type[MatrixOptimizer], start: Tensor, grads: Any, **options: Any) -> tuple[Tensor, MatrixOptimizer]:
    """The weight after a step on each of `grads`, and its optimizer."""
    weight = nn.Parameter(start.clone())
    optimizer = cls([weight], **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight, optimizer


def moved(start: Tensor, end: Tensor) -> float:
    """How far a weight has come."""
    return float((end.detach().double() - start.detach().double()).norm())
