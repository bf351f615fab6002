"""Training with Lightning: modules, data, callbacks, strategies, checkpoints, and whole runs.

Names are imported when they are used first, so that reading a configuration does not wait for Lightning::

    from thinrank.trainers import CausalLM, TextData
    from thinrank.trainers.pretrain import PretrainConfig, pretrain
"""

if __name__ != "thinrank.trainers":
    raise ImportError(
        "write `import thinrank.trainers`, not `import trainers`: a second copy of every class would be made"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinrank.trainers.callbacks.checkpointing import Checkpointing
    from thinrank.trainers.callbacks.guard import NonFiniteGuard
    from thinrank.trainers.callbacks.layerwise import LayerwiseSchedule
    from thinrank.trainers.callbacks.metrics import TrainingMetrics
    from thinrank.trainers.callbacks.preemption import Preemption
    from thinrank.trainers.callbacks.progress import Progress
    from thinrank.trainers.callbacks.spikes import SpikeGuard
    from thinrank.trainers.checkpoint import AtomicCheckpointIO
    from thinrank.trainers.data import FilesConfig, HuggingFaceConfig, PySourceConfig, TextData
    from thinrank.trainers.errors import GuardStop, RankLost, UserError
    from thinrank.trainers.guards import GuardConfig
    from thinrank.trainers.liveness import heartbeat
    from thinrank.trainers.models import ModelConfig
    from thinrank.trainers.module import CausalLM
    from thinrank.trainers.pretrain import PretrainConfig, TrainerConfig
    from thinrank.trainers.run import RunConfig
    from thinrank.trainers.schedule import ScheduleConfig
    from thinrank.trainers.strategies import (
        FSDP2Config,
        GossipConfig,
        OwnedConfig,
        ReplicatedConfig,
        StrategyConfig,
        ZeroConfig,
    )
    from thinrank.trainers.strategies.fsdp2 import FSDP2Strategy
    from thinrank.trainers.strategies.gossip import GossipStrategy
    from thinrank.trainers.strategies.replicated import OwnedStrategy, ReplicatedStrategy
    from thinrank.trainers.strategies.zero import ZeroStrategy

__all__ = [
    "AtomicCheckpointIO",
    "CausalLM",
    "Checkpointing",
    "FSDP2Config",
    "FSDP2Strategy",
    "FilesConfig",
    "GossipConfig",
    "GossipStrategy",
    "GuardConfig",
    "GuardStop",
    "HuggingFaceConfig",
    "LayerwiseSchedule",
    "ModelConfig",
    "NonFiniteGuard",
    "OwnedConfig",
    "OwnedStrategy",
    "Preemption",
    "PretrainConfig",
    "Progress",
    "PySourceConfig",
    "RankLost",
    "ReplicatedConfig",
    "ReplicatedStrategy",
    "RunConfig",
    "ScheduleConfig",
    "SpikeGuard",
    "StrategyConfig",
    "TextData",
    "TrainerConfig",
    "TrainingMetrics",
    "UserError",
    "ZeroConfig",
    "ZeroStrategy",
    "heartbeat",
]

_HOMES = {
    "callbacks.checkpointing": ("Checkpointing",),
    "callbacks.guard": ("NonFiniteGuard",),
    "callbacks.layerwise": ("LayerwiseSchedule",),
    "callbacks.metrics": ("TrainingMetrics",),
    "callbacks.preemption": ("Preemption",),
    "callbacks.progress": ("Progress",),
    "callbacks.spikes": ("SpikeGuard",),
    "checkpoint": ("AtomicCheckpointIO",),
    "data": ("FilesConfig", "HuggingFaceConfig", "PySourceConfig", "TextData"),
    "errors": ("GuardStop", "RankLost", "UserError"),
    "guards": ("GuardConfig",),
    "liveness": ("heartbeat",),
    "models": ("ModelConfig",),
    "module": ("CausalLM",),
    "pretrain": ("PretrainConfig", "TrainerConfig"),
    "run": ("RunConfig",),
    "schedule": ("ScheduleConfig",),
    "strategies": ("FSDP2Config", "GossipConfig", "OwnedConfig", "ReplicatedConfig", "StrategyConfig", "ZeroConfig"),
    "strategies.fsdp2": ("FSDP2Strategy",),
    "strategies.gossip": ("GossipStrategy",),
    "strategies.replicated": ("OwnedStrategy", "ReplicatedStrategy"),
    "strategies.zero": ("ZeroStrategy",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


from thinrank.trainers.registration import register_strategies  # noqa: E402 - needs the names above

register_strategies()  # Trainer(strategy="thinrank_ddp"), Trainer(strategy="thinrank_fsdp2")
