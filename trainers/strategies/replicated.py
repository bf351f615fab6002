"""Lightning's strategy for replicas that exchange coordinates instead of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from thinrank.optim import MatrixOptimizer
from thinrank.optim.messages import BUCKET_BYTES
from thinrank.optim.remembering import MEMORIES_EVERY
from thinrank.trainers.errors import UserError
from thinrank.trainers.module import CausalLM
from thinrank.trainers.strategies.config import MESSAGE_DTYPES, OwnedConfig, ReplicatedConfig, norms_travel
from thinrank.trainers.strategies.one_file import unwrapped
from thinrank.trainers.strategies.unwrapped import UnwrappedStrategy, checked


class ReplicatedStrategy(UnwrappedStrategy):
    """Every process holds the whole model; what travels is what the optimizer's updates need of gradients.

    `Trainer(strategy="thinrank_ddp")` after `import thinrank.trainers`, or an object of this class for other settings.
    The model is not wrapped. The module's optimizers must be thinrank's, since they are who exchanges
    (`MatrixOptimizer.replicate`, which says what the settings mean). Accumulation, `gradient_clip_val` by norm and
    clipping by `CausalLM` work as ever; a gradient is freed once it is on its way, so that `p.grad` of a matrix is
    None after backward.

    Args:
        messages: `auto` (coordinates where they are enough), `full` (gradients), `signs` or `majority` (coordinates,
            and where a method needs more, signs of the rest, or the sign that most ranks have).
        embeddings: how their gradients travel: `dense`, `rows` (those that any rank touched), `bfloat16` (they and the
            head's rounded to that), or `rows_bfloat16`.
        dtype: of the messages: `auto` (float32 for coordinates, a gradient's own), `float32`, `bfloat16`.
        norms: of gradients, beside coordinates: `auto`, where the Trainer or `CausalLM` clips by norm, or the module
            has a hook of its own by which it may look at them, or `always`.
        overlap: messages leave while backward goes on.
        check_every: steps between two looks at whether the replicas are still equal; None: never.
        memories_every: steps between two means of what ranks remember apart (Dion, LDAdam, feedback); None: never.
        bucket_bytes: least payload of a message.
        options: of Lightning's `DDPStrategy`, but for those of DDP's wrapper.

    Raises:
        UserError: for bad values, or a Lightning that has not been tested; in `fit` for optimizers that do not suit.
    """

    CONFIG: type[ReplicatedConfig] = ReplicatedConfig
    NAME = "thinrank_ddp"
    UNSCALED = "frees gradients in backward, before a loss scaler could look at them"

    def __init__(
        self,
        *,
        messages: str = "auto",
        embeddings: str = "dense",
        dtype: str = "auto",
        norms: str = "auto",
        overlap: bool = True,
        check_every: int | None = 100,
        memories_every: int | None = MEMORIES_EVERY,
        bucket_bytes: int = BUCKET_BYTES,
        **options: Any,
    ) -> None:
        self._exchange: dict[str, Any] = {
            "messages": messages,
            "embeddings": embeddings,
            "dtype": dtype,
            "norms": norms,
            "overlap": overlap,
            "check_every": check_every,
            "memories_every": memories_every,
        }
        checked(self.CONFIG, **self._exchange)
        super().__init__(**options)
        self._norms = norms
        self._exchange |= {"dtype": MESSAGE_DTYPES[dtype], "bucket_bytes": bucket_bytes}

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        try:
            self._exchange["norms"] = norms_travel(self._norms, asks_for_norms(trainer, self.lightning_module))
            for optimizer in self._own():
                self._join(optimizer)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.precision_plugin.clip_grad_by_norm = _clip_by_norm
        self.precision_plugin.clip_grad_by_value = partial(_clip_by_value, self.NAME)

    def _join(self, optimizer: MatrixOptimizer) -> None:
        optimizer.replicate(**self._exchange)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a checkpoint keeps: what one process would, whoever holds it."""
        found = unwrapped(optimizer)
        assert isinstance(found, MatrixOptimizer)  # setup_optimizers has looked
        return found.full_state_dict()

    def _own(self) -> list[MatrixOptimizer]:
        for optimizer in self.optimizers:
            if not isinstance(optimizer, MatrixOptimizer):
                raise UserError(
                    f"{self.NAME} leaves the exchange to thinrank's optimizers, and {type(optimizer).__name__} is "
                    "none: return thinrank.optim.build(self, config) from configure_optimizers, or use strategy='ddp'"
                )
        return self.optimizers  # pyright: ignore[reportReturnType]

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients of micro-batches add up on this rank until the last one."""
        own = self._own()
        for optimizer in own:
            optimizer.accumulating = True
        try:
            yield
        finally:
            for optimizer in own:
                optimizer.accumulating = False


class OwnedStrategy(ReplicatedStrategy):
    """As `ReplicatedStrategy`, with the optimizer's state and the work of its step shared out among the processes.

    `Trainer(strategy="thinrank_owned")`; a matrix is stepped by one process, who tells the others its update
    (`MatrixOptimizer.own`).
    """

    CONFIG = OwnedConfig
    NAME = "thinrank_owned"

    def _join(self, optimizer: MatrixOptimizer) -> None:
        optimizer.own(**self._exchange)


def asks_for_norms(trainer: pl.Trainer, module: pl.LightningModule | None) -> bool:
    """Whether a training clips by the norm of gradients, a guard decides by it, or a user's module has hooks where it
    may ask for it."""
    if trainer.gradient_clip_val is not None or getattr(module, "clip_norm", None) is not None:
        return True
    if any(getattr(callback, "needs_norm", False) for callback in trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
        return True
    if module is None or isinstance(module, CausalLM):
        return False
    hooks = ("configure_gradient_clipping", "on_before_optimizer_step", "optimizer_step")
    return any(is_overridden(hook, module, pl.LightningModule) for hook in hooks)


def _clip_by_norm(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
    found = unwrapped(optimizer)
    assert isinstance(found, MatrixOptimizer)  # setup_optimizers has looked
    found.clip_grad_norm_(clip_val)


def _clip_by_value(strategy: str, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
    raise UserError(
        f"gradient_clip_algorithm='value' with {clip_val:g} needs whole gradients, which {strategy} does not send: "
        "use 'norm'"
    )
