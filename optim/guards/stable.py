"""StableAdamW's measure: how large a gradient is for the second moment that AdamW divides it by.

Source: Wortsman et al. 2023 (arXiv 2304.13013): RMS_t = √mean(g² / max(v, ε²)), by which StableAdamW divides the rate
of a tensor where it is above 1; that loss spikes follow steps with RMS_t ≥ 2.3 is their observation (of the first layer
of vision models). Here it is looked at before a step and nothing is divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.guards.reading import Reading, Verdict
from thinrank.optim.linalg.quantise import expand8

THRESHOLD = 2.3


@torch.no_grad()
def update_ratio(
    grad: Tensor, second_moment: Tensor, count: float | Tensor, *, beta2: float, eps: float = 1e-6
) -> Tensor:
    """RMS_t of a tensor that AdamW is about to step (float32 scalar).

    The paper's v has this gradient in it, with a debiased decay; that is the bias-corrected moment after the step,
    v̂ = (β₂ v + (1 - β₂) g²) / (1 - β₂ᵗ). So the ratio is 1 in the first step, near 1 as long as gradients stay as they
    were, and never above √((1 - β₂ᵗ) / (1 - β₂)).

    Args:
        grad: of any shape, in the layout of `second_moment`.
        second_moment: AdamW's v of the steps before, the same shape.
        count: how many steps that was.
        beta2: its decay rate.
        eps: the smallest √v that is divided by; the paper's 1e-6.
    """
    square = grad.float().square()
    corrected = (beta2 * second_moment.float() + (1.0 - beta2) * square) / (1.0 - beta2 ** (count + 1.0))
    return (square / corrected.clamp(min=eps**2)).mean().sqrt()


@torch.no_grad()
def update_ratios(optimizer: torch.optim.Optimizer, eps: float = 1e-6) -> dict[str, Tensor]:
    """`update_ratio` of every parameter with a gradient whose second moment `optimizer` holds entry by entry, by name;
    they stay on the device.

    Read are `exp_avg_sq` in the parameter's shape, in any float, and thinrank's 8-bit codes of it. What is not seen: a
    matrix that a low-rank method steps, whose moments are those of coordinates in a basis; methods without a second
    moment (Muon); a parameter before its first step.
    """
    found: dict[str, Tensor] = {}
    matrices = getattr(optimizer, "matrices", None)
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        in_basis = [bool(each) for each in matrices(index)] if matrices is not None else [False] * len(names)
        for name, param, projected in zip(names, group["params"], in_basis, strict=True):
            state = optimizer.state.get(param, {})
            if param.grad is None or projected or "step" not in state or "betas" not in group:
                continue
            moment = _second_moment(state, param)
            if moment is not None and (state["step"].device.type != "cpu" or float(state["step"]) > 0):
                beta2 = float(group["betas"][1])
                found[name] = update_ratio(param.grad, moment, state["step"].to(param.device), beta2=beta2, eps=eps)
    return found


def _second_moment(state: Mapping[str, Any], param: Tensor) -> Tensor | None:
    whole = state.get("exp_avg_sq")
    if whole is not None:
        return whole if whole.shape == param.shape else None
    codes, scale = state.get("exp_avg_sq_codes"), state.get("exp_avg_sq_scale")
    if codes is None or scale is None or codes.shape != param.shape:
        return None
    return expand8(codes.view(-1), scale.view(-1)).view(param.shape)


class StableRatio:
    """A step is a spike when the ratio of any tensor is above `threshold`. It has no statistics of its own.

    Args:
        threshold: of RMS_t; 2.3 by the paper's observation. It cannot be reached where √(1 / (1 - β₂)) is less: 4.5 for
            β₂ = 0.95, 31.6 for 0.999; nor in the first steps, where step t has √t at most.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        if not threshold > 1:
            raise ValueError(f"threshold must be above 1, where gradients are as they were, got {threshold}: use 2.3")
        self.threshold = threshold

    def judge(self, reading: Reading) -> Verdict:
        if not reading.ratios:
            return Verdict()
        name, worst = max(reading.ratios.items(), key=lambda pair: pair[1])
        if worst <= self.threshold:
            return Verdict()
        return Verdict(reason=f"the gradient of {name} is {worst:.2f} times what its second moment lets expect")

    def learn(self, reading: Reading, verdict: Verdict) -> None:
        """Nothing: the optimizer's moments are the statistics."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing."""
