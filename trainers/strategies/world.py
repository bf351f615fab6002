"""The processes of a run, as their launcher describes them, and the few things they do together outside of training."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from thinrank.trainers.errors import UserError
from thinrank.trainers.strategies.config import StrategyConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands among those of the run; by default it is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun says in the environment; alone without it.

        Raises:
            UserError: the environment is that of a launcher which does not say all of it.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = [os.environ.get(name) for name in names]
        if values[0] is None and values[1] is None:
            return cls()
        if None in values:
            missing = ", ".join(name for name, value in zip(names, values, strict=True) if value is None)
            raise UserError(f"the launcher did not set {missing}: start the processes with torchrun")
        rank, size, local_rank, local_size = (int(str(value)) for value in values)
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size)

    @property
    def nodes(self) -> int:
        """Machines, each with as many processes as this one."""
        return self.size // self.local_size

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0


@contextmanager
def process_group(world: World, config: StrategyConfig, *, cuda: bool) -> Iterator[None]:
    """Connects the processes before training needs it; Lightning finds the connection and uses it.

    Args:
        world: the processes; one alone needs no connection.
        config: backend and timeout.
        cuda: whether tensors will be on GPUs; then this process's GPU is selected here.
    """
    if cuda:
        torch.cuda.set_device(world.local_rank)
    if world.size == 1 or dist.is_initialized():
        yield
        return
    backend = config.backend
    if backend == "auto":
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    yield
    gc.collect()  # what optimizers and strategies, which lie in cycles, hold of the connection goes before it
    dist.destroy_process_group()  # not after an error: the others may still be waiting, and the launcher ends them all


def together(world: World, function: Callable[[], T]) -> T:
    """Calls `function` on every rank and waits for all; if it fails for a user's reason anywhere, it fails everywhere.

    Otherwise the ranks without the error would wait until the timeout for the one that has left.

    Raises:
        UserError: what the first rank that failed had to say, of the kind it was of, which decides the exit code.
    """
    if world.size == 1:
        return function()
    error: UserError | None = None
    result: list[T] = []
    try:
        result.append(function())
    except UserError as caught:
        error = caught
    errors: list[tuple[type[UserError], str] | None] = [None] * world.size
    dist.all_gather_object(errors, None if error is None else (type(error), str(error)))
    first = next((found for found in errors if found is not None), None)
    if first is not None:
        kind, sentence = first
        raise kind(sentence) from error
    return result[0]


def gathered(value: T) -> list[T]:
    """Every rank's value, which has to be picklable, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found  # pyright: ignore[reportReturnType]


def from_rank_zero(world: World, function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 and returns its result, which has to be picklable, on every rank.

    Raises:
        UserError: what rank 0 had to say, on every rank.
    """
    box: list[T | None] = [together(world, lambda: function() if world.main else None)]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]  # pyright: ignore[reportReturnType]
