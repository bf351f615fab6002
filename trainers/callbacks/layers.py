"""Layers of factors in a Lightning run: what they do between steps."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from thinrank.optim.layers import Upkeep
from thinrank.trainers.errors import UserError


class LayerUpkeep(pl.Callback):
    """Has the converted layers of the module do what they do between steps (`thinrank.optim.layers.Upkeep`).

    With any strategy whose optimizer is of thinrank, and with any optimizer where weights are whole. Everything that a
    resumed run needs is in the module's own state, so that this has none. Learning rates that rise again after a
    resampling are the schedule's: `CausalLM` does so by itself, others multiply theirs by
    `thinrank.optim.layers.warmth(model)(step)`.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._upkeep: Upkeep | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = trainer.optimizers
        if len(optimizers) != 1:
            raise UserError(f"layers between whose steps something happens need one optimizer, got {len(optimizers)}")
        model: Any = getattr(pl_module, "model", pl_module)
        try:
            self._upkeep = Upkeep(model if isinstance(model, nn.Module) else pl_module, optimizers[0], seed=self.seed)
        except ValueError as error:
            raise UserError(str(error)) from error

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._upkeep is not None:
            self._upkeep.detach()
            self._upkeep = None
