"""A program that two ranks execute under torchrun: ZeRO in whole pre-training runs and in a user's own module."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny_pretrain import config, leave, signalled_at
from tiny_replicas import GALORE, fit, own, refusal

from thinrank.optim import DCTAdamWConfig, LDAdamConfig
from thinrank.trainers import CausalLM, ZeroConfig
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies import StrategyConfig

PARTS = {"max_steps": 20, "batch_size": 8, "micro_batch_size": 2, "clip_norm": 0.5, "model": {"extra": {}}}
"""Two micro-batches on each of two ranks, clipped; without dropout, since ranks draw otherwise than one process."""

MOVES = {
    "max_steps": 12,
    "batch_size": 8,
    "model": {"extra": {}},
    "checkpoint_every": 5,
    "optimizer": LDAdamConfig(rank=4),
}


def zero(stage):
    return ZeroConfig(name=f"thinrank_zero{stage}", bucket=2**12)


def main(base):
    import torch.distributed as dist

    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    dist.init_process_group("gloo")  # once, for all runs of this program
    rank = dist.get_rank()
    for stage in (1, 2, 3):
        pretrain(config(base, f"galore {stage}", optimizer=GALORE, strategy=zero(stage), **PARTS))
    pretrain(config(base, "half", optimizer=GALORE, strategy=zero(2), **{**PARTS, "precision": "bf16-mixed"}))
    ended = []
    length = {"max_steps": 12, "checkpoint_every": 5, "optimizer": DCTAdamWConfig(rank=4, update_proj_gap=4)}
    for stage in (2, 3):
        pretrain(config(base, f"whole {stage}", strategy=zero(stage), **length))
        undo = signalled_at(7, rank=1)
        first = pretrain(config(base, f"parts {stage}", strategy=zero(stage), **length))
        undo()
        second = pretrain(config(base, f"parts {stage}", strategy=zero(stage), **length))
        ended += [first["run"], second["run"]]

    step_at = CausalLM.training_step

    def broken(self, batch, batch_idx):
        found = step_at(self, batch, batch_idx)
        bad = self.trainer.global_step == 3 and rank == 1
        return {**found, "loss": found["loss"] * (torch.nan if bad else 1.0)}

    CausalLM.training_step = broken
    skipped = [
        pretrain(config(base, f"skips {stage}", strategy=zero(stage), **{**PARTS, "max_steps": 6}))["training"]
        for stage in (2, 3)
    ]
    CausalLM.training_step = step_at

    # one run, by one strategy after the other; its last part is for one process
    for steps, strategy in ((3, zero(1)), (6, zero(3)), (9, StrategyConfig(name="ddp"))):
        pretrain(config(base, "moves", strategy=strategy, **{**MOVES, "max_steps": steps}))

    parallel = {"rank": rank, "world": 2, "devices": 2, "gradient_clip_val": 0.1}
    by_name = {}
    for stage in (1, 2, 3):
        parallel["strategy"] = f"thinrank_zero{stage}"
        by_name[stage] = fit(own, accumulate=2, **parallel).state_dict()
    said = {
        "other optimizer": refusal(lambda module: torch.optim.AdamW(module.parameters()), **parallel),
        "by value": refusal(own, **parallel, gradient_clip_algorithm="value"),
        "half": refusal(own, **parallel, precision="16-true"),
    }
    if rank == 0:
        torch.save(by_name, Path(base) / "own.pt")
        (Path(base) / "result.json").write_text(json.dumps([ended, said, skipped]))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
