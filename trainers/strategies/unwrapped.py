"""What Lightning's strategies of this package have in common whose model is not wrapped."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from thinrank.optim.replicated import equalise
from thinrank.trainers.errors import UserError
from thinrank.trainers.strategies.config import StrategyConfig
from thinrank.trainers.versions import require_lightning

C = TypeVar("C", bound=StrategyConfig)


def checked(kind: type[C], **settings: Any) -> C:
    """The configuration of a strategy that is made by itself, whose rules are then the same.

    Raises:
        UserError: for bad values, or a Lightning that has not been tested.
    """
    try:
        found = kind(**settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    require_lightning()
    return found


class UnwrappedStrategy(DDPStrategy):
    """Every process holds the whole model as it is, and its own gradients when backward ends."""

    NAME: str
    """What users call it."""
    UNSCALED: str
    """What a strategy does for which gradients may not be scaled: the rest of a sentence that begins with its name."""

    def configure_ddp(self) -> None:
        """Gives all ranks the first one's weights and buffers; nothing is wrapped."""
        assert self.model is not None
        equalise(self.model)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise UserError(
                f"{self.NAME} {self.UNSCALED}: use precision='bf16-mixed' or '32-true' instead of '16-mixed'"
            )
