"""CLOVER: trained cores between frozen orthonormal vectors, head by head (Meng et al. 2025, arXiv 2411.17426).

For each head h with rows W_V^h (d, in) of the values' weight and columns W_O^h (out, d) of the output's,

    W_O^h [W_V^h, b_V^h] = U_h diag(s_h) [V_hᵀ, β_h] ;   W_V^h ← C_h V_hᵀ,  b_V^h ← C_h β_h,  W_O^h ← U_h

    W^h = R_hᵀ Q_hᵀ  for the other weights cut into blocks of d rows, by (W^h)ᵀ = Q_h R_h ;   W^h ← C_h Q_hᵀ

Only the cores C_h (d, d) are trained, all entries of them; they begin as diag(s_h) and R_hᵀ. The decompositions of one
head have size d: those of W_O^h and of W_V^h come first. Queries and keys are always done apart, since rotary positions
may stand between them. So are values where there are fewer heads of them than of queries, or where something else than
the mixing of tokens may stand between them and the output; then the output's weight stays as it is, frozen. Weights
outside an attention (`up_proj`) are cut into blocks of d rows, too.

From the authors' code is what is written here, except: they put the bias into the QR as well, here it stays outside;
they have b_V inside the core, here it is outside with the same value at first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinrank.optim.heads import HeadLayout, attention_layouts
from thinrank.optim.layers.base import FineTuning, Layer, like
from thinrank.optim.layers.dense import Dense
from thinrank.optim.linalg.factor import singular

BETWEEN = ("q_norm", "k_norm", "query_norm", "key_norm")
"""What an attention may have beside its four layers without touching values."""


class HeadwiseLinear(Layer):
    """Blocks of rows that are each a trained core times a frozen basis.

    Attributes:
        basis: (out, in), frozen; orthonormal rows in each block.
        core: C, (out, d), the blocks' cores one below the other, trained.
    """

    def __init__(self, dense: Dense, size: int) -> None:
        super().__init__(dense)
        self.rank = size
        self.basis = like(dense, *dense.shape, trained=False)
        self.core = like(dense, self.out_features, size)

    def start_(self, dense: Dense) -> None:
        """Core and basis of the weight that was there, by a QR of each block."""
        with torch.no_grad():
            q, r = torch.linalg.qr(_whole(dense.weight).unflatten(0, (-1, self.rank)).mT)
            self.basis.copy_(q.mT.flatten(0, 1))
            self.core.copy_(r.mT.flatten(0, 1))

    def cores(self) -> Tensor:
        """C_h, (blocks, d, d)."""
        return self.core.unflatten(0, (-1, self.rank))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.basis).unflatten(-1, (-1, self.rank))
        y = torch.einsum("...hd,hed->...he", z, self.cores()).flatten(-2)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def weight(self) -> Tensor:
        return (self.cores() @ self.basis.unflatten(0, (-1, self.rank))).flatten(0, 1)


class FrozenLinear(Layer):
    """A weight that is not trained.

    Attributes:
        base: W, (out, in), frozen.
    """

    def __init__(self, dense: Dense) -> None:
        super().__init__(dense)
        self.base = like(dense, *dense.shape, trained=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base, self.bias)

    def weight(self) -> Tensor:
        return self.base


def _whole(weight: Tensor) -> Tensor:
    """`weight` in float32 or better.

    Raises:
        ValueError: where an entry is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("has entries that are not finite and no orthonormal factors: mend or leave out that weight")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def across(values: Tensor, output: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of each head's `output_h values_h`, without forming it.

    Args:
        values: (heads · size, in), heads as blocks of rows.
        output: (out, heads · size), heads as blocks of columns.

    Returns:
        `U` (heads, out, size), `s` (heads, size), `Vᵀ` (heads, size, in).
    """
    qo, ro = torch.linalg.qr(output.unflatten(1, (-1, size)).transpose(0, 1))
    qv, rv = torch.linalg.qr(values.unflatten(0, (-1, size)).mT)
    found = [singular(a @ b.mT) for a, b in zip(ro, rv, strict=True)]
    left, s, right = (torch.stack(parts) for parts in zip(*found, strict=True))
    return qo @ left, s, (qv @ right).mT


class Pair:
    """The values' and the output's weight of one attention; it forgets what it has found once both have taken it."""

    def __init__(self, values: Dense, output: Dense, size: int) -> None:
        self.values, self.output, self.size = values, output, size
        self._found: dict[str, tuple[Tensor, ...]] = {}

    def _take(self, key: str) -> tuple[Tensor, ...]:
        if key not in self._found:
            weight, bias = _whole(self.values.weight), self.values.bias
            if bias is not None:
                weight = torch.cat([weight, bias.detach().to(weight.dtype)[:, None]], 1)
            u, s, v = across(weight, _whole(self.output.weight), self.size)
            cut = self.values.shape[1]
            offset = (s[:, :, None] * v[:, :, cut:]).flatten()
            self._found = {
                "v": (v[:, :, :cut].flatten(0, 1), torch.diag_embed(s).flatten(0, 1), offset),
                "o": (u.transpose(0, 1).flatten(1),),
            }
        return self._found.pop(key)

    @torch.no_grad()
    def values_layer(self, dense: Dense) -> HeadwiseLinear:
        layer = HeadwiseLinear(dense, self.size)
        if not dense.is_meta:
            basis, core, offset = self._take("v")
            layer.basis.copy_(basis)
            layer.core.copy_(core)
            if dense.bias is not None:  # another parameter, so that the layer that is replaced keeps its own
                bias = offset.to(dense.bias.dtype)
                layer.bias = nn.Parameter(bias, requires_grad=dense.bias.requires_grad)
        return layer

    @torch.no_grad()
    def output_layer(self, dense: Dense) -> FrozenLinear:
        layer = FrozenLinear(dense)
        if not dense.is_meta:
            layer.base.copy_(self._take("o")[0])
        return layer


@dataclass(frozen=True, slots=True)
class Place:
    """What is made of one layer: `blocks` of `size` rows, the `values` or the `output` of a pair, or `frozen`."""

    kind: str
    size: int = 0
    pair: Pair | None = None


@dataclass(frozen=True, kw_only=True)
class CLOVER(FineTuning):
    """CLOVER (Meng et al. 2025, arXiv 2411.17426): small cores between orthonormal vectors of each head are trained.

    The authors adapt `up_proj` as well: targets=[attention, up_proj].

    Defaults: the authors' is group=None, which stands for the size of a head; ours are targets=[attention], which all
    models have, and what the shared class says is.

    Equations and shapes: `thinrank.optim.layers.clover`.
    """

    name: str = field(default="clover", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    targets: list[str] = field(
        default_factory=lambda: ["attention"],
        metadata={"help": "weights that are replaced: attention, all-linear, mlp, or regular expressions on names"},
    )
    group: int | None = field(
        default=None, metadata={"help": "rows of a block outside attentions; null: the size of a head"}
    )

    _places: ClassVar[Mapping[str, Place] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and (
            isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1
        ):
            raise ValueError(f"group must be at least 1 row, got {self.group!r}: leave it out for the size of a head")

    def plan(self, denses: Iterable[Dense], model: nn.Module | None = None) -> CLOVER:
        if model is None:
            raise ValueError("clover must see the whole model to know its heads: convert the model, not a layer")
        denses = list(denses)
        names = {f"{dense.name}.weight": dense for dense in denses}
        layouts = {key.removesuffix(".weight"): value for key, value in attention_layouts(model, names).items()}
        by_name = {dense.name: dense for dense in denses}
        sizes = {name: _head_size(by_name[name], layout) for name, layout in layouts.items()}
        places: dict[str, Place] = {}
        for dense in denses:
            if dense.name not in layouts:
                places[dense.name] = Place("blocks", self._group(dense, sizes))
            elif layouts[dense.name].roles == ("o",):
                places.setdefault(dense.name, Place("frozen"))
            else:
                places[dense.name] = Place("blocks", sizes[dense.name])
                output = _output_of(dense, layouts, by_name, model)
                if output is not None:
                    pair = Pair(dense, output, sizes[dense.name])
                    places[dense.name] = Place("values", sizes[dense.name], pair)
                    places[output.name] = Place("output", pair=pair)
            place = places[dense.name]
            if place.size > dense.shape[1]:
                raise ValueError(
                    f"clover needs at least as many inputs as a block has rows, {place.size}, and {dense.name} is "
                    f"{dense.shape}: exclude that layer"
                )
        planned = copy.copy(self)
        object.__setattr__(planned, "_places", places)
        return planned

    def _group(self, dense: Dense, sizes: Mapping[str, int]) -> int:
        size = self.group or next(iter(sizes.values()), None)
        if size is None:
            raise ValueError(f"group must say how many rows of {dense.name} are a block, since no head does: set it")
        if dense.shape[0] % size:
            raise ValueError(
                f"the {dense.shape[0]} rows of {dense.name} are no multiple of {size}: set group, or exclude that layer"
            )
        return size

    def layer(self, dense: Dense, generator: torch.Generator) -> Layer:
        if self._places is None:
            raise ValueError("cannot be made by itself: clover must be planned for the whole model first")
        place = self._places[dense.name]
        if place.pair is not None:
            return place.pair.values_layer(dense) if place.kind == "values" else place.pair.output_layer(dense)
        if place.kind == "frozen":
            layer = FrozenLinear(dense)
            if not dense.is_meta:
                with torch.no_grad():
                    layer.base.copy_(dense.weight)
            return layer
        layer = HeadwiseLinear(dense, place.size)
        if not dense.is_meta:
            layer.start_(dense)
        return layer


def _head_size(dense: Dense, layout: HeadLayout) -> int:
    """Rows of a head, or columns for an output's weight."""
    if any(len(role) != 1 for role in layout.roles):
        raise ValueError(f"clover cannot cut {dense.name}, which holds several of q, k and v in turn: exclude it")
    if layout.sections is not None:
        return layout.sections[0] // layout.counts[0]
    return dense.shape[1 if layout.roles == ("o",) else 0] // layout.counts[0]


def _output_of(
    dense: Dense, layouts: Mapping[str, HeadLayout], by_name: Mapping[str, Dense], model: nn.Module
) -> Dense | None:
    """The output's layer that a values' layer goes with, where the product of both is all that counts."""
    if layouts[dense.name].roles != ("v",):
        return None
    path = dense.name.rpartition(".")[0]
    beside = {name for name, layout in layouts.items() if name.rpartition(".")[0] == path}
    output = next((name for name in beside if layouts[name].roles == ("o",)), None)
    if output is None or layouts[output].counts != layouts[dense.name].counts:
        return None
    attention = model.get_submodule(path)
    known = {name.rpartition(".")[2] for name in beside} | set(BETWEEN)
    own = any(True for _ in attention.parameters(recurse=False))
    others = any(
        name not in known and any(True for _ in child.parameters()) for name, child in attention.named_children()
    )
    clipped = getattr(getattr(attention, "config", None), "clip_qkv", None) is not None
    return None if own or others or clipped else by_name[output]
