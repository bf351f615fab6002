"""D-PSGD: weights are averaged with those of neighbours (Lian et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thinrank.optim.gossip.compress import Codec
from thinrank.optim.gossip.mail import to_all
from thinrank.optim.gossip.rounds import Step
from thinrank.optim.gossip.schemes.base import Place, Scheme
from thinrank.optim.gossip.topology import Topology

ORDERS = ("with", "then")
"""Adapt with combine, W X + u, of which W X can travel while u is computed; adapt then combine, W (X + u)."""


class DPSGD(Scheme):
    """x ← Σⱼ Wᵢⱼ xⱼ + u, all x of before the step (order `with`, the paper's), or x ← Σⱼ Wᵢⱼ (xⱼ + uⱼ) (`then`).

    Nothing is remembered of neighbours, so that graphs may change and a lost message costs one step's averaging: its
    weight falls to the rank's own. A rank that leaves out a step sends the weights it has.

    Args:
        order: of averaging and update.
    """

    NAME = "dpsgd"
    LINEAR = True

    @classmethod
    def holds(cls, graph: Topology, rank: int, codec: Codec, options: Mapping[str, Any]) -> int:
        return 4 * codec.numel if options.get("order", "with") == "with" else 0

    def __init__(self, place: Place, codec: Codec, *, order: str = "with") -> None:
        super().__init__(place, codec)
        if order not in ORDERS:
            raise ValueError(f"order must be {' or '.join(ORDERS)}, got {order!r}: leave it out for the paper's")
        self.order = order
        self._mixed: Tensor | None = None  # W X of the weights that this rank has now

    def start(self, weights: Tensor) -> None:
        self._mixed = weights

    def introduce(self, weights: Tensor) -> Step:
        if self.order == "with":
            self._mixed = yield from self._average(weights, weights)
        return weights

    def _step(self, weights: Tensor, update: Tensor, good: bool) -> Step:
        if self.order == "then":
            return (yield from self._average(weights + update, None))
        assert self._mixed is not None, "start comes before the first step"
        new = self._mixed + update
        self._mixed = yield from self._average(new, new)
        return new

    def _average(self, own: Tensor, weights: Tensor | None) -> Step:
        payload = self.codec.encode(own, self.key())
        message = self.mail.seal(self.steps, payload)
        expects = dict.fromkeys(self.sources, self.codec.nbytes)
        letters = yield from self.mail.swap(self.steps, to_all(self.targets, message), expects, weights=weights)
        others = {
            j: self.codec.decode(a.payload, self.key(rank=j)) for j, a in letters.items() if a.payload is not None
        }
        return self.mixed(own, others)

    def state(self) -> dict[str, Tensor]:
        return {} if self.order == "then" or self._mixed is None else {"mixed": self._mixed}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        super().load(state, steps)
        self._mixed = state.get("mixed")
