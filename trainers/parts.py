"""What a run consists of, once everything exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from thinrank import optim
from thinrank.trainers.callbacks.checkpointing import Checkpointing
from thinrank.trainers.callbacks.guard import NonFiniteGuard
from thinrank.trainers.callbacks.held import HeldMemory
from thinrank.trainers.callbacks.layerwise import LayerwiseSchedule
from thinrank.trainers.callbacks.preemption import Preemption
from thinrank.trainers.checkpoint import step_of
from thinrank.trainers.data import TextData
from thinrank.trainers.jobs import Job
from thinrank.trainers.module import CausalLM
from thinrank.trainers.pretrain import Plan, TrainingConfig
from thinrank.trainers.resident import Resident
from thinrank.trainers.run import RunFolder
from thinrank.trainers.strategies import World


@dataclass(kw_only=True)
class Parts:
    """What a run consists of."""

    job: Job
    origin: Mapping[str, str]
    tree: Mapping[str, Any]
    world: World
    plan: Plan
    folder: RunFolder
    resume: Path | None
    data: TextData
    module: CausalLM
    routing: optim.Routing
    parameters: int
    """Of the whole model, adapter included, trained or not."""
    trainer: pl.Trainer
    checkpointing: Checkpointing
    preemption: Preemption
    guard: NonFiniteGuard
    held: HeldMemory
    resident: Resident
    layerwise: LayerwiseSchedule | None = None
    """What multiplies rates by layer."""
    origin_step: int | None = None
    """The optimizer step that this process has resumed from, whatever it went back to later; None: a fresh start."""
    again: bool = False
    """Whether this process goes on after a way back before a spike."""
    ranks: Mapping[str, int | float | None] | None = None
    """Of matrices that have come to their own."""

    @property
    def config(self) -> TrainingConfig:
        return self.job.config

    @property
    def model(self) -> Any:
        return self.module.model

    @property
    def shards(self) -> int:
        """Ranks that hold the model together; 1 where each holds all of it."""
        return self.config.strategy.shards(self.world.size)

    @property
    def start(self) -> int:
        """The optimizer step to go on from."""
        return 0 if self.resume is None else step_of(self.resume) or 0
