"""Bytes of the tensors that are alive while code runs, exactly as torch's operators make and drop them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from typing_extensions import override

_READ = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default


class Live(TorchDispatchMode):
    """Counts the bytes of every storage on one device, from the operator that makes it until nobody holds it.

    On the meta device nothing is allocated and everything is counted, so that the code that will run is asked itself
    what it needs. What it reads there to decide by has no value, and is answered: conditions are true, whole numbers 0,
    others `number` (the optimizer's are counts of steps). What libraries take for themselves inside of an operator is
    not seen.

    Args:
        held: tensors that are there already.
        device: whose storages count.
        number: what numbers read from the meta device are.

    Attributes:
        now: bytes alive, those `held` included.
        peak: most bytes alive at one time; may be set back (`restart`).
    """

    def __init__(self, held: Iterable[Tensor], device: str = "meta", number: float = 0.0) -> None:
        super().__init__()
        self.device, self.number = device, number
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        for tensor in held:
            self._see(tensor)

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.now

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if self.device == "meta" and args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is _READ:
                return _answer(args[0].dtype, self.number)
            if func is _COPY and torch.device(given.get("device") or "meta").type == "cpu":
                dtype = given.get("dtype") or args[0].dtype
                return torch.full(args[0].shape, _answer(args[0].dtype, self.number), dtype=dtype)
        out = func(*args, **given)
        for each in tree_iter(out):
            if isinstance(each, Tensor):
                self._see(each)
        return out

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return
        self._known[place] = storage.nbytes()
        self.now += self._known[place]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self.now -= self._known.pop(place)


def _answer(dtype: torch.dtype, number: float) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return number if dtype.is_floating_point else 0
