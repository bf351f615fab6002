"""Lightning's strategy for DeepSpeed's ZeRO with an optimizer of matrices, on GPUs and, with gloo, on CPUs."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from thinrank.optim import MatrixOptimizer
from thinrank.trainers import zero
from thinrank.trainers.errors import RollBack, UserError
from thinrank.trainers.module import CausalLM
from thinrank.trainers.strategies.config import steps_or_never
from thinrank.trainers.strategies.one_file import OneFile
from thinrank.trainers.versions import require_lightning

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")

OPTIONS = (
    "timeout", "process_group_backend", "cluster_environment", "logging_level",
    "accelerator", "parallel_devices", "precision_plugin",
)  # fmt: skip
"""Of Lightning's `DeepSpeedStrategy`, which takes no notice of its others beside a configuration."""


class ZeroStrategy(OneFile, DeepSpeedStrategy):
    """DeepSpeed's engine trains, and the module's optimizer steps whole matrices that the engine keeps in pieces.

    `Trainer(strategy="thinrank_zero1")`, `"thinrank_zero2"` or `"thinrank_zero3"` after `import thinrank.trainers`, or
    an object of this class for other settings. The module returns an optimizer of thinrank; `gradient_clip_val` (or
    `CausalLM`'s `clip_norm`) and `accumulate_grad_batches` become settings of DeepSpeed.

    Weights are whole while `configure_optimizers` runs, and again when `fit` is over: evaluation outside of `fit`,
    samples and exports see an ordinary model, which every process then holds. Checkpoints are single files of what one
    process would have, trained weights in float32, for any strategy to go on from.

    Args:
        stage: 1 (state and float32 masters in pieces), 2 (gradients as well), 3 (weights as well).
        bucket: entries of a message of gradients, and of weights.
        overlap: messages leave while backward goes on; on GPUs.
        check_every: steps between two looks at whether what ranks hold alike is still the same; None: never.
        config: more of DeepSpeed's configuration.
        options: of Lightning's `DeepSpeedStrategy` that are no settings of DeepSpeed: `timeout`,
            `process_group_backend`, `cluster_environment`, `logging_level`.

    Raises:
        UserError: for bad values, other options, offload in `config`, or a Lightning or DeepSpeed that has not been
            tested; in `fit` and its kin for a precision, an optimizer or further settings that do not suit.
    """

    def __init__(
        self,
        stage: int = 2,
        *,
        bucket: int = 2**25,
        overlap: bool = True,
        check_every: int | None = 100,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if stage not in (1, 2, 3):
            raise UserError(f"stage must be 1, 2 or 3, got {stage}: choose one of them")
        try:
            steps_or_never("check_every", check_every)
        except ValueError as error:
            raise UserError(str(error)) from None
        self._check_every = check_every
        require_lightning()
        for name in options:
            if name not in OPTIONS:
                raise UserError(
                    f"{name} is none of ZeroStrategy's options, {', '.join(OPTIONS[:4])} among them: give settings of "
                    "DeepSpeed as config={'zero_optimization': {…}}, without offload"
                )
        more = dict(config or {})
        settings = {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
            "stage3_prefetch_bucket_size": bucket,
            "overlap_comm": overlap and torch.cuda.is_available(),
            **more.pop("zero_optimization", {}),
        }
        more["zero_optimization"] = settings
        zero.check_config(more)
        zero.load_deepspeed()
        super().__init__(config=more, **options)
        self._run: zero.ZeroRun | None = None

    # --- the processes ------------------------------------------------------------------------------------------------

    @property
    def _on_cpu(self) -> bool:
        return not isinstance(self.accelerator, CUDAAccelerator)

    def setup_environment(self) -> None:
        if self._on_cpu:  # Lightning knows DeepSpeed on GPUs alone
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if self.world_size == 1 and not dist.is_initialized():
            # without the variables that DeepSpeed would leave in the environment, for a later run to misunderstand
            backend = "gloo" if self._on_cpu else "nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if not dist.is_initialized() and not self._on_cpu:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        if dist.is_initialized():
            self._process_group_backend = self._get_process_group_backend()
            zero.load_deepspeed().init_distributed(dist_backend=self._process_group_backend, auto_mpi_discovery=False)
        else:
            self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Weights stay whole until the optimizer knows their shapes."""
        yield

    # --- setup --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        precision = str(self.precision_plugin.precision)
        if precision not in PRECISIONS:
            raise UserError(
                f"precision={precision!r} has not been tried with ZeRO: use {', '.join(map(repr, PRECISIONS))}"
            )
        self.model = self.precision_plugin.convert_module(self.model)
        if trainer.state.fn == TrainerFn.FITTING:
            self._begin(trainer, bfloat16=precision.startswith("bf16"))
        else:
            self.model_to_device()
        self.setup_precision_plugin()
        self.barrier()

    def _begin(self, trainer: pl.Trainer, *, bfloat16: bool) -> None:
        module = self.lightning_module
        assert module is not None
        optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
        if len(optimizers) != 1 or not isinstance(optimizers[0], MatrixOptimizer):
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            raise UserError(
                f"thinrank's ZeRO steps for one optimizer of thinrank, and configure_optimizers gave {names}: return "
                "thinrank.optim.build(self, config), or use Lightning's strategy 'deepspeed_stage_2'"
            )
        optimizers[0].check_every = self._check_every
        self._run = zero.initialize(
            module,
            optimizers[0],
            self._settings(trainer, module, bfloat16=bfloat16),
            args=argparse.Namespace(device_rank=self.local_rank),
            dist_init_required=False,
        )
        self.model = self._run.engine
        self.optimizers = [optimizers[0]]
        self.lr_scheduler_configs = schedulers

    def _settings(self, trainer: pl.Trainer, module: pl.LightningModule, *, bfloat16: bool) -> dict[str, Any]:
        if trainer.gradient_clip_algorithm == "value":
            raise UserError("DeepSpeed clips by the norm of all gradients: use gradient_clip_algorithm='norm'")
        own = isinstance(module, CausalLM)
        if not own and is_overridden("configure_gradient_clipping", module, pl.LightningModule):
            warnings.warn(
                "DeepSpeed clips gradients itself, and configure_gradient_clipping finds none: use gradient_clip_val",
                stacklevel=2,
            )
        clip = module.clip_norm if own else None
        assert isinstance(self.config, dict)
        return {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own report of speed, which nobody reads here
            "gradient_accumulation_steps": trainer.accumulate_grad_batches,
            "gradient_clipping": clip or trainer.gradient_clip_val or 0.0,
            **({"bf16": {"enabled": True}} if bfloat16 else {}),
            **self.config,
        }

    # --- a step -------------------------------------------------------------------------------------------------------

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the number of micro-batches, which DeepSpeed would do once more."""
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False, **kwargs})

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """One micro-batch: its forward and backward, and with the last of a step the callbacks, who see the norm of the
        gradients, and the step."""
        module = self.lightning_module
        assert module is not None
        assert self._run is not None
        result = closure()
        if module.automatic_optimization and result is None:
            raise UserError("a training_step that returns None leaves DeepSpeed without a backward: return a loss")
        with zero.quiet_deepspeed():
            if self._run.engine.is_gradient_accumulation_boundary():
                self.precision_plugin._after_closure(module, optimizer)
            self._run.engine.step(**kwargs)
        return result

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients before clipping (scalar), between the last backward of a step and the step."""
        assert self._run is not None
        return self._run.gradient_norm()

    def clip_step(self, limit: float) -> None:
        """Has the gradients of this step clipped to a norm of at most `limit`; all ranks call it."""
        assert self._run is not None
        self._run.front.clip_step(limit)

    def skip_step(self) -> None:
        """Throws the gradients of this step away; all ranks call it."""
        assert self._run is not None
        self._run.front.skip_step()

    def on_train_end(self) -> None:
        """Gives the module its whole weights back."""
        if self._run is not None:
            self._run.release()
            self._run, self.model = None, self.lightning_module

    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, RollBack) and self._run is not None:
            self._run.engine.destroy()  # this process makes another one
        super().on_exception(exception)

    def teardown(self) -> None:
        self._run, self.model = None, self.lightning_module  # after an error nobody may wait for the others any more
        super().teardown()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def in_pieces(self) -> bool:
        return self._run is not None

    def whole_weights(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict() if self._run is None else self._run.weights()

    def load_whole_weights(self, weights: Mapping[str, Any], strict: bool) -> None:
        assert self.lightning_module is not None
        if self._run is None:
            self.lightning_module.load_state_dict(weights, strict=strict)
        else:
            self._run.load_weights(weights, strict=strict)

    def whole_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        assert isinstance(optimizer, MatrixOptimizer)  # _begin has looked
        return optimizer.full_state_dict()

    def load_whole_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        optimizer.load_state_dict(state)


assert issubclass(DeepSpeedStrategy, DDPStrategy)  # whose methods are meant by `super(DeepSpeedStrategy, self)`
