"""DeepSqueeze: weights travel compressed, with what compression has left out before (Tang et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import Codec
from thinrank.optim.gossip.mail import to_all
from thinrank.optim.gossip.rounds import Step
from thinrank.optim.gossip.schemes.base import Place, Scheme, require
from thinrank.optim.gossip.topology import Topology


class DeepSqueeze(Scheme):
    """DeepSqueeze (Tang, Lian, Qiu, Yuan, Zhang, Zhang and Liu 2019).

    v = x + u + δ,  δ ← v − C(v),  x ← x + u + γ Σⱼ (Wᵢⱼ − Iᵢⱼ) C(vⱼ).

    Nothing is remembered of neighbours, so that graphs may change. The weight of a lost message falls to C(v) of one's
    own, which costs one step's averaging and nothing later. Compression never touches the mean: Σᵢ (Wᵢⱼ − Iᵢⱼ) = 0. It
    does touch how far ranks agree, by its error of the weights themselves, which does not go away near the optimum as
    that of differences does. A rank that leaves out a step sends the weights it has.

    Args:
        gamma: γ, in (0, 1]. 1 suits quantisers of 4 bits and more, 0.3 those of 2; the authors take 0.01 with signs.
    """

    NAME = "deepsqueeze"
    USUAL = "uniform8"

    def __init__(self, place: Place, codec: Codec, *, gamma: float = 1.0) -> None:
        super().__init__(place, codec)
        require("gamma", gamma, lambda x: 0.0 < x <= 1.0, "in (0, 1]", "leave it out, or use less for a coarser codec")
        self.gamma = gamma
        self._left: Tensor | None = None  # δ

    @classmethod
    def limit(cls, graph: Topology) -> tuple[float, str]:
        return 1.0, "what error feedback makes good"

    def start(self, weights: Tensor) -> None:
        self._left = torch.zeros_like(weights)

    def _step(self, weights: Tensor, update: Tensor, good: bool) -> Step:
        assert self._left is not None, "start comes before the first step"
        new = weights + update
        aim = new + self._left
        payload = self.codec.encode(aim, self.key())
        told = self.codec.decode(payload, self.key())
        self.tally.error.add(aim, told)
        self._left = aim.sub_(told)
        message = self.mail.seal(self.steps, payload)
        expects = dict.fromkeys(self.sources, self.codec.nbytes)
        letters = yield from self.mail.swap(self.steps, to_all(self.targets, message), expects)
        others = {
            j: self.codec.decode(a.payload, self.key(rank=j)) for j, a in letters.items() if a.payload is not None
        }
        return new.add_(self.pulled(told, others), alpha=self.gamma)

    def state(self) -> dict[str, Tensor]:
        return {} if self._left is None else {"left": self._left}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        super().load(state, steps)
        self._left = state.get("left")
