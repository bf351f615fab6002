"""The strategies under their names in Lightning's registry, without importing Lightning before somebody needs it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

DESCRIPTIONS = {
    "thinrank_ddp": "whole model on every process; coordinates travel, and gradients only where a step chooses by them",
    "thinrank_owned": "as thinrank_ddp, with the optimizer's state and work shared out; directions travel back",
    "thinrank_fsdp2": "rows of every weight on every process; matrices are stepped by rows, or whole by one process",
    "thinrank_gossip": "whole model on every process, trained on its own; weights are averaged with neighbours'",
    "thinrank_zero1": "DeepSpeed ZeRO-1: state and float32 masters in pieces, matrices stepped whole by their owners",
    "thinrank_zero2": "DeepSpeed ZeRO-2: gradients in pieces as well",
    "thinrank_zero3": "DeepSpeed ZeRO-3: weights in pieces as well",
}

REGISTRIES = ("lightning.pytorch.strategies", "pytorch_lightning.strategies")


def register_strategies() -> None:
    """Makes `Trainer(strategy="thinrank_…")` known, now or as soon as Lightning is imported."""
    for name in REGISTRIES:
        module = sys.modules.get(name)
        if hasattr(module, "StrategyRegistry"):
            _register(module)
        elif not any(isinstance(finder, _After) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _After(name, _register))


def _register(module: Any) -> None:
    """In the registry of `lightning`; for that of `pytorch_lightning`, whose classes are others, a refusal."""
    ours: dict[str, Callable[..., Any]] = {
        "thinrank_ddp": thinrank_ddp,
        "thinrank_owned": thinrank_owned,
        "thinrank_fsdp2": thinrank_fsdp2,
        "thinrank_gossip": thinrank_gossip,
    }
    ours |= {f"thinrank_zero{stage}": partial(thinrank_zero, stage) for stage in (1, 2, 3)}
    for name, description in DESCRIPTIONS.items():
        build = ours[name] if module.__name__.startswith("lightning.") else _refuse
        module.StrategyRegistry.register(name, build, description=description, override=True)


def thinrank_ddp(**options: Any) -> Any:
    """A `ReplicatedStrategy`."""
    from thinrank.trainers.strategies.replicated import ReplicatedStrategy

    return ReplicatedStrategy(**options)


def thinrank_owned(**options: Any) -> Any:
    """An `OwnedStrategy`."""
    from thinrank.trainers.strategies.replicated import OwnedStrategy

    return OwnedStrategy(**options)


def thinrank_fsdp2(**options: Any) -> Any:
    """An `FSDP2Strategy`."""
    from thinrank.trainers.strategies.fsdp2 import FSDP2Strategy

    return FSDP2Strategy(**options)


def thinrank_gossip(**options: Any) -> Any:
    """A `GossipStrategy`."""
    from thinrank.trainers.strategies.gossip import GossipStrategy

    return GossipStrategy(**options)


def thinrank_zero(stage: int, **options: Any) -> Any:
    """A `ZeroStrategy`."""
    from thinrank.trainers.strategies.zero import ZeroStrategy

    return ZeroStrategy(stage, **options)


def _refuse(**options: Any) -> Any:
    raise ValueError(
        "thinrank's strategies are for the Trainer of `lightning.pytorch`, and this one is of `pytorch_lightning`, "
        "another package: write `import lightning.pytorch as pl`"
    )


class _After(importlib.abc.MetaPathFinder):
    """Calls `then(module)` once after the module `name` has been imported.

    Lightning has no entry point for strategies, and importing it takes seconds that whoever reads a configuration need
    not wait.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)  # by the finders behind this one
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.then(module)

            spec.loader.exec_module = exec_module  # of this loader alone, which serves this module alone
        return spec
