"""DeepSpeed's engine for an optimizer of matrices: how it is made, what weights it holds, and how they become a model's
again. Lightning's strategies (`strategies.zero`) do with it what a plain loop does::

    optimizer = build(model, GaLoreConfig(rank=128))
    run = zero.initialize(model, optimizer, {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}})
    for batch in my_share_of_the_data:
        run.engine.backward(loss(run.engine, batch))
        run.engine.step()
    torch.save([run.weights(), optimizer.full_state_dict()], path)  # all ranks ask, the first one has them
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinrank.optim import MatrixOptimizer
from thinrank.optim.zero import ZeroFront, refuse_offload
from thinrank.trainers.errors import UserError
from thinrank.trainers.versions import require, warn_of_newer_torch

STALE_SECONDS = 1800.0
"""No compilation of DeepSpeed's takes half an hour."""

CHUNK_BYTES = 256 * 2**20
"""Whole float32 weights that are on their way to the first rank at once."""


def load_deepspeed() -> Any:
    """The package, for the machine's accelerator.

    Without a GPU it runs on the CPU with plain gloo: its own shared-memory collectives would be compiled first, for a
    minute, with a lock that a killed process leaves behind.

    Warns:
        UserWarning: torch is newer than what it has been tested with.

    Raises:
        UserError: it is not installed, in a version that has not been tested, or a lock of a killed compilation would
            keep it waiting for ever.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _refuse_stale_lock()
    with quiet_deepspeed():
        try:
            import deepspeed
            import deepspeed.ops
        except ImportError as error:
            raise UserError(
                f"ZeRO needs DeepSpeed ({error}): install it with pip install 'thinrank[deepspeed]'"
            ) from error
    require("DeepSpeed", deepspeed.__version__)
    warn_of_newer_torch("ZeRO")
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Keeps from a user what he can do nothing about: how DeepSpeed calls torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        yield


def _name_local_rank() -> bool:
    """DeepSpeed insists on this variable, when it starts and in ZeRO-3's passes; launchers set it, and a process alone,
    or a forked one, has none. True when it was set here."""
    if "LOCAL_RANK" in os.environ:
        return False
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return True


def _refuse_stale_lock() -> None:
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    for lock in (*Path(root).glob("*/lock"), *Path(root).glob("*/*/lock")):
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            continue  # just finished
        if age > STALE_SECONDS and lock.parent.name.startswith("deepspeed"):
            raise UserError(
                f"a compilation of DeepSpeed's that was killed has left {lock}, for which every later one waits "
                "without a word: delete it"
            )


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses what DeepSpeed's configuration must not ask for, before DeepSpeed sees it.

    Raises:
        UserError: for offload (`thinrank.optim.zero.refuse_offload`).
    """
    try:
        refuse_offload(config)
    except ValueError as error:
        raise UserError(str(error)) from error


def initialize(model: nn.Module, optimizer: MatrixOptimizer, config: Mapping[str, Any], **options: Any) -> ZeroRun:
    """`deepspeed.initialize` for an optimizer of matrices, bound to its engine; all ranks call it.

    Args:
        model: with whole weights; DeepSpeed changes it in place.
        optimizer: what `thinrank.optim.build` made for it; it goes on being who steps, and its groups hold the rates.
        config: DeepSpeed's own, as a dict, with `zero_optimization.stage` 1, 2 or 3.
        options: of `deepspeed.initialize`.

    Raises:
        UserError: for a configuration or a version under which the steps would not be those of one process.
        RuntimeError: without a process group.
    """
    if not dist.is_initialized():
        raise RuntimeError("ZeRO needs a process group: call torch.distributed.init_process_group before")
    check_config(config)
    deepspeed = load_deepspeed()
    before = _Before(model)
    before.named_local_rank = _name_local_rank()
    try:
        front = ZeroFront(optimizer)
        with quiet_deepspeed():
            engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=[param for param in model.parameters() if param.requires_grad],
                optimizer=front,
                config={"zero_allow_untested_optimizer": True, **config},
                **options,
            )
        before.restore_buffers(model)
        front.bind(engine)
    except ValueError as error:
        raise UserError(str(error)) from error
    return ZeroRun(engine, front, before)


class ZeroRun:
    """An engine and the optimizer that steps for it.

    Attributes:
        engine: DeepSpeed's.
        front: what DeepSpeed takes for the optimizer.
    """

    def __init__(self, engine: Any, front: ZeroFront, before: _Before) -> None:
        self.engine, self.front, self._before = engine, front, before

    def gradient_norm(self) -> Tensor:
        """See `ZeroFront.gradient_norm`."""
        return self.front.gradient_norm()

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The model's `state_dict` as one process would have it, what is trained in float32, on the CPU of the first
        rank; {} on the others. All ranks call it."""
        module: nn.Module = self.engine.module
        names, shards, first = _names(module), self.front.shards, dist.get_rank() == 0
        whole: dict[str, Tensor] = {}
        for some in _in_chunks([param for param in names if param in shards], shards.shape):
            for param, value in zip(some, shards.whole(some), strict=True):
                if value is not None:
                    value = value.view(shards.shape(param)).to("cpu", copy=True)  # on one rank it is the master itself
                    whole |= dict.fromkeys(names[param], value)
        for param in names:
            if param not in shards:
                with self._gathered([param]):
                    value = param.detach().to("cpu", copy=True) if first else torch.empty(0)
                whole |= dict.fromkeys(names[param], value)
        rest = module.state_dict()
        return {name: whole[name] if name in whole else rest[name].to("cpu", copy=True) for name in rest if first}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Takes whole weights, of `weights` or of one process; all ranks call it, each with all of them.

        Raises:
            RuntimeError: with `strict`, where names differ; and where shapes do.
        """
        module: nn.Module = self.engine.module
        names = _names(module)
        wanted = module.state_dict().keys()
        missing, unexpected = wanted - weights.keys(), weights.keys() - wanted
        if strict and (missing or unexpected):
            raise RuntimeError(f"the weights have other names: missing {sorted(missing)}, unknown {sorted(unexpected)}")
        tensors: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
        for param, own in names.items():
            given = next((weights[name] for name in own if name in weights), None)
            if given is None:
                continue
            shape = self.front.shards.shape(param)
            if tuple(given.shape) != shape:
                raise RuntimeError(f"{own[0]} is {tuple(given.shape)} in the weights, and {shape} in the model")
            if hasattr(param, "ds_id"):
                with self._gathered([param], modifier_rank=0):
                    param.data.copy_(given)
            else:
                param.data.copy_(given)
            if param in self.front.shards:
                self.front.shards.set_(param, given)
        for name in wanted & weights.keys() & tensors.keys():
            tensors[name].copy_(weights[name])

    @torch.no_grad()
    def release(self) -> None:
        """Ends the engine, and leaves an ordinary model with whole weights, in the dtypes that they had before.

        All ranks call it.
        """
        module: nn.Module = self.engine.module
        names, shards = _names(module), self.front.shards
        trained = [param for param in names if param in shards]
        whole: dict[Tensor, Tensor] = {}
        for some in _in_chunks(trained, shards.shape):
            pairs = zip(some, shards.everywhere(some), strict=True)
            whole |= {param: value.to(self._before.dtypes.get(param, value.dtype)) for param, value in pairs}
        for param in names:
            if param not in shards:
                with self._gathered([param]):
                    whole[param] = param.detach().to(self._before.dtypes.get(param, param.dtype), copy=True)
        shards.remove()
        self.engine.destroy()
        self._before.restore(module)
        if self._before.named_local_rank:
            os.environ.pop("LOCAL_RANK", None)
        for param, value in whole.items():
            param.data = value
            param.grad = None

    @contextmanager
    def _gathered(self, params: list[Any], **how: Any) -> Iterator[None]:
        with quiet_deepspeed(), sys.modules["deepspeed"].zero.GatheredParameters(params, **how):
            yield


class _Before:
    """What DeepSpeed hangs on a model, by what hung there before."""

    HOOKS = (
        "_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks",
        "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
    )  # fmt: skip

    named_local_rank = False

    def __init__(self, model: nn.Module) -> None:
        self.dtypes = {param: param.dtype for param in model.parameters()}
        self.buffers = {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}
        self._attributes = {param: set(vars(param)) for param in model.parameters()}
        self._hooks = {(module, kind): set(getattr(module, kind)) for module in model.modules() for kind in self.HOOKS}

    def restore_buffers(self, model: nn.Module) -> None:
        """Takes back that DeepSpeed has rounded buffers together with the weights, such as rotary frequencies."""
        for name, buffer in model.named_buffers():
            if name in self.buffers and buffer.dtype != self.buffers[name].dtype:
                buffer.data = self.buffers[name].to(buffer.device)
        self.buffers.clear()

    def restore(self, model: nn.Module) -> None:
        for module in model.modules():
            module._parameters = dict(module._parameters.items())
            for kind in self.HOOKS:
                hooks = getattr(module, kind)
                for key in [key for key in hooks if key not in self._hooks.get((module, kind), ())]:
                    del hooks[key]
            for key in [key for key in vars(module) if key.startswith(("ds_", "_ds_", "_original_parameters"))]:
                delattr(module, key)
        for param in model.parameters():
            for key in set(vars(param)) - self._attributes.get(param, set()):
                delattr(param, key)


def _names(module: nn.Module) -> dict[Any, list[str]]:
    """Every parameter with all of its names, in order."""
    found: dict[Any, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        found.setdefault(param, []).append(name)
    return found


def _in_chunks(params: Sequence[Any], shape: Any) -> Iterator[list[Any]]:
    some: list[Any] = []
    held = 0
    for param in params:
        some.append(param)
        held += 4 * torch.Size(shape(param)).numel()
        if held >= CHUNK_BYTES:
            yield some
            some, held = [], 0
    if some:
        yield some
