"""Outliers of the last so many values: OLMo's rule for steps to leave out, and its score of a whole run.

Sources: OLMo 2 (Team OLMo, 2024, arXiv 2501.00656) for the spike score, and the skip-step optimizer and stability
monitor of its training code for the rule, the window and the constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from thinrank.optim.guards.reading import Reading, Verdict

WINDOW = 128
SIGMA = 6.0
RATE_STEPS = 10_000
"""Steps over which a rate of spikes is told."""


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1 below the sum) of at least two values.

    Sums are exact before they are rounded, so that the order of the values does not matter.
    """
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def is_outlier(value: float, history: Sequence[float], sigma: float) -> bool:
    """Whether `value` is more than `sigma` standard deviations above the mean of `history`; below it none is."""
    mean, std = mean_and_std(history)
    return value - mean > sigma * std


class Rolling:
    """The last `window` values, of which an outlier is told once there are half as many (at least 2).

    Args:
        window: values that are kept, at least 4.
        sigma: standard deviations above the mean from which a value is an outlier.
    """

    def __init__(self, window: int = WINDOW, sigma: float = SIGMA) -> None:
        if window < 4:
            raise ValueError(f"window must be at least 4 steps, got {window}: OLMo's is {WINDOW}")
        if not sigma > 0:
            raise ValueError(f"threshold must be above 0 standard deviations, got {sigma}: OLMo's is {SIGMA:g}")
        self.window, self.sigma = window, sigma
        self.values: list[float] = []

    def outlier(self, value: float) -> bool:
        """Whether a new value is one, which is not among the kept ones yet."""
        return len(self.values) >= max(2, self.window // 2) and is_outlier(value, self.values, self.sigma)

    def add(self, value: float) -> None:
        self.values = [*self.values[-self.window + 1 :], value]

    def told(self, value: float, what: str) -> str:
        """How far above the others a value is, in words."""
        mean, std = mean_and_std(self.values)
        far = f"{(value - mean) / std:.1f} standard deviations" if std else "any distance"
        return f"the {what}, {value:.4g}, is {far} above the mean of the last {len(self.values)} steps, {mean:.4g}"


class ZScore:
    """OLMo's rule: a step is a spike when its loss **or** its gradient norm is an outlier of the last `window` steps.

    The step itself does not count among them while it is judged, and every step enters the history afterwards, spikes
    too: a level that stays is no spike for long. Before the history is half full nothing is a spike. In OLMo the
    decision stays on the device, as a factor of the update; here it is made on the host, which reads both numbers
    anyway. A history of equal values makes every larger one an outlier, as in OLMo.

    Args:
        threshold: standard deviations; OLMo's 6.
        window: steps; OLMo's 128.
    """

    def __init__(self, threshold: float = SIGMA, window: int = WINDOW) -> None:
        self.losses, self.norms = Rolling(window, threshold), Rolling(window, threshold)

    def judge(self, reading: Reading) -> Verdict:
        found = [
            rolling.told(value, what)
            for rolling, value, what in (
                (self.losses, reading.loss, "loss"),
                (self.norms, reading.norm, "gradient norm"),
            )
            if rolling.outlier(value)
        ]
        return Verdict(reason=" and ".join(found) or None)

    def learn(self, reading: Reading, verdict: Verdict) -> None:
        self.losses.add(reading.loss)
        self.norms.add(reading.norm)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses.values), "norms": list(self.norms.values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.losses.values, self.norms.values = list(state_dict["losses"]), list(state_dict["norms"])


class SpikeScore:
    """How spiky a run is: the share of its steps whose value was an outlier of the `window` steps before.

    The score counts all steps (OLMo 2: values at least six deviations from the mean of the last values; its report's
    window is 1000, its monitor's 128), the rate the last 10,000. Both are shares between 0 and 1.

    Attributes:
        seen: values so far.
        spikes: the numbers of those that were outliers, counted from 1, no older than the rate needs.
        total: how many were.
    """

    def __init__(self, window: int = WINDOW, sigma: float = SIGMA) -> None:
        self._rolling = Rolling(window, sigma)
        self.seen, self.total = 0, 0
        self.spikes: list[int] = []

    def add(self, value: float) -> bool:
        """Takes the next value; whether it is an outlier."""
        self.seen += 1
        outlier = self._rolling.outlier(value)
        if outlier:
            self.total += 1
            self.spikes.append(self.seen)
        self.spikes = [number for number in self.spikes if number > self.seen - RATE_STEPS]
        self._rolling.add(value)
        return outlier

    @property
    def score(self) -> float:
        """Share of outliers among all values."""
        return self.total / self.seen if self.seen else 0.0

    @property
    def rate(self) -> float:
        """Share of outliers among the last 10,000 values."""
        return len(self.spikes) / min(self.seen, RATE_STEPS) if self.seen else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self.seen, "total": self.total, "spikes": list(self.spikes), "values": list(self._rolling.values),
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.seen, self.total = state_dict["seen"], state_dict["total"]
        self.spikes, self._rolling.values = list(state_dict["spikes"]), list(state_dict["values"])
