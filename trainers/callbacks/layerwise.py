"""Learning rates, or weight decays, by layer in a Lightning run, as the tails of the weights' spectra say."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from thinrank.optim.layerwise import TailSchedule
from thinrank.trainers.errors import UserError


class LayerwiseSchedule(TailSchedule, pl.Callback):
    """`thinrank.optim.layerwise.TailSchedule` as a callback: it looks before the step after every `every` of them.

        Trainer(callbacks=[LayerwiseSchedule("llr", every=100)])

    With any strategy whose one optimizer is of thinrank. Where weights are whole, ranks share the work; all of them
    have the same numbers. What is found is logged as `layerwise/alpha/<name>`, and what is set as
    `layerwise/lr/<name>` (the multiplier), or `layerwise/decay/<name>`, at the steps of a look. Its state is in
    checkpoints, so that a resumed run goes on to the bit. In one's own loop `update` does the same.

    Args:
        method, settings: as in `TailSchedule`.
    """

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(method=self.config.name)  # one of rates and one of decays go together

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise UserError(f"rates by layer need one optimizer, got {len(trainer.optimizers)}: return one")
        try:
            self.candidates(_network(pl_module), trainer.optimizers[0])
        except ValueError as error:
            raise UserError(str(error)) from error

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At the beginning of a step, since weights may be stepped inside of its backward."""
        looked = self.update(
            _network(pl_module),
            trainer.optimizers[0],
            trainer.global_step,
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            summed=lambda values: trainer.strategy.reduce(values, reduce_op="sum"),  # pyright: ignore[reportArgumentType, reportReturnType]
        )
        if looked:
            for logger in trainer.loggers:
                logger.log_metrics(self.measured(), step=trainer.global_step)


def _network(module: pl.LightningModule) -> nn.Module:
    model: Any = getattr(module, "model", module)
    return model if isinstance(model, nn.Module) else module
