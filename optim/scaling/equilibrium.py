"""Where weights settle under decay, in formulas: size, rotation, time scale, and the two meanings of "decay".

A step of AdamW is W ← (1 − ηλ) W − η U, with U of entries about 1. If the updates of different times have nothing to do
with each other, what is added and what is lost come to balance. If something in them persists for longer than 1/(ηλ)
steps, that part grows to Ū/λ instead, whatever η is, and the formulas of this page are too small (`drift` looks).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from thinrank.optim.methods.config import number


def equilibrium_rms(lr: float, decay: float, update_rms: float = 1.0) -> float:
    """RMS of the entries of a weight in balance: η u / √(1 − (1 − ηλ)²), which is nearly √(η/2λ) u.

    Adam's momentum does not change it: of independent gradients, what it spreads over steps adds up to the same.

    Args:
        lr: η; decay: λ of torch's AdamW; both above 0, and their product below 2.
        update_rms: u, of the entries of one gradient's whole contribution: 1 for Adam.

    Raises:
        ValueError: for values without a balance.
    """
    number("lr", lr, open_low=True)
    number("decay", decay, open_low=True)
    if lr * decay >= 2:
        raise ValueError(f"lr × decay must be below 2, got {lr * decay:g}: weights would not stay finite")
    keep = 1 - lr * decay
    return lr * update_rms / math.sqrt(1 - keep**2)


def noise_top_sigma(rows: int, columns: int, rms: float) -> float:
    """The largest singular value of a (rows, columns) matrix of independent entries: rms (√rows + √columns)."""
    return rms * (math.sqrt(rows) + math.sqrt(columns))


def spectral_bound(decay: float, update_norm: float = 1.0) -> float:
    """What ‖W‖₂ cannot exceed where no update's spectral norm exceeds `update_norm`: c/λ, whatever gradients are."""
    number("decay", decay, open_low=True)
    return update_norm / decay


def instant_update_rms(lr: float, beta1: float) -> float:
    """RMS of one step of Adam on independent gradients, η √((1 − β₁)/(1 + β₁)): 0.23 η at β₁ = 0.9."""
    return lr * math.sqrt((1 - beta1) / (1 + beta1))


def angular_update(lr: float, decay: float, beta1: float = 0.0) -> float:
    """Rotation of a weight in balance in one step, in radians: √(2ηλ (1 − β₁)/(1 + β₁)).

    Kosson, Messmer & Jaggi 2023 (arXiv:2305.17212): the same for all layers, since the size of gradients cancels. It is
    also the relative change ‖ΔW‖/‖W‖. The factor of β₁ is derived here, for independent gradients.
    """
    return math.sqrt(2 * lr * decay) * instant_update_rms(1.0, beta1)


def decay_clock(rates: Iterable[float], decay: float | Iterable[float]) -> float:
    """Σ η_t λ_t, the age of a run in units of the weights' memory.

    Below about 1 weights still remember how they began, and sizes say little about balance. Runs of one schedule whose
    ηλ differ, as they do at different widths under `const` and `sqrt_wd`, are to be compared at equal age, not step.

    Raises:
        ValueError: where rates and decays are of different numbers.
    """
    etas = list(rates)
    lambdas = [float(decay)] * len(etas) if isinstance(decay, (int, float)) else list(decay)
    if len(etas) != len(lambdas):
        raise ValueError(f"there must be a decay for each rate, got {len(etas)} and {len(lambdas)}: give one, or all")
    return math.fsum(eta * lam for eta, lam in zip(etas, lambdas, strict=True))


def independent_decay(decay: float, lr: float) -> float:
    """Decay λ′ of an optimizer that shrinks by 1 − (η_t/η) λ′, equal to torch's `decay` λ at the peak rate η: λη."""
    return decay * lr


def coupled_decay(decay: float, lr: float) -> float:
    """Decay λ of torch's AdamW, 1 − η_t λ, that equals the independent `decay` λ′ at the peak rate η = `lr`: λ′/η."""
    number("lr", lr, open_low=True)
    return decay / lr


def ema_timescale(batch_tokens: float, lr: float, decay: float, tokens: float) -> float:
    """The share of a training over which AdamW averages its updates: τ = B/(ηλD).

    AdamW's weights are an exponential mean of updates with memory 1/(ηλ) steps (Wang & Aitchison 2024,
    arXiv:2405.13698), of D/B in all. η is the peak rate of the weights in question.

    Raises:
        ValueError: for a value that is not above 0.
    """
    for name, value in (("batch_tokens", batch_tokens), ("lr", lr), ("decay", decay), ("tokens", tokens)):
        number(name, value, open_low=True)
    return batch_tokens / (lr * decay * tokens)


@dataclass(frozen=True, kw_only=True)
class PowerLines:
    """Laws of Bergsma et al. 2025 (arXiv:2505.13738) for decay and batch size, by training tokens D and parameters N.

    The best τ = B/(ηλD) is c (D/N)^m; the best and the critical batch are powers of D alone. The forms are the paper's,
    fitted to models of 111M to 3.3B in µP. **The constants are quoted from memory of that fit, and not checked against
    its tables**: a start for a fit of one's own, and values to be replaced by one.
    """

    timescale: float = field(default=1.084, metadata={"help": "c in τ = c (tokens/parameters)^m"})
    timescale_exp: float = field(default=-0.527, metadata={"help": "m in τ = c (tokens/parameters)^m, below 0"})
    batch: float = field(default=0.0306, metadata={"help": "factor of the best batch's power of the tokens"})
    batch_exp: float = field(default=0.383, metadata={"help": "exponent of the same"})
    critical: float = field(default=0.0471, metadata={"help": "factor of the critical batch's power of the tokens"})
    critical_exp: float = field(default=0.462, metadata={"help": "exponent of the same"})

    def __post_init__(self) -> None:
        for name in ("timescale", "batch", "critical"):
            number(name, getattr(self, name), open_low=True)
        number("timescale_exp", self.timescale_exp, low=-4.0, high=0.0)

    def best_timescale(self, tokens: float, parameters: float) -> float:
        """c (D/N)^m."""
        return self.timescale * (tokens / parameters) ** self.timescale_exp

    def best_decay(self, *, batch_tokens: float, lr: float, tokens: float, parameters: float) -> float:
        """λ = B/(η D τ): proportional to the batch, and falling with the tokens more slowly than 1/D.

        Args:
            lr: peak rate η of the weights in question, that of hidden ones after the width rule.
        """
        return batch_tokens / (lr * tokens * self.best_timescale(tokens, parameters))

    def best_batch(self, tokens: float) -> float:
        """Of the best final loss, in the fit's unit (sequences of 2,048 tokens)."""
        return self.batch * tokens**self.batch_exp

    def critical_batch(self, tokens: float) -> float:
        """Above which twice the batch no longer halves the steps, in the same unit."""
        return self.critical * tokens**self.critical_exp

    def decay_multiplier(self, *, batch: float = 1.0, tokens: float = 1.0, tokens_per_parameter: float = 1.0) -> float:
        """What a base's decay is multiplied by, beside any factor of width, by ratios to the base:
        (B/B₀)(D₀/D)(TPP₀/TPP)^m."""
        return batch / tokens * tokens_per_parameter**-self.timescale_exp
