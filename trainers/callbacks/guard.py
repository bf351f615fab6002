"""Skip the steps whose gradients are not finite, and stop when there is nothing else."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from thinrank.optim import MatrixOptimizer
from thinrank.trainers.errors import GuardStop
from thinrank.trainers.gradients import total_norm

_log = logging.getLogger(__name__)


def gradient_norm(module: pl.LightningModule) -> Tensor | None:
    """Norm of all gradients (scalar): that of the module, which keeps it for this step, or of a strategy that keeps the
    gradients to itself, or else computed here, with what thinrank's optimizers have taken of gradients; None where one
    of these does not know it (`knows_norm`)."""
    if not all(optimizer.knows_norm for optimizer in own_optimizers(module)):
        return None
    shared = getattr(module, "gradient_norm", None) or getattr(module.trainer.strategy, "gradient_norm", None)
    if shared is not None:
        return shared()
    return torch.nn.utils.get_total_norm(
        [total_norm(rest(module)), *(optimizer.gradient_norm() for optimizer in own_optimizers(module))]
    )


def are_finite(module: pl.LightningModule) -> bool:
    """Whether all gradients are finite numbers, where nobody knows their norm."""
    each = [
        torch.isfinite(total_norm(rest(module))),
        *(optimizer.gradients_are_finite() for optimizer in own_optimizers(module)),
    ]
    return all(bool(found) for found in each)


def own_optimizers(module: pl.LightningModule) -> list[MatrixOptimizer]:
    """Those of thinrank, which know more of gradients than `p.grad` says."""
    return [optimizer for optimizer in module.trainer.optimizers if isinstance(optimizer, MatrixOptimizer)]


def rest(module: pl.LightningModule) -> list[torch.nn.Parameter]:
    """The parameters of which no optimizer of thinrank knows."""
    groups = [group for optimizer in own_optimizers(module) for group in optimizer.param_groups]
    theirs = {param for group in groups for param in group["params"]}
    return [param for param in module.parameters() if param not in theirs]


def leave_out(trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Gives the coming step of the optimizer no gradients at all, so that weights and state stay as they are."""
    for parameter in module.parameters():
        parameter.grad = None
    optimizer.zero_grad()  # what it keeps of gradients that backward handed to it
    skip_step = getattr(trainer.strategy, "skip_step", None)
    if skip_step is not None:  # gradients are elsewhere
        skip_step()


class NonFiniteGuard(pl.Callback):
    """Skip every step whose gradient norm is infinite or NaN, on all ranks together; where replicas exchange
    coordinates and no norms, every step with a coordinate that is. Ranks that exchange weights skip each their own.

    A skipped step gives the optimizer no gradients at all, so that weights and optimizer state stay as they are bit for
    bit; the learning-rate schedule and the position in the data move on. Skips are counted, kept in checkpoints,
    reported once each and logged as `guard/skipped_steps`.

    With a loss scaler (precision "16-mixed") overflows belong to its search for a scale: they are skipped and counted,
    but lead to a stop only once the scale has come down to 1.

    Args:
        limit: this many skipped steps in a row stop training with a `GuardStop`.

    Attributes:
        skipped: steps skipped so far, over restarts.
        consecutive: steps skipped in a row.
    """

    def __init__(self, limit: int = 5) -> None:
        if limit < 1:
            raise ValueError(
                f"limit must be at least 1, got {limit}: set trainer.nonfinite_limit to the steps to tolerate"
            )
        self.limit = limit
        self.skipped = 0
        self.consecutive = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the norm after the last backward, before clipping, which would spread a NaN to every gradient."""
        norm = gradient_norm(pl_module)
        bad = not (are_finite(pl_module) if norm is None else bool(torch.isfinite(norm)))
        apart = getattr(trainer.strategy, "local_gradients", False)  # then a rank leaves out a step of its own
        if trainer.world_size > 1 and not apart:  # gradients may be local, and then one rank alone sees it
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            self._skip(trainer, pl_module, optimizer, "not finite" if norm is None else float(norm))
        else:
            self.consecutive = 0

    def _skip(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        norm: float | str,
    ) -> None:
        """Leaves out a step that is not finite, and counts it."""
        leave_out(trainer, pl_module, optimizer)
        self.skipped += 1
        if not _searching_scale(trainer):
            self.consecutive += 1
        step = trainer.global_step + 1
        if trainer.is_global_zero:
            _log.warning(
                "step %d skipped: the gradient norm is %s (%d skipped so far, %d in a row)",
                step,
                norm,
                self.skipped,
                self.consecutive,
            )
        for logger in trainer.loggers:
            logger.log_metrics({"guard/skipped_steps": float(self.skipped)}, step=step)
        if self.consecutive >= self.limit:
            raise GuardStop(
                f"training stopped at step {step}: the gradients were not finite {self.consecutive} times in a row; "
                f"lower optimizer.lr, set trainer.clip_norm, lengthen the warm-up "
                f"or use a wider trainer.precision such as bf16-mixed or 32-true"
            )

    def facts(self) -> dict[str, int]:
        """What a report says of it."""
        return {"skipped_steps": self.skipped}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.consecutive = state_dict["consecutive"]


def _searching_scale(trainer: pl.Trainer) -> bool:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1
