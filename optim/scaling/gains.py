"""What matrices and branches of a model do to the size of what goes through them; nothing is changed by measuring."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

KINDS: dict[str, str] = {
    "qk": r"(^|\.)(q_proj|k_proj|query|key)(\.|$)",
    "vo": r"(^|\.)(v_proj|o_proj|out_proj|value)(\.|$)",
    "mlp_in": r"(^|\.)(gate_proj|up_proj|gate_up_proj|input_linear|fc1|c_fc|w1|w3)(\.|$)",
    "mlp_out": r"(^|\.)(down_proj|output_linear|fc2|mlp\.c_proj|w2)(\.|$)",
}
"""Matrices of a Transformer that are looked at together, by the customary names."""


def matrix_kind(name: str) -> str | None:
    """The kind of a matrix by its name: qk, vo, mlp_in or mlp_out; None for another."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)


@torch.no_grad()
def top_sigma(model: nn.Module) -> dict[str, Tensor]:
    """The largest singular value (float32 scalar, on the weight's device) of every matrix of a linear map, by module.

    Of a layer of factors it is that of the matrix that it amounts to; embeddings, and what amounts to no single matrix,
    are left out. Some tens of products with eight vectors for each, so not for every step. In one process, on whole
    weights.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or weight is None:
            continue
        if callable(weight) and not isinstance(weight, Tensor):
            try:
                weight = weight()
            except ValueError:  # no single matrix
                continue
        if isinstance(weight, Tensor) and weight.ndim == 2 and "Norm" not in type(module).__name__:
            found[name] = _top(weight.detach().float())
    return found


EXACT = 192
"""Up to this shorter side the whole SVD is cheaper than iterations."""


def _top(weight: Tensor, width: int = 8, rounds: int = 24) -> Tensor:
    """By subspace iteration from a start that depends on the shape alone; a lower bound, 1 % below at most where the
    spectrum is that of noise, whose largest values lie close to each other, and exact where one stands out."""
    if min(weight.shape) <= EXACT:
        return torch.linalg.matrix_norm(weight, ord=2)
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    start = torch.randn(tall.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start.to(weight.device)).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(tall.mT @ (tall @ basis)).Q
    return torch.linalg.matrix_norm(tall @ basis, ord=2)


@dataclass
class Gains:
    """Ratios of RMS, float32 scalars on the model's device, by module.

    Attributes:
        linear: rms(Wx)/rms(x) of each linear map, x as it comes in, a bias left in.
        residual: rms(f(h))/rms(h) of each branch, with whatever it is multiplied by before it is added, where h is what
            it is added to.
    """

    linear: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def measure_gains(model: nn.Module, forward: Callable[[], Any]) -> Gains:
    """Gains in one forward, which `forward` does: `lambda: model(batch)`, on the same batch at every width.

    Branches are found where a block is written as nearly all are: direct children in turns of norm and branch, h going
    into the norm. A module that has a block's `residual_multiplier` beside it (Granite) is counted with it. Where a
    block is written otherwise, only linear gains are found. Costs a reduction of every input and output.
    """
    found, handles, stream = Gains(), [], {}

    def linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                found.linear[name] = _rms(output) / _rms(args[0])

        return hook

    def norm(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor):
                stream[block] = _rms(args[0])

        return hook

    def branch(block: str, name: str, factor: float) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if block in stream and isinstance(first, Tensor):
                found.residual[name] = factor * _rms(first) / stream.pop(block)

        return hook

    try:
        for name, module in model.named_modules():
            if hasattr(module, "in_features") and hasattr(module, "out_features"):
                handles.append(module.register_forward_hook(linear(name)))
        for block, module in _blocks(model):
            factor = getattr(module, "residual_multiplier", 1.0)
            for child, part in module.named_children():
                name = f"{block}.{child}"
                if "Norm" in type(part).__name__:
                    handles.append(part.register_forward_hook(norm(block)))
                elif not hasattr(part, "in_features") and any(True for _ in part.parameters()):
                    handles.append(part.register_forward_hook(branch(block, name, float(factor))))
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Members of lists of modules that have a norm among their children."""
    return [
        (f"{name}.{key}" if name else key, module)
        for name, parent in model.named_modules()
        if isinstance(parent, (nn.ModuleList, nn.Sequential))
        for key, module in parent.named_children()
        if any("Norm" in type(part).__name__ for part in module.children())
    ]


def _rms(tensor: Tensor) -> Tensor:
    return tensor.detach().float().square().mean().sqrt()
