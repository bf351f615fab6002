"""From a model and a configuration to an optimizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from thinrank.optim.grouping import Routing, Row, group_parameters, unstepped
from thinrank.optim.heads import HeadLayout
from thinrank.optim.lowrank.remainder import leaves_remainder
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.messages import KINDS, whole_messages_because
from thinrank.optim.methods.config import MethodConfig, RankedConfig
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.optimizers import OPTIMIZERS
from thinrank.optim.rule import MatrixRule, Remembers, remembers
from thinrank.optim.scaling.rule import Scaling

BASES = ("basis", "basis_long", "columns")
"""Names of the tensors in a matrix's state that say where its subspace is."""


def route(
    model: nn.Module,
    config: MethodConfig,
    roles: Mapping[str, str] | None = None,
    ranks: Mapping[str, int | float | None] | None = None,
    heads: Mapping[str, HeadLayout] | None = None,
    scaling: Scaling | None = None,
) -> Routing:
    """Which parameter of `model` is stepped by which rule under `config`, and what its state costs.

    The states are laid out on the meta device, so nothing is allocated; `model` may be there itself.

    Args:
        roles: regular expression on a parameter's name → role, where the role found by module type is wrong.
        ranks: name of a matrix → its own rank in the place of `config.rank` (None: stepped element by element), such
            as `allocated_ranks` and `optimizer.ranks()` give. Without them, ranks that are yet to be shared out
            (`config.rank_allocation`) are shown as `config.rank` for all, which is their budget.
        heads: regular expression on an attention weight's name → where its heads lie, for methods that share a basis
            among heads (`cross_heads`) and models whose weights are not known.
        scaling: what a rule of scale makes of rates, decay and eps (`thinrank.optim.scaling.scaling_of`).

    Raises:
        ValueError: when a target, an exclusion, a role or a heads pattern matches nothing, when a rank is of no
            projected matrix, when LoRA's factors would be projected or a weight that has some, and when the heads of an
            attention weight cannot be told apart.
        RuntimeError: when a trainable parameter is in no group: it would never be stepped.
    """
    routing = _grouped(model, config, roles, ranks, heads, scaling)
    stand_ins = [{**group, "params": [(name, _stand_in(p)) for name, p in group["params"]]} for group in routing.groups]
    optimizer = _optimizer(stand_ins, config, seed=0)
    routing.stand_in = optimizer
    directions = optimizer.directions()
    for index, group in enumerate(optimizer.param_groups):
        own = group["ranks"] is not None
        shown = zip(optimizer.names(index), group["params"], optimizer.matrices(index), strict=True)
        for name, param, matrices in shown:
            state = optimizer.state[param]
            rule, rank = group["label"].rpartition("/")[2], directions.get(name)
            dense = own and rank is None
            routing.rows.append(
                Row(
                    name=name,
                    shape=tuple(param.shape),
                    role=group["role"],
                    rule="adamw" if dense else f"{rule}@{rank}" if own else rule,
                    lr=float(group["lr"]) * (1.0 if dense else optimizer.scale(group)),
                    elements=param.numel(),
                    state_bytes=_bytes(state.values()),
                    rank=rank,
                    itemsize=param.element_size(),
                    matrices=sum(shape[0] for _, shape in matrices),
                    bases_bytes=_bytes(v for key, v in state.items() if key.rpartition(".")[2] in BASES),
                    **_exchanged(matrices),
                )
            )
    routing.scaling = "" if scaling is None else scaling.table()
    if allocates(config) and not ranks:
        routing.note = (
            f"the sizes above are those of one rank for all: what that costs will be shared out by the spectra of the "
            f"{config.rank_allocation}s (rank_allocation={config.rank_allocation})"
        )
    return routing


def _stand_in(param: Tensor) -> nn.Parameter:
    """Without memory, and whole where `param` lies in pieces."""
    return nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device="meta"))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in tensors)


def _exchanged(matrices: Sequence[tuple[MatrixRule, tuple[int, int, int]]]) -> dict[str, Any]:
    """The fields of a `Row` that say what of a gradient an update needs, and when it needs all of it."""
    if matrices and all(remembers(rule) for rule, _ in matrices):
        return _asked(matrices)
    image: Counter[str] = Counter()
    remainder: Counter[str] = Counter()
    leaves = bool(matrices)
    for rule, shape in matrices:
        if not isinstance(rule, LowRank):
            return {}
        image.update({KINDS[key]: size for key, size in rule.image_sizes(shape).items()})
        if leaves_remainder(rule):
            remainder.update({"coordinates": math.prod(rule.subspace.small(shape)), "rows": shape[0] * shape[1]})
        else:
            leaves = False
    rules = [rule for rule, _ in matrices if isinstance(rule, LowRank)]
    return {
        "image": dict(image),
        "sends_image": bool(rules) and all(rule.linear and whole_messages_because(rule) is None for rule in rules),
        "gap": max((rule.subspace.every for rule in rules), default=1),
        "searches": max((rule.searches for rule in rules), default=0),
        "remainder": dict(remainder) if leaves else {},
    }


def _asked(matrices: Sequence[tuple[MatrixRule, tuple[int, int, int]]]) -> dict[str, Any]:
    """The same for matrices of which replicas remember apart."""
    asked: Counter[str] = Counter()
    gap = 0
    for rule, shape in matrices:
        assert isinstance(rule, Remembers)
        asked.update({"usual": rule.asks(shape), "choosing": rule.asks(shape, choosing=True)})
        gap = max(gap, rule.subspace.every if isinstance(rule, LowRank) else 0)
    remembered = any(rule.memory for rule, _ in matrices if isinstance(rule, Remembers))
    return {"asked": {**asked, "gap": gap}, "remembered": remembered}


def build(
    model: nn.Module,
    config: MethodConfig,
    *,
    seed: int = 0,
    roles: Mapping[str, str] | None = None,
    ranks: Mapping[str, int | float | None] | None = None,
    heads: Mapping[str, HeadLayout] | None = None,
    scaling: Scaling | None = None,
) -> MatrixOptimizer:
    """The optimizer of `config` for `model`: groups by role, projected matrices by `config.targets`.

    Args:
        seed: of every random choice of the method; two runs with one seed choose alike.
        roles, ranks, heads, scaling: as in `route`. Of `scaling` the groups take their part; the initial weights are
            scaled by `thinrank.optim.scaling.scale_init`.

    Raises:
        ValueError: as `route` does, and where both `ranks` and `config.rank_allocation` say who has which rank.
    """
    shared_out = allocates(config)
    if shared_out and ranks:
        raise ValueError(
            f"ranks are given, and rank_allocation={config.rank_allocation!r} would replace them: leave one of them out"
        )
    optimizer = _optimizer(_grouped(model, config, roles, ranks, heads, scaling).groups, config, seed=seed)
    if shared_out:
        optimizer.allocate_ranks(config.rank_allocation, every=config.rank_allocation_every)
    return optimizer


def allocates(config: MethodConfig) -> TypeGuard[RankedConfig]:
    """True when `config` has ranks shared out by spectra."""
    return isinstance(config, RankedConfig) and config.rank_allocation != "uniform"


def _grouped(
    model: nn.Module,
    config: MethodConfig,
    roles: Mapping[str, str] | None,
    ranks: Mapping[str, int | float | None] | None,
    heads: Mapping[str, HeadLayout] | None,
    scaling: Scaling | None,
) -> Routing:
    factors = None if scaling is None else scaling.multipliers()
    routing = group_parameters(model, config, roles, ranks, heads, factors)
    left = unstepped(model, routing.groups)
    if left:
        raise RuntimeError(
            f"no rule steps the trainable parameter {left[0]} ({len(left):,} in all): freeze it by "
            "requires_grad_(False) if it is to stay as it is"
        )
    return routing


def _optimizer(groups: list[dict[str, Any]], config: MethodConfig, *, seed: int) -> MatrixOptimizer:
    cls = cast("Any", OPTIMIZERS[type(config)])
    return cls(groups, lr=config.lr, weight_decay=config.weight_decay, seed=seed, **config.group())
