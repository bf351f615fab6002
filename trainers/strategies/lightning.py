"""From the choice of a strategy to Lightning's objects."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from thinrank.trainers.strategies.config import (
    FSDP2Config,
    GossipConfig,
    OwnedConfig,
    ReplicatedConfig,
    StrategyConfig,
    ZeroConfig,
)
from thinrank.trainers.strategies.world import World

if TYPE_CHECKING:  # Lightning takes seconds to import, and configurations are read without it
    from lightning.pytorch.plugins.environments import ClusterEnvironment
    from lightning.pytorch.strategies import Strategy


def build_strategy(config: StrategyConfig, world: World) -> tuple[Strategy | str, ClusterEnvironment]:
    """Lightning's strategy and its view of the processes.

    The environment is given rather than detected, since on a cluster Lightning would take the variables of an
    interactive shell for those of a batch job.

    Args:
        config: the choice.
        world: the processes.

    Returns:
        What ``Trainer(strategy=…)`` takes, and a plugin for ``Trainer(plugins=[…])``.
    """
    from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    # torchrun may have started a single process, too, whose WORLD_SIZE the other environment would delete at the end
    launched = world.size > 1 or TorchElasticEnvironment.detect()
    environment = TorchElasticEnvironment() if launched else LightningEnvironment()
    if world.size == 1 and config.name == "auto":
        return "auto", environment
    from lightning.pytorch.strategies import DDPStrategy

    options: dict[str, Any] = {"timeout": timedelta(seconds=config.timeout)}
    if config.backend != "auto":
        options["process_group_backend"] = config.backend
    if isinstance(config, ReplicatedConfig):
        from thinrank.trainers.strategies.replicated import OwnedStrategy, ReplicatedStrategy

        strategy = (OwnedStrategy if isinstance(config, OwnedConfig) else ReplicatedStrategy)(
            messages=config.messages,
            embeddings=config.embeddings,
            dtype=config.dtype,
            norms=config.norms,
            overlap=config.overlap,
            check_every=config.check_every,
            memories_every=config.memories_every,
            **options,
        )
        return strategy, environment
    if isinstance(config, FSDP2Config):
        from thinrank.trainers.strategies.fsdp2 import FSDP2Strategy

        strategy = FSDP2Strategy(
            replicas=config.replicas,
            reshard_after_forward=config.reshard_after_forward,
            messages=config.messages,
            dtype=config.dtype,
            norms=config.norms,
            check_every=config.check_every,
            **options,
        )
        return strategy, environment
    if isinstance(config, ZeroConfig):
        from thinrank.trainers.strategies.zero import ZeroStrategy

        strategy = ZeroStrategy(
            config.stage, bucket=config.bucket, overlap=config.overlap, check_every=config.check_every, **options
        )
        return strategy, environment
    if isinstance(config, GossipConfig):
        from thinrank.trainers.strategies.gossip import build

        return build(config, **options), environment
    # Every parameter of a language model takes part in every step, so nothing has to be searched for unused ones, and
    # its buffers are constant.
    strategy = DDPStrategy(broadcast_buffers=False, **options)
    return strategy, environment
