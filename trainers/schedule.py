"""Learning-rate schedules: one pure function of the step, applied as a factor to every group's own learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a config is read in places where torch is not needed
    import torch
    from torch.optim.lr_scheduler import LambdaLR

_KINDS = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, then one of four shapes: cosine, linear, constant, or wsd (warm-up, stable, decay)."""

    kind: str = field(default="cosine", metadata={"help": "shape after the warm-up: cosine, linear, constant or wsd"})
    warmup_steps: int | None = field(
        default=None, metadata={"help": "steps of linear warm-up; null: warmup_fraction of all steps"}
    )
    warmup_fraction: float = field(
        default=0.1, metadata={"help": "share of all steps spent in warm-up where warmup_steps is null"}
    )
    min_lr_fraction: float = field(
        default=0.1, metadata={"help": "learning rate of the last step as a share of the peak (constant ignores it)"}
    )
    decay_fraction: float = field(default=0.2, metadata={"help": "share of all steps in the final decay of wsd"})

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {self.kind!r}: choose one of them")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}: use 0 for no warm-up")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(
                f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}: give a share such as 0.1, "
                f"or a number of steps as warmup_steps"
            )
        if not 0 <= self.min_lr_fraction <= 1:
            raise ValueError(f"min_lr_fraction must be in [0, 1], got {self.min_lr_fraction}: give a share of the peak")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be in [0, 1], got {self.decay_fraction}: give a share such as 0.2")
        if self.kind == "wsd" and self.warmup_steps is None and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction and decay_fraction must add up to at most 1, got {self.warmup_fraction} and "
                f"{self.decay_fraction}: lower one of them"
            )

    def warmup(self, total: int) -> int:
        """Number of warm-up steps in a run of `total` steps."""
        return round(self.warmup_fraction * total) if self.warmup_steps is None else self.warmup_steps


def multiplier(step: int, total: int, config: ScheduleConfig) -> float:
    """The factor on the learning rate at `step`.

    The first step of a warm-up of w steps has 1/w, so that no step is wasted at zero; step w-1 is the first at the
    peak; the last step, total-1, has exactly `min_lr_fraction` (for every shape but constant), and so has every step
    after it.

    Args:
        step: optimizer steps done before this one, from 0.
        total: optimizer steps of the whole run, at least 1.
        config: the shape.

    Returns:
        A factor in [0, 1].
    """
    ordinal = min(step + 1, total)
    warmup = config.warmup(total)
    if ordinal < warmup:
        return ordinal / warmup
    floor = config.min_lr_fraction
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        start = max(warmup, total - round(config.decay_fraction * total))
        progress = 0.0 if ordinal <= start else (ordinal - start) / (total - start)
        return 1 - (1 - floor) * progress
    progress = (ordinal - warmup) / (total - warmup) if total > warmup else 0.0
    if config.kind == "linear":
        return 1 - (1 - floor) * progress
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    config: ScheduleConfig,
    total_steps: int,
    *,
    factor: Callable[[int], float] | None = None,
) -> LambdaLR:
    """A scheduler that multiplies each group's own learning rate by `multiplier`; step it once per optimizer step.

    Args:
        factor: of the steps done, multiplies it once more, such as `thinrank.optim.layers.warmth`.

    Raises:
        ValueError: no steps, or a warm-up (with the decay of wsd) that does not fit into them.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}: give the number of optimizer steps")
    warmup = config.warmup(total_steps)
    if warmup > total_steps:
        raise ValueError(
            f"warmup_steps must be at most the {total_steps} steps of the run, got {warmup}: "
            f"lower it or use warmup_fraction"
        )
    if config.kind == "wsd" and warmup + round(config.decay_fraction * total_steps) > total_steps:
        raise ValueError(
            f"warmup_steps must leave room for the decay of {config.decay_fraction:g} of {total_steps} steps, "
            f"got {warmup}: lower warmup_steps or decay_fraction"
        )
    more = factor if factor is not None else lambda step: 1.0
    return LambdaLR(optimizer, lambda step: multiplier(step, total_steps, config) * more(step))
