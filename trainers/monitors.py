"""What of a model's layers is looked at in a run, how often, and whether what is seen ends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from thinrank.optim.spectra import CHEAP, METRICS, check_metrics

ALARMS = ("off", "warn", "stop")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Readings of the layers' weights and inputs. They change nothing in the training."""

    name: str = field(default="layers", metadata={"help": "a label (chosen by `monitors=…`)"})
    every: int = field(default=50, metadata={"help": "steps between readings of all layers; 0: never"})
    metrics: list[str] = field(
        default_factory=lambda: list(CHEAP), metadata={"help": "what is read of each layer (docs/monitors.md)"}
    )
    layers: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "linear layers: all-linear, attention, mlp, or regular expressions on names of modules"},
    )
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "regular expressions on names that are left out"}
    )
    each: bool = field(
        default=True, metadata={"help": "curves of every layer, and not of their extremes and median alone"}
    )
    histograms: bool = field(default=True, metadata={"help": "histograms of the alignments, for TensorBoard"})
    images: bool = field(
        default=True, metadata={"help": "pictures of layers over time, for TensorBoard and the run folder"}
    )
    alarm: str = field(
        default="warn",
        metadata={"help": "when the inputs of many layers lie on one side: off, warn, or stop (exit code 76)"},
    )
    alarm_baseline: int | None = field(
        default=None,
        metadata={
            "help": "steps after the warm-up by which a layer's beginning is known; null: a tenth of all, up to 500"
        },
    )

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(
                f"every must be at least 0, got {self.every}: give a number of steps, or 0 for no readings"
            )
        check_metrics(self.metrics)
        if self.every and not self.metrics:
            raise ValueError(
                f"metrics must name some of {', '.join(METRICS)}, got none: use monitors=none to read nothing"
            )
        if self.every and not self.layers:
            raise ValueError("layers must name some, got none: use monitors=none to read nothing")
        if self.alarm not in ALARMS:
            raise ValueError(f"alarm must be one of {', '.join(ALARMS)}, got {self.alarm!r}: choose one of them")
        if self.every and self.alarm != "off":
            missing = [name for name in ("sign_diversity", "sigma", "sigma_gap") if name not in self.metrics]
            if missing:
                raise ValueError(
                    f"alarm={self.alarm} goes by {', '.join(missing)}, which metrics leaves out: add it there, or use "
                    "alarm=off"
                )
        if self.alarm_baseline is not None and self.alarm_baseline < 1:
            raise ValueError(
                f"alarm_baseline must be at least 1, got {self.alarm_baseline}: give a number of steps, or null"
            )

    def baseline(self, steps: int) -> int:
        """Of a run of so many steps: the steps by which layers' beginnings are known."""
        return max(1, min(500, steps // 10)) if self.alarm_baseline is None else self.alarm_baseline
