"""Any linear layer as one weight (out, in), and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """True for what multiplies by one weight: `nn.Linear`, and `Conv1D` of `transformers`, which stores (in, out)."""
    return isinstance(module, nn.Linear) or _is_turned(module)


def _is_turned(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


@dataclass(frozen=True)
class Dense:
    """A linear layer, seen as `y = W x + b`.

    Attributes:
        name: in its model.
        module: the layer itself.
        weight: W, (out, in), a view of the layer's own.
        bias: b, (out,), the layer's own parameter, or None.
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: nn.Parameter | None

    @classmethod
    def of(cls, module: nn.Module, name: str = "the layer") -> Dense:
        """Raises TypeError for what is no linear layer."""
        if not is_linear(module):
            raise TypeError(f"{name} is a {type(module).__name__}, not a linear layer: leave it out")
        weight = module.weight.detach()  # pyright: ignore[reportCallIssue]
        bias = module.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, nn.Parameter)
        return cls(name, module, weight.mT if _is_turned(module) else weight, bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def is_meta(self) -> bool:
        """True where there are shapes and no values."""
        return self.weight.is_meta

    def shell(self) -> nn.Module:
        """A copy of the layer without memory for its weight, to be filled by `filled`."""
        empty = nn.Parameter(torch.empty_like(self.module.weight, device="meta"))  # pyright: ignore[reportArgumentType]
        known = {id(self.module.weight): empty}
        if self.bias is not None:
            known[id(self.bias)] = nn.Parameter(torch.empty_like(self.bias, device="meta"))
        return copy.deepcopy(self.module, known)  # pyright: ignore[reportArgumentType]


def filled(shell: nn.Module, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """A layer of the class that it was, with `weight` (out, in)."""
    module = copy.copy(shell)
    module._parameters = dict(shell._parameters)
    module.weight = nn.Parameter((weight.mT if _is_turned(shell) else weight).contiguous())
    if bias is not None:
        module.bias = bias
    return module
