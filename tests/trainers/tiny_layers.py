"""A program that two ranks execute under torchrun: models of factors under every strategy, cut and resumed."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from tiny_pretrain import config, leave, signalled_at

from thinrank.optim import AdamWConfig
from thinrank.optim.layers import SST
from thinrank.trainers import FSDP2Config, OwnedConfig, ReplicatedConfig, ZeroConfig
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies import StrategyConfig

LAYERS = SST(rank=4, every=5, iterations=2, warmup=2)
RUN = {
    "max_steps": 12,
    "batch_size": 8,
    "checkpoint_every": 20,
    "optimizer": AdamWConfig(lr=1e-3, eps=1e-4),  # a gradient that is rounding alone is no step of full size
    "model": {"extra": {}, "initializer_range": 0.2},  # singular values stay above zero
    "reparam": LAYERS,
}
STRATEGIES = {
    "ddp": StrategyConfig(),
    "thinrank_ddp": ReplicatedConfig(),
    "thinrank_owned": OwnedConfig(),
    "thinrank_fsdp2": FSDP2Config(),
    "thinrank_zero2": ZeroConfig(name="thinrank_zero2"),
    "thinrank_zero3": ZeroConfig(name="thinrank_zero3"),
}


def main(base):
    dist.init_process_group("gloo")  # once, for all runs of this program
    reports = {}
    for name, strategy in STRATEGIES.items():
        reports[name] = pretrain(config(base, name, strategy=strategy, export=True, **RUN))["metrics"]
    undo = signalled_at(7, rank=1, batch=8)
    first = pretrain(config(base, "parts", strategy=FSDP2Config(), export=True, **RUN))
    undo()
    second = pretrain(config(base, "parts", strategy=FSDP2Config(), export=True, **RUN))
    reports |= {"first": first["run"], "second": second["run"]}
    (Path(base) / "result.json").write_text(json.dumps(reports))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
