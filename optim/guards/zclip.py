"""ZClip: gradients are clipped where their norm stands out of an exponential mean, to less the more it does.

Source: ZClip (Kumar, Owen, Chowdhury, Güra, 2025, arXiv 2504.02507): the z-score, the three ways, and the constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from thinrank.optim.guards.reading import Reading, Verdict

WAYS = ("adaptive", "mean", "percentile")
THRESHOLD, DECAY, WARMUP = 2.5, 0.97, 25
_EPS = 1e-6


def zclip_limit(norm: float, mean: float, var: float, threshold: float, way: str = "adaptive") -> float | None:
    """The norm to clip to, or None where `norm` is not `threshold` deviations above the mean.

    With z = (g - μ) / (s + 1e-6): `adaptive` μ + z_thr² s / z (the further out, the closer to the mean), `mean` μ,
    `percentile` μ + z_thr s, which is the largest norm that is left alone.
    """
    std = math.sqrt(var)
    z = (norm - mean) / (std + _EPS)
    if way == "percentile":
        limit = mean + threshold * std
        return limit if norm > limit else None
    if z <= threshold:
        return None
    return mean if way == "mean" else mean + threshold**2 * std / z


class ZClip:
    """The gradient norm against its exponential mean and variance.

    The first `warmup` norms are collected, and mean and variance (n below the sum) begin with theirs. Later both move
    by what the step was let through with: min(g, g*), mean first, and variance by the distance from the new mean.
    During the warm-up nothing is a spike; the paper clips these steps to `max_norm` alone. A norm above `max_norm` is
    clipped to it, which is no spike, and the statistics do not see it, as in the authors' code.

    Args:
        threshold: z_thr, standard deviations above the mean; the paper's 2.5.
        decay: α of both exponential means, between 0 and 1; the paper's 0.97.
        warmup: steps before the first decision, at least 2; the paper's 25.
        way: `adaptive` (the paper's), `mean` or `percentile`, see `zclip_limit`.
        max_norm: a limit above all; None leaves that to whoever clips.
    """

    def __init__(
        self,
        threshold: float = THRESHOLD,
        decay: float = DECAY,
        warmup: int = WARMUP,
        way: str = "adaptive",
        max_norm: float | None = None,
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold must be above 0 standard deviations, got {threshold}: ZClip's is {THRESHOLD}")
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}: ZClip's is {DECAY}")
        if warmup < 2:
            raise ValueError(f"warmup must be at least 2 steps, got {warmup}: ZClip's is {WARMUP}")
        if way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}: ZClip's is adaptive")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm}: use None for no limit")
        self.threshold, self.decay, self.warmup, self.way, self.max_norm = threshold, decay, warmup, way, max_norm
        self.mean, self.var = 0.0, 0.0
        self.first: list[float] = []

    @property
    def warm(self) -> bool:
        """Whether there are statistics to decide by."""
        return len(self.first) >= self.warmup

    def judge(self, reading: Reading) -> Verdict:
        norm = reading.norm
        limit = zclip_limit(norm, self.mean, self.var, self.threshold, self.way) if self.warm else None
        if limit is None:
            return Verdict(limit=self.max_norm if self.max_norm is not None and norm > self.max_norm else None)
        z = (norm - self.mean) / (math.sqrt(self.var) + _EPS)
        reason = f"the gradient norm, {norm:.4g}, is {z:.1f} standard deviations above its mean, {self.mean:.4g}"
        return Verdict(reason=reason, limit=limit if self.max_norm is None else min(limit, self.max_norm))

    def learn(self, reading: Reading, verdict: Verdict) -> None:
        norm = reading.norm
        if not self.warm:
            self.first.append(norm)
            if self.warm:
                self.mean = math.fsum(self.first) / self.warmup
                self.var = math.fsum((each - self.mean) ** 2 for each in self.first) / self.warmup
            return
        limit = zclip_limit(norm, self.mean, self.var, self.threshold, self.way)
        norm = norm if limit is None else min(norm, limit)
        self.mean = self.decay * self.mean + (1 - self.decay) * norm
        self.var = self.decay * self.var + (1 - self.decay) * (norm - self.mean) ** 2

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "var": self.var, "first": list(self.first)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.mean, self.var, self.first = state_dict["mean"], state_dict["var"], list(state_dict["first"])
