"""AdamW, element by element, on tensors of any shapes: torch's own arithmetic, fused where the device has it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from thinrank.optim.linalg.adam import one_layout
from thinrank.optim.rule import Decay, State


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseAdamW:
    """AdamW on a list of tensors of any shapes.

    Attributes:
        eps_raw: add eps before the bias correction, as GaLore does for its unprojected groups too.
        decay: GaLore decays after the update.
    """

    betas: tuple[float, float]
    eps: float
    eps_raw: bool = False
    decay: Decay = field(default=Decay())

    def init(self, weight: Tensor) -> State:
        """torch's state: `step` (a CPU scalar) and two moments in the weight's shape and dtype."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device="meta" if weight.is_meta else "cpu"),
            "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
        }

    def step_(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        """One step on all `weights`, in place."""
        if not self.eps_raw:
            self._torch(weights, grads, states, lr, 0.0 if self.decay.after else weight_decay, self.eps)
        else:
            by_count: dict[float, list[int]] = defaultdict(list)
            for i, state in enumerate(states):
                by_count[float(state["step"])].append(i)
            for count, which in by_count.items():
                eps = self.eps / (1.0 - self.betas[1] ** (count + 1.0)) ** 0.5
                decay = 0.0 if self.decay.after else weight_decay
                self._torch(
                    [weights[i] for i in which], [grads[i] for i in which], [states[i] for i in which], lr, decay, eps
                )
        if self.decay.after and weight_decay:
            torch._foreach_mul_(list(weights), 1.0 - lr * weight_decay)

    def _torch(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        lr: float,
        weight_decay: float,
        eps: float,
    ) -> None:
        able = [
            w.device.type in ("cpu", "cuda") and one_layout(w, grad, state["exp_avg"], state["exp_avg_sq"])
            for w, grad, state in zip(weights, grads, states, strict=True)
        ]
        for fused in (True, False):
            which = [i for i, fits in enumerate(able) if fits is fused]
            if which:
                _adamw(
                    [weights[i] for i in which],
                    [grads[i] for i in which],
                    [states[i] for i in which],
                    fused=fused,
                    betas=self.betas,
                    lr=lr,
                    weight_decay=weight_decay,
                    eps=eps,
                )


def _adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    *,
    fused: bool,
    betas: tuple[float, float],
    lr: float,
    weight_decay: float,
    eps: float,
) -> None:
    # The fused CUDA kernel wants the step counts beside the weights. They live on the CPU, where reading them is free,
    # so it gets filled stand-ins: a copy would make the host wait.
    steps = [
        torch.full((), float(step), dtype=torch.float32, device=w.device) if fused and w.is_cuda else step
        for w, step in ((w, state["step"]) for w, state in zip(weights, states, strict=True))
    ]
    torch_adamw(
        weights,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        fused=fused,
        foreach=False,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for step, state in zip(steps, states, strict=True):
        if step is not state["step"]:
            state["step"].add_(1.0)
