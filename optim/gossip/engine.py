"""Ranks that train apart under DeepSpeed: its engine steps, and weights are exchanged in the place of gradients."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thinrank.optim.gossip.exchange import Gossip
from thinrank.optim.gossip.trained import Trained, trained_parameters
from thinrank.versions import requirement, untested


class EngineGossip(Gossip):
    """`Gossip` after the steps of a DeepSpeed engine of stage 0, whose own exchange of gradients it switches off.

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0}, "bf16": {"enabled": True},
        })
        exchange = EngineGossip(engine, topology="ring", scheme="choco", compressor="uniform4")
        for batch in batches:
            engine.backward(engine(batch))
            engine.step()
            exchange.step()

    Accumulation, clipping and the scheduler are the engine's, each rank by itself: gradients are clipped by the norm of
    this rank's (DeepSpeed would take the mean of all ranks' norms where weights are float32), and a rank whose bfloat16
    gradients are not finite leaves that step out alone, its scheduler's too (DeepSpeed would ask all ranks at every
    step). No step of the engine waits for other ranks any more, and none of its gradients leave a rank. It cannot go
    back to exchanging gradients.

    Of bfloat16 weights the float32 masters of DeepSpeed's wrapper are exchanged, and the weights are their rounding.
    DeepSpeed decays its masters once by `lr · weight_decay` while it is initialised, in a step without gradients.
    thinrank's optimizers know only the parameters that they were built for, which this wrapper replaces: give them
    float32 weights, and the model bfloat16 by DeepSpeed's `torch_autocast`.

    `engine.save_checkpoint` knows the first rank alone. To go on, every rank saves `engine.optimizer.state_dict()`, its
    scheduler's and `state_dict()`, after a step that was not in the midst of accumulation, and loads them in that
    order.

    Not for Lightning: its `DeepSpeedStrategy` is for CUDA only and does not know of this; `GossipStrategy` of
    `thinrank.trainers.strategies` is Lightning's way.

    Args:
        engine: what `deepspeed.initialize` returns first, with weights in float32 or bfloat16 (or in float32 under
            `torch_autocast`) and an optimizer that it has not fused.
        options: of `Gossip`, its model and optimizer left out; `interval` counts the engine's steps.

    Raises:
        RuntimeError: without a process group.
        ValueError: for an engine that cuts weights, gradients or state, or scales its loss; and as `Gossip` does.
    """

    def __init__(self, engine: Any, **options: Any) -> None:
        refuse_engine(engine)
        self.engine = engine
        self._stepped = engine.global_steps
        super().__init__(engine.module, engine.optimizer, **options)
        _keep_apart(engine)

    def _find(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trained:
        return _EngineTrained(self.engine)

    def step(self) -> None:
        """Exchanges, if the engine has stepped since the last call and an exchange is due; to be called by all ranks
        after each `engine.step()`, of which those in the midst of accumulation are no steps.

        A step that the engine has left out, because its gradients were not finite, counts: others have taken it.

        Raises:
            PeerLost: a neighbour does not answer.
        """
        if self.engine.global_steps != self._stepped:
            self._stepped = self.engine.global_steps
            super().step()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Gossip.load_state_dict`; after the state of the engine's optimizer has been loaded."""
        super().load_state_dict(state)
        self._stepped = self.engine.global_steps

    def restart(self) -> None:
        """See `Gossip.restart`; masters start again from weights that were changed."""
        super().restart()
        self._stepped = self.engine.global_steps


class _EngineTrained(Trained):
    """Masters are those of DeepSpeed's wrapper of 16-bit weights, which steps them in the place of the model's."""

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        self._masters: dict[Tensor, Tensor] = {}
        if _wrapped(engine):
            for params, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
                self._masters.update(zip(params, masters, strict=True))
        stepped = self._masters if self._masters else None
        self.params = trained_parameters(engine.module, engine.basic_optimizer, stepped)

    def master(self, param: Tensor) -> Tensor | None:
        return self._masters.get(param)


def _wrapped(engine: Any) -> bool:
    """Whether DeepSpeed steps float32 copies, in the shapes of the weights."""
    return type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer"


def _keep_apart(engine: Any) -> None:
    """Takes out of the engine's steps all that would be summed over ranks."""
    engine.enable_backward_allreduce = False
    if _wrapped(engine):
        engine.optimizer.overflow_checker.deepspeed = None  # by it, it would see that all ranks have to be asked
    engine.clip_fp32_gradients = functools.partial(_clip, engine)


def _clip(engine: Any) -> None:
    torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())


# --- refusals ---------------------------------------------------------------------------------------------------------

_NEEDS = (
    "module", "optimizer", "basic_optimizer", "global_steps", "gradient_clipping", "clip_fp32_gradients",
    "zero_optimization_stage", "zero_use_cpu_optimizer", "zero_offload_param", "fp16_enabled", "bfloat16_enabled",
)  # fmt: skip
_NEEDS_WRAPPED = ("fp16_groups", "fp32_groups", "overflow_checker")


def _offload(engine: Any) -> bool:
    return engine.zero_use_cpu_optimizer() or getattr(engine.zero_offload_param(), "device", "none") != "none"


_REFUSED: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (
        lambda engine: getattr(engine, "pipeline_parallelism", False),
        "a pipeline has other layers on other ranks, which have nothing to average: use deepspeed.initialize with a "
        "model that is whole on every rank",
    ),
    (
        lambda engine: getattr(engine, "has_moe_layers", False),
        "experts differ between ranks, and an average of all would mix them: train a model without DeepSpeed's experts",
    ),
    (
        lambda engine: (
            getattr(engine, "mpu", None) is not None
            or getattr(engine, "mp_world_size", 1) > 1
            or getattr(engine, "sequence_parallel_size", 1) > 1
            or getattr(engine, "optimized_linear_base_weight_sharding", False)
        ),
        "tensor or sequence parallelism makes several ranks one, and an exchange is between ranks that have a whole "
        "model each: leave mpu, tensor_parallel, sequence_parallel_size and sharded base weights out",
    ),
    (
        lambda engine: engine.fp16_enabled() or getattr(engine, "torch_autocast_z0_gradscaler", None) is not None,
        "float16 needs a scale of the loss, which would go its own way on every rank, and with it left out steps and "
        "learning rates: use bf16",
    ),
    (
        _offload,
        "offload keeps values on another device than the weights that are exchanged: leave offload_optimizer and "
        "offload_param out",
    ),
    (
        lambda engine: engine.optimizer is None or type(engine.optimizer).__name__ == "DummyOptim",
        "the engine has no optimizer: give one to deepspeed.initialize",
    ),
    (
        lambda engine: getattr(engine.optimizer, "fused_lamb_legacy", False),
        "DeepSpeed's fused LAMB asks all ranks at every step whether gradients are finite: use an optimizer of torch's",
    ),
)


def refuse_engine(engine: Any) -> None:
    """A ValueError, with the remedy, where ranks that exchange weights would not be what this engine trains."""
    if not hasattr(engine, "enable_backward_allreduce"):
        raise ValueError(
            f"EngineGossip takes DeepSpeed's engine, got {type(engine).__name__}: give it what deepspeed.initialize "
            "returns first, or use Gossip(model, optimizer) without DeepSpeed"
        )
    version = getattr(sys.modules.get("deepspeed"), "__version__", None)
    if version is not None and (sentence := untested("DeepSpeed", version)) is not None:
        raise ValueError(sentence)
    _refuse_missing(engine, _NEEDS, version)
    stage = int(engine.zero_optimization_stage())
    if stage:
        raise ValueError(
            f"ZeRO-{stage} has each rank step a piece of the weights by the mean of all gradients, so that no rank has "
            "weights of its own to exchange: set zero_optimization.stage to 0"
        )
    for holds, sentence in _REFUSED:
        if holds(engine):
            raise ValueError(sentence)
    kind = type(engine.optimizer).__name__
    if _wrapped(engine):
        _refuse_missing(engine.optimizer, _NEEDS_WRAPPED, version)
    elif engine.bfloat16_enabled() or engine.optimizer is not engine.basic_optimizer:
        raise ValueError(
            f"DeepSpeed {version} steps this optimizer through a {kind}, which joins weights into vectors of its own: "
            "use an optimizer of torch's, which it does not fuse"
        )


def _refuse_missing(what: Any, names: tuple[str, ...], version: str | None) -> None:
    for name in names:
        if not hasattr(what, name):
            raise ValueError(
                f"DeepSpeed {version} has no {name} in its {type(what).__name__}, on which the exchange relies: pip "
                f"install '{requirement('DeepSpeed')}'"
            )
