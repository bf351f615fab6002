"""A tiny model and tiny data for the tests of the training module: seconds, no files, no network."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset

from thinrank.trainers.models import ModelConfig, build_model
from thinrank.trainers.module import CausalLM
from thinrank.trainers.schedule import ScheduleConfig

VOCAB = 64
TINY = ModelConfig(
    name="tiny",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)

lightning_warnings = [
    # torch 2.13 deprecates what Lightning 2.6 calls when it looks into a batch; not ours to change
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*:FutureWarning"),
    # in-memory data of a test needs no workers
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # the tests log every step on purpose, or have fewer batches than Lightning's logging interval
    pytest.mark.filterwarnings("ignore:The number of training batches.*is smaller than the logging interval"),
]


def tiny_model(seed: int = 0) -> Any:
    return build_model(TINY, VOCAB, seed=seed)


def rows(count: int, length: int = 8, seed: int = 0) -> torch.Tensor:
    """Windows (count, length + 1) of random tokens."""
    return torch.randint(0, VOCAB, (count, length + 1), generator=torch.Generator().manual_seed(seed))


class Batches(Dataset):
    """Ready batches of rows `[start, stop)` for one rank; `position` counts the rows of all ranks."""

    def __init__(self, tokens: torch.Tensor, batch_size: int, rank: int = 0, world: int = 1, ignore: Any = None):
        self.batches = []
        share = batch_size // world
        for start in range(0, len(tokens), batch_size):
            mine = tokens[start + rank * share : start + (rank + 1) * share]
            labels = mine[:, 1:].clone()
            if ignore is not None:
                labels[ignore[start + rank * share : start + (rank + 1) * share]] = -100
            self.batches.append({"input_ids": mine[:, :-1], "labels": labels, "position": start + batch_size})

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


class TinyData(pl.LightningDataModule):
    """Train rows, held-out rows, and a record of where `advance` was called."""

    def __init__(
        self,
        train: torch.Tensor,
        held_out: torch.Tensor | None = None,
        *,
        batch_size: int = 4,
        ignore: torch.Tensor | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__()
        self.train = Batches(train, batch_size, rank, world)
        self.held_out = Batches(rows(8, seed=1) if held_out is None else held_out, batch_size, rank, world, ignore)
        self.advanced: list[int] = []

    def advance(self, position: int) -> None:
        self.advanced.append(position)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=None)

    test_dataloader = val_dataloader


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def tiny_module(**changes: Any) -> CausalLM:
    options: dict[str, Any] = {
        "model": tiny_model(),
        "optimizer": adamw,
        "schedule": ScheduleConfig(kind="constant"),
        "clip_norm": None,
    }
    options.update(changes)
    return CausalLM(**options)


def tiny_trainer(max_steps: int, **changes: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "max_steps": max_steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**(options | changes))


class PoolEnvironment(LightningEnvironment):
    """Tells Lightning that the processes and the process group of a test's rank pool are there already."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    def local_rank(self) -> int:
        return torch.distributed.get_rank()

    def set_world_size(self, size: int) -> None:
        assert size == self.world_size()

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.global_rank()

    def teardown(self) -> None:
        """The pool keeps its environment variables for its next job."""


def ddp_trainer(max_steps: int, **changes: Any) -> pl.Trainer:
    """A Trainer over the ranks of the pool that calls this."""
    strategy = DDPStrategy(cluster_environment=PoolEnvironment(), process_group_backend="gloo")
    return tiny_trainer(max_steps, devices=torch.distributed.get_world_size(), strategy=strategy, **changes)
