"""Pre-training: what there is to choose, and how many steps of what size follow from it.

`pretrain` (in `thinrank.trainers.assembly`) does it. The dataclasses here import neither Lightning nor transformers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from thinrank.optim import MethodConfig, SubspaceAdamWConfig
from thinrank.optim.backward import MODES, whole_because
from thinrank.optim.gossip.parts import graph_of, made
from thinrank.optim.gossip.schemes import Place
from thinrank.optim.layers import ReparamConfig
from thinrank.optim.layerwise import LayerwiseConfig, refuse_without_decay
from thinrank.optim.lowrank.remainder import leaves_remainder
from thinrank.optim.messages import COARSE
from thinrank.optim.scaling import ScalingConfig
from thinrank.trainers.data.config import DataConfig, PySourceConfig
from thinrank.trainers.errors import UserError
from thinrank.trainers.guards import GuardConfig
from thinrank.trainers.loss.backends import BACKENDS, cannot
from thinrank.trainers.models import ModelConfig
from thinrank.trainers.monitors import MonitorConfig
from thinrank.trainers.plan.precision import AUTO
from thinrank.trainers.run import RunConfig
from thinrank.trainers.schedule import ScheduleConfig
from thinrank.trainers.strategies import (
    FSDP2Config,
    GossipConfig,
    OwnedConfig,
    ReplicatedConfig,
    StrategyConfig,
    World,
    ZeroConfig,
)
from thinrank.trainers.versions import require_lightning

C = TypeVar("C", bound="TrainingConfig")

_PRECISIONS = (AUTO, "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
_DURATION = re.compile(r"(?:(\d+):)?(\d+):(\d\d)|(\d+(?:\.\d+)?)\s*([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds of a duration: ``1:30:00`` or ``5:00`` (minutes and seconds), or ``90s``, ``45m``, ``1.5h``, ``2d``.

    Raises:
        ValueError: the text is none of these, or no time at all.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration: write it as 1:30:00, 90s, 45m, 1.5h or 2d")
    hours, minutes, seconds, number, unit = match.groups()
    found = float(number) * _UNITS[unit] if number else int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    if found <= 0:
        raise ValueError(f"{text!r} is no time at all: give at least a second")
    return found


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long to train, in what portions, how precisely, and what to look at meanwhile."""

    max_steps: int | None = field(default=500, metadata={"help": "optimizer steps; null: max_tokens decides"})
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "training tokens, rounded up to whole steps; with max_steps, the lesser ends the run"},
    )
    max_time: str | None = field(
        default=None,
        metadata={"help": "training time over all restarts, as 1:30:00, 90s, 45m, 1.5h or 2d; ends after a whole step"},
    )
    batch_size: int = field(default=16, metadata={"help": "sequences in an optimizer step, over all processes"})
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "sequences that a process computes at once; null: its whole share of the batch"},
    )
    clip_norm: float | None = field(
        default=1.0, metadata={"help": "largest norm of all gradients together; null: no clipping"}
    )
    in_backward: str = field(
        default="off",
        metadata={"help": "gradients of matrices: off (kept), project (as coordinates), step (stepped in backward)"},
    )
    cross_entropy: str = field(
        default="dense",
        metadata={"help": "dense (all logits), or auto, chunked, torch, cce or liger: the loss a few tokens at a time"},
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "weight of the squared log of the softmax's denominator; PaLM: 1e-4"}
    )
    precision: str = field(
        default=AUTO,
        metadata={
            "help": f"arithmetic: {', '.join(_PRECISIONS)}; auto: bf16-mixed where bfloat16 is fast, else 32-true"
        },
    )
    accelerator: str = field(default="auto", metadata={"help": "auto (a GPU where there is one), cpu, or gpu"})
    devices: int | str = field(
        default="auto", metadata={"help": "processes on this machine, one for each device; auto: as launched"}
    )
    num_nodes: int | str = field(default="auto", metadata={"help": "machines; auto: as launched"})
    validate_every: int = field(default=100, metadata={"help": "steps between validations; 0: only at the end"})
    log_every: int = field(default=10, metadata={"help": "steps between logged values"})
    checkpoint_every: int = field(default=100, metadata={"help": "steps between checkpoints"})
    nonfinite_limit: int = field(
        default=5, metadata={"help": "steps in a row with infinite or NaN gradients after which training stops"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the initial weights and of dropout"})
    projection_seed: int = field(default=0, metadata={"help": "seed of the optimizer's random choices"})
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig, metadata={"help": "of the learning rate"})
    sample_prompt: str = field(default="def ", metadata={"help": "start of the text that the trained model continues"})
    sample_tokens: int = field(default=128, metadata={"help": "tokens of that text; 0: none"})
    tensorboard: bool = field(default=True, metadata={"help": "write TensorBoard events into the run folder"})
    export: bool = field(default=True, metadata={"help": "write the trained model in the Hugging Face layout"})
    deterministic: bool = field(
        default=False, metadata={"help": "ask torch for deterministic kernels on GPUs (the CPU's always are)"}
    )

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_tokens is None:
            raise ValueError("max_steps must be given where max_tokens is not: the schedule needs to know the end")
        for name in ("max_steps", "max_tokens", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}: use null to leave it out")
        for name in ("batch_size", "log_every", "checkpoint_every", "nonfinite_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}: give a positive number")
        for name in ("validate_every", "sample_tokens", "seed", "projection_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}: give 0 or a positive number")
        for name in ("devices", "num_nodes"):
            value = getattr(self, name)
            if value != "auto" and (isinstance(value, str) or value < 1):
                raise ValueError(
                    f"{name} must be auto or at least 1, got {value!r}: leave it out to use what torchrun says"
                )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got {self.clip_norm}: use null for no clipping")
        if self.in_backward not in MODES:
            raise ValueError(
                f"in_backward must be one of {', '.join(MODES)}, got {self.in_backward!r}: choose one of them"
            )
        if self.cross_entropy not in BACKENDS:
            raise ValueError(
                f"cross_entropy must be one of {', '.join(BACKENDS)}, got {self.cross_entropy!r}: choose one of them"
            )
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss must be at least 0, got {self.z_loss}: 0 for none, or PaLM's 1e-4")
        if self.z_loss and (cause := cannot(self.cross_entropy, z_loss=True)) is not None:
            raise ValueError(f"cross_entropy={self.cross_entropy} {cause}")
        if self.precision not in _PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(_PRECISIONS)}, got {self.precision!r}: choose one of them"
            )
        if self.accelerator not in _ACCELERATORS:
            raise ValueError(
                f"accelerator must be one of {', '.join(_ACCELERATORS)}, got {self.accelerator!r}: choose one of them"
            )
        if self.max_time is not None:
            try:
                parse_duration(self.max_time)
            except ValueError as error:
                raise ValueError(f"max_time must be a duration, but {error}") from None

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else parse_duration(self.max_time)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every kind of run can be told."""

    run: RunConfig = field(default_factory=RunConfig, metadata={"help": "the run folder and how to resume"})
    model: Any = field(default=None, metadata={"help": "the model"})
    data: DataConfig = field(default_factory=PySourceConfig, metadata={"help": "the text"})
    optimizer: MethodConfig = field(default_factory=SubspaceAdamWConfig, metadata={"help": "the method"})
    strategy: StrategyConfig = field(default_factory=StrategyConfig, metadata={"help": "how processes share the work"})
    reparam: ReparamConfig = field(default_factory=ReparamConfig, metadata={"help": "layers of factors"})
    scaling: ScalingConfig = field(
        default_factory=ScalingConfig, metadata={"help": "how rates, decay and initial weights follow the model's size"}
    )
    trainer: TrainerConfig = field(default_factory=TrainerConfig, metadata={"help": "how long, how large, how often"})
    monitors: MonitorConfig = field(default_factory=MonitorConfig, metadata={"help": "what of the layers is looked at"})
    layerwise: LayerwiseConfig = field(
        default_factory=LayerwiseConfig, metadata={"help": "rates by layer, as the tails of spectra say"}
    )
    guard: GuardConfig = field(default_factory=GuardConfig, metadata={"help": "what is done about spikes"})

    def __post_init__(self) -> None:
        if self.trainer.in_backward == "step" and self.reparam.acts:
            raise ValueError(
                f"trainer.in_backward=step steps each weight by itself, and layers of reparam={self.reparam.name} do "
                "something between whole steps: use trainer.in_backward=off"
            )
        rule = self.optimizer.matrix_rule()
        cause = whole_because(rule) if self.trainer.in_backward == "project" else None
        if cause is not None:
            raise ValueError(
                f"trainer.in_backward=project keeps coordinates alone, but optimizer={self.optimizer.name} with these "
                f"settings needs whole gradients, because {cause}: use trainer.in_backward=step, or a method such as "
                "galore"
            )
        if isinstance(self.strategy, FSDP2Config):
            self._refuse_in_pieces(self.strategy)
        if isinstance(self.strategy, ReplicatedConfig):
            name = self.strategy.name
            if self.trainer.in_backward != "off":
                raise ValueError(
                    f"trainer.in_backward={self.trainer.in_backward} is for one process; strategy={name} frees "
                    "gradients in backward by itself: leave in_backward out"
                )
            if self.strategy.messages in COARSE and not leaves_remainder(rule):
                raise ValueError(
                    f"strategy.messages={self.strategy.messages} is for what a subspace misses of gradients, and "
                    f"optimizer={self.optimizer.name} with these settings has no use for it, or no subspace that stays "
                    "for some steps: use strategy.messages=auto, or a method such as fira"
                )
            if getattr(self.optimizer, "rank_allocation", None) == "gradient":
                raise ValueError(
                    f"strategy={name} keeps no whole gradients until the step, by which "
                    "optimizer.rank_allocation=gradient shares ranks out: use optimizer.rank_allocation=weight, or "
                    "strategy=ddp"
                )
            if isinstance(self.strategy, OwnedConfig):
                self._refuse_sharing_out_later(name)
            if self.trainer.precision == "16-mixed":
                raise ValueError(
                    f"strategy={name} frees gradients before a loss scaler could look at them: use "
                    "trainer.precision=bf16-mixed or 32-true instead of 16-mixed"
                )
        if isinstance(self.strategy, GossipConfig) and self.trainer.precision == "16-mixed":
            raise ValueError(
                f"strategy={self.strategy.name} leaves each process its own gradients, by which loss scales would "
                "part: use trainer.precision=bf16-mixed or 32-true instead of 16-mixed"
            )
        if isinstance(self.strategy, ZeroConfig):
            self._check_zero(self.strategy.name)
        if self.guard.acts:
            self._check_guard()
        if self.trainer.in_backward != "off" and getattr(self.optimizer, "rank_allocation", None) == "gradient":
            raise ValueError(
                f"trainer.in_backward={self.trainer.in_backward} keeps no whole gradients until the step, by which "
                "optimizer.rank_allocation=gradient shares ranks out: use optimizer.rank_allocation=weight, or "
                "trainer.in_backward=off"
            )

    def computing_in(self: C, precision: str) -> C:
        """The same in another `trainer.precision`, such as the one that `auto` has come to."""
        return dataclasses.replace(self, trainer=dataclasses.replace(self.trainer, precision=precision))

    def _check_guard(self) -> None:
        guard, strategy = self.guard, self.strategy
        if self.trainer.in_backward == "step":
            raise ValueError(
                f"trainer.in_backward=step has stepped each weight before guard={guard.name} can look at the whole "
                "step: use trainer.in_backward=off or project, or guard=nonfinite"
            )
        if guard.action == "rollback" and isinstance(strategy, GossipConfig):
            raise ValueError(
                f"strategy={strategy.name} leaves each process to judge its own steps, and guard.action=rollback needs "
                "all to go back together: use guard.action=skip"
            )
        if guard.detector == "stable" and (
            isinstance(strategy, (FSDP2Config, ReplicatedConfig, ZeroConfig)) or self.trainer.in_backward != "off"
        ):
            raise ValueError(
                f"guard.detector=stable needs whole gradients beside second moments, which strategy={strategy.name} "
                f"with trainer.in_backward={self.trainer.in_backward} does not leave on a process: use "
                "guard.detector=zscore or zclip, or strategy=ddp"
            )

    def _refuse_in_pieces(self, strategy: FSDP2Config) -> None:
        """What needs whole weights or whole gradients, or a loss scaler, where there are pieces."""
        if self.trainer.in_backward != "off":
            raise ValueError(
                f"trainer.in_backward={self.trainer.in_backward} takes gradients before strategy={strategy.name} has "
                "summed them up over the ranks: leave in_backward out"
            )
        allocation = getattr(self.optimizer, "rank_allocation", "uniform")
        if allocation != "uniform":
            raise ValueError(
                f"optimizer.rank_allocation={allocation} shares ranks out by whole matrices, which lie in pieces under "
                f"strategy={strategy.name}: leave it out, or use strategy=ddp"
            )
        if self.trainer.precision not in (AUTO, *strategy.PRECISIONS):
            raise ValueError(
                f"strategy={strategy.name} computes in {', '.join(strategy.PRECISIONS)}, got "
                f"trainer.precision={self.trainer.precision}: use one of them"
            )

    def _check_zero(self, name: str) -> None:
        if name == "thinrank_zero3" and self.reparam.penalises:
            raise ValueError(
                f"strategy={name} has taken weights apart when layers of reparam={self.reparam.name} look at them for "
                "the loss: use strategy=thinrank_zero2 or thinrank_fsdp2"
            )
        if self.trainer.in_backward != "off":
            raise ValueError(
                f"trainer.in_backward={self.trainer.in_backward} takes gradients before strategy={name} has averaged "
                "them: leave in_backward out"
            )
        self._refuse_sharing_out_later(name)
        if self.trainer.precision not in (AUTO, "32-true", "bf16-mixed", "bf16-true"):
            raise ValueError(
                f"trainer.precision={self.trainer.precision} has not been tried with strategy={name}: use bf16-mixed, "
                "bf16-true or 32-true"
            )

    def _refuse_sharing_out_later(self, name: str) -> None:
        allocation = getattr(self.optimizer, "rank_allocation", "uniform")
        if allocation == "gradient" or getattr(self.optimizer, "rank_allocation_every", None) is not None:
            raise ValueError(
                f"strategy={name} leaves no rank with all that ranks would be shared out by during a run: use "
                "optimizer.rank_allocation=weight without rank_allocation_every"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Everything that a pre-training run can be told."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={"help": "the model"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reparam.PRETRAINS and self.model.pretrained is None:
            raise ValueError(
                f"reparam={self.reparam.name} is for trained weights, and these begin at random: set model.pretrained, "
                "or use launch/finetune.py"
            )
        longest, length = self.model.max_position_embeddings, self.data.sequence_length
        if self.model.pretrained is None and length > longest:
            raise ValueError(
                f"data.sequence_length must be at most model.max_position_embeddings ({longest}), got {length}: "
                "lower the one or raise the other"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes that follow from a configuration and the number of processes."""

    steps: int
    accumulate: int
    """Micro-batches of an optimizer step, one after the other."""
    micro_batch: int
    """Sequences of a micro-batch on one process."""
    tokens_per_step: int

    @classmethod
    def of(cls, config: TrainingConfig, world: World) -> Plan:
        """The plan for `world.size` processes.

        Raises:
            UserError: the batch, or the replicas, cannot be divided among them, or they are not those of `devices` and
                `num_nodes`.
        """
        trainer = config.trainer
        _check_launch(trainer, world)
        batch, world_size = trainer.batch_size, world.size
        if isinstance(config.strategy, FSDP2Config) and world_size % config.strategy.replicas:
            raise UserError(
                f"strategy.replicas must divide the {world_size} processes, got {config.strategy.replicas}: leave it "
                "out for one group of all"
            )
        if isinstance(config.strategy, GossipConfig):
            _check_exchange(config.strategy, world_size)
        try:
            refuse_without_decay(config.layerwise, [config.optimizer.weight_decay])
        except ValueError as error:
            raise UserError(str(error)) from error
        if batch % world_size:
            raise UserError(
                f"trainer.batch_size must be a multiple of the {world_size} processes, got {batch}: "
                f"set it to {_multiples(batch, world_size)}"
            )
        share = batch // world_size
        micro = share if trainer.micro_batch_size is None else trainer.micro_batch_size
        if share % micro:
            raise UserError(
                f"trainer.micro_batch_size must divide the {share} sequences of a batch that each process has, "
                f"got {micro}: set it to a divisor of {share}, or trainer.batch_size to "
                f"{_multiples(batch, world_size * micro)}"
            )
        tokens = batch * config.data.sequence_length
        limits = [] if trainer.max_steps is None else [trainer.max_steps]
        if trainer.max_tokens is not None:
            limits.append(math.ceil(trainer.max_tokens / tokens))
        return cls(steps=min(limits), accumulate=share // micro, micro_batch=micro, tokens_per_step=tokens)


def pretrain(config: PretrainConfig, *, resolved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Trains a causal language model as `config` says, in this process or in all those that torchrun started.

    Makes or resumes the run folder, trains, validates on the whole held-out text, samples, exports, and reports.

    Args:
        config: what to do.
        resolved: the same as plain values, for ``config.yaml``; by default made from `config`.

    Returns:
        The report (see `thinrank.trainers.report.collect`), on every rank. ``report["run"]["state"]`` is "finished" or
        "preempted", and ``report["run"]["exit_code"]`` the code for the process to end with, 0 or 75.

    Raises:
        UserError: something that the user can change; nothing was begun, or the last checkpoint stands.
        GuardStop: a guard has stopped training.
    """
    require_lightning()  # before the imports that would stumble over another
    from thinrank.trainers.assembly import run
    from thinrank.trainers.jobs import Pretraining

    # cast: to a checker this file is also trainers/pretrain.py, with a PretrainConfig of its own
    return run(Pretraining(cast(Any, config)), resolved)


def _check_exchange(strategy: GossipConfig, ranks: int) -> None:
    """Refuses a graph that there is not of so many ranks, and parts that do not go together."""
    try:
        graph = graph_of(strategy.made_topology(), ranks)
        place = Place(rank=0, topology=graph, compressor=strategy.made_compressor())
        made(strategy.scheme, place, strategy.made_compressor(), [(1,)], strategy.strict, strategy.scheme_options)
    except ValueError as error:
        raise UserError(f"strategy={strategy.name}: {error}") from error


def _check_launch(trainer: TrainerConfig, world: World) -> None:
    if world.size == 1 and (trainer.devices not in ("auto", 1) or trainer.num_nodes not in ("auto", 1)):
        nodes = "--standalone" if trainer.num_nodes in ("auto", 1) else f"--nnodes {trainer.num_nodes}"
        devices = 1 if trainer.devices == "auto" else trainer.devices
        raise UserError(
            f"trainer.devices={trainer.devices} and trainer.num_nodes={trainer.num_nodes} need more than this one "
            f"process: start it with torchrun {nodes} --nproc-per-node {devices}"
        )
    for name, value, found in (
        ("devices", trainer.devices, world.local_size),
        ("num_nodes", trainer.num_nodes, world.nodes),
    ):
        if value not in ("auto", found):
            raise UserError(f"trainer.{name} must be what torchrun started, {found}, got {value}: leave it out")


def _multiples(number: int, of: int) -> str:
    below, above = number // of * of, (number // of + 1) * of
    return f"{below} or {above}" if below else f"{above}"
