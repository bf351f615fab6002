"""What to do about spikes of the loss and of gradients: the choice, without Lightning.

`trainers.callbacks.spikes.SpikeGuard` acts on it, `trainers.rollback` goes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from thinrank.optim.guards import WAYS, Detector, StableRatio, ZClip, ZScore

DETECTORS = ("nonfinite", "zscore", "zclip", "stable")
ACTIONS = ("skip", "clip", "rollback", "stop", "warn")


@dataclass(frozen=True, kw_only=True)
class RollbackConfig:
    """How far back a run goes at a spike, and what data it leaves out on the way forward (PaLM, arXiv 2204.02311)."""

    back: int | None = field(
        default=None,
        metadata={"help": "steps that the checkpoint is older than the spike; null: trainer.checkpoint_every"},
    )
    skip: int = field(
        default=8, metadata={"help": "batches left out around the spike, none before the checkpoint; PaLM: 200 to 500"}
    )
    limit: int = field(default=3, metadata={"help": "times that a run goes back; the next spike stops it"})

    def __post_init__(self) -> None:
        if self.back is not None and self.back < 1:
            raise ValueError(f"back must be at least 1 step, got {self.back}: use null for trainer.checkpoint_every")
        if self.skip < 1:
            raise ValueError(f"skip must be at least 1 batch, the spike's own, got {self.skip}: give 1 or more")
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}: use action=stop to stop at the first spike")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are spikes, and what happens to them. Steps that are not finite are skipped in any case."""

    name: str = field(default="nonfinite", metadata={"help": "what the choice is called"})
    detector: str = field(
        default="nonfinite",
        metadata={
            "help": "nonfinite (nothing else), zscore (loss or norm, OLMo), zclip (norm), stable (per tensor, AdamW's)"
        },
    )
    action: str = field(
        default="skip", metadata={"help": "at a spike: skip the step, clip (zclip only), rollback, stop, or warn"}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "of the detector; null: zscore 6, zclip 2.5 deviations, stable 2.3 times"}
    )
    max_norm: float | None = field(
        default=None, metadata={"help": "with action=clip: a limit above zclip's own; null: what clips otherwise"}
    )
    window: int = field(default=128, metadata={"help": "steps that zscore and the spike score look back on"})
    warmup: int = field(default=25, metadata={"help": "steps before zclip decides"})
    decay: float = field(default=0.97, metadata={"help": "of zclip's exponential means"})
    way: str = field(default="adaptive", metadata={"help": f"what zclip clips to: {', '.join(WAYS)}"})
    rollback: RollbackConfig = field(
        default_factory=RollbackConfig, metadata={"help": "with action=rollback: how far, and without which data"}
    )

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(
                f"detector must be one of {', '.join(DETECTORS)}, got {self.detector!r}: choose one of them"
            )
        if self.action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, got {self.action!r}: choose one of them")
        if self.detector == "nonfinite":
            if self.action != "skip":
                raise ValueError(
                    f"action={self.action} needs a detector of spikes, and detector=nonfinite skips steps that are not "
                    "finite: use detector=zscore, zclip or stable"
                )
            if self.threshold is not None:
                raise ValueError(
                    f"threshold={self.threshold:g} means nothing to detector=nonfinite: leave it out, or choose "
                    "zscore, zclip or stable"
                )
        if self.action == "clip" and self.detector != "zclip":
            raise ValueError(
                f"action=clip needs a norm to clip to, and detector={self.detector} says only whether a step is a "
                "spike: use detector=zclip, or action=skip"
            )
        if self.max_norm is not None and self.action != "clip":
            raise ValueError(f"max_norm={self.max_norm:g} is for action=clip, got action={self.action}: leave it out")
        self.made_detector()  # which refuses its own
        if self.window < 4:
            raise ValueError(f"window must be at least 4 steps, got {self.window}: OLMo's is 128")

    @property
    def acts(self) -> bool:
        """Whether there is more to do than to skip steps that are not finite."""
        return self.detector != "nonfinite"

    def made_detector(self) -> Detector | None:
        """The detector, without statistics yet; None for `nonfinite`.

        Raises:
            ValueError: for settings that it refuses.
        """
        given = {} if self.threshold is None else {"threshold": self.threshold}
        if self.detector == "zscore":
            return ZScore(window=self.window, **given)
        if self.detector == "zclip":
            return ZClip(decay=self.decay, warmup=self.warmup, way=self.way, max_norm=self.max_norm, **given)
        return StableRatio(**given) if self.detector == "stable" else None
