"""Gradients that are taken the moment backward has finished them, so that few are ever alive together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

MODES = ("off", "project", "step")


class Images:
    """Gradients kept as what their updates need of them: coordinates in the subspace instead of whole matrices."""

    def __init__(self) -> None:
        self._parts: dict[Tensor, dict[str, dict[str, Tensor]]] = {}

    def __contains__(self, param: Tensor) -> bool:
        return param in self._parts

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, param: Tensor, prefix: str, image: dict[str, Tensor]) -> None:
        """Adds the image of one more part of the gradient of (the view `prefix` of) `param`."""
        mine = self._parts.setdefault(param, {})
        if prefix not in mine:
            mine[prefix] = image
        else:
            for key, value in image.items():
                mine[prefix][key].add_(value)

    def stacked(self, params: Iterable[Tensor], prefix: str) -> dict[str, Tensor]:
        """The images of equal matrices as one batch."""
        images = [self._parts[param][prefix] for param in params]
        return {key: torch.cat([image[key] for image in images]) for key in images[0]}

    def coordinates(self) -> list[Tensor]:
        """All coordinates, for norms and scaling."""
        return [image["low"] for parts in self._parts.values() for image in parts.values()]

    def tensors(self) -> list[Tensor]:
        return [value for parts in self._parts.values() for image in parts.values() for value in image.values()]

    def clear(self) -> None:
        self._parts.clear()


class Hooks:
    """Calls `take(param)` whenever backward has finished the gradient of one of `params`, until removed."""

    def __init__(self, params: Iterable[Tensor], take: Callable[[Tensor], None]) -> None:
        self._handles = [p.register_post_accumulate_grad_hook(take) for p in params if p.requires_grad]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
