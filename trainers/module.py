"""The training module: a causal language model, its loss, one optimizer and its schedule, as Lightning hosts them.

It needs none of the callbacks of this package and no particular data: batches are dicts of `input_ids` and `labels`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from thinrank import optim
from thinrank.optim.grouping import unstepped
from thinrank.optim.layers import penalty, warmth
from thinrank.optim.scaling import Scaling
from thinrank.trainers.errors import UserError
from thinrank.trainers.gradients import total_norm
from thinrank.trainers.loss.backends import BACKENDS, Unable
from thinrank.trainers.loss.head import Head, Unfit, head_loss, head_of
from thinrank.trainers.loss.linear import LogZ, log_z_of, of_logits
from thinrank.trainers.models import ModelConfig, build_model
from thinrank.trainers.schedule import ScheduleConfig, build_scheduler

IGNORE = -100
"""The label of a place that has none, as in torch and transformers."""


def token_nats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy in float32, summed over the real labels, and how many there are.

    Args:
        logits: (B, L, V), of any floating dtype.
        labels: (B, L) int64, already shifted; `IGNORE` marks a place without a label.

    Returns:
        The sum in nats (float32 scalar, with gradient) and the count (int64 scalar).
    """
    nats = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return nats, (labels != IGNORE).sum()


def frozen_names(module: nn.Module) -> set[str]:
    """Names, as in `state_dict`, of the parameters that are not trained, tied ones under each of their names."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


class CausalLM(pl.LightningModule):
    """Train and evaluate a causal language model.

    Batches are dicts: `input_ids` and `labels`, int64 (B, L), labels already shifted with -100 where there is none,
    and, for a data module that has `advance`, `position`, the number of samples consumed by all ranks after this batch.

    The training loss is the mean over the labels of a batch. Evaluation is the sum of nats over the sum of labels of
    all batches on all ranks, logged as `val/loss`, `val/perplexity`, `val/bits_per_byte` (or `test/…`).

    Args:
        model: a `transformers` model, or a `ModelConfig` that is built when the Trainer starts.
        optimizer: the config of a method, or a function from the model to a torch optimizer.
        schedule: of the learning rate, over `total_steps`.
        total_steps: optimizer steps of the whole run; None asks the Trainer.
        clip_norm: largest norm of all gradients together; None does not clip here.
        in_backward: `off`, `project` or `step`, for optimizers of thinrank (`MatrixOptimizer.in_backward`). With
            `project` the norm that is logged and clipped is that of the coordinates; with `step` each parameter's
            gradient is clipped by itself, and there is no norm of all to log.
        bytes_per_token: mean UTF-8 bytes of a token of the evaluated text, for bits per byte: a number, or one for each
            of "val" and "test"; None asks the data module for `validation_bytes_per_token` and `test_bytes_per_token`.
        vocab_size: for a `ModelConfig`; None takes the length of the data module's `tokenizer`.
        seed: of the initial weights, for a `ModelConfig`.
        projection_seed: of whatever the method draws.
        scaling: what a rule of scale makes of rates, decay and eps (`thinrank.optim.scaling`), for a method's config.
        save_frozen: keep the weights that are not trained in checkpoints; False where they come from elsewhere and
            will be there again, as beside an adapter.
        cross_entropy: `dense` computes logits (B, L, V) and then their loss; any other backend of
            `thinrank.trainers.loss.linear.linear_cross_entropy` goes from the last hidden states to the loss. `auto`
            does so where the model allows it, and says why where it does not; the others refuse such a model.
        z_loss: weight of log² Z in the loss that is trained (PaLM: 1e-4). It is in no loss that is logged.

    Attributes:
        log_z: measure log Z in steps that Lightning logs, which `TrainingMetrics` then writes; on with a `z_loss`.
        consumed_tokens: input tokens of all ranks in the finished optimizer steps; kept in checkpoints.
        step_limit: a largest norm for the coming step alone, below `clip_norm` or without it, which a guard may set
            before the step is clipped.
    """

    def __init__(
        self,
        model: nn.Module | ModelConfig,
        optimizer: Any | Callable[[nn.Module], torch.optim.Optimizer],
        *,
        schedule: ScheduleConfig | None = None,
        total_steps: int | None = None,
        clip_norm: float | None = 1.0,
        in_backward: str = "off",
        bytes_per_token: float | Mapping[str, float] | None = None,
        vocab_size: int | None = None,
        seed: int = 0,
        projection_seed: int = 0,
        scaling: Scaling | None = None,
        save_frozen: bool = True,
        cross_entropy: str = "dense",
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if cross_entropy not in BACKENDS:
            raise ValueError(
                f"cross_entropy must be one of {', '.join(BACKENDS)}, got {cross_entropy!r}: choose one of them"
            )
        if not z_loss >= 0:
            raise ValueError(f"z_loss must be at least 0, got {z_loss}: PaLM's is 1e-4")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got {clip_norm}: use null (None) for no clipping")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}: use None to ask the Trainer")
        self.model: nn.Module | None = None if isinstance(model, ModelConfig) else model
        self.model_config = model if isinstance(model, ModelConfig) else None
        self.optimizer = optimizer
        self.schedule = schedule if schedule is not None else ScheduleConfig()
        self.total_steps = total_steps
        self.clip_norm = clip_norm
        self.in_backward = in_backward
        self.bytes_per_token = bytes_per_token
        self.vocab_size = vocab_size
        self.seed = seed
        self.projection_seed = projection_seed
        self.scaling = scaling
        self.save_frozen = save_frozen
        self.cross_entropy, self.z_loss, self.log_z = cross_entropy, z_loss, z_loss > 0
        self._head: Head | None = None
        self._looked = False
        self.consumed_tokens = 0
        self._pending_tokens = 0  # of the micro-batches since the last optimizer step
        self._position: int | None = None
        self._norm: Tensor | None = None
        self.step_limit: float | None = None
        self._sums = torch.zeros(2)

    # ---- model, optimizer, schedule

    def configure_model(self) -> None:
        """Build the model of a `ModelConfig`, once, and look at its output layer; Lightning may call this again.

        Raises:
            UserError: the model's logits cannot be left out, as `cross_entropy` asks for.
        """
        self._build()
        if self.model is not None:  # now, while nothing hangs on its modules yet
            self._without_logits()

    def _build(self) -> None:
        if self.model is not None or self.model_config is None:
            return
        vocab_size = self.vocab_size
        if vocab_size is None:
            tokenizer = getattr(self._datamodule, "tokenizer", None)
            if tokenizer is None:
                raise UserError(
                    "the model's vocabulary is not known: pass vocab_size or a data module with a tokenizer"
                )
            vocab_size = len(tokenizer)
        self.model = build_model(self.model_config, vocab_size, seed=self.seed)

    def configure_optimizers(self) -> Any:
        """One optimizer object and its schedule, stepped with every optimizer step.

        Raises:
            UserError: when the function given as `optimizer` leaves a trainable parameter out.
        """
        model = self._network
        if callable(self.optimizer):
            optimizer = cast("torch.optim.Optimizer", self.optimizer(model))
            left = unstepped(model, optimizer.param_groups)
            if left:
                raise UserError(
                    f"the optimizer was not given the trainable parameter {left[0]} ({len(left):,} in all), which "
                    "would stay as it is: pass it to the optimizer, or freeze it by requires_grad_(False)"
                )
        else:
            optimizer = optim.build(model, self.optimizer, seed=self.projection_seed, scaling=self.scaling)
        self._take_in_backward(optimizer)
        total = self.total_steps
        if total is None:
            estimate = self.trainer.estimated_stepping_batches
            if not math.isfinite(estimate):
                raise UserError("the schedule needs an end: give the Trainer max_steps or the module total_steps")
            total = int(estimate)
        scheduler = build_scheduler(optimizer, self.schedule, total, factor=warmth(model))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def _take_in_backward(self, optimizer: torch.optim.Optimizer) -> None:
        if self.in_backward == "off":
            return
        if not isinstance(optimizer, optim.MatrixOptimizer):
            raise UserError(f"in_backward={self.in_backward!r} needs an optimizer of thinrank: use 'off' with others")
        if self.trainer.world_size > 1:
            raise UserError(
                f"in_backward={self.in_backward!r} needs gradients that are complete after backward, which those of "
                "several processes are not: use 'off'; strategy='thinrank_ddp' frees gradients in backward as well"
            )
        try:
            optimizer.in_backward(self.in_backward, max_norm=self.clip_norm if self.in_backward == "step" else None)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def _own_optimizer(self) -> optim.MatrixOptimizer | None:
        """The optimizer, where it knows more of gradients than `p.grad` says: it takes or exchanges them, or has only
        pieces of them here."""
        if self._strategy_norm is not None:
            return None
        found = self.optimizers(use_pl_optimizer=False)
        if not isinstance(found, optim.MatrixOptimizer) or (self.in_backward == "off" and found.wire is None):
            return None
        return found

    @property
    def _strategy_norm(self) -> Callable[[], Tensor] | None:
        """The norm of gradients that are in the strategy's keeping, which also clips them; None where they are here."""
        return getattr(getattr(self._trainer, "strategy", None), "gradient_norm", None)

    def on_fit_start(self) -> None:
        if self.clip_norm is not None and self.trainer.gradient_clip_val is not None:
            raise UserError(
                f"clipping is set twice, clip_norm={self.clip_norm:g} in the module and "
                f"gradient_clip_val={self.trainer.gradient_clip_val:g} in the Trainer: leave one of them at None"
            )
        tokenizer = getattr(self._datamodule, "tokenizer", None)
        rows = getattr(getattr(self._network, "config", None), "vocab_size", None)
        if tokenizer is not None and rows is not None and len(tokenizer) > rows:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens and the model knows {rows}: build it for this tokenizer"
            )

    # ---- training

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, L, V) of token ids (B, L)."""
        self._check_length(input_ids)
        # Without a cache, and without labels: transformers would shift them once more and average per rank.
        return self._network(input_ids=input_ids, use_cache=False).logits

    def _check_length(self, input_ids: Tensor) -> None:
        longest = getattr(getattr(self._network, "config", None), "max_position_embeddings", None)
        if longest is not None and input_ids.shape[-1] > longest:
            raise UserError(
                f"a sequence of {input_ids.shape[-1]} tokens is longer than the model's {longest}: "
                f"lower data.sequence_length or raise model.max_position_embeddings"
            )

    def _without_logits(self) -> Head | None:
        """The output layer, where the loss comes from what goes into it."""
        if self._looked or self.cross_entropy == "dense":
            return self._head
        try:
            self._head = head_of(self._network)
        except Unfit as error:
            said = f"cross_entropy={self.cross_entropy} cannot leave logits out: {error}"
            if self.cross_entropy != "auto":
                raise UserError(f"{said}; use cross_entropy=dense") from error
            warnings.warn(f"{said}; they are computed", stacklevel=2)
        self._looked = True
        return self._head

    def _loss(self, batch: dict[str, Any], z_loss: float, log_z: bool) -> tuple[Tensor, Tensor, LogZ | None]:
        """The loss of a batch, summed over its labels, how many there are, and log Z if it is asked for."""
        ids, labels = batch["input_ids"], batch["labels"]
        head = self._without_logits()
        if head is not None:
            self._check_length(ids)
            options = {"backend": self.cross_entropy, "z_loss": z_loss, "ignore_index": IGNORE}
            try:
                loss, found = head_loss(self._network, head, ids, labels, statistics=log_z, **options)
            except Unable as error:
                raise UserError(str(error)) from error
            return loss, (labels != IGNORE).sum(), found
        if not (z_loss or log_z):
            return *token_nats(self(ids), labels), None
        flat = labels.flatten()
        loss, every = of_logits(self(ids).flatten(0, -2), flat, IGNORE, z_loss)
        found = None if every is None else log_z_of(every, flat, IGNORE)
        return loss, (labels != IGNORE).sum(), found

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Mean nats per label and what else is trained as `loss`; the nats' sum and count as `nats` and `labels`; with
        `log_z`, in steps that are logged, the mean and the largest log Z as `log_z` and `log_z_max`."""
        self._norm = self.step_limit = None
        if (own := self._own_optimizer) is not None:
            own.accumulating = self.trainer.fit_loop._should_accumulate()
        step = self.trainer.global_step + 1
        read = self.log_z and (step == 1 or step % self.trainer.log_every_n_steps == 0)
        total, count, found = self._loss(batch, self.z_loss, bool(read or self.z_loss))
        loss = total / count.clamp(min=1)  # a batch without any label has no gradient rather than NaN
        nats = total.detach()
        if self.z_loss and found is not None:
            nats = nats - self.z_loss * found.square * count
        if (added := penalty(self._network)) is not None:
            self.log("train/penalty", added.detach(), logger=False, batch_size=len(batch["input_ids"]))
            loss = loss + added
        self._pending_tokens += batch["input_ids"].numel() * self.trainer.world_size
        self._position = batch.get("position")
        shown = nats / count.clamp(min=1) if self.z_loss else loss.detach()
        self.log("train/loss", shown, prog_bar=True, logger=False, batch_size=len(batch["input_ids"]))
        measured = {"log_z": found.mean, "log_z_max": found.max} if read and found is not None else {}
        return {"loss": loss, "nats": nats, "labels": count, **measured}

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients of this step before clipping (scalar), computed on the first call and then kept.

        To be called between the last backward of a step and the step itself: the guard, the clipping and the metrics
        share it.
        """
        own, elsewhere = self._own_optimizer, self._strategy_norm
        if self._norm is None and elsewhere is not None:
            self._norm = elsewhere()
        if self._norm is None and own is not None:
            self._norm = own.gradient_norm()
        if self._norm is None:
            self._norm = total_norm(self.parameters())
        return self._norm

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the shared norm; without `clip_norm`, do what the Trainer was told."""
        if self._strategy_norm is not None:
            return  # it has been told the norm
        own = self._own_optimizer
        limit = min((each for each in (self.clip_norm, self.step_limit) if each is not None), default=None)
        if limit is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif own is not None:
            own.clip_grad_norm_(limit, self.gradient_norm())  # nothing is left where backward has stepped
        else:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), limit, self.gradient_norm())

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then count what the step consumed.

        Here rather than in `on_train_batch_end`, where callbacks come before the module: one that saves a checkpoint
        there would save the position of the step before.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trainer.fit_loop._should_accumulate():
            return  # a strategy that accumulates by itself (DeepSpeed) comes here for every micro-batch
        self.consumed_tokens += self._pending_tokens
        self._pending_tokens = 0
        advance = getattr(self._datamodule, "advance", None)
        if advance is not None:
            if self._position is None:
                raise UserError(
                    "the data module counts its position: put `position` into its batches or drop `advance`"
                )
            advance(int(self._position))

    # ---- evaluation

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add this batch's nats and labels to the sums."""
        nats, count, _ = self._loss(batch, 0.0, False)
        self._sums += torch.stack([nats.double(), count.double()])

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same as `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        nats, count = cast("Tensor", self.trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")).tolist()
        if count == 0:
            raise UserError("the evaluation set has no label: give it more text or a shorter data.sequence_length")
        loss = nats / count
        metrics = {f"{stage}/loss": loss, f"{stage}/perplexity": math.exp(loss) if loss < 700 else math.inf}
        ratio = self._ratio(stage)
        if ratio is not None:
            metrics[f"{stage}/bits_per_byte"] = loss / math.log(2) / ratio
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        # The values are equal on all ranks already; the mean over them only satisfies Lightning's rule.
        connected = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.log_dict(metrics, logger=False if fitting else None, sync_dist=connected)
        if fitting and not self.trainer.sanity_checking:
            # To the loggers directly: Lightning would count a validation inside of training to the step before.
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.trainer.global_step)

    def _ratio(self, stage: str) -> float | None:
        given = self.bytes_per_token
        if isinstance(given, Mapping):
            return given.get(stage)
        if given is not None:
            return float(given)
        name = {"val": "validation_bytes_per_token", "test": "test_bytes_per_token"}[stage]
        return getattr(self._datamodule, name, None)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["consumed_tokens"] = self.consumed_tokens
        if not self.save_frozen:
            for name in frozen_names(self):
                checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.consumed_tokens = checkpoint.get("consumed_tokens", 0)  # absent in a checkpoint of another module
        if not self.save_frozen:
            own = self.state_dict()
            for name in frozen_names(self):
                checkpoint["state_dict"].setdefault(name, own[name])

    # ---- what is attached

    @property
    def _network(self) -> nn.Module:
        if self.model is None:
            raise UserError("the model is not built yet: call configure_model or start a Trainer first")
        return self.model

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)
