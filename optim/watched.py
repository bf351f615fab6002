"""Which linear layers of a model are watched, and the pieces of their weights that lie on this rank."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.exchange.dtensors import DTensorShards, is_sharded
from thinrank.optim.exchange.shards import Carrier, Shards
from thinrank.optim.grouping import PRESETS, output_weight
from thinrank.optim.monitors.tracker import Piece


@dataclass(frozen=True, slots=True)
class Watched:
    """A linear layer.

    Attributes:
        name: of the module in the model.
        module: itself.
        shape: (out, in) of its weight as it is stored.
        turned: the weight is stored (in, out), as GPT-2's layers have it; `shape` is then the stored one.
        made: the layer's weight is made of other tensors (`thinrank.optim.layers`).
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    turned: bool = False
    made: bool = False

    @property
    def inputs(self) -> int:
        """Entries of a token that the layer gets."""
        return self.shape[0] if self.turned else self.shape[1]


def linear_layers(
    model: nn.Module, targets: Sequence[str] = ("all-linear",), exclude: Sequence[str] = ()
) -> dict[str, Watched]:
    """The linear layers of `model` by name: torch's, GPT-2's, and those made of factors.

    Args:
        targets: presets (all-linear, attention, mlp), which leave the output head out, or regular expressions on names
            of modules, which do not.
        exclude: regular expressions on names of modules.

    Raises:
        ValueError: for a target or an exclusion that is of no linear layer, and where none is left.
    """
    found = {name: watched for name, module in model.named_modules() if (watched := _linear(name, module)) is not None}
    # by the weight itself, since one that ZeRO-3 has taken apart has no shape to tell its role by
    output = output_weight(model)
    heads = {name for name, layer in found.items() if output is not None and layer.module.weight is output}
    chosen: set[str] = set()
    for target in targets:
        pattern = PRESETS.get(target, target)
        hits = {name for name in _matching(pattern, found) if target not in PRESETS or name not in heads}
        if not hits:
            near = difflib.get_close_matches(target, [*PRESETS, *found], n=2)
            hint = f", {' or '.join(near)} perhaps" if near else ""
            raise ValueError(
                f"layers: {target!r} is no linear layer of the model: name presets ({', '.join(PRESETS)}) or patterns "
                f"on names{hint}"
            )
        chosen |= hits
    for pattern in exclude:
        hits = _matching(pattern, found)
        if not hits:
            raise ValueError(f"exclude: {pattern!r} is no linear layer of the model: correct or remove it")
        chosen -= hits
    if not chosen:
        raise ValueError("layers: nothing is left to watch after exclude: name fewer there")
    return {name: watched for name, watched in found.items() if name in chosen}


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    try:
        return {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"layers: {pattern!r} is not a regular expression ({error}): correct it") from None


def _linear(name: str, module: nn.Module) -> Watched | None:
    weight = getattr(module, "weight", None)
    if callable(weight) and not isinstance(weight, Tensor) and hasattr(module, "in_features"):
        size: Any = module
        return Watched(name, module, (size.out_features, size.in_features), made=True)
    if not isinstance(weight, Tensor):
        return None
    if isinstance(module, nn.Linear):
        return Watched(name, module, (module.out_features, module.in_features))
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:
        return Watched(name, module, (weight.shape[0], weight.shape[1]), turned=True)
    return None


def _unmade(layer: Any) -> str:
    """Why a layer of factors has no weight to look at; "" where it has one."""
    if any(is_sharded(param) or hasattr(param, "ds_tensor") for param in layer.parameters()):
        return "its factors lie in pieces"
    try:
        with torch.no_grad():
            layer.weight()
    except ValueError as error:  # there is none that does the same
        return str(error)
    return ""


class Weights:
    """Where the weights of watched layers are, whoever has cut them into pieces.

    Args:
        layers: of `linear_layers`.
        optimizer: of thinrank or torch; one of thinrank knows where DeepSpeed's ZeRO-3 keeps weights.

    Attributes:
        axis: the ranks that the pieces lie on.
        left_out: why some layers have no weight to look at here, by name.
    """

    def __init__(self, layers: Mapping[str, Watched], optimizer: torch.optim.Optimizer | None = None) -> None:
        self._layers = layers
        self.axis = WHOLE
        self.left_out: dict[str, str] = {}
        self._shards: Shards | None = None
        named = [(name, layer.module.weight) for name, layer in layers.items() if not layer.made]
        params: list[tuple[str, Any]] = [(name, weight) for name, weight in named if isinstance(weight, Tensor)]
        cut = [param for _, param in params if is_sharded(param)]
        gone = [param for _, param in params if hasattr(param, "ds_tensor")]
        if cut or gone:
            own = getattr(optimizer, "shards", None)
            self._shards = own if own is not None else DTensorShards(params) if cut else None
            for name, param in params:
                if self._shards is None or param not in self._shards:
                    self.left_out[name] = "its weight lies in pieces that no optimizer of thinrank knows"
        for name, layer in layers.items():
            if layer.made and (cause := _unmade(layer.module)):
                self.left_out[name] = cause
        self._rank = 0
        if self._shards is not None:
            device = next(self._shards.weight(param).device for _, param in params if param in self._shards)
            carrier = Carrier(self._shards.group, self._shards.wire.rare, device)
            self.axis, self._rank = Axis(carrier.everybody, self._note(self._shards.wire)), carrier.rank

    @staticmethod
    def _note(wire: Any) -> Callable[[int, int], None]:
        return lambda size, ranks: wire.rare.note([("monitors", size)], ranks)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every weight that can be looked at, as stored."""
        return {name: layer.shape for name, layer in self._layers.items() if name not in self.left_out}

    def pieces(self) -> dict[str, Piece]:
        """What lies here of every weight; those made of factors are made for this."""
        return {name: self._piece(self._layers[name]) for name in self.shapes()}

    def _piece(self, layer: Watched) -> Piece:
        weight: Any = layer.module.weight
        if layer.made:
            with torch.no_grad():
                return Piece.whole(weight())
        if self._shards is None:
            return Piece.whole(weight)
        return Piece(self._shards.weight(weight), layer.shape, self._start(weight))

    def gradients(self) -> dict[str, Piece]:
        """The same of the gradients that are there, which those that backward or DeepSpeed has taken are not."""
        found: dict[str, Piece] = {}
        for name in self.shapes():
            layer = self._layers[name]
            weight: Any = layer.module.weight
            if layer.made or (self._shards is not None and not is_sharded(weight)) or weight.grad is None:
                continue
            if self._shards is None:
                found[name] = Piece.whole(weight.grad)
            else:
                grad = self._shards.gradient(weight)
                assert grad is not None
                found[name] = Piece(grad, layer.shape, self._start(weight))
        return found

    def _start(self, weight: Tensor) -> int:
        assert self._shards is not None
        return self._shards.spans(weight)[self._rank][0]
