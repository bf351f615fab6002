"""How a run is spread over processes: which processes there are, how they talk, and Lightning's strategy for them."""

from thinrank.trainers.strategies.config import (
    FSDP2Config,
    GossipConfig,
    OwnedConfig,
    ReplicatedConfig,
    StrategyConfig,
    ZeroConfig,
)
from thinrank.trainers.strategies.lightning import build_strategy
from thinrank.trainers.strategies.world import World, process_group, together

__all__ = [
    "FSDP2Config",
    "GossipConfig",
    "OwnedConfig",
    "ReplicatedConfig",
    "StrategyConfig",
    "World",
    "ZeroConfig",
    "build_strategy",
    "process_group",
    "together",
]
