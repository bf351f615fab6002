"""Weights and states in pieces, checkpoints in one file: what every strategy that shards does about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer


class OneFile(Strategy, ABC):
    """A part of a strategy: checkpoints are as one process writes them, whole weights by name and whole states.

    So a run goes on with any number of processes and under any strategy. Every rank takes part in gathering; rank 0
    holds the result, in the memory of its processor, and writes it by the Trainer's `CheckpointIO`. When a checkpoint
    is loaded every rank reads the file and keeps its pieces.
    """

    @property
    def in_pieces(self) -> bool:
        """False where the module has its whole weights just now."""
        return True

    @abstractmethod
    def whole_weights(self) -> dict[str, Any]:
        """The module's `state_dict` as in one process, on rank 0 in CPU memory; {} elsewhere. All ranks call it."""

    @abstractmethod
    def load_whole_weights(self, weights: Mapping[str, Any], strict: bool) -> None:
        """Keeps this rank's pieces of what `whole_weights` gave on rank 0 of some run."""

    @abstractmethod
    def whole_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's `state_dict` as in one process, on rank 0 in CPU memory; {} elsewhere. All ranks call it."""

    @abstractmethod
    def load_whole_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Keeps this rank's pieces of what `whole_state` gave on rank 0 of some run."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Pieces exist, and can be filled, once the model is sharded."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.whole_weights()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.load_whole_weights(checkpoint["state_dict"], strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self.whole_state(unwrapped(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self.load_whole_state(unwrapped(optimizer), state)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, map_location="cpu", weights_only=weights_only)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
