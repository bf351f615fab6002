"""Training curves: loss, norms, learning rates, captured energy, speed and memory, for any logger of the Trainer."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from thinrank.trainers.callbacks.guard import gradient_norm


class LossMean:
    """A mean loss that stays on the device until it is read, weighted by labels where the module gives their number."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, outputs: Any, accumulate: int) -> None:
        """Add what `training_step` returned, as Lightning hands it to `on_train_batch_end`.

        Args:
            outputs: a dict with `nats` and `labels`, or with `loss` alone.
            accumulate: micro-batches per step; Lightning has divided `loss` by it.
        """
        if isinstance(outputs, dict) and "nats" in outputs:
            pair = torch.stack([outputs["nats"].float(), outputs["labels"].float()])
        elif isinstance(outputs, dict) and "loss" in outputs:
            loss = outputs["loss"].detach().float() * accumulate
            pair = torch.stack([loss, torch.ones_like(loss)])
        else:
            return
        self._sums = pair if self._sums is None else self._sums + pair

    def take(self, strategy: Any = None) -> float | None:
        """The mean since the last call, over all ranks if a strategy is given (all must call); None without a label."""
        sums, self._sums = self._sums, None
        if sums is None:
            return None
        if strategy is not None:
            sums = strategy.reduce(sums, reduce_op="sum")
        total, weight = sums.tolist()
        return total / weight if weight else None


class LogZMean:
    """Mean and largest logarithm of the softmax's denominator over the micro-batches of a step, where the module
    measures it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._top: Tensor | None = None

    def add(self, outputs: Any) -> None:
        """Add what `training_step` returned: a dict with `log_z`, `log_z_max` and `labels`, or one without."""
        if not isinstance(outputs, dict) or "log_z" not in outputs:
            return
        labels = outputs["labels"].float()
        pair, top = torch.stack([outputs["log_z"].float() * labels, labels]), outputs["log_z_max"].float()
        self._sums = pair if self._sums is None else self._sums + pair
        self._top = top if self._top is None else torch.maximum(self._top, top)

    def take(self, strategy: Any) -> dict[str, float]:
        """The values since the last call, over all ranks, all of which must call; nothing without a label."""
        sums, top, self._sums, self._top = self._sums, self._top, None, None
        if sums is None:
            return {}
        total, labels = strategy.reduce(sums, reduce_op="sum").tolist()
        highest = float(strategy.reduce(top, reduce_op="max"))
        return {"train/log_z": total / labels, "train/log_z_max": highest} if labels else {}


class TokenClock:
    """Tokens and seconds of training since the last reading, without the time spent in evaluation."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.tokens = 0
        self._start = time.perf_counter()
        self._paused_at: float | None = None

    def add(self, batch: Any, world_size: int) -> None:
        """Count a batch, which every rank has in the same size."""
        if isinstance(batch, dict) and isinstance(batch.get("input_ids"), Tensor):
            self.tokens += batch["input_ids"].numel() * world_size

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        if self._paused_at is not None:
            self._start += time.perf_counter() - self._paused_at
            self._paused_at = None

    def take(self) -> tuple[int, float]:
        """Tokens of all ranks and seconds since the last reading."""
        tokens, seconds = self.tokens, time.perf_counter() - self._start
        self.restart()
        return tokens, seconds


class TrainingMetrics(pl.Callback):
    """Log the state of training every few optimizer steps; the axis is the number of optimizer steps done.

    | tag | what |
    | --- | --- |
    | `train/loss` | mean nats per label since the last reading, over all ranks |
    | `train/log_z`, `train/log_z_max` | mean and largest log of the softmax's denominator in this step, if measured |
    | `grad_norm` | norm of all gradients before clipping; none where coordinates travel and no norms |
    | `lr/<label>` | learning rate of a group in this step |
    | `opt/effective_lr/<label>` | learning rate of a group with every scale |
    | `opt/update_rms/<label>` | RMS of a group's weight change, before the learning rate |
    | `lowrank/captured_energy/<parameter>` | share of the gradient's energy that the subspace holds |
    | `lowrank/captured_energy` | its mean over the projected matrices |
    | `lowrank/subspace_overlap[/<parameter>]` | share of the old subspace in the new one, at the last renewal |
    | `lowrank/rank[/<parameter>]` | directions of a matrix, where matrices have ranks of their own |
    | `tokens_per_sec`, `time/step` | tokens per second of all ranks; seconds per step |
    | `consumed_tokens` | tokens so far |
    | `comm/payload(MiB)`, `comm/<kind>(MiB)` | sent for the optimizer by this rank, a step |
    | `comm/messages` | messages of that, a step |
    | `gossip/…` | of an exchange of weights, as `Gossip.measured` says it |
    | `comm/rare(MiB)` | sent beside steps since the last reading: the start, checks, what is saved |
    | `memory/optimizer_state(MiB)` | tensors of the optimizer on this rank |
    | `memory/max_rss(GiB)`, `memory/max_active(GiB)` | peak of the process; peak of the CUDA allocator |

    The optimizer's own values need one that measures itself (`optimizer.measure`, `optimizer.measured`); others lack
    those tags. Between readings nothing waits for the device.

    Args:
        every: optimizer steps between two readings. The first step is always read.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}: set trainer.log_every to a number of steps")
        self.every = every
        self._loss = LossMean()
        self._log_z = LogZMean()
        self._clock = TokenClock()
        self._read: dict[str, Any] = {}  # what has to be read before the step, or nothing if this step is not read
        self._measuring = False
        self._seen = 0  # optimizer steps done when this callback last looked
        self._last = 0  # optimizer steps done at the last reading
        self._sent: Counter[str] = Counter()  # bytes and messages until then

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = self._last = trainer.global_step
        self._clock.restart()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before the step, since the schedule and the clipping have moved on after it."""
        step = trainer.global_step + 1
        if step != 1 and step % self.every:
            return
        self._measuring = hasattr(optimizer, "measure")
        if self._measuring:
            setattr(optimizer, "measure", True)  # noqa: B010  (a torch.optim.Optimizer in general has none)
        norm = gradient_norm(pl_module)
        self._read = ({} if norm is None else {"grad_norm": norm}) | {
            f"lr/{group.get('label', index)}": group["lr"] for index, group in enumerate(optimizer.param_groups)
        }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss.add(outputs, trainer.accumulate_grad_batches)
        self._log_z.add(outputs)
        self._clock.add(batch, trainer.world_size)
        if trainer.global_step == self._seen:
            return  # a micro-batch without a step
        self._seen = trainer.global_step
        if self._read:
            metrics = self._metrics(trainer, pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def _wire(self, trainer: pl.Trainer, steps: int) -> dict[str, float]:
        now = sent(trainer)
        new = {kind: (now[kind] - self._sent[kind]) / steps for kind in now}
        self._sent = now
        if not new:
            return {}
        messages, rare = new.pop("messages"), new.pop("rare") * steps / 2**20
        sizes = {f"comm/{kind}(MiB)": size / 2**20 for kind, size in new.items()}
        return {"comm/payload(MiB)": sum(sizes.values()), **sizes, "comm/messages": messages, "comm/rare(MiB)": rare}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.resume()

    def _metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        metrics = {name: float(value) for name, value in self._read.items()}
        self._read = {}
        loss = self._loss.take(trainer.strategy)
        if loss is not None:
            metrics["train/loss"] = loss
        metrics |= self._log_z.take(trainer.strategy)
        optimizer = trainer.optimizers[0]
        if self._measuring:  # the optimizer has done so in the step just finished, and stopped
            metrics |= _measured(getattr(optimizer, "measured", {}))
        tokens, seconds = self._clock.take()
        metrics["time/step"] = seconds / (trainer.global_step - self._last)
        metrics |= self._wire(trainer, trainer.global_step - self._last)
        own = getattr(trainer.strategy, "metrics", None)
        metrics |= {} if own is None else own()
        self._last = trainer.global_step
        if tokens:
            metrics["tokens_per_sec"] = tokens / seconds
        consumed = getattr(module, "consumed_tokens", None)
        if consumed is not None:
            metrics["consumed_tokens"] = float(consumed)
        return metrics | _memory(optimizer, module.device)


def sent(trainer: pl.Trainer) -> Counter[str]:
    """Bytes of payload that an optimizer, or a strategy in its place, has sent so far, by kind, with its `messages` and
    the bytes that no step needed (`rare`); nothing where none exchanges."""
    exchange = getattr(trainer.strategy, "exchange", None)
    wire = getattr(trainer.optimizers[0] if exchange is None else exchange, "wire", None)
    if wire is None:
        return Counter()
    return Counter({**wire.payload, "messages": wire.messages, "rare": wire.rare.total()})


def _measured(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """The optimizer's own values under their tags; a step that was skipped has none."""
    metrics: dict[str, float] = {}
    for key in ("captured_energy", "subspace_overlap", "rank"):
        found = {name: float(value) for name, value in measured.get(key, {}).items()}
        metrics |= {f"lowrank/{key}/{name}": value for name, value in found.items()}
        if found:
            metrics[f"lowrank/{key}"] = sum(found.values()) / len(found)
    for key in ("update_rms", "effective_lr"):
        metrics |= {f"opt/{key}/{label}": float(value) for label, value in measured.get(key, {}).items()}
    return metrics


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state on this rank."""
    own = getattr(optimizer, "state_bytes", None)
    if own is not None:
        return own()
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, float]:
    memory = {"memory/optimizer_state(MiB)": state_bytes(optimizer) / 2**20, "memory/max_rss(GiB)": peak_rss() / 2**30}
    if device.type == "cuda":
        memory["memory/max_active(GiB)"] = torch.cuda.max_memory_allocated(device) / 2**30
    return memory
