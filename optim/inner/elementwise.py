"""AdamW, element by element, on tensors of any shapes: torch's own arithmetic, fused where the device has it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from thinrank.optim.inner.half import HalfWeights
from thinrank.optim.inner.moments import moments, zeros
from thinrank.optim.linalg.adam import FUSED, one_layout
from thinrank.optim.linalg.quantise import BLOCK
from thinrank.optim.rule import Decay, State

QUANTISED_FROM = 4096
"""Entries from which a tensor of two dimensions or more keeps 8-bit moments, where they are asked for."""

PIECE, CPU_PIECE = 2**22, 2**18
"""Entries whose 8-bit moments are open at one time: a bound on transient memory, and on a CPU, for each thread, what
its cache holds (tensors of 1 MiB) and still is worth the tenth of a millisecond that calling torch for a piece takes.
On one thread and on two, half or twice as much took up to 15 % longer, an eighth twice as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseAdamW:
    """AdamW on a list of tensors of any shapes.

    Attributes:
        eps_raw: add eps before the bias correction, as GaLore does for its unprojected groups too.
        decay: GaLore decays after the update.
        bits: of an entry of the moments: 32, or 8 (`linalg/quantise.py`, `compand8`, in blocks of the flattened
            tensor); vectors and tensors of less than `QUANTISED_FROM` entries keep theirs as with 32 (their bytes are
            few), and so do float64 weights (who wants those wants no codes).
        half: how 16-bit weights take their update.
    """

    betas: tuple[float, float]
    eps: float
    eps_raw: bool = False
    decay: Decay = field(default=Decay())
    bits: int = 32
    half: HalfWeights = field(default=HalfWeights())

    def init(self, weight: Tensor) -> State:
        """torch's state: `step` (a CPU scalar) and two moments in the weight's shape and dtype.

        Moments of 16-bit weights that are rounded in another way than torch's are float32, because a second moment in
        bfloat16 does not move by 0.1 %. Moments of 8 bits are `…_codes` in the weight's shape and `…_scale`.
        """
        state = {"step": torch.zeros((), dtype=torch.float32, device="meta" if weight.is_meta else "cpu")}
        large = weight.ndim > 1 and weight.numel() >= QUANTISED_FROM
        if self.bits == 8 and large and weight.dtype is not torch.float64:
            own = zeros((weight.numel(),), weight.device, bits=8)
            own = {key: value.view(weight.shape) if key.endswith("codes") else value for key, value in own.items()}
        else:
            dtype = torch.float32 if self.half.apply(weight) else weight.dtype
            own = {
                key: torch.zeros_like(weight, dtype=dtype, memory_format=torch.preserve_format)
                for key in ("exp_avg", "exp_avg_sq")
            }
        return state | own | self.half.init(weight)

    def step_(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float,
        weight_decay: float,
        seeds: Sequence[int] = (),
    ) -> None:
        """One step on all `weights`, in place.

        Args:
            seeds: for each weight, of the random numbers by which it is rounded; only `half.way="stochastic"` needs
                them.
        """
        opened = [
            self.half.open(weight, state) if self.half.apply(weight) or self._opens(weight, state) else weight
            for weight, state in zip(weights, states, strict=True)
        ]
        by_count: dict[float, list[int]] = defaultdict(list)
        for i, state in enumerate(states):
            by_count[float(state["step"]) if self.eps_raw else 0.0].append(i)
        for count, which in by_count.items():
            eps = self.eps / (1.0 - self.betas[1] ** (count + 1.0)) ** 0.5 if self.eps_raw else self.eps
            decay = 0.0 if self.decay.after else weight_decay
            coded = [i for i in which if "exp_avg" not in states[i]]
            plain = [i for i in which if "exp_avg" in states[i]]
            if plain:
                own = [opened[i] for i in plain]
                wide = [grads[i].to(w.dtype) for i, w in zip(plain, own, strict=True)]
                self._torch(own, wide, [states[i] for i in plain], lr, decay, eps)
                if self.decay.after and weight_decay:
                    torch._foreach_mul_(own, 1.0 - lr * weight_decay)
            for i in coded:
                self._by_pieces(opened[i], grads[i], states[i], lr, weight_decay, eps)
        for i, (weight, own) in enumerate(zip(weights, opened, strict=True)):
            if own is not weight:
                self.half.close_(weight, own, seeds[i] if seeds else 0)

    @staticmethod
    def _opens(weight: Tensor, state: State) -> bool:
        return "exp_avg" not in state and not weight.is_contiguous()  # coded moments lie flat, as must what they step

    def _by_pieces(
        self, weight: Tensor, grad: Tensor, state: State, lr: float, weight_decay: float, eps: float
    ) -> None:
        """One step on a contiguous `weight` whose moments are codes, some blocks of it at a time, in float32.

        A weight of 16 bits is rounded to the nearest, piece by piece: no float32 copy of an embedding is ever whole.
        """
        decay = 0.0 if self.decay.after else weight_decay
        size = CPU_PIECE * torch.get_num_threads() if weight.device.type == "cpu" else PIECE
        count = float(state["step"])
        keys = [key for key in state if key.startswith("exp_avg")]
        flat, gradient = weight.view(-1), grad.reshape(-1)
        # Held over all pieces: a tensor of a MiB and more that is freed goes back to the system, and the next one comes
        # in pages that must be zeroed, which can take longer than all the arithmetic.
        spare = [torch.empty(min(size, flat.numel()), dtype=torch.float32, device=weight.device) for _ in range(4)]
        for start in range(0, flat.numel(), size):
            whole = slice(start, start + size)
            blocks = slice(start // BLOCK, (start + size) // BLOCK)
            part = {key: state[key].view(-1)[blocks if key.endswith("scale") else whole] for key in keys}
            here = [each[: flat.numel() - start] for each in spare]
            with moments(part, [int(count)], spare=here) as (m, v):
                piece = {"step": torch.tensor(count), "exp_avg": m, "exp_avg_sq": v}
                own = flat[whole].float()
                self._torch([own], [gradient[whole].float()], [piece], lr, decay, eps)
            if self.decay.after and weight_decay:
                own.mul_(1.0 - lr * weight_decay)
            if flat.dtype is not torch.float32:
                flat[whole].copy_(own)
        state["step"].add_(1.0)

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
            w.device.type in FUSED and one_layout(w, grad, state["exp_avg"], state["exp_avg_sq"])
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
