"""The class of every parameter, by what of its shape grows with the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from thinrank.optim.grouping import Role, roles


class ParameterClass(str, Enum):
    """What a parameter does with the width of a model.

    Two questions decide: do two of its sides grow (then its decay follows `wd_width_exp`), and does it sum over the
    width, that is, does its fan-in grow (then its learning rate falls)?
    """

    INPUT = "input"
    """A table whose rows are as long as the model is wide: embeddings, learnt positions."""
    VECTOR = "vector"
    """One side grows, and it is no sum: gains, biases, singular values."""
    HIDDEN = "hidden"
    """Both sides grow."""
    READOUT = "readout"
    """From the width to a fixed number of outputs that are the model's: the language model's head."""
    FACTOR_IN = "factor_in"
    """From the width to a fixed inner size: the first of two factors of fixed rank, a router."""
    FACTOR_OUT = "factor_out"
    """From a fixed inner size to the width: the second of them."""
    FIXED = "fixed"
    """Nothing grows."""

    @property
    def fan_in_grows(self) -> bool:
        return self in (ParameterClass.HIDDEN, ParameterClass.READOUT, ParameterClass.FACTOR_IN)

    @property
    def both_grow(self) -> bool:
        return self is ParameterClass.HIDDEN


@dataclass(frozen=True, slots=True)
class Member:
    """Where a parameter belongs: its class, and whether it is in one of the blocks whose number is the depth."""

    kind: ParameterClass
    in_block: bool = False


def classify(
    narrow: nn.Module,
    wide: nn.Module,
    *,
    deep: nn.Module | None = None,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Member]:
    """The class of every parameter by name, from the same model at two widths; no names are interpreted.

    A side grows if it differs between the two. Of a weight (out, in) the last side is the fan-in; of a table the rows'
    length is its output; `FAN_IN` of a module (name of a parameter → side) says otherwise, as `Conv1D` of
    `transformers` does by its name. A vector whose length grows as the square of the width holds entries of a matrix,
    and counts as one. Ours: after mup's base shapes, extended by factors and by scattered entries.

    Args:
        narrow: the model, on the meta device, say.
        wide: of twice the width and the same depth.
        deep: of the width of `narrow` and twice its depth, where the depth matters: containers of modules that are
            longer in it hold the blocks.
        overrides: regular expression on the name → class, the first match wins.

    Raises:
        ValueError: for models of different parameters, a parameter of which more than two sides grow, and an override
            that matches nothing.
    """
    ours, theirs = dict(narrow.named_parameters()), dict(wide.named_parameters())
    odd = sorted(ours.keys() ^ theirs.keys())
    if odd:
        raise ValueError(
            f"the two widths have different parameters ({odd[0]} is in one of them alone): build both in the same way, "
            "and of the same depth"
        )
    role, blocks = roles(narrow), () if deep is None else _blocks(narrow, deep)
    width = _growth(ours, theirs)
    found: dict[str, Member] = {}
    for name, parameter in ours.items():
        kind = _kind(name, parameter, theirs[name], narrow, role[name], width)
        found[name] = Member(kind, any(name.startswith(block) for block in blocks))
    return _overridden(found, overrides or {})


def _growth(narrow: Mapping[str, Tensor], wide: Mapping[str, Tensor]) -> float:
    """The ratio of the widths: the least growth of any side that grows."""
    ratios = [
        b / a for name, p in narrow.items() for a, b in zip(p.shape, wide[name].shape, strict=False) if a and b > a
    ]
    if not ratios:
        raise ValueError("no parameter grows between the two widths: build the second model wider than the first")
    return min(ratios)


def _kind(name: str, narrow: Tensor, wide: Tensor, model: nn.Module, role: Role, width: float) -> ParameterClass:
    if narrow.ndim != wide.ndim:
        raise ValueError(f"{name} has {narrow.ndim} sides at one width and {wide.ndim} at the other: name its class")
    sides = [i for i, (a, b) in enumerate(zip(narrow.shape, wide.shape, strict=True)) if a != b]
    if len(sides) > 2:
        raise ValueError(
            f"{name} grows along {len(sides)} sides, {tuple(narrow.shape)} to {tuple(wide.shape)}, and there is no "
            f"rule for more than two: set scaling.overrides={{{re.escape(name)}: hidden}}, or another class"
        )
    if not sides:
        return ParameterClass.FIXED
    if len(sides) == 2:
        return ParameterClass.HIDDEN
    if narrow.ndim < 2:
        scattered = wide.numel() / narrow.numel() > width**1.5
        return ParameterClass.HIDDEN if scattered else ParameterClass.VECTOR
    prefix, _, last = name.rpartition(".")
    owner = model.get_submodule(prefix)
    if role is Role.VECTOR:
        return ParameterClass.VECTOR
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return ParameterClass.INPUT
    if sides[0] != _fan_in(owner, last, narrow.ndim):
        return ParameterClass.FACTOR_OUT
    return ParameterClass.READOUT if role is Role.HEAD else ParameterClass.FACTOR_IN


def _fan_in(owner: nn.Module, parameter: str, sides: int) -> int:
    given = getattr(owner, "FAN_IN", {})
    if parameter in given:
        return given[parameter]
    if type(owner).__name__ == "Conv1D":  # transformers' linear layer with its weight turned round
        return 0
    return 1 if sides in (2, 4) else sides - 1


def _blocks(shallow: nn.Module, deep: nn.Module) -> tuple[str, ...]:
    """Prefixes of the containers that have more members in `deep`."""
    sizes = {name: len(m) for name, m in shallow.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    grown = [
        f"{name}." if name else ""
        for name, module in deep.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and sizes.get(name, len(module)) < len(module)
    ]
    if not grown:
        raise ValueError(
            "no list of modules is longer in the deeper model, so that its blocks are not known: keep them in an "
            "nn.ModuleList, or set scaling.depth_exp=null"
        )
    return tuple(grown)


def _overridden(found: dict[str, Member], overrides: Mapping[str, str]) -> dict[str, Member]:
    unused = dict(overrides)
    result = dict(found)
    for name, member in found.items():
        for pattern, kind in overrides.items():
            if re.search(pattern, name):
                unused.pop(pattern, None)
                result[name] = Member(ParameterClass(kind), member.in_block)
                break
    if unused:
        raise ValueError(f"the scaling pattern {next(iter(unused))!r} matches no parameter: correct or remove it")
    return result
