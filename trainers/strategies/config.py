"""The choice of a strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from thinrank.optim.gossip.compress import Compressor, compressor
from thinrank.optim.gossip.schemes import scheme_class
from thinrank.optim.gossip.topology import TOPOLOGIES
from thinrank.optim.messages import EMBEDDINGS, MESSAGES, refuse_signs, refuse_widened
from thinrank.optim.remembering import MEMORIES_EVERY

MESSAGE_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""What messages are sent in, by the name that a configuration uses."""

ISLANDS = ("full", "auto")
"""What replicas of sharded models may exchange: whole gradients, by torch, or what a step needs, by the optimizer."""

NORMS = ("auto", "always")
"""When the norms of gradients travel beside coordinates."""

_BACKENDS = ("auto", "gloo", "nccl")


_NORMS_HELP = (
    "norms of gradients beside coordinates: auto (where clip_norm or a guard needs them), or always (as grad_norm)"
)


def norms_travel(norms: str, clips: bool) -> bool:
    """Whether they do, by the setting, where gradients are clipped by norm or are not."""
    return norms == "always" or clips


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuses a `value` that is none of `allowed` (ValueError)."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}: choose one of them")


def steps_or_never(name: str, value: int | None) -> None:
    """Refuses a number of steps below 1 (ValueError)."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1 step, got {value}: use null for never")


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How the processes of a run share the work."""

    NAMES: ClassVar[tuple[str, ...]] = ("auto", "ddp")
    """What `name` may be; other strategies have settings, and a class, of their own."""

    name: str = field(
        default="auto",
        metadata={"help": "auto (ddp for several processes), or ddp (whole model on each, gradients averaged)"},
    )
    backend: str = field(
        default="auto",
        metadata={"help": "how processes talk: auto (nccl for GPU tensors, gloo for others), gloo or nccl"},
    )
    timeout: float = field(
        default=1800.0, metadata={"help": "seconds after which a process stops waiting for the others"}
    )
    heartbeat_timeout: float | None = field(
        default=60.0,
        metadata={"help": "seconds without a sign of life after which a rank is lost and the others end; null: never"},
    )

    def __post_init__(self) -> None:
        if self.name not in self.NAMES:
            raise ValueError(
                f"name must be one of {', '.join(self.NAMES)}, got {self.name!r}: choose one of them, or another "
                "strategy by strategy=NAME"
            )
        one_of("backend", self.backend, _BACKENDS)
        if not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {self.timeout}: leave it out for half an hour")
        if self.heartbeat_timeout is not None and not self.heartbeat_timeout > 0:
            raise ValueError(
                f"heartbeat_timeout must be above 0 seconds, got {self.heartbeat_timeout}: use null for no heartbeats"
            )

    def shards(self, ranks: int) -> int:
        """How many of so many processes hold one model together; 1 where each holds all of it."""
        return 1


@dataclass(frozen=True, kw_only=True)
class ReplicatedConfig(StrategyConfig):
    """Whole model on every process; what travels is what updates need of gradients (`MatrixOptimizer.replicate`)."""

    NAMES: ClassVar[tuple[str, ...]] = ("thinrank_ddp",)

    name: str = field(default="thinrank_ddp", metadata={"help": "coordinates of gradients are averaged (thinrank_ddp)"})
    messages: str = field(
        default="auto",
        metadata={
            "help": "auto: coordinates where enough; full: gradients; signs, majority: of what subspaces miss (Fira)"
        },
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "of messages: auto (float32 for coordinates, a gradient's own), float32, bfloat16"},
    )
    embeddings: str = field(
        default="dense",
        metadata={
            "help": "how their gradients travel: dense, rows (touched ones), bfloat16 (and the head's), rows_bfloat16"
        },
    )
    norms: str = field(default="auto", metadata={"help": _NORMS_HELP})
    overlap: bool = field(default=True, metadata={"help": "messages leave while backward goes on"})
    check_every: int | None = field(
        default=100, metadata={"help": "steps between two looks at whether the ranks are still equal; null: never"}
    )

    memories_every: int | None = field(
        default=MEMORIES_EVERY,
        metadata={"help": "steps between two means of what ranks remember apart (dion, ldadam, feedback); null: never"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, allowed in (
            ("messages", self.messages, MESSAGES),
            ("embeddings", self.embeddings, EMBEDDINGS),
            ("dtype", self.dtype, tuple(MESSAGE_DTYPES)),
            ("norms", self.norms, NORMS),
        ):
            one_of(name, value, allowed)
        refuse_widened(self.embeddings, MESSAGE_DTYPES[self.dtype])
        for name in ("check_every", "memories_every"):
            steps_or_never(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class OwnedConfig(ReplicatedConfig):
    """Whole model on every process, a share of the optimizer's state and work (`MatrixOptimizer.own`)."""

    NAMES: ClassVar[tuple[str, ...]] = ("thinrank_owned",)

    name: str = field(
        default="thinrank_owned", metadata={"help": "each matrix is stepped by one process, its owner (thinrank_owned)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_signs(self.messages, "owners")


@dataclass(frozen=True, kw_only=True)
class FSDP2Config(StrategyConfig):
    """Weights, gradients and optimizer state in pieces on all processes (torch's `fully_shard`)."""

    NAMES: ClassVar[tuple[str, ...]] = ("thinrank_fsdp2",)
    PRECISIONS: ClassVar[tuple[str, ...]] = ("32-true", "bf16-mixed", "bf16-true")
    """What `trainer.precision` may be."""

    name: str = field(default="thinrank_fsdp2", metadata={"help": "every process holds a part (thinrank_fsdp2)"})
    replicas: int = field(
        default=1,
        metadata={"help": "groups of processes of which each holds the whole model in pieces; 1: all are one group"},
    )
    reshard_after_forward: bool = field(
        default=True,
        metadata={"help": "a block's whole weights are dropped after forward and fetched again in backward"},
    )
    messages: str = field(
        default="full",
        metadata={"help": "between replicas: full (torch averages gradients), auto (coordinates where enough)"},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "of messages=auto: auto (float32 for coordinates, a gradient's own), float32, bfloat16"},
    )
    norms: str = field(default="auto", metadata={"help": _NORMS_HELP})
    check_every: int | None = field(
        default=100, metadata={"help": "steps between two looks at whether what ranks hold alike is; null: never"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or self.replicas < 1:
            raise ValueError(
                f"replicas must be a whole number of groups, at least 1, got {self.replicas!r}: leave it out for one "
                "group of all processes"
            )
        if not isinstance(self.reshard_after_forward, bool):
            raise ValueError(
                f"reshard_after_forward must be true or false, got {self.reshard_after_forward!r}: leave it out for "
                "true"
            )
        one_of("messages", self.messages, ISLANDS)
        one_of("dtype", self.dtype, tuple(MESSAGE_DTYPES))
        one_of("norms", self.norms, NORMS)
        steps_or_never("check_every", self.check_every)
        if self.messages == "auto" and self.replicas == 1:
            raise ValueError(
                "messages=auto is for what replicas exchange, and replicas=1 is one group of all processes: set "
                "replicas to 2 or more, or leave messages out"
            )
        if self.dtype != "auto" and self.messages != "auto":
            raise ValueError(
                f"dtype={self.dtype} is of what messages=auto sends, and with messages=full torch sends gradients in "
                "the dtype in which it sums them up: set messages=auto, or leave dtype out"
            )

    def shards(self, ranks: int) -> int:
        return ranks // self.replicas


@dataclass(frozen=True, kw_only=True)
class ZeroConfig(StrategyConfig):
    """DeepSpeed's ZeRO: weights, gradients and state in pieces, each matrix stepped whole by one process."""

    NAMES: ClassVar[tuple[str, ...]] = ("thinrank_zero1", "thinrank_zero2", "thinrank_zero3")

    name: str = field(
        default="thinrank_zero2",
        metadata={"help": "state (thinrank_zero1), gradients too (thinrank_zero2), weights too (thinrank_zero3)"},
    )
    bucket: int = field(default=2**25, metadata={"help": "entries of gradients, or of weights, in a message"})
    overlap: bool = field(default=True, metadata={"help": "messages leave while backward goes on, on a GPU"})
    check_every: int | None = field(
        default=100, metadata={"help": "steps between two looks at whether what ranks hold alike is; null: never"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        steps_or_never("check_every", self.check_every)
        if self.bucket < 1:
            raise ValueError(f"bucket must be at least 1 entry, got {self.bucket}: leave it out for 2**25")

    @property
    def stage(self) -> int:
        """How much is in pieces: 1, 2 or 3."""
        return int(self.name[-1])


EVALUATES = ("average", "local")
"""What is validated: the mean of all ranks' weights, or each rank's own, on its share of the text."""


@dataclass(frozen=True, kw_only=True)
class GossipConfig(StrategyConfig):
    """Whole model on every process, trained on its own; weights are averaged with neighbours' (`Gossip`)."""

    NAMES: ClassVar[tuple[str, ...]] = ("thinrank_gossip", "gossip")

    name: str = field(default="thinrank_gossip", metadata={"help": "neighbours average weights (thinrank_gossip)"})
    topology: str = field(default="ring", metadata={"help": f"who averages with whom: {', '.join(TOPOLOGIES)}"})
    topology_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "of the topology: rows of torus, per_node of hierarchical, edges"},
    )
    scheme: str = field(
        default="choco", metadata={"help": "what is sent and how it is used; docs/exchange.md lists them"}
    )
    scheme_options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "of the scheme, such as gamma of choco, restart of ecd, order of dpsgd"}
    )
    compressor: str = field(
        default="auto",
        metadata={"help": "of messages: auto (the scheme's usual one), float32, uniform8, topk, …"},
    )
    compressor_options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "of the compressor, such as bucket of uniform8"}
    )
    interval: int = field(default=1, metadata={"help": "steps of the optimizer between two exchanges"})
    overlap: bool = field(default=True, metadata={"help": "messages travel while the next gradient is computed"})
    check_every: int = field(
        default=100, metadata={"help": "exchanges between two looks at whether copies of neighbours are right"}
    )
    strict: bool = field(
        default=False, metadata={"help": "refuse a compressor coarser than the scheme's theory allows; false: warn"}
    )
    evaluate: str = field(
        default="average",
        metadata={"help": "what is validated: the average of all ranks' weights, or each's own (local)"},
    )
    seed: int = field(default=0, metadata={"help": "of what is random about compression"})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("topology", self.topology, TOPOLOGIES)
        one_of("evaluate", self.evaluate, EVALUATES)
        for name in ("interval", "check_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}: leave it out")
        scheme_class(self.scheme).refuse_options(self.scheme_options)
        self.made_compressor()

    def made_compressor(self) -> Compressor:
        """The compressor by its name and options."""
        name = scheme_class(self.scheme).USUAL if self.compressor == "auto" else self.compressor
        return compressor(name, **self.compressor_options)

    def made_topology(self) -> Any:
        """What `Gossip` takes for `topology`."""
        return {"name": self.topology, **self.topology_options}
