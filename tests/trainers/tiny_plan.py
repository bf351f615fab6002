"""A program for one, two or four ranks: short runs of several methods and strategies, for what they held and sent."""

import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from tiny_pretrain import config, leave

from thinrank.optim import AdamWConfig, DCTAdamWConfig, FiraConfig, GaLoreConfig, GaLorePlusConfig
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies import FSDP2Config, OwnedConfig, ReplicatedConfig, StrategyConfig

METHODS = {
    "adamw": AdamWConfig(),
    "galore": GaLoreConfig(rank=4, svd="power", update_proj_gap=7),
    "galore_plus": GaLorePlusConfig(rank=4, update_proj_gap=7, warmup=3, density=0.05),
    "fira": FiraConfig(rank=4, svd="power"),
    "dct_adamw": DCTAdamWConfig(rank=4, update_proj_gap=5, state_bits=8),
}
STRATEGIES = {
    "ddp": (StrategyConfig(name="ddp"), METHODS),
    "thinrank_ddp": (ReplicatedConfig(), METHODS),
    "bfloat16": (ReplicatedConfig(dtype="bfloat16"), ("galore", "galore_plus")),
    "signs": (ReplicatedConfig(messages="signs"), ("fira",)),
    "majority": (ReplicatedConfig(messages="majority"), ("fira",)),
    "thinrank_owned": (OwnedConfig(), METHODS),
    "thinrank_fsdp2": (FSDP2Config(), METHODS),
    "half thinrank_ddp": (ReplicatedConfig(), ("adamw", "galore", "fira")),
    "half thinrank_owned": (OwnedConfig(), ("adamw", "galore", "fira")),
    "half thinrank_fsdp2": (FSDP2Config(), ("adamw", "galore", "fira")),
}
"""By name, with the methods that run under it; with 16-bit weights where the name says `half`."""
HYBRID = {
    "hybrid thinrank_fsdp2": (FSDP2Config(replicas=2), ("adamw", "galore", "fira")),
    "islands thinrank_fsdp2": (FSDP2Config(replicas=2, messages="auto", dtype="bfloat16"), ("galore",)),
    "half islands thinrank_fsdp2": (FSDP2Config(replicas=2, messages="auto"), ("galore",)),
}
"""On four ranks."""
STEPS = 12


def runs(world):
    """(strategy, its choice, method) of every run on so many ranks; alone, where nothing travels, of two methods."""
    strategies = HYBRID if world == 4 else STRATEGIES
    every = [(name, choice, method) for name, (choice, methods) in strategies.items() for method in methods]
    return [run for run in every if world > 1 or run[2] in ("adamw", "galore")]


def counted_by_ddp():
    """Bytes of the buckets that DDP has summed up since, in a list that grows."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    found = []
    configure = DDPStrategy.configure_ddp

    def hook(state, bucket):
        found.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    def configure_and_count(self):
        configure(self)
        assert self.model is not None
        self.model.register_comm_hook(None, hook)  # pyright: ignore[reportCallIssue] - it is wrapped now

    DDPStrategy.configure_ddp = configure_and_count
    return found


def main(base):
    import torch.distributed as dist

    dist.init_process_group("gloo")  # once, for all runs of this program
    buckets, result = counted_by_ddp(), {}
    for strategy, choice, method in runs(dist.get_world_size()):
        buckets.clear()
        name = f"{method}-{strategy}-{dist.get_world_size()}"
        settings: dict[str, Any] = {"max_steps": STEPS, "batch_size": 4, "micro_batch_size": 1, "validate_every": 0}
        settings["precision"] = "bf16-true" if strategy.startswith("half ") else "32-true"
        settings["log_every"] = 10 * STEPS  # by rows, a step that is looked at sums up a few numbers more
        report = pretrain(
            config(base, name, optimizer=METHODS[method], strategy=choice, model={"extra": {}}, **settings)
        )
        result[f"{method}-{strategy}"] = {**report["plan"], "buckets": sum(buckets) / STEPS}
    if dist.get_rank() == 0:
        (Path(base) / f"{dist.get_world_size()}.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
