"""Sparse Spectral Training (Zhao et al. 2025, arXiv 2405.15481): all singular values, some singular vectors at a time.

A weight is kept as its singular triples and never as a matrix:

    y = U diag(s) Vᵀ x + b ,   U (out, k), s (k,), V (in, k), k = min(out, in)

    every step       s ← max(s − η Adam(∂s), 0)                             all of them
                     u_i ← normalise(u_i − η Adam(G v_i)),                   for i in S, with G = ∂L/∂W
                     v_i ← normalise(v_i − η Adam(Gᵀ u_i))
    every T3 steps   S ← r indices by p_i = 1/2 (1/k + s_i / Σ s), without replacement (an *iteration*);
                     Adam's state of the vectors ← 0; the learning rate warms up again over a few steps
    every T2 of these   U, s, V ← SVD(U diag(s) Vᵀ) (a *round*); Adam's state of s ← 0 as well

The paper was read in digests, and the authors' code was not available to us: T3 = 200, a warm-up of 20 steps and
T2 = k / r are reconstructed. That s keeps its state between rounds, since its coordinates stay the same, and loses it
with them, is ours; so is all storage: `U`, `V` hold the r vectors that are trained, `U_rest`, `V_rest` the others, and
`order` says which is which, while `s` stays in its order. A resampling swaps as few columns as it can and leaves W as
it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from thinrank.optim.layers.base import Layer, RankedReparam, like
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.spectral import (
    ENGINES,
    DenseForm,
    FactorForm,
    built,
    computed_in,
    dense_cost,
    factor_cost,
    flat,
)
from thinrank.optim.linalg.factor import draw, exchange_of, mixture, singular
from thinrank.optim.methods.config import choice, whole_steps

if TYPE_CHECKING:
    from thinrank.optim.layers.upkeep import Upkeep

SAMPLINGS = ("mixture", "spectrum", "uniform", "top")
GRADIENTS = ("enhanced", "default")


class SSTLinear(Layer):
    """A weight as its singular triples.

    Attributes:
        U, V: trained singular vectors, (out, r) and (in, r).
        s: all singular values, (k,), in the order of the last decomposition.
        U_rest, V_rest: the other vectors, (out, k−r) and (in, k−r), frozen; None where r = k.
        order: (k,) int64, place → index into s; the first r places are those of U and V.
        clock: steps done, a buffer.
    """

    COEFFICIENTS = ("s",)
    FAN_IN: ClassVar[Mapping[str, int]] = {"V": 0, "V_rest": 0}
    keeps = True

    def __init__(self, dense: Dense, rank: int, config: SST) -> None:
        super().__init__(dense)
        self.rank, self.config = rank, config
        rest = self.short - rank
        self.U, self.V = like(dense, self.out_features, rank), like(dense, self.in_features, rank)
        self.s = like(dense, self.short)
        self.U_rest: nn.Parameter | None = like(dense, self.out_features, rest, trained=False) if rest else None
        self.V_rest: nn.Parameter | None = like(dense, self.in_features, rest, trained=False) if rest else None
        device = dense.weight.device
        self.register_buffer("order", torch.arange(self.short, device=device))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64, device=device))
        self.order: Tensor
        self.clock: Tensor

    # --- the weight ---------------------------------------------------------------------------------------------------

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """U, V, the others' U and V, and the singular values of both."""
        s = self.s[self.order]
        u_rest, v_rest = self.U_rest, self.V_rest
        if u_rest is None or v_rest is None:
            u_rest, v_rest = self.U[:, :0].detach(), self.V[:, :0].detach()
        return self.U, self.V, u_rest, v_rest, s[: self.rank], s[self.rank :]

    def forward(self, x: Tensor) -> Tensor:
        with computed_in(x, *self._parts()) as (low, *parts):
            tokens = flat(low)
            form = DenseForm if self.engine(len(tokens)) == "dense" else FactorForm
            y = form.apply(tokens, *parts, self.config.gradient == "enhanced")
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def engine(self, tokens: int) -> str:
        """`factors` or `dense`: which is used for so many tokens at once."""
        if self.config.engine != "auto":
            return self.config.engine
        sizes = (tokens, self.out_features, self.in_features, self.short, self.rank)
        trained = torch.is_grad_enabled() and self.U.requires_grad
        cheaper = dense_cost(*sizes, trained=trained) < factor_cost(*sizes, trained=trained)
        return "dense" if cheaper else "factors"

    def weight(self) -> Tensor:
        return built(*self._parts())

    def flops(self) -> int:
        return 2 * self.short * (self.in_features + self.out_features + 1)

    # --- between steps ------------------------------------------------------------------------------------------------

    def set_(self, factors: tuple[Tensor, Tensor, Tensor], order: Tensor) -> None:
        """Takes all singular triples, in the order of s, and who is trained; not for weights in pieces."""
        left, s, right = factors
        active, rest = order[: self.rank], order[self.rank :]
        with torch.no_grad():
            self.s.copy_(s)
            self.order.copy_(order)
            for mine, whole in ((self.U, left), (self.V, right)):
                mine.copy_(whole[:, active])
            if self.U_rest is not None and self.V_rest is not None:
                self.U_rest.copy_(left[:, rest])
                self.V_rest.copy_(right[:, rest])

    def chosen(self, s: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of the vectors that are trained next, (r,), rising, on the CPU."""
        sampling = self.config.sampling
        if sampling == "top":
            return s.detach().float().cpu().topk(self.rank).indices.sort().values
        p = mixture(s.detach()) if sampling == "mixture" else s.detach().double().clamp(min=0)
        if sampling == "uniform" or int((p > 0).sum()) < self.rank:
            p = torch.ones_like(p)
        return draw(p, self.rank, generator)

    def after_step(self, upkeep: Upkeep) -> None:
        clock = upkeep.tick(self)
        upkeep.clamp_(self.s)
        upkeep.normalise_(self.U, self.V)
        every, rounds = self.config.every, self.config.iterations or math.ceil(self.short / self.rank)
        if clock % every:
            return
        iteration = clock // every
        if iteration % rounds == 0:
            self._decompose(upkeep)
        self._resample(upkeep, iteration)
        upkeep.forget(self.U, self.V)

    def _decompose(self, upkeep: Upkeep) -> None:
        """U, s, V ← SVD(U diag(s) Vᵀ), by one rank for all; `order` stays as it is."""
        trained, rest = (self.U, self.s, self.V), tuple(p for p in (self.U_rest, self.V_rest) if p is not None)
        u, s, v, *others = upkeep.whole(*trained, *rest)
        order = self.order.to(s.device)
        back = torch.argsort(order)
        left = torch.cat([u, *others[:1]], 1)[:, back]
        right = torch.cat([v, *others[1:]], 1)[:, back]
        shapes = [left.shape, s.shape, right.shape]
        left, s, right = upkeep.by_owner(self, lambda: singular((left * s) @ right.mT), shapes, left)
        active, others_at = order[: self.rank], order[self.rank :]
        values = [left[:, active], s, right[:, active]]
        if rest:
            values += [left[:, others_at], right[:, others_at]]
        upkeep.replace((*trained, *rest), values)
        upkeep.forget(self.s)

    def _resample(self, upkeep: Upkeep, iteration: int) -> None:
        if self.U_rest is None or self.V_rest is None:
            return
        (s,) = upkeep.whole(self.s)
        into, out_of = exchange_of(self.order, self.rank, self.chosen(s, upkeep.generator(self, iteration)))
        if not len(into):
            return
        for mine, others in ((self.U, self.U_rest), (self.V, self.V_rest)):
            upkeep.swap_columns(mine, others, into, out_of)
        order = self.order.clone()
        order[into], order[self.rank + out_of] = self.order[self.rank + out_of], self.order[into]
        self.order.copy_(order)

    def warmth(self, step: int) -> float:
        return self.config.warmth(step)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank} of {self.short}"


@dataclass(frozen=True, kw_only=True)
class SST(RankedReparam):
    """Sparse Spectral Training (Zhao et al. 2025, arXiv 2405.15481): singular values always, vectors by turns.

    Defaults: the paper's are sampling=mixture and gradient=enhanced; every=200, warmup=20 and iterations=None, which
    stands for the layer's shorter side divided by the rank, are reconstructed; ours are engine=auto and what the
    shared class says is.

    Equations and shapes: `thinrank.optim.layers.sst`.
    """

    name: str = field(default="sst", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    rank: int | float = field(
        default=0.25, metadata={"help": "singular vectors trained at a time: a number, or a share of the shorter side"}
    )
    every: int = field(default=200, metadata={"help": "steps until others are drawn (an iteration)"})
    iterations: int | None = field(
        default=None, metadata={"help": "iterations until the SVD is made anew (a round); null: shorter side / rank"}
    )
    warmup: int = field(default=20, metadata={"help": "steps of an iteration in which the learning rate rises again"})
    sampling: str = field(
        default="mixture", metadata={"help": "vectors by: mixture (half chance, half size), spectrum, uniform, top"}
    )
    gradient: str = field(
        default="enhanced", metadata={"help": "of the vectors: enhanced (without the factor s), or default"}
    )
    engine: str = field(
        default="auto", metadata={"help": "products: factors, dense (the weight is built and dropped), auto (cheaper)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_steps("every", self.every)
        if self.iterations is not None:
            whole_steps("iterations", self.iterations)
        if not isinstance(self.warmup, int) or not 0 <= self.warmup <= self.every:
            raise ValueError(f"warmup must be from 0 to the {self.every} steps of an iteration, got {self.warmup!r}")
        choice("sampling", self.sampling, SAMPLINGS)
        choice("gradient", self.gradient, GRADIENTS)
        choice("engine", self.engine, ENGINES)

    def warmth(self, step: int) -> float:
        """What the learning rate is multiplied by in the step after `step` of them."""
        return min(1.0, (step % self.every + 1) / self.warmup) if self.warmup else 1.0

    @property
    def acts(self) -> bool:
        return True

    def layer(self, dense: Dense, generator: torch.Generator) -> SSTLinear:
        layer = SSTLinear(dense, self.rank_of(dense), self)
        if not dense.is_meta:
            factors = singular(dense.weight)
            chosen = layer.chosen(factors[1], generator)
            mask = torch.ones(layer.short, dtype=torch.bool)
            mask[chosen] = False
            layer.set_(factors, torch.cat([chosen, mask.nonzero()[:, 0]]).to(dense.weight.device))
        return layer
