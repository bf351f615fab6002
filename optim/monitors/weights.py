"""Which matrices a model or a state dict holds, each once, by name: what a report has a row for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from thinrank.optim.monitors.spectrum import (
    KERNEL_SIDE,
    Ties,
    kernel_matrices,
    product_singular_values,
    singular_values,
    wide,
)

Source = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Weight:
    """One weight of a model.

    Attributes:
        name: of the layer, or of the parameter where that is not called `weight`.
        kind: `dense`, `conv` or `factors`.
        shape: (out, in) of the matrix, or of each of a convolution's.
        make: the matrix (out, in), or a batch (k, out, in) of a convolution's.
        factors: (out, r) and (r, in), whose product the matrix is; None where it is stored whole.
        missing: why there is no such matrix; empty where there is.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    make: Callable[[], Tensor]
    factors: tuple[Tensor, Tensor] | None = None
    missing: str = ""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it is stored in, or made of for the purpose."""
        return self.factors or (self.make(),)

    def singular_values(self) -> Tensor:
        """All min(out, in) of them by falling size, of every matrix of a convolution together; float64.

        Of factors by their core, with zeros for the rest.

        Raises:
            ValueError: an entry is not finite.
        """
        if self.factors is None or self.factors[0].shape[1] > min(self.shape):
            return singular_values(self.make()).flatten().sort(descending=True).values
        s = product_singular_values(*self.factors)
        return nn.functional.pad(s, (0, min(self.shape) - len(s)))


def weights(source: Source, layers: str = "") -> Iterator[Weight]:
    """The weights of two dimensions and more, in the model's order, one at a time.

    Layers of factors (`thinrank.optim.layers`, known by their methods `weight` and `factors`) are one weight, the
    product. In a state dict, which does not say what its tensors are for, `NAME.A` (r, in) and `NAME.B` (out, r) with
    nothing beside them but a bias are taken for factors, three dimensions of which the last is at most 16 and four for
    a convolution, other three for a stack of matrices. Tied weights come once, under their first name; in a mapping
    that is not a `dict`, which may read tensors as they are asked for, ties are not looked for.

    Args:
        source: a model, or its state dict.
        layers: a regular expression that a name must contain.

    Raises:
        ValueError: a pattern that is none.
    """
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise ValueError(f"layers must be a regular expression, got {layers!r} ({error})") from error
    found = _of_module(source) if isinstance(source, nn.Module) else _of_mapping(source, pattern)
    return (weight for weight in found if pattern.search(weight.name))


def _of_module(model: nn.Module) -> Iterator[Weight]:
    ties = Ties()
    for name, module in model.named_modules():
        if callable(getattr(module, "weight", None)) and hasattr(module, "factors"):
            if ties.new(next(module.parameters())):
                yield from _of_layer(name, module)
            continue
        for key, value in module.named_parameters(recurse=False):
            if _is_matrix(value) and ties.new(value):
                yield from _of_tensor(_named(f"{name}.{key}".lstrip(".")), value, conv=isinstance(module, _ConvNd))


def _of_layer(name: str, layer: Any) -> Iterator[Weight]:
    """The product of a layer of factors; where there is none, a row that says so, and one for each factor."""
    shape = (layer.out_features, layer.in_features)
    absent = [key for key, value in layer.named_parameters(recurse=False) if value.is_meta and key != "bias"]
    if absent:
        yield Weight(name, "factors", shape, layer.weight, missing=f"no values of {', '.join(absent)}")
        return
    try:
        factors = layer.factors()
        if factors is None:
            layer.weight()  # whether there is one; nobody keeps it
    except ValueError as error:  # NotMergeable
        yield Weight(name, "factors", shape, layer.weight, missing=f"no matrix: {str(error).partition(',')[0]}")
        for key, value in layer.named_parameters(recurse=False):
            if _is_matrix(value):
                yield from _of_tensor(f"{name}.{key}", value)
        return
    if factors is None:
        yield Weight(name, "factors", shape, lambda: layer.weight().detach())
    else:
        yield _product(name, *factors)


def _of_mapping(tensors: Mapping[str, Tensor], pattern: re.Pattern[str]) -> Iterator[Weight]:
    ties = Ties() if isinstance(tensors, dict) else None
    beside: dict[str, set[str]] = {}
    for key in tensors:
        prefix, _, last = key.rpartition(".")
        beside.setdefault(prefix, set()).add(last)
    for key in tensors:
        prefix, _, last = key.rpartition(".")
        pair = {"A", "B"} <= beside[prefix] <= {"A", "B", "bias"}
        if not pattern.search(prefix if pair else _named(key)) and not pattern.search(key):
            continue
        if pair and last != "bias":
            right, left = tensors[f"{prefix}.A"], tensors[f"{prefix}.B"]
            if left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]:
                if last == "A" and (ties is None or ties.new(right)):
                    yield _product(prefix, left.detach(), right.detach())
                continue
        value = tensors[key]
        if isinstance(value, Tensor) and _is_matrix(value) and (ties is None or ties.new(value)):
            yield from _of_tensor(_named(key), value)


def _of_tensor(name: str, value: Tensor, *, conv: bool | None = None) -> Iterator[Weight]:
    x = value.detach()
    shape = (x.shape[-2], x.shape[-1])
    if x.ndim == 2:
        yield Weight(name, "dense", shape, lambda: x)
    elif conv or (conv is None and (x.ndim == 4 or (x.ndim == 3 and x.shape[-1] <= KERNEL_SIDE))):
        yield Weight(name, "conv", (x.shape[0], x.shape[1]), lambda: kernel_matrices(x))
    else:
        for index, each in enumerate(x.reshape(-1, *shape)):
            yield Weight(f"{name}[{index}]", "dense", shape, lambda each=each: each)


def _product(name: str, left: Tensor, right: Tensor) -> Weight:
    left, right = left.detach(), right.detach()
    return Weight(
        name, "factors", (left.shape[0], right.shape[1]), lambda: wide(left) @ wide(right), factors=(left, right)
    )


def _is_matrix(x: Tensor) -> bool:
    return x.ndim >= 2 and x.is_floating_point()


def _named(key: str) -> str:
    return key.removesuffix(".weight")
