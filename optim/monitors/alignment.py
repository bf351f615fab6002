"""Spectral Alignment: on which side of a weight's principal singular vector its inputs lie.

For a linear layer with weight W, first right singular vector v1, and inputs x_i (its tokens, as the layer gets them)::

    SA_i = <x_i, v1> / ||x_i||                 in [-1, 1]
    f+   = mean_i 1[SA_i > 0]
    SD   = 2 min(f+, 1 - f+)                   sign diversity, in [0, 1]

Healthy layers see both signs; when all inputs fall on one side, every token gets the same large output component, and
whatever pushes σ1 pushes it the same way for all of them. Qiu et al. 2025 (arXiv:2510.04202) monitor the distribution
of alignments and find that the collapse of sign diversity comes before a loss explodes. The normalisation by ||x||, the
numbers below and the thresholds of `AlignmentAlarm` are ours: the paper's own were not at hand.

What it cannot see: where σ1 and σ2 nearly agree, v1 is any vector of a plane and SD means nothing; the inputs of a
layer after a gated or squared activation are one-sided by construction; some layers of healthy models are one-sided all
the time. Look at how a layer changes, and at how many do, never at one layer's value.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.monitors.tracker import exact

BINS = 41
REACH = 10.0
"""The histogram's: so many bins of SA · sqrt(in) from -10 to 10; what lies beyond counts in the last."""

CHUNK = 2**16
"""Tokens that are sorted into bins at a time."""


def counts(inputs: Tensor, right: Tensor) -> Tensor:
    """What is needed of the alignments of `inputs`, all of it additive over tokens, micro-batches and ranks.

    Args:
        inputs: (…, in), of any floating dtype; tokens that are zero have no direction and are left out.
        right: (in,) v1 in float32.

    Returns:
        (4 + 41,) float64: tokens, positive ones, Σ SA, Σ |SA|, and the histogram of SA · sqrt(in).
    """
    with exact(inputs.device):
        return _counted(inputs.detach().reshape(-1, inputs.shape[-1]), right)


def _counted(rows: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros(4 + BINS, dtype=torch.float64, device=rows.device)
    edges = torch.linspace(-REACH, REACH, BINS + 1, device=rows.device)[1:-1]
    for part in rows.split(CHUNK):
        wide = part.to(right.dtype)
        size = torch.linalg.vector_norm(wide, dim=-1)
        there = size > 0
        alignment = (wide @ right) / size.clamp(min=torch.finfo(size.dtype).tiny)
        place = (alignment[:, None] * math.sqrt(rows.shape[-1]) >= edges).sum(-1)
        bins = ((place[:, None] == torch.arange(BINS, device=rows.device)) & there[:, None]).sum(0)
        sums = [there.sum(), ((alignment > 0) & there).sum(), alignment.sum(), alignment.abs().sum()]
        total += torch.cat([torch.stack([value.double() for value in sums]), bins.double()])
    return total


@dataclass(frozen=True, slots=True)
class Alignment:
    """The distribution of a layer's alignments.

    Attributes:
        tokens: that it was taken from; all else is NaN without any.
        positive: f+, the share of positive ones. It turns into 1 - f+ with the arbitrary sign of v1, as `mean` does.
        mean: of SA · sqrt(in), for inputs without a direction 0.
        magnitude: mean of |SA| · sqrt(in), for these 0.80.
        histogram: of SA · sqrt(in), tokens in each of 41 bins from -10 to 10.
    """

    tokens: int
    positive: float
    mean: float
    magnitude: float
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, counted: Tensor, width: int) -> Alignment:
        """From the sum of `counts` over all inputs, for a layer with so many inputs a token."""
        tokens, positive, total, absolute, *bins = counted.tolist()
        scale = math.sqrt(width) / tokens if tokens else math.nan
        share = positive / tokens if tokens else math.nan
        return cls(int(tokens), share, total * scale, absolute * scale, tuple(int(count) for count in bins))

    @property
    def sign_diversity(self) -> float:
        """SD = 2 min(f+, 1 - f+): 1 when both signs are as frequent, 0 when there is one. Inputs shifted along v1 by
        half a standard deviation have 0.6, by one 0.3, by two 0.04."""
        return 2 * min(self.positive, 1 - self.positive)

    @property
    def sign_entropy(self) -> float:
        """The same as the entropy of the sign, in bits."""
        return -sum(p * math.log2(p) for p in (self.positive, 1 - self.positive) if p > 0)


LEVELS = ("healthy", "info", "warn", "alert")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an alarm says at a reading.

    Attributes:
        level: "healthy", "info" (something for the dashboard), "warn" or "alert".
        collapsed: share of the layers whose inputs lie on one side.
        layers: their names, those that lost the most first.
        reason: one sentence; "" when healthy.
    """

    level: str
    collapsed: float
    layers: tuple[str, ...] = ()
    reason: str = ""


@dataclass
class _Layer:
    fast: float = math.nan
    slow: float = math.nan
    begun: list[float] = field(default_factory=list)
    collapsed: bool = False
    sigma: deque[tuple[int, float]] = field(default_factory=deque)


@dataclass
class AlignmentAlarm:
    """Tells from sign diversities when a model is about to collapse. Its thresholds are ours, not the paper's.

    A layer is collapsed when a running mean of its SD falls below `collapse` and the layer began above `healthy`: one
    that has always been one-sided says nothing. It is so until the mean is above `clear` again. The model is in trouble
    when many layers are: one or a few collapse in runs that train well.

    * alert: a share `alert` of the layers is collapsed, or the share rose by `rise` within `window` steps while the
      median σ1 grew by a tenth;
    * warn: a share `warn`, or the mean SD of all layers fell below `fall` of what it was at the beginning;
    * info: a layer is collapsed and goes on losing SD while its σ1 grows by a tenth within `window` steps.

    Nothing is said before `warmup` steps, nor until the beginning is known; layers whose σ1 / σ2 is below `gap` have no
    v1 and are left out of that reading.

    Args:
        warmup: steps in which nothing is said, such as those of the learning rate's warm-up.
        baseline: steps after it whose median SD is a layer's beginning.
        fast, slow: readings of the two running means.

    Raises:
        ValueError: for thresholds that contradict each other.
    """

    warmup: int = 0
    baseline: int = 500
    collapse: float = 0.05
    clear: float = 0.15
    healthy: float = 0.3
    warn: float = 0.30
    alert: float = 0.40
    rise: float = 0.15
    fall: float = 0.6
    window: int = 200
    gap: float = 1.05
    fast: int = 10
    slow: int = 200
    _layers: dict[str, _Layer] = field(default_factory=dict)
    _shares: deque[tuple[int, float, float]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if not 0 < self.collapse < self.clear <= 1:
            raise ValueError(
                f"collapse and clear must be 0 < collapse < clear <= 1, got {self.collapse} and {self.clear}: a layer "
                "must rise further than it fell to be healthy again"
            )
        if not 0 < self.warn <= self.alert <= 1:
            raise ValueError(f"warn and alert must be 0 < warn <= alert <= 1, got {self.warn} and {self.alert}")
        for key in ("baseline", "window", "fast", "slow"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}: give a number of steps")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}: give a number of steps")

    def update(self, step: int, readings: Mapping[str, tuple[float, float, float]]) -> Verdict:
        """Takes a reading after `step` steps.

        Args:
            step: larger than at the last call.
            readings: by layer its SD, its σ1 and its σ1 / σ2; those with a value that is NaN are left out.
        """
        for name, (diversity, sigma, gap) in readings.items():
            if not (math.isfinite(diversity) and math.isfinite(sigma)) or gap < self.gap:
                continue
            self._read(self._layers.setdefault(name, _Layer()), step, diversity, sigma)
        known = {name: layer for name, layer in self._layers.items() if layer.begun}
        if step <= self.warmup or not known:
            return Verdict("healthy", 0.0)
        growth = statistics.median([_growth(layer.sigma) for layer in known.values()])
        collapsed = [name for name, layer in known.items() if layer.collapsed]
        collapsed.sort(key=lambda name: known[name].fast)
        share = len(collapsed) / len(known)
        self._shares.append((step, share, growth))
        while self._shares[0][0] < step - self.window:
            self._shares.popleft()
        if step <= self.warmup + self.baseline:
            return Verdict("healthy", share, tuple(collapsed))
        start = statistics.fmean(statistics.median(layer.begun) for layer in known.values())
        now = statistics.fmean(layer.fast for layer in known.values())
        risen = share - min(before for _, before, _ in self._shares)
        names = tuple(collapsed)
        if share >= self.alert:
            return Verdict("alert", share, names, f"the inputs of {share:.0%} of the layers lie on one side")
        if risen >= self.rise and growth > 1.1:
            reason = f"{risen:.0%} of the layers became one-sided within {self.window} steps while σ1 grew"
            return Verdict("alert", share, names, reason)
        if share >= self.warn:
            return Verdict("warn", share, names, f"the inputs of {share:.0%} of the layers lie on one side")
        if now < self.fall * start:
            return Verdict("warn", share, names, f"mean sign diversity fell from {start:.2f} to {now:.2f}")
        falling = [n for n in names if known[n].fast < 0.5 * known[n].slow and _growth(known[n].sigma) > 1.1]
        if falling:
            return Verdict("info", share, names, f"{falling[0]} became one-sided while its σ1 grew")
        return Verdict("healthy", share, names)

    def _read(self, layer: _Layer, step: int, diversity: float, sigma: float) -> None:
        fresh = math.isnan(layer.fast)
        layer.fast = diversity if fresh else layer.fast + (diversity - layer.fast) / self.fast
        layer.slow = diversity if fresh else layer.slow + (diversity - layer.slow) / self.slow
        layer.sigma.append((step, sigma))
        while layer.sigma[0][0] < step - self.window:
            layer.sigma.popleft()
        if step <= self.warmup:
            return
        if step <= self.warmup + self.baseline or not layer.begun:
            layer.begun.append(diversity)
        if layer.collapsed:
            layer.collapsed = layer.fast <= self.clear
        else:
            layer.collapsed = layer.fast < self.collapse and statistics.median(layer.begun) > self.healthy

    def state_dict(self) -> dict[str, Any]:
        """Beginnings and running means, as plain numbers."""
        return {
            "shares": [list(entry) for entry in self._shares],
            "layers": {
                name: {
                    "fast": layer.fast,
                    "slow": layer.slow,
                    "begun": list(layer.begun),
                    "collapsed": layer.collapsed,
                    "sigma": [list(entry) for entry in layer.sigma],
                }
                for name, layer in self._layers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`."""
        self._shares = deque((int(step), share, growth) for step, share, growth in state["shares"])
        self._layers = {
            name: _Layer(
                fast=saved["fast"],
                slow=saved["slow"],
                begun=list(saved["begun"]),
                collapsed=bool(saved["collapsed"]),
                sigma=deque((int(step), value) for step, value in saved["sigma"]),
            )
            for name, saved in state["layers"].items()
        }


def _growth(readings: deque[tuple[int, float]]) -> float:
    """σ1 now, in parts of the first within the window."""
    if not readings or readings[0][1] <= 0:
        return 1.0
    return readings[-1][1] / readings[0][1]
