"""Lightning's strategy for a model that torch's `fully_shard` has cut into rows (FSDP2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from thinrank.optim import MatrixOptimizer
from thinrank.optim.replicated import equalise
from thinrank.trainers.errors import UserError
from thinrank.trainers.strategies.config import MESSAGE_DTYPES, FSDP2Config, norms_travel
from thinrank.trainers.strategies.one_file import OneFile
from thinrank.trainers.strategies.replicated import asks_for_norms
from thinrank.trainers.strategies.units import blocks, network, refuse
from thinrank.trainers.strategies.unwrapped import checked
from thinrank.trainers.versions import warn_of_newer_torch

POLICIES: dict[str, MixedPrecisionPolicy] = {
    "32-true": MixedPrecisionPolicy(),
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32),
}
"""What is gathered and how gradients are summed up, by the Trainer's precision. Weights are stepped in the dtype that
they have: float32 but with `bf16-true`."""

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FSDP2Strategy(OneFile, ModelParallelStrategy):
    """Every process holds rows of every weight and of its gradient and, by thinrank's optimizers, a part of the state.

    `Trainer(strategy="thinrank_fsdp2")` after `import thinrank.trainers`, or an object of this class for other
    settings. The model needs no code for it: once `configure_model` has run, all ranks are given the first one's
    weights, and each transformer block and the rest are sharded (`thinrank.trainers.strategies.units` says what is a
    block). Gradients of every micro-batch are summed up and cut at once, so that no rank ever holds them whole.
    Checkpoints are one file, as of one process. Optimizers of torch that work element by element may be used, too.

    Args:
        replicas: groups of consecutive processes that each hold the whole model in pieces; 1: all are one group.
        reshard_after_forward: a block's whole weights are dropped after forward and fetched again in backward.
        messages: what replicas exchange. `full`: gradients, which torch averages in backward, of every micro-batch.
            `auto`: once a step what its updates need of them, coordinates of matrices that are stepped by rows
            (`MatrixOptimizer.replicate`); gradients are then clipped by the norm of what is left of them.
        dtype: of the messages of `auto`: `auto` (float32 for coordinates, a gradient's own), `float32`, `bfloat16`.
        norms: beside coordinates, as in `ReplicatedStrategy`: `auto` (where somebody may ask for them), or `always`.
        check_every: steps between two looks at whether what several processes hold alike is still the same; None:
            never.
        options: `process_group_backend` and `timeout` of Lightning's `ModelParallelStrategy`.

    Warns:
        UserWarning: torch is newer than what has been tested.

    Raises:
        UserError: for bad values, or a Lightning that has not been tested; in `fit` and its kin for a precision, a
            number of processes or a model that do not suit.
    """

    def __init__(
        self,
        *,
        replicas: int = 1,
        reshard_after_forward: bool = True,
        messages: str = "full",
        dtype: str = "auto",
        norms: str = "auto",
        check_every: int | None = 100,
        **options: Any,
    ) -> None:
        self._choice = checked(
            FSDP2Config,
            replicas=replicas,
            reshard_after_forward=reshard_after_forward,
            messages=messages,
            dtype=dtype,
            norms=norms,
            check_every=check_every,
        )
        warn_of_newer_torch("thinrank_fsdp2")
        super().__init__(save_distributed_checkpoint=False, **options)
        self.replicas, self.reshard_after_forward = replicas, reshard_after_forward

    @property
    def _islands(self) -> bool:
        """Whether the optimizer exchanges between replicas, and torch knows of the processes of one alone."""
        return self._choice.messages == "auto"

    # --- where the pieces lie -----------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        self._setup_distributed()
        if self.world_size % self.replicas:
            raise UserError(
                f"replicas must divide the {self.world_size} processes, got {self.replicas}: use 1 for one group of "
                "all, or start more processes"
            )
        if self._device_mesh is None:  # later stages go on with the mesh on which the model lies
            shape, names = (self.replicas, self.world_size // self.replicas), ("replicas", "shards")
            alone = self.replicas == 1
            self._device_mesh = init_device_mesh(
                self.root_device.type, shape[1:] if alone else shape, mesh_dim_names=names[1:] if alone else names
            )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def _pieces_mesh(self) -> DeviceMesh:
        """The processes that torch cuts weights for and averages gradients over."""
        assert self.device_mesh is not None
        return self.device_mesh["shards"] if self._islands else self.device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        root = network(module)
        if not self._is_ours(root):
            self._shard(module, root)
        self.model_to_device()  # metrics and buffers outside of the network
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, module: nn.Module, root: nn.Module) -> None:
        units = blocks(root)
        refuse(root, units)
        policy = self._policy()
        self.precision_plugin.convert_module(module)
        mesh = self._pieces_mesh
        options = {"mesh": mesh, "reshard_after_forward": self.reshard_after_forward, "mp_policy": policy}
        for unit in units:
            self._from_first(unit)
            fully_shard(unit, **options)
        self._from_first(root)
        if root is module:  # what a step is given are data, targets among them, whose precision is the user's
            policy = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
        fully_shard(root, mesh=mesh, mp_policy=policy)  # its weights are needed as soon as backward begins
        if root is module:
            for name in STEPS:
                register_fsdp_forward_method(module, name)

    def _from_first(self, module: nn.Module) -> None:
        """Brings a module that is not sharded yet, whatever inside of it is, to its device, with rank 0's weights."""
        done = {param for param in module.parameters() if isinstance(param, DTensor)}
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor not in done:
                tensor.data = tensor.data.to(self.root_device)
        equalise(module, but=done)

    def _is_ours(self, root: nn.Module) -> bool:
        """Whether an earlier stage, or another Trainer with the same settings, has sharded it."""
        if not isinstance(root, FSDPModule):
            return False
        meshes = [param.device_mesh for param in root.parameters() if isinstance(param, DTensor)]
        computes_in = root._get_fsdp_state()._mp_policy.param_dtype
        return computes_in == self._policy().param_dtype and all(mesh == self._pieces_mesh for mesh in meshes)

    def _policy(self) -> MixedPrecisionPolicy:
        precision = str(self.precision_plugin.precision)
        if precision not in POLICIES:
            raise UserError(
                f"thinrank_fsdp2 computes in {', '.join(POLICIES)}, got precision={precision!r}: use one of them"
            )
        return POLICIES[precision]

    # --- optimizers ---------------------------------------------------------------------------------------------------

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        module = self.lightning_module
        for optimizer in self.optimizers:
            if isinstance(optimizer, MatrixOptimizer):
                optimizer.check_every = self._choice.check_every
            if self._islands:
                self._exchange(optimizer, norms_travel(self._choice.norms, asks_for_norms(trainer, module)))
        self.precision_plugin.clip_grad_by_norm = _clip_by_norm
        self.precision_plugin.clip_grad_by_value = _refuse_by_value if self._islands else _clip_by_value

    def _exchange(self, optimizer: Optimizer, norms: bool) -> None:
        if not isinstance(optimizer, MatrixOptimizer):
            raise UserError(
                f"messages='auto' leaves the exchange between replicas to thinrank's optimizers, and "
                f"{type(optimizer).__name__} is none: return thinrank.optim.build(self, config) from "
                "configure_optimizers, or use messages='full'"
            )
        assert self.device_mesh is not None
        optimizer.replicate(
            self.device_mesh["replicas"].get_group(),
            dtype=MESSAGE_DTYPES[self._choice.dtype],
            norms=norms,
            check_every=self._choice.check_every,
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def whole_weights(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        weights = _gathered(self.lightning_module.state_dict(keep_vars=True), self.is_global_zero)
        return OrderedDict(weights)

    def load_whole_weights(self, weights: Mapping[str, Any], strict: bool) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        pieces = {name: _piece(value, own.get(name)) for name, value in weights.items()}
        self.lightning_module.load_state_dict(pieces, strict=strict)

    def whole_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, MatrixOptimizer):
            return optimizer.full_state_dict()
        return _gathered(optimizer.state_dict(), self.is_global_zero)

    def load_whole_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if not isinstance(optimizer, MatrixOptimizer):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            whole = {
                index: {
                    key: _piece(value, params[index]) if getattr(value, "shape", None) == params[index].shape else value
                    for key, value in entries.items()
                }
                for index, entries in state["state"].items()
            }
            state = {**state, "state": whole}
        optimizer.load_state_dict(state)


def _gathered(tree: Any, keep: bool, seen: dict[Tensor, Tensor] | None = None) -> Any:
    """`tree` with every tensor whole and in CPU memory where `keep`, else {}; tied weights stay tied."""
    seen = {} if seen is None else seen
    if isinstance(tree, Mapping):
        found = {key: _gathered(value, keep, seen) for key, value in tree.items()}
        return found if keep else {}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_gathered(value, keep, seen) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    if tree not in seen:
        whole = tree.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()  # a message: on every rank, in the same order
        seen[tree] = whole.cpu() if keep else torch.empty(0)
    return seen[tree]


def _piece(value: Any, like: Any) -> Any:
    """What this rank holds of `value`, where `like` is sharded."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != like.shape:
        return value  # whoever loads it says so
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _clip_by_norm(optimizer: Optimizer, clip_val: float) -> None:
    found = getattr(optimizer, "_optimizer", optimizer)  # inside of Lightning's wrapper
    if isinstance(found, MatrixOptimizer):
        found.clip_grad_norm_(clip_val)
    else:
        torch.nn.utils.clip_grad_norm_([p for group in found.param_groups for p in group["params"]], clip_val)


def _refuse_by_value(optimizer: Optimizer, clip_val: float) -> None:
    raise UserError(
        f"gradient_clip_algorithm='value' with {clip_val:g} needs whole gradients, which messages='auto' does not "
        "send: use 'norm', or messages='full'"
    )


def _clip_by_value(optimizer: Optimizer, clip_val: float) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                grad = param.grad
                (grad.to_local() if isinstance(grad, DTensor) else grad).clamp_(-clip_val, clip_val)
