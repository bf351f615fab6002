"""The choice of a strategy."""

from __future__ import annotations

from dataclasses import dataclass, field

_NAMES = ("auto", "ddp")
_BACKENDS = ("auto", "gloo", "nccl")


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How the processes of a run share the work."""

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

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            raise ValueError(f"name must be one of {', '.join(_NAMES)}, got {self.name!r}: choose one of them")
        if self.backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {self.backend!r}: choose one of them")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {self.timeout}: leave it out for half an hour")
