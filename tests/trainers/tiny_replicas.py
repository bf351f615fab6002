"""A program that two ranks execute under torchrun: replicas in whole pre-training runs and in a user's own module."""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from tiny_pretrain import config, leave, signalled_at
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thinrank.optim import DCTAdamWConfig, DionConfig, FiraConfig, GaLoreConfig, build
from thinrank.trainers import NonFiniteGuard, OwnedConfig, ReplicatedConfig, UserError
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies.world import gathered

GALORE = GaLoreConfig(rank=4, svd="power", update_proj_gap=7, lr=0.01)
DION = DionConfig(rank=4)
PARTS = {"max_steps": 20, "batch_size": 8, "micro_batch_size": 2, "clip_norm": None}
"""Two micro-batches on each of two ranks; the norm of what is left of gradients is another than that of gradients."""


class Own(pl.LightningModule):
    """A module that knows nothing of replicas."""

    def __init__(self, optimizer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return (self.net(x).squeeze(-1) - x.prod(-1)).square().mean()

    def configure_optimizers(self):
        return self.make(self)


class Broken(Own):
    """In the fourth step the last rank's loss is no number."""

    def training_step(self, batch, batch_idx):
        bad = self.global_step == 3 and self.global_rank == self.trainer.world_size - 1
        return super().training_step(batch, batch_idx) * (torch.nan if bad else 1.0)


def fit(optimizer, rank=0, world=1, accumulate=1, kind=None, **options):
    """Six steps of eight rows, of which this rank has its share; the trained module."""
    torch.manual_seed(rank)  # a rank's weights are not the first's until the strategy makes them
    module = (kind or Own)(optimizer)
    rows = torch.randn(48, 6, generator=torch.Generator().manual_seed(1)).view(6, accumulate, world, -1, 6)[:, :, rank]
    loader = DataLoader(TensorDataset(rows.reshape(-1, 6)), batch_size=rows.shape[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's remarks on workers and loggers
        pl.Trainer(
            accelerator="cpu",
            max_steps=6,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        ).fit(module, loader)
    return module


def own(model):
    return build(model, GaLoreConfig(rank=3, svd="power", update_proj_gap=3, lr=0.05, scale=1.0))


def refusal(optimizer, **options):
    try:
        fit(optimizer, **options)
    except UserError as error:
        return str(error)
    return None


def main(base):
    import torch.distributed as dist

    dist.init_process_group("gloo")  # once, for all runs of this program
    rank, replicas = dist.get_rank(), ReplicatedConfig(check_every=2)
    model = {"extra": {}}  # no dropout: ranks draw otherwise than one process
    pretrain(config(base, "galore", optimizer=GALORE, strategy=replicas, model=model, **PARTS))
    pretrain(config(base, "fira", optimizer=FiraConfig(rank=4, svd="power"), strategy=replicas, model=model, **PARTS))
    signs = ReplicatedConfig(check_every=2, messages="signs")
    pretrain(config(base, "signs", optimizer=FiraConfig(rank=4, svd="power"), strategy=signs, model=model, **PARTS))
    owned = OwnedConfig(check_every=2)
    pretrain(config(base, "owned", optimizer=GALORE, strategy=owned, model=model, **PARTS))
    pretrain(config(base, "dion", optimizer=DION, strategy=replicas, model=model, **PARTS))
    length = {"max_steps": 12, "checkpoint_every": 5, "optimizer": DION}
    pretrain(config(base, "apart whole", strategy=replicas, **length))
    undo = signalled_at(10, rank=1)  # where both are saved, so that both have one memory
    pretrain(config(base, "apart parts", strategy=replicas, **length))
    undo()
    pretrain(config(base, "apart parts", strategy=replicas, **length))

    columns = DCTAdamWConfig(rank=4, update_proj_gap=4, error_feedback="off")
    length = {"max_steps": 12, "checkpoint_every": 5, "optimizer": columns}
    pretrain(config(base, "whole", strategy=replicas, **length))
    undo = signalled_at(7, rank=1)
    first = pretrain(config(base, "parts", strategy=replicas, **length))
    undo()
    second = pretrain(config(base, "parts", strategy=replicas, **length))

    pretrain(config(base, "owned whole", strategy=owned, **length))
    undo = signalled_at(7, rank=1)
    pretrain(config(base, "owned parts", strategy=owned, **length))
    undo()
    pretrain(config(base, "owned parts", strategy=owned, **length))
    undo = signalled_at(7, rank=0)
    pretrain(config(base, "another", strategy=owned, **length))
    undo()
    pretrain(config(base, "another", strategy=replicas, **length))

    parallel = {"rank": rank, "world": 2, "strategy": "thinrank_ddp", "devices": 2}
    weights = fit(own, accumulate=2, **parallel).state_dict()
    clipped = fit(own, gradient_clip_val=0.1, **parallel).state_dict()
    by_value = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    said = {
        "other optimizer": refusal(lambda module: torch.optim.AdamW(module.parameters()), **parallel),
        "by value": refusal(own, **parallel, **by_value),
    }
    by_owners = {**parallel, "strategy": "thinrank_owned"}
    shared = fit(own, accumulate=2, **by_owners)
    facts, skipping = {"state on": shared.trainer.optimizers[0].state_ranks}, {}
    for name, how in (("replicas", parallel), ("owners", by_owners)):
        guard = NonFiniteGuard()
        skipping[name] = dict(fit(own, kind=Broken, callbacks=[guard], **how).state_dict())
        alike = [all(torch.equal(each[n], skipping[name][n]) for n in each) for each in gathered(skipping[name])]
        facts[name] = gathered(guard.skipped), alike
    said["by value, owners"] = refusal(own, **by_owners, **by_value)
    if rank == 0:
        torch.save([weights, clipped], Path(base) / "own.pt")
        torch.save([shared.state_dict(), skipping, facts], Path(base) / "owners.pt")
        (Path(base) / "result.json").write_text(json.dumps([first["run"], second["run"], said]))
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
