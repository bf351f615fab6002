"""Maestro: factors whose columns are ordered by training itself (Horváth et al., ICML 2024, arXiv 2308.14929).

    y = U Vᵀ x + b        U (out, w) = L sqrt(s), V (in, w) = R sqrt(s) of the weight L diag(s) Rᵀ; w = min(out, in)

The rank-b model of a layer has its first b columns alone. What is trained is all of them at once (*ordered dropout*),

    min  E_(l,b) loss(layer l has its first b columns, the others all)
         + λ Σ_l Σ_{b=1..w} (‖U_l[:, b:]‖_F + ‖V_l[:, b:]‖_F)             (hierarchical group lasso; b counted from 1)

with (l, b) one of all pairs in turn, shuffled, until none is left and they are shuffled anew (`per_layer`, the
paper's), or with b drawn for every layer by itself (`across_layers`). For a linear map and isotropic x that finds the
singular triples of the map, by falling singular value. So tails that are not needed become small, and every so many
steps

    w ← #{b: ‖U[:, b:]‖_F ‖V[:, b:]‖_F ≥ ε}                              (*progressive shrinking*)

Columns from w on take no part from then on; they stay where they are, so that an optimizer's state fits, until `shrink`
drops them at the end. A layer of w = 0 gives its bias.

Read from the authors' code, which shrinks once an epoch, and has a variant that trains the whole model too and the
others by its outputs; here is the one of their scripts, without. Ours: b is drawn after a step for the next one, so
that all its micro-batches, and the recomputation of activations, have the same; from the seed and the step alone, so
that all ranks have the same, and a resumed run too. The first step, which nothing was drawn for, is that of the whole
model. Statistics of batch normalisation, which the authors estimate anew before they evaluate, are left to the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinrank.optim.exchange.dtensors import is_sharded
from thinrank.optim.layers.base import Layer, ReparamConfig, like
from thinrank.optim.layers.convert import layers, refuse_held, set_module
from thinrank.optim.layers.dense import Dense
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.optim.linalg.factor import singular, tails
from thinrank.optim.methods.config import choice, number, whole_steps

if TYPE_CHECKING:
    from thinrank.optim.layers.upkeep import Upkeep

SAMPLERS = ("per_layer", "across_layers")


class MaestroLinear(Layer):
    """Two factors with ordered columns, of which the first take part.

    Attributes:
        U: (out, k), k = min(out, in).
        V: (in, k).
        width: w, columns that are left, a buffer.
        cut: b, columns that take part in training until the next step, a buffer; at most w counts.
        clock: steps done, a buffer.
        shuffled: the step at which the pairs were shuffled last, a buffer.
    """

    FAN_IN: ClassVar[Mapping[str, int]] = {"V": 0}
    keeps = True

    def __init__(self, dense: Dense, config: Maestro) -> None:
        super().__init__(dense)
        self.config = config
        self.rank = self.short
        self.U, self.V = like(dense, self.out_features, self.rank), like(dense, self.in_features, self.rank)
        self.width: Tensor
        self.cut: Tensor
        self.clock: Tensor
        self.shuffled: Tensor
        self._order: tuple[tuple[int, int, int], Tensor] | None = None
        # numbers that the host knows too, so that it need not wait for a device to cut a matrix
        self._known = {"width": self.rank, "cut": self.rank, "shuffled": 1}
        for name, value in {**self._known, "clock": 0}.items():
            self.register_buffer(name, torch.full((), value, dtype=torch.int64, device=dense.weight.device))

    def _load_from_state_dict(self, *args: Any, **more: Any) -> None:
        super()._load_from_state_dict(*args, **more)
        self._known.clear()

    def known(self, name: str) -> int:
        """The value of the buffer `width`, `cut` or `shuffled`."""
        if name not in self._known:
            self._known[name] = int(getattr(self, name))
        return self._known[name]

    def note_(self, name: str, value: int) -> None:
        """Gives that buffer a value."""
        getattr(self, name).fill_(value)
        self._known[name] = value

    # --- the weight ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        kept = self.known("width")
        if self.training:
            kept = min(kept, self.known("cut"))
        return F.linear(F.linear(x, self.V[:, :kept].mT), self.U[:, :kept], self.bias)

    def weight(self) -> Tensor:
        kept = self.known("width")
        return self.U[:, :kept] @ self.V[:, :kept].mT

    def factors(self) -> tuple[Tensor, Tensor]:
        kept = self.known("width")
        return self.U[:, :kept], self.V[:, :kept].mT

    def flops(self) -> int:
        return 2 * self.known("width") * (self.in_features + self.out_features)

    def penalty(self) -> Tensor:
        """λ Σ_b (‖U[:, b:]‖_F + ‖V[:, b:]‖_F) over the columns that are left; its gradient is zero where a norm is."""
        kept = self.known("width")
        return self.config.lasso * (_tail_norms(self.U, kept) + _tail_norms(self.V, kept))

    def pruned(self) -> nn.Module:
        """Plain factors of the columns that are left; or a dense layer, where that has fewer numbers."""
        rank = self.known("width")
        if (self.in_features + self.out_features) * rank > self.in_features * self.out_features:
            return self.merged()
        bare = self.U.detach().new_empty(()).expand(self.out_features, self.in_features)
        layer = LowRankLinear(Dense("the layer", self._shell[0], bare, self.bias), rank)
        with torch.no_grad():
            layer.B.copy_(self.U[:, :rank])
            layer.A.copy_(self.V[:, :rank].mT)
        return layer.train(self.training)

    # --- between steps ------------------------------------------------------------------------------------------------

    def after_step(self, upkeep: Upkeep) -> None:
        clock = upkeep.tick(self)
        peers: list[MaestroLinear] = upkeep.peers(MaestroLinear)
        if self is not peers[-1]:
            return  # the last one acts for all, which have ticked by then
        every = self.config.every
        fewer = [layer._narrow(upkeep) for layer in peers] if every and clock % every == 0 else []
        if self.config.sampler == "across_layers":
            for layer in peers:
                layer.note_("cut", layer._drawn(upkeep, clock))
        else:
            _next_pair(peers, upkeep, clock, anew=any(fewer))

    def _narrow(self, upkeep: Upkeep) -> bool:
        """Whether it has become narrower."""
        kept = self.known("width")
        mine, other = (tails(squares[:kept].double()) for squares in upkeep.weights.squares([self.U, self.V]))
        importance = (mine * other).sqrt()
        width = int((importance >= self.config.eps).sum())
        if width == kept or not bool(torch.isfinite(importance).all()):
            return False
        self.note_("width", width)
        return True

    def _place(self, upkeep: Upkeep, start: int, pairs: int, count: int) -> int:
        """Entry `count` of the permutation of so many pairs that was drawn at step `start`."""
        key = (upkeep.seed, start, pairs)
        if self._order is None or self._order[0] != key:
            self._order = key, torch.randperm(pairs, generator=upkeep.generator(self, start))
        return int(self._order[1][count])

    def _drawn(self, upkeep: Upkeep, clock: int) -> int:
        kept = self.known("width")
        return int(torch.randint(kept, (), generator=upkeep.generator(self, clock))) + 1 if kept else 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.known('width')} of {self.rank}"


def _tail_norms(factor: Tensor, kept: int) -> Tensor:
    """`Σ_{b ≤ kept} ‖F[:, b:kept]‖_F` of a factor (rows, k) that may be in pieces, rows here and there.

    Its gradient, `F_j Σ_{b ≤ j} 1 / ‖F[:, b:]‖` for column j, is that of half a weighted sum of squares, which each
    rank takes of what it has, while the weights are everybody's.
    """
    cut, whole = is_sharded(factor), cast("Any", factor)
    here = whole.to_local() if cut else whole
    with torch.no_grad():
        squares = whole.float().square().sum(0)
        squares = squares.full_tensor() if cut else squares
        norms = tails(squares[:kept]).sqrt()
        weights = torch.where(norms > 0, 1 / norms, 0.0).cumsum(0)
    half = (here[:, :kept].float().square() * weights).sum() / 2
    return norms.sum() + half - half.detach()


def _next_pair(peers: list[MaestroLinear], upkeep: Upkeep, clock: int, *, anew: bool) -> None:
    """Cuts one layer, by the next one of all shuffled pairs."""
    widths = [layer.known("width") for layer in peers]
    start, pairs = peers[0].known("shuffled"), sum(widths)
    if anew or clock - start >= pairs:
        start = clock
    for layer, width in zip(peers, widths, strict=True):
        layer.note_("shuffled", start)
        layer.note_("cut", width)
    if not pairs:
        return
    place = peers[0]._place(upkeep, start, pairs, clock - start)
    for layer, width in zip(peers, widths, strict=True):
        if place < width:
            layer.note_("cut", place + 1)
            return
        place -= width


def shrink(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int | None]:
    """Drops what Maestro has found not to be needed, in place: at the end of training, or before fine-tuning.

    Args:
        model: whole on this process, with converted layers.
        optimizer: one that steps `model`, if there is any: it is refused, since it would go on stepping what is
            dropped.

    Returns:
        By a layer's name the rank of the plain factors in its place, or None where it is dense again, having had fewer
        numbers so: (out + in) w > out · in.

    Raises:
        ValueError: for an optimizer, and for a model without such layers, or in pieces.
    """
    found = {name: layer for name, layer in layers(model).items() if isinstance(layer, MaestroLinear)}
    if not found:
        raise ValueError("the model has no layer of Maestro: convert(model, Maestro()) and train it first")
    refuse_held(found, optimizer)
    ranks: dict[str, int | None] = {}
    for name, layer in found.items():
        pruned = layer.pruned()
        ranks[name] = pruned.rank if isinstance(pruned, LowRankLinear) else None
        set_module(model, name, pruned)
    return ranks


@dataclass(frozen=True, kw_only=True)
class Maestro(ReparamConfig):
    """Maestro (Horváth et al., ICML 2024, arXiv 2308.14929): ordered factors of full width that training narrows.

    Defaults: the authors' are sampler=per_layer, lasso=1e-06, of their scripts (0.005 is their program's), and
    eps=1e-05; every=1000 is ours, for their once an epoch, as is what the shared class says.

    Equations and shapes: `thinrank.optim.layers.maestro`.
    """

    name: str = field(default="maestro", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    sampler: str = field(
        default="per_layer", metadata={"help": "what is cut in a step: per_layer (one layer), across_layers (each)"}
    )
    lasso: float = field(default=1e-6, metadata={"help": "lambda, of the group lasso that is added to the loss"})
    eps: float = field(default=1e-5, metadata={"help": "columns go from where the product of both tails is below it"})
    every: int | None = field(default=1000, metadata={"help": "steps from one narrowing to the next; null: never"})

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("sampler", self.sampler, SAMPLERS)
        number("lasso", self.lasso)
        number("eps", self.eps)
        if self.every is not None:
            whole_steps("every", self.every)

    @property
    def acts(self) -> bool:
        return True

    @property
    def penalises(self) -> bool:
        return self.lasso > 0

    def layer(self, dense: Dense, generator: torch.Generator) -> MaestroLinear:
        layer = MaestroLinear(dense, self)
        if not dense.is_meta:
            left, s, right = singular(dense.weight)
            root = s.sqrt()
            with torch.no_grad():
                layer.U.copy_(left * root)
                layer.V.copy_(right * root)
        return layer
