"""What DeepSpeed steps in the place of an optimizer of matrices, which goes on stepping whole matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.exchange.zero import ZeroShards, partitioned, refuse_offload
from thinrank.optim.optimizer import MatrixOptimizer

__all__ = ["ZeroFront", "refuse_offload"]


class ZeroFront(torch.optim.Optimizer):
    """An optimizer for `deepspeed.initialize`, whose steps are those of `optimizer`.

        optimizer = build(model, config)
        front = ZeroFront(optimizer)
        engine, *_ = deepspeed.initialize(model=model, optimizer=front, config=settings)
        front.bind(engine)

    ZeRO replaces the parameters of the optimizer that it is given by flat slices, and steps these group by group. It
    does so to this object, and `optimizer` never sees it: in every step it is told which of the model's parameters
    DeepSpeed is stepping, finds their pieces on all ranks (`exchange.zero`), and writes into DeepSpeed's own float32
    masters.

    The values of a group (`lr`, `weight_decay`, …) are those of `optimizer`: what is written into `front.param_groups`
    is written there, so that schedulers of either, DeepSpeed's own among them, act. `clip_grad_norm_` and
    `gradient_norm` of `optimizer` see nothing of the engine's gradients: clip by `gradient_clipping` in DeepSpeed's
    configuration, and ask `gradient_norm` here.

    Args:
        optimizer: built before `deepspeed.initialize`, from a model whose weights are whole.

    Raises:
        ValueError: where the weights were in pieces when `optimizer` was built.
    """

    def __init__(self, optimizer: MatrixOptimizer) -> None:
        _refuse_partitioned(optimizer)
        trained = [[p for p in group["params"] if p.requires_grad and _elements(p)] for group in optimizer.param_groups]
        super().__init__([{"params": params} for params in trained if params], {})
        self.optimizer = optimizer
        self.param_groups: list[Any] = [
            _Group(optimizer, index, params) for index, params in enumerate(trained) if params
        ]
        self._shards: ZeroShards | None = None
        self._engine: Any = None
        self._skipped_at = -1
        self._clipped_from: float | None = None  # what DeepSpeed clips to otherwise

    def bind(self, engine: Any) -> None:
        """Reads where `engine`'s ZeRO has put the weights, and hands each rank the state of what it will step.

        All ranks call it, once, after `deepspeed.initialize` and before the first forward.

        Raises:
            ValueError: for a DeepSpeed, or settings of it, under which the steps would not be those of one process.
        """
        self._engine = engine
        named = [
            (name, param)
            for index, group in enumerate(self.optimizer.param_groups)
            for name, param in zip(self.optimizer.names(index), group["params"], strict=True)
        ]
        self._shards = ZeroShards(engine, named)
        self.optimizer.shard(self._shards)

    @property
    def shards(self) -> ZeroShards:
        if self._shards is None:
            raise RuntimeError("the optimizer is not bound to an engine: call bind(engine) after deepspeed.initialize")
        return self._shards

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """The step of those groups that DeepSpeed has left in `param_groups`; before `bind`, of zero gradients only."""
        flats = [flat for group in self.param_groups for flat in group["params"] if flat.grad is not None]
        if self._shards is None:
            if any(bool(flat.grad.any()) for flat in flats):
                raise RuntimeError(
                    "a step with gradients came before the optimizer was bound to the engine: call bind(engine) right "
                    "after deepspeed.initialize"
                )
            return
        for flat in flats:
            if self._skipped_at != self._engine.global_steps:
                self.optimizer.step_of(self._shards.behind(flat), last=self._shards.is_last(flat))
            if self._shards.is_last(flat):
                self._shards.finish()
                if self._clipped_from is not None:
                    self._engine.optimizer.clip_grad, self._clipped_from = self._clipped_from, None
                setattr(self.optimizer, "_opt_called", True)  # noqa: B010 - torch's schedulers look whether it has stepped before them

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients before clipping (scalar), infinite where one is no number; all ranks call it, between
        the last `engine.backward` of a step and `engine.step`."""
        return self.shards.norm()

    def clip_step(self, limit: float) -> None:
        """Has the coming `engine.step`, and no later one, scale all gradients to a norm of at most `limit`, or of what
        DeepSpeed's configuration says (`gradient_clipping`), where that is less; all ranks call it."""
        zero = self._engine.optimizer
        usual = zero.clip_grad if self._clipped_from is None else self._clipped_from
        zero.clip_grad, self._clipped_from = min(limit, usual) if usual else limit, usual

    def skip_step(self) -> None:
        """Throws the gradients of a step away: the coming `engine.step` leaves weights and state as they are; all ranks
        call it after the last `engine.backward`."""
        self.shards.discard()
        self._skipped_at = self._engine.global_steps

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError(
            "the state of an optimizer of matrices is not in DeepSpeed's slices, so engine.save_checkpoint would lose "
            "it: save optimizer.full_state_dict(), and whole weights by ZeroRun.weights() of thinrank.trainers.zero"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise RuntimeError("load the state into the optimizer itself: optimizer.load_state_dict(full_state)")


class _Group(MutableMapping[str, Any]):
    """The values of a group of an optimizer, beside other parameters."""

    def __init__(self, optimizer: MatrixOptimizer, index: int, params: list[Any]) -> None:
        self._optimizer, self._index, self._params = optimizer, index, params

    @property
    def _own(self) -> dict[str, Any]:
        return self._optimizer.param_groups[self._index]  # asked for each time: loading a state makes new ones

    def __getitem__(self, key: str) -> Any:
        return self._params if key == "params" else self._own[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "params":
            self._params = value
        else:
            self._own[key] = value

    def __delitem__(self, key: str) -> None:
        raise KeyError(f"{key} belongs to the optimizer behind this one")

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def _elements(param: Tensor) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def _refuse_partitioned(optimizer: MatrixOptimizer) -> None:
    for index, group in enumerate(optimizer.param_groups):
        for name, param in zip(optimizer.names(index), group["params"], strict=True):
            whole = any(value.numel() > 1 for value in optimizer.state[param].values())
            if partitioned(param) and not whole and prod(getattr(param, "ds_shape", ())) > 1:
                raise ValueError(
                    f"{name} was in pieces when the optimizer was built, so that its shape was not known: call build "
                    "inside of deepspeed.zero.GatheredParameters(list(model.parameters()))"
                )
