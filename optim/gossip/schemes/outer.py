"""DiLoCo, Streaming DiLoCo and SparseLoCo: ranks train alone for many steps, and an outer optimizer takes what all did.

All three are to be called every so many steps of the inner optimizer (`interval` of `Gossip`, some 15 to 500), with
what it has moved the weights by since. Its state stays on its rank and is never exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import Codec
from thinrank.optim.gossip.rounds import Step
from thinrank.optim.gossip.schemes.alike import Alike
from thinrank.optim.gossip.schemes.base import Place, require, require_whole
from thinrank.optim.gossip.schemes.quantised import Averaging


class DiLoCo(Averaging):
    """DiLoCo (Douillard et al. 2023), and Streaming DiLoCo (Douillard et al. 2025) with `fragments`.

    θ are weights that all ranks have in common, xᵢ = θ + uᵢ those of a rank after its own steps:

        d = θ − mean of xᵢ,  v ← μ v + d,  θ ← θ − η (d + μ v),  xᵢ ← θ

    an outer SGD with Nesterov's momentum. Streaming DiLoCo cuts the weights into P fragments, of which fragment f has
    the tensors f, f + P, …; each call is for one of them in turn, so that each is exchanged as often as every P calls.
    With `delay` a fragment's mean travels until the next call, which then takes it over, and the weights of a call are
    known before any message comes. xᵢ ← α xᵢ + (1 − α) θ keeps a part of what the rank has done meanwhile.

    All ranks take part, whatever the topology. d can be compressed, as by `Averaging`. A rank with an update that is
    not finite is left out of the mean and goes on from θ and, of other fragments, from its last weights.

    Args:
        outer_lr: η.
        outer_momentum: μ, in [0, 1).
        fragments: P.
        delay: calls until a fragment is taken over, 0 or 1.
        mixing: α, in [0, 1). The authors of the streaming form use 0.5.
    """

    NAME = "diloco"

    def __init__(
        self,
        place: Place,
        codec: Codec,
        *,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        fragments: int = 1,
        delay: int = 0,
        mixing: float = 0.0,
    ) -> None:
        super().__init__(place, codec)
        require("outer_lr", outer_lr, lambda x: 0.0 < x < float("inf"), "above 0 and finite", "use 0.7")
        require("outer_momentum", outer_momentum, lambda x: 0.0 <= x < 1.0, "in [0, 1)", "use 0.9, or 0 for none")
        require_whole("fragments", fragments, 1, "use 1 for all tensors at once")
        require("delay", delay, lambda n: n in (0, 1), "0 or 1", "use a longer interval for a longer delay")
        require("mixing", mixing, lambda x: 0.0 <= x < 1.0, "in [0, 1)", "use 0, or 0.5 with a delay")
        if fragments > len(codec.shapes):
            raise ValueError(f"fragments must be at most the {len(codec.shapes)} tensors, got {fragments}: use fewer")
        if delay and fragments == 1:
            raise ValueError("delay needs fragments of at least 2, got 1: all would be under way when it is due again")
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        self.fragments, self.delay, self.mixing = fragments, delay, mixing
        self.sizes = [torch.Size(shape).numel() for shape in codec.shapes]
        self.common: Tensor | None = None  # θ
        self.momentum: Tensor | None = None  # v, with the sign of an update

    def start(self, weights: Tensor) -> None:
        self.common, self.momentum = weights.clone(), torch.zeros_like(weights)

    def _step(self, weights: Tensor, update: Tensor, good: bool) -> Step:
        assert self.common is not None, "start comes before the first step"
        assert self.momentum is not None
        local, part = weights + update, self.steps % self.fragments
        if self.delay and self.steps:
            self._take(local, (self.steps - 1) % self.fragments)
        known = local if self.delay else None
        moved = torch.cat([x - y for x, y in zip(self._of(local, part), self._of(self.common, part), strict=True)])
        mean = yield from self.mean(moved, good, known)
        self._outer(mean, part)
        if not self.exact:
            both = yield from self.agreed(torch.cat([self.common, self.momentum]), known)
            self.common, self.momentum = both.chunk(2)
        if not self.delay:
            self._take(local, part)
        return local

    def _outer(self, mean: Tensor, part: int) -> None:
        sizes = [x.numel() for x in self._of(self.common, part)]
        for step, x, v in zip(
            mean.split(sizes), self._of(self.common, part), self._of(self.momentum, part), strict=True
        ):
            v.mul_(self.outer_momentum).add_(step)
            x.add_(step, alpha=self.outer_lr).add_(v, alpha=self.outer_lr * self.outer_momentum)

    def _take(self, local: Tensor, part: int) -> None:
        for own, common in zip(self._of(local, part), self._of(self.common, part), strict=True):
            own.copy_(torch.lerp(common, own, self.mixing) if self.mixing else common)

    def _of(self, flat: Tensor | None, part: int) -> tuple[Tensor, ...]:
        """Views of a fragment's tensors."""
        assert flat is not None, "start comes before the first step"
        return flat.split(self.sizes)[part :: self.fragments]

    def state(self) -> dict[str, Tensor]:
        if self.common is None or self.momentum is None:
            return {}
        return {"common": self.common, "momentum": self.momentum}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        super().load(state, steps)
        self.common, self.momentum = state.get("common"), state.get("momentum")


class SparseLoCo(Alike):
    """SparseLoCo (Sarfi, Thérien, Lidin and Belilovsky 2025): error feedback in place of the outer momentum.

    e ← β e + u,  s = C(e),  e ← e − s,  θ ← θ + η mean of sᵢ.

    e is a rank's own, θ all ranks'. Messages go from everyone to everyone, whatever the topology: n − 1 of them for
    each rank, which a compressor of a few hundredths of all entries affords up to some 32 ranks. The mean is over the
    ranks whose messages are there; a rank with an update that is not finite sends none, and keeps its e.

    Args:
        outer_lr: η.
        decay: β, in [0, 1].
    """

    NAME = "sparseloco"
    USUAL = "topk"

    def __init__(self, place: Place, codec: Codec, *, outer_lr: float = 1.0, decay: float = 0.95) -> None:
        super().__init__(place, codec)
        require("outer_lr", outer_lr, lambda x: 0.0 < x < float("inf"), "above 0 and finite", "use 1")
        require("decay", decay, lambda x: 0.0 <= x <= 1.0, "in [0, 1]", "use 0.95, or 1 to forget nothing")
        self.outer_lr, self.decay = outer_lr, decay
        self._left: Tensor | None = None  # e

    def start(self, weights: Tensor) -> None:
        self._left = torch.zeros_like(weights)

    def _step(self, weights: Tensor, update: Tensor, good: bool) -> Step:
        assert self._left is not None, "start comes before the first step"
        payload = torch.zeros(self.codec.nbytes, dtype=torch.uint8, device=weights.device)
        if good:
            aim = self._left.mul(self.decay).add_(update)
            payload = self.codec.encode(aim, self.key())
            told = self.codec.decode(payload, self.key())
            self.tally.error.add(aim, told)
            self._left = aim.sub_(told)
        payloads = yield from self.gathered(payload, good)
        total = torch.zeros_like(weights)
        for j, part in payloads.items():
            total.add_(self.codec.decode(part, self.key(rank=j)))
        new = torch.add(weights, total, alpha=self.outer_lr / max(len(payloads), 1))
        return (yield from self.agreed(new))

    def state(self) -> dict[str, Tensor]:
        return {} if self._left is None else {"left": self._left}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        super().load(state, steps)
        self._left = state.get("left")
