"""A program that two ranks execute under torchrun: rates by layer in whole runs under every strategy."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from tiny_pretrain import config, leave

from thinrank.optim import GaLoreConfig
from thinrank.optim.layerwise import LLR, LayerwiseConfig
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies import FSDP2Config, GossipConfig, OwnedConfig, ReplicatedConfig, StrategyConfig

LAYERWISE = LLR(every=2, ramp=1, min_evals=5, window=8, per_side=2)
GALORE = GaLoreConfig(rank=4, update_proj_gap=3, lr=0.01, svd="power", weight_decay=0.1)
RUN = {
    "max_steps": 3, "optimizer": GALORE, "model": {"extra": {}}, "validate_every": 0, "log_every": 5,
    "sample_tokens": 0, "tensorboard": False,
}  # fmt: skip
"""Without dropout, since ranks draw otherwise than one process."""

STRATEGIES = {
    "ddp": StrategyConfig(name="ddp"),
    "thinrank_ddp": ReplicatedConfig(check_every=2),
    "thinrank_owned": OwnedConfig(name="thinrank_owned", check_every=2),
    "thinrank_fsdp2": FSDP2Config(check_every=2),
    "thinrank_gossip": GossipConfig(),
}


def run(base, name, strategy=None, layerwise: LayerwiseConfig = LAYERWISE, **changes):
    """The report of one run."""
    return pretrain(replace(config(base, name, strategy=strategy, **{**RUN, **changes}), layerwise=layerwise))


def main(base):
    import torch.distributed as dist

    dist.init_process_group("gloo")  # once, for all runs of this program
    found = {name: run(base, name, strategy)["training"]["layerwise"] for name, strategy in STRATEGIES.items()}
    (Path(base) / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
