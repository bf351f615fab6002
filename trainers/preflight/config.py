"""What the look at the machines measures, and what it does not tolerate."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """Checks that all ranks make together before training; a failure names the rank and ends the run with code 3."""

    enabled: bool = field(default=False, metadata={"help": "make them; launch/submit.py turns them on"})
    min_bandwidth: float = field(
        default=0.0, metadata={"help": "GB/s that every link between two machines has to carry; 0: only compared"}
    )
    min_bandwidth_inside: float = field(
        default=0.0, metadata={"help": "GB/s that every link inside a machine has to carry; 0: only compared"}
    )
    slow_factor: float = field(
        default=4.0, metadata={"help": "how many times slower than the others a rank or a link may be"}
    )
    megabytes: float = field(default=32.0, metadata={"help": "size of a message that is measured"})
    rounds: int = field(default=8, metadata={"help": "links of every rank that are measured, if it has so many"})
    timeout: float = field(default=300.0, metadata={"help": "seconds that a rank has to answer"})

    def __post_init__(self) -> None:
        for name in ("min_bandwidth", "min_bandwidth_inside"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0 GB/s, got {getattr(self, name)}: use 0 for no floor")
        if not self.slow_factor > 1:
            raise ValueError(f"slow_factor must be above 1, got {self.slow_factor}: use 4 or more")
        for name in ("megabytes", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}: leave it out")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}: leave it out")
