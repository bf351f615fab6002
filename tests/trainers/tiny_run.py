"""A training run of a second with everything that a resume can get wrong: dropout, a schedule, accumulation,
validation in the middle, data with a position. It records what happened at which step."""

import json
import os
import warnings
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from thinrank.trainers.callbacks.checkpointing import Checkpointing
from thinrank.trainers.callbacks.preemption import Preemption
from thinrank.trainers.checkpoint import AtomicCheckpointIO
from thinrank.trainers.rng import seed_all

BATCH = 8


class Rows(IterableDataset):
    """Endless micro-batches; number i is made from the seed i."""

    def __init__(self, start, size):
        self.start, self.size = start, size

    def __iter__(self):
        position = self.start
        while True:
            x = torch.stack(
                [torch.randn(4, generator=torch.Generator().manual_seed(position + i)) for i in range(self.size)]
            )
            position += self.size
            yield {"x": x, "position": position}


class Data(pl.LightningDataModule):
    def __init__(self, accumulate=1):
        super().__init__()
        self.consumed, self.size = 0, BATCH // accumulate

    def train_dataloader(self):
        return DataLoader(Rows(self.consumed, self.size), batch_size=None)

    def val_dataloader(self):
        rows = [{"x": torch.full((3, 4), float(i))} for i in range(2)]
        return DataLoader(cast(Dataset, rows), batch_size=None)

    def advance(self, position):
        self.consumed = position

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict):
        self.consumed = state_dict["consumed"]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.events, self.position = [], 0
        self.total = 0.0

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch["x"]) - batch["x"].sum(-1, keepdim=True)).square().mean()
        self.events.append(("train", self.trainer.global_step, loss.item()))
        self.position = batch["position"]
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.trainer.datamodule.advance(self.position)

    def on_validation_epoch_start(self):
        self.total = 0.0

    def validation_step(self, batch, batch_idx):
        self.total += (self.net(batch["x"]) - batch["x"].sum(-1, keepdim=True)).square().mean().item()

    def on_validation_epoch_end(self):
        self.log("val/loss", self.total)
        self.events.append(("val", self.trainer.global_step, self.total))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class At(pl.Callback):
    """Calls a function at the end of one optimizer step, before the callbacks that save."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.function()


class Run:
    """What is left after `train`."""

    def __init__(self, trainer, module, data, checkpointing, preemption):
        self.trainer, self.module, self.data = trainer, module, data
        self.checkpointing, self.preemption = checkpointing, preemption

    @property
    def events(self):
        return self.module.events

    def state(self):
        """Everything that a resumed run has to have in common with an uninterrupted one."""
        return {
            "model": self.module.state_dict(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "scheduler": self.trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "consumed": self.data.consumed,
            "random": torch.get_rng_state(),
            "step": self.trainer.global_step,
        }


def train(
    folder, steps, *, every=5, validate=4, accumulate=1, resume=None, callbacks=(), marker=None, max_seconds=None
):
    """Trains `Net` with the checkpointing under test; `folder` takes the checkpoints."""
    seed_all(1)
    module, data = Net(), Data(accumulate)
    checkpointing = Checkpointing(Path(folder), every, header={"identity": "{}"})
    preemption = Preemption(checkpointing, marker, max_seconds=max_seconds)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, preemption, checkpointing],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # the loaders of this test have no workers on purpose
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        trainer.fit(module, data, ckpt_path=resume)
    return Run(trainer, module, data, checkpointing, preemption)


def same(left, right, place="state"):
    """Asserts that two nested states are equal bit for bit, naming the first place that is not."""
    assert type(left) is type(right), place
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            same(left[key], right[key], f"{place}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), place
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            same(a, b, f"{place}[{index}]")
    else:
        assert left == right, f"{place}: {left} and {right}"


def forked(function):
    """Runs `function` in a forked child without waiting for it; the child's exit status is 0 if it returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return child


def read(path):
    return json.loads(Path(path).read_text())
