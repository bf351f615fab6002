"""Spikes of the loss and of gradients: seen before the step, by the same numbers on all ranks, and dealt with."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinrank.optim import MatrixOptimizer
from thinrank.optim.guards import Reading, SpikeScore, Verdict, update_ratios
from thinrank.trainers.callbacks.checkpointing import Checkpointing
from thinrank.trainers.callbacks.guard import NonFiniteGuard, gradient_norm, leave_out, own_optimizers, rest
from thinrank.trainers.errors import GuardStop, RollBack, UserError
from thinrank.trainers.guards import GuardConfig
from thinrank.trainers.strategies.world import gathered

_log = logging.getLogger(__name__)

_SETTINGS = ("threshold", "max_norm", "window", "warmup", "decay", "way", "rollback")


class SpikeGuard(NonFiniteGuard):
    """Does what `NonFiniteGuard` does, and something about spikes: it takes that callback's place.

    Once a step, after the last backward and before any clipping, the host reads the loss (that backward was called on,
    summed over micro-batches) and the norm of all gradients together, in one go. Where ranks decide together both are
    their means over the ranks, from one small message, so that all see the same numbers and come to the same verdict.
    Under a strategy that leaves ranks their own gradients (gossip) each decides for itself.

    | action | what happens to a step that is a spike |
    | --- | --- |
    | `skip` | the optimizer is given no gradients: weights, moments, step and renewal counters stay bit for bit |
    | `clip` | gradients are scaled to the limit of `zclip`, or to `clip_norm` where that is less |
    | `stop` | `GuardStop`, with the weights of the step before |
    | `rollback` | `RollBack`: a run of `thinrank.trainers.pretrain` goes back and leaves data out |
    | `warn` | nothing |

    All of them are told, counted, and logged as `guard/spikes` (so far) beside `guard/spike_score/loss`,
    `guard/spike_score/grad_norm` and `guard/spike_rate/…` (OLMo's shares of outliers, whatever the detector) every
    `Trainer.log_every_n_steps` steps. The statistics are Python numbers, kept in checkpoints, so that a resumed run, or
    the same run again, comes to the same verdicts. Values that are not finite do not enter them. A guard that only
    looks leaves weights as they are, bit for bit.

    The norm is that of whole gradients wherever somebody knows it. Where coordinates travel in their place it is asked
    for beside them; with `in_backward="project"` it is that of the coordinates, which jumps when a subspace is renewed.

    Args:
        detector: `zscore`, `zclip` or `stable` (`thinrank.optim.guards`). `stable` needs whole gradients beside second
            moments: one process, DDP, or gossip.
        action: see above.
        limit: of `NonFiniteGuard`.
        checkpointing: of a run that can go back; only for `action="rollback"`.
        rollbacks: how often the run has done so.
        settings: the other fields of `GuardConfig`: `threshold`, `max_norm`, `window`, `warmup`, `decay`, `way`,
            `rollback`.

    Attributes:
        spikes: steps so far that were spikes; of them, clipped: those that were clipped. `skipped` counts skipped
            spikes too.

    Raises:
        ValueError: for unknown or impossible choices, and `action="rollback"` without somebody who goes back.
        UserError: when training starts, for what this guard cannot work with.
    """

    needs_norm = True
    """Asks strategies that send coordinates to send norms beside them."""

    def __init__(
        self,
        detector: str = "zscore",
        action: str = "skip",
        *,
        limit: int = 5,
        checkpointing: Checkpointing | None = None,
        rollbacks: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(limit)
        self.config = GuardConfig(name=detector, detector=detector, action=action, **settings)
        found = self.config.made_detector()
        if found is None:
            raise ValueError("detector=nonfinite is NonFiniteGuard: use that, or choose zscore, zclip or stable")
        if action == "rollback" and checkpointing is None:
            raise ValueError(
                "action=rollback goes back in a run folder: use launch/pretrain.py (or finetune.py) guard=rollback, or "
                "action=stop, and fit again with ckpt_path and a data module that leaves the batches out"
            )
        self.detector, self.action = found, action
        self.spikes, self.clipped = 0, 0
        self._checkpointing, self._rollbacks = checkpointing, rollbacks
        self._scores = {"loss": SpikeScore(self.config.window), "grad_norm": SpikeScore(self.config.window)}
        self._loss: Tensor | None = None

    @property
    def state_key(self) -> str:
        """That of the guard whose place this one takes: a run may change from the one to the other, and a Trainer
        refuses both."""
        return NonFiniteGuard.__qualname__

    # --- a step -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses what it cannot work with."""
        self._loss = None
        if len(trainer.optimizers) != 1:
            raise UserError(f"SpikeGuard decides on whole steps of one optimizer, got {len(trainer.optimizers)}")
        if self.action == "clip" and trainer.gradient_clip_val is not None:
            raise UserError(
                f"clipping is set twice, action='clip' in SpikeGuard and gradient_clip_val="
                f"{trainer.gradient_clip_val:g} in the Trainer: leave the latter at None, and use CausalLM's clip_norm "
                "for a limit above"
            )
        if any(optimizer.steps_in_backward for optimizer in own_optimizers(pl_module)):
            raise UserError(
                "in_backward='step' has stepped each weight before anybody can look at the whole step: use 'off' or "
                "'project' with SpikeGuard, or NonFiniteGuard"
            )
        if self.config.detector == "stable":
            self._refuse_pieces(trainer)

    @staticmethod
    def _refuse_pieces(trainer: pl.Trainer) -> None:
        optimizer = trainer.optimizers[0]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        elsewhere = hasattr(trainer.strategy, "gradient_norm") or any(isinstance(param, DTensor) for param in params)
        if elsewhere or (isinstance(optimizer, MatrixOptimizer) and optimizer.wire is not None):
            raise UserError(
                "detector='stable' needs whole gradients beside second moments, which this strategy does not leave on "
                "a process: use 'zscore' or 'zclip', or strategy='ddp'"
            )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keeps the loss on the device; Lightning has divided it by the number of micro-batches."""
        value = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # it has been scaled already
            value = value / scaler.scale(torch.ones_like(value))
        self._loss = value if self._loss is None else self._loss + value

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Reads, judges, acts; before clipping, as `NonFiniteGuard` does."""
        reading = self._read(trainer, pl_module)
        if not (math.isfinite(reading.norm) and math.isfinite(reading.loss)):
            self._skip(trainer, pl_module, optimizer, reading.norm)
            return
        self.consecutive = 0
        self._scores["loss"].add(reading.loss)
        self._scores["grad_norm"].add(reading.norm)
        verdict = self.detector.judge(reading)
        self.detector.learn(reading, verdict)
        step = trainer.global_step + 1
        if verdict.spike:
            self.spikes += 1
            self._act(trainer, pl_module, optimizer, verdict, reading, step)
        elif self.action == "clip" and verdict.limit is not None:
            self._clip(trainer, pl_module, verdict.limit, reading.norm)
        every = getattr(trainer, "log_every_n_steps", 0)
        if verdict.spike or (every and step % every == 0):
            for logger in trainer.loggers:
                logger.log_metrics(self._metrics(), step=step)

    def _read(self, trainer: pl.Trainer, module: pl.LightningModule) -> Reading:
        """The one place where the host waits for the device, and ranks for each other."""
        norm = gradient_norm(module)
        if norm is None:
            raise UserError(
                "SpikeGuard decides by the gradient norm, which this strategy does not know: use norms='always'"
            )
        loss, self._loss = self._loss, None
        if loss is None:
            raise UserError("SpikeGuard found no loss: it needs automatic_optimization and a training_step with a loss")
        ratios = update_ratios(trainer.optimizers[0]) if self.config.detector == "stable" else {}
        dtype = torch.promote_types(norm.dtype, torch.float32)
        found = torch.stack([each.to(norm.device, dtype) for each in (loss, norm, *ratios.values())])
        if trainer.world_size > 1 and not _apart(trainer):
            found = trainer.strategy.reduce(found, reduce_op="sum") / trainer.world_size
        values = found.tolist()
        return Reading(loss=values[0], norm=values[1], ratios=dict(zip(ratios, values[2:], strict=True)))

    def _act(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        verdict: Verdict,
        reading: Reading,
        step: int,
    ) -> None:
        assert verdict.reason is not None
        action = self.action
        if action == "rollback" and not self._can_go_back():
            action = "skip"
        if action == "skip":
            leave_out(trainer, module, optimizer)
            self.skipped += 1
        elif action == "clip" and verdict.limit is not None:
            self._clip(trainer, module, verdict.limit, reading.norm)
            self.clipped += 1
        elif action in ("stop", "rollback"):
            leave_out(trainer, module, optimizer)  # what is under way between ranks comes to its end
            self._end(action, step, verdict.reason)
        if trainer.is_global_zero:
            done = {"skip": "skipped", "clip": f"clipped to {verdict.limit}", "warn": "made all the same"}[action]
            why = ", since there is no checkpoint yet to go back to" if action != self.action else ""
            _log.warning("step %d is a spike, and %s%s: %s", step, done, why, verdict.reason)

    def _can_go_back(self) -> bool:
        """Alike on all ranks, which save together."""
        return self._checkpointing is not None and self._checkpointing.last_step >= 0

    def _end(self, action: str, step: int, reason: str) -> None:
        most = self.config.rollback.limit
        if action == "rollback" and self._rollbacks < most:
            raise RollBack(step, reason)
        often = f" after {most} rollbacks" if action == "rollback" else ""
        raise GuardStop(
            f"training stopped before step {step}{often}: {reason}; lower optimizer.lr, set trainer.clip_norm or "
            "lengthen the warm-up, and start again, from an earlier checkpoint by run.resume"
        )

    @staticmethod
    def _clip(trainer: pl.Trainer, module: pl.LightningModule, limit: float, norm: float) -> None:
        elsewhere = getattr(trainer.strategy, "clip_step", None)
        if elsewhere is not None:
            elsewhere(limit)
        elif hasattr(module, "step_limit"):
            setattr(module, "step_limit", limit)  # noqa: B010  (a LightningModule in general has none)
        else:
            before = torch.tensor(norm)
            for own in own_optimizers(module):
                own.clip_grad_norm_(limit, before)
            torch.nn.utils.clip_grads_with_norm_(rest(module), limit, before)

    def _metrics(self) -> dict[str, float]:
        found = {"guard/spikes": float(self.spikes)}
        if self.action == "clip":
            found["guard/clipped_steps"] = float(self.clipped)
        if self.skipped:
            found["guard/skipped_steps"] = float(self.skipped)
        for name, score in self._scores.items():
            found |= {f"guard/spike_score/{name}": score.score, f"guard/spike_rate/{name}": score.rate}
        return found

    def facts(self) -> dict[str, int]:
        found = {**super().facts(), "spikes": self.spikes}
        if self.action == "clip":
            found["clipped_steps"] = self.clipped
        if self.action == "rollback":
            found["rollbacks"] = self._rollbacks
        return found

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "spikes": self.spikes,
            "clipped": self.clipped,
            "detector": self._described(),
            "statistics": self.detector.state_dict(),
            "scores": {name: score.state_dict() for name, score in self._scores.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Statistics of another detector, or of other windows, are not taken: it begins anew, and says so."""
        super().load_state_dict(state_dict)
        self.spikes, self.clipped = state_dict.get("spikes", 0), state_dict.get("clipped", 0)
        if state_dict.get("detector") == self._described():
            self.detector.load_state_dict(state_dict["statistics"])
            for name, score in self._scores.items():
                score.load_state_dict(state_dict["scores"][name])
        else:
            _log.info("%s begins without statistics: the checkpoint has none of it", self.config.detector)

    def _described(self) -> str:
        c = self.config
        return f"{c.detector} {c.window} {c.warmup} {c.decay} {c.way}"

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if (
            _apart(trainer) and trainer.world_size > 1
        ):  # the file is the first rank's, and each has statistics of its own
            checkpoint["callbacks"][self.state_key]["ranks"] = gathered(self.state_dict())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ranks = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("ranks", ())
        if len(ranks) == trainer.world_size:
            checkpoint["callbacks"][self.state_key] = ranks[trainer.global_rank]


def _apart(trainer: pl.Trainer) -> bool:
    """Whether each rank leaves out steps of its own."""
    return bool(getattr(trainer.strategy, "local_gradients", False))


def made_guard(
    config: GuardConfig, limit: int, *, checkpointing: Checkpointing | None = None, rollbacks: int = 0
) -> NonFiniteGuard:
    """The guard of a configuration, `limit` being `trainer.nonfinite_limit`."""
    if not config.acts:
        return NonFiniteGuard(limit)
    settings = {name: getattr(config, name) for name in _SETTINGS}
    return SpikeGuard(
        config.detector, config.action, limit=limit, checkpointing=checkpointing, rollbacks=rollbacks, **settings
    )
