"""A program that two ranks execute under torchrun: sharded models in whole runs and in users' own modules."""

import json
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import tiny_finetune
import tiny_replicas
import torch
from tiny_pretrain import config, leave, signalled_at
from tiny_replicas import Own, fit, own, refusal
from torch import nn
from torch.distributed.tensor import DTensor

from thinrank.optim import DCTAdamWConfig, GaLoreConfig
from thinrank.trainers import FSDP2Config, FSDP2Strategy, NonFiniteGuard, ReplicatedConfig
from thinrank.trainers.adapters import LoraConfig
from thinrank.trainers.finetune import finetune
from thinrank.trainers.pretrain import pretrain

GALORE = GaLoreConfig(rank=4, svd="power", update_proj_gap=7, lr=0.01, eps=1e-3)
"""With Adam's usual eps, under DDP as well, a gradient that is rounding alone would be a step of full size."""

PARTS = {"max_steps": 20, "batch_size": 8, "micro_batch_size": 2}
RELAY = {"max_steps": 12, "checkpoint_every": 20, "clip_norm": None, "optimizer": GALORE, "model": {"extra": {}}}
"""A run that several strategies carry on: without dropout, for ranks draw otherwise than one process, and without
clipping, for replicas clip by what is left of gradients."""


class Several(Own):
    """Networks beside each other, weights of its own, and a step that goes through `forward`."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.head = nn.Linear(1, 1)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.head(self.net(x)) * self.gain

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return (self(x).squeeze(-1) - x.prod(-1)).square().mean()


class Burst(Own):
    """The gradient of the third step is no number on rank 1, or in one process."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_step == 2 and self.global_rank + 1 == self.trainer.world_size else loss


class Shared(Own):
    """One weight in two blocks."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net = blocks = Blocks()
        first, second = (block[0] for block in cast("list[Any]", list(blocks.blocks)))
        second.weight = first.weight


class Blocks(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6)) for _ in "ab")
        self.out = nn.Linear(6, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.out(torch.tanh(x))


class InBlocks(Own):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net = Blocks(16)


class Scalar(Own):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net.register_parameter("gain", nn.Parameter(torch.ones(())))


class Frozen(Own):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.requires_grad_(False)


class Meta(Own):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.to("meta")


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def spread(module):
    """thinrank's optimizer with ranks that are to be shared out, by the gradients of sharded weights."""
    optimizer = own(module)
    optimizer.allocate_ranks("gradient")
    return optimizer


@contextmanager
def training(cls):
    before, tiny_replicas.Own = tiny_replicas.Own, cls
    try:
        yield
    finally:
        tiny_replicas.Own = before


OWN = {
    "accumulation": (Own, own, {"accumulate": 2}),
    "clipping by norm": (InBlocks, own, {"gradient_clip_val": 0.1}),
    "clipping by value": (Own, own, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "several networks": (Several, own, {}),
    "a burst": (Burst, own, {"gradient_clip_val": 0.1}),
    "AdamW of torch": (InBlocks, adamw, {"gradient_clip_val": 0.1}),
    "AdamW of torch with a burst": (Burst, adamw, {}),
}
"""Modules that know nothing of strategies, what trains them, and how."""


def own_runs(rank=0, world=1, **options):
    found = {}
    for name, (cls, optimizer, settings) in OWN.items():
        guard = NonFiniteGuard()
        with training(cls):
            module = fit(optimizer, rank, world, callbacks=[guard], **options, **settings)
        found[name] = {n: whole(p).clone() for n, p in module.named_parameters()} | {"skipped": guard.skipped}
    return found


def whole(param):
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


def refusals(rank):
    def said(cls=Own, optimizer=own, strategy: Any = "thinrank_fsdp2", **options):
        with training(cls):
            try:
                return refusal(optimizer, rank=rank, world=2, strategy=strategy, devices=2, **options)
            except ValueError as error:
                return str(error)

    return {
        "64-true": said(precision="64-true"),
        "replicas": said(strategy=FSDP2Strategy(replicas=3)),
        "shared": said(Shared),
        "scalar": said(Scalar),
        "frozen": said(Frozen),
        "meta": said(Meta),
        "ranks": said(optimizer=spread),
    }


def preempted(base, name, step, **settings):
    undo = signalled_at(step, rank=1)
    result = pretrain(config(base, name, **settings))
    undo()
    return result["run"]["state"]


def main(base):
    import torch.distributed as dist

    dist.init_process_group("gloo")  # once, for all runs of this program
    rank, pieces = dist.get_rank(), FSDP2Config()
    model = {"extra": {}}
    reports = {
        "galore": pretrain(config(base, "galore", optimizer=GALORE, strategy=pieces, model=model, export=True, **PARTS))
    }
    for name in ("bf16-mixed", "bf16-true"):
        pretrain(config(base, name, optimizer=GALORE, strategy=pieces, model=model, precision=name, **PARTS))
    length = {"max_steps": 12, "checkpoint_every": 5, "optimizer": DCTAdamWConfig(rank=4, update_proj_gap=4)}
    pretrain(config(base, "whole", strategy=pieces, **length))
    states = [preempted(base, "parts", 7, strategy=pieces, **length)]
    reports["parts"] = pretrain(config(base, "parts", strategy=pieces, **length))

    states.append(preempted(base, "there", 6, strategy=pieces, **RELAY))
    states.append(preempted(base, "back", 6, strategy=pieces, **RELAY))  # one process has begun it
    states.append(preempted(base, "back", 9, strategy=ReplicatedConfig(), **RELAY))
    pretrain(config(base, "back", strategy=pieces, **RELAY))

    tuned = tiny_finetune.config(Path(base), "lora", adapter=LoraConfig(rank=2))
    reports["lora"] = finetune(replace(tuned, strategy=pieces))

    weights = own_runs(rank, 2, strategy="thinrank_fsdp2", devices=2)
    said = refusals(rank)
    if rank == 0:
        torch.save(weights, Path(base) / "own.pt")
        facts = {
            name: {key: report[key] for key in ("run", "metrics", "training", "optimizer_state")}
            for name, report in reports.items()
        }
        (Path(base) / "result.json").write_text(json.dumps([states, facts, said]))
    leave()


if __name__ == "__main__":
    warnings.simplefilter("error")
    # Lightning 2.6 asks torch 2.13 in a deprecated way whether a batch is nested
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated", category=FutureWarning)
    # the checkpoints of the relay are of another number of ranks, or of micro-batches
    warnings.filterwarnings("ignore", message="the checkpoint of step .* goes on with", category=UserWarning)
    main(sys.argv[1])
