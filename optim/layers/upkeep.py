"""What layers do between steps, wherever their weights lie: it drives them and lends them hands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from thinrank.optim.exchange.whole import Weights
from thinrank.optim.layers.base import Layer
from thinrank.optim.layers.forget import forget, prune
from thinrank.optim.linalg.factor import unit_columns
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.rule import key_of, seed_of


class Upkeep:
    """Has the layers of a model do what they do between the steps of an optimizer.

        convert(model, SST(rank=64))
        optimizer = build(model, AdamWConfig(lr=1e-3))
        upkeep = Upkeep(model, optimizer)          # once; every optimizer.step() then does the rest

    What the layers know of time is in the model's `state_dict` (`clock`, `order`), and everything random is drawn from
    `seed`, the layer's name and that time. So a model and an optimizer that are loaded go on as if nothing had been, if
    an `Upkeep` with the same seed is made for them, before loading or after. In several processes all
    train the same model and all make one; then one of them decomposes a layer for all.

    Args:
        model: with converted layers; one without any needs no upkeep and gets none.
        optimizer: what steps it; any of torch's, too, if its state is tensors of the parameters' shapes.
        seed: of everything that is drawn.

    Raises:
        ValueError: with `in_backward("step")`, which steps weights one by one.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 0) -> None:
        self.seed, self.optimizer = seed, optimizer
        self._layers = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, Layer) and layer.keeps
        }
        self._names = {id(layer): (_own_name(name), i) for i, (name, layer) in enumerate(self._layers.items())}
        self._clocks: dict[int, int] = {}
        self._weights: Weights | None = None
        self._held: list[Any] = []
        if not self._layers:
            return
        if getattr(optimizer, "steps_in_backward", False):
            raise ValueError(
                "layers that change between steps need gradients that are there until step: leave in_backward out"
            )
        for layer in self._layers.values():
            self._held.append(layer.register_load_state_dict_post_hook(self._reset))
        if isinstance(optimizer, MatrixOptimizer):
            optimizer.attend(self.before, self.after)
        else:
            self._held.append(optimizer.register_step_pre_hook(lambda *_: self.before()))
            self._held.append(optimizer.register_step_post_hook(lambda *_: self.after()))

    def _reset(self, *_: Any) -> None:
        self._clocks.clear()

    @property
    def weights(self) -> Weights:
        """Made when it is first asked for: a framework may cut the model into pieces after the optimizer was made."""
        if self._weights is None:
            own = self.optimizer if isinstance(self.optimizer, MatrixOptimizer) else None
            named = [
                (f"{name}.{key}", param)
                for name, layer in self._layers.items()
                for key, param in layer.named_parameters(recurse=False)
            ]
            self._weights = Weights(named, own.shards if own else None, own.wire if own else None)
        return self._weights

    @torch.no_grad()
    def before(self) -> None:
        """What comes before a step."""
        for layer in self._layers.values():
            layer.before_step(cast("Any", self))  # to a checker this file is src/thinrank/… as well

    @torch.no_grad()
    def after(self) -> None:
        """What comes after it."""
        for layer in self._layers.values():
            layer.after_step(cast("Any", self))
        self.weights.publish()

    def detach(self) -> None:
        """Ends it: steps are steps of the optimizer alone from now on."""
        for handle in self._held:
            handle.remove()
        if isinstance(self.optimizer, MatrixOptimizer):
            self.optimizer.attend(None, None)
        self._held, self._layers = [], {}

    # --- hands --------------------------------------------------------------------------------------------------------

    def tick(self, layer: Any) -> int:
        """Counts one more step of `layer`, whose buffer `clock` has it in checkpoints; nobody waits for a device."""
        key = id(layer)
        if key not in self._clocks:
            self._clocks[key] = int(layer.clock)
        self._clocks[key] += 1
        layer.clock.fill_(self._clocks[key])
        return self._clocks[key]

    def generator(self, layer: Layer, count: int) -> torch.Generator:
        """A generator on the CPU for what `layer` draws at its time `count`: the same on all ranks."""
        return torch.Generator().manual_seed(seed_of(self.seed, key_of(self._names[id(layer)][0]), count))

    def peers(self, kind: type[Any]) -> list[Any]:
        """All layers of a kind, in the model's order, for what is decided for all of them together."""
        return [layer for layer in self._layers.values() if isinstance(layer, kind)]

    def clamp_(self, *params: Tensor) -> None:
        """No entry below zero."""
        for param in params:
            self.weights.here(param).clamp_(min=0)

    def normalise_(self, *params: Tensor) -> None:
        """Columns of length one."""
        for param, squares in zip(params, self.weights.squares(params), strict=True):
            self.weights.scale_columns_(param, unit_columns(squares))

    def whole(self, *params: Tensor) -> list[Tensor]:
        """Whole weights, not to be written to."""
        return self.weights.read(*params)

    def replace(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Puts whole values, which are the same on all ranks, in the place of parameters."""
        for param, value in zip(params, values, strict=True):
            self.weights.write(param, value)

    def swap_columns(self, one: Tensor, other: Tensor, into: Tensor, out_of: Tensor) -> None:
        """Columns `into` of `one` (rows, a) and `out_of` of `other` (rows, b) change places."""
        mine, theirs = (value.clone() for value in self.whole(one, other))
        into, out_of = into.to(mine.device), out_of.to(mine.device)
        moved = mine[:, into].clone()
        mine[:, into] = theirs[:, out_of].to(mine.dtype)
        theirs[:, out_of] = moved.to(theirs.dtype)
        self.replace((one, other), (mine, theirs))

    def by_owner(self, layer: Layer, compute: Any, shapes: Sequence[Sequence[int]], like: Tensor) -> list[Tensor]:
        """What `compute()` gives, computed by one rank, another one for each layer."""
        return self.weights.by_owner(compute, shapes, like, self._names[id(layer)][1])

    def forget(self, *params: Tensor) -> None:
        """The optimizer's state of `params` becomes what it was before the first step."""
        forget(self.optimizer, params)

    def prune(self, keep: float, *params: Tensor) -> None:
        """Of the optimizer's moments of `params` the share `keep` stays, the largest; the others become zero."""
        prune(self.optimizer, params, keep, self.weights)


def _own_name(name: str) -> str:
    """A layer's name in its own model, whatever wraps that (DDP, torch.compile): draws are seeded by it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
