"""Cross entropy of a linear layer's outputs, a few tokens at a time: logits of a chunk, then their gradient, then gone.

With `z = s · (W h + b)`, capped as `c · tanh(z / c)` where there is a cap, and `Z = Σ_v exp(z_v)`, a token with label
`y` costs

    ℓ = log Z − z_y + ζ · log² Z ,          ∂ℓ/∂z_v = (1 + 2 ζ log Z) · exp(z_v) / Z − [v = y] ,

whose last term is PaLM's z-loss (Chowdhery et al. 2022, arXiv:2204.02311, section 5, ζ = 1e-4). A chunk's gradient is
made in the place of its logits while they are there, so that the forward pass leaves gradients of the states and of the
weight behind, and nothing of (tokens, vocabulary). That gradients can be had in the forward pass, since the loss is the
end of the graph, is known from Liger (Hsu et al. 2024, arXiv:2410.10989); the code and its precision are ours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the loss is of.

    Attributes:
        ignore_index: the label of a token that has none.
        scale: of the logits, before their cap.
        softcap: c; None: no cap.
        z_loss: ζ.
        chunk: tokens at a time.
        lower: a 16-bit type of the products, which are summed up in float32; None: the accumulator's.
    """

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    chunk: int = 1024
    lower: torch.dtype | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums over tokens and vocabulary are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_for(tokens: int, vocabulary: int, width: int) -> int:
    """Tokens of a chunk: a power of two, of whose logits in float32 there are at most half as many as entries in the
    larger of the weight's gradient and the states, and at least 64, for the sake of the products.

    The rule is ours. Smaller chunks would save what is not the most of it.
    """
    most = max(tokens, vocabulary) * width // (2 * vocabulary)
    return min(max(1 << (most.bit_length() - 1) if most else 1, 64), max(tokens, 1))


def chunked(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: Form, *, each: bool) -> Any:
    """The loss, and log Z.

    Args:
        hidden: (N, d).
        weight: (V, d).
        bias: (V,) or None.
        labels: (N,) int64.
        each: of every token by itself, 0 where there is no label; else their sum. The sum's gradients are made at once,
            and a second backward pass computes them again; those of every token are made in the backward pass.

    Returns:
        The loss, () or (N,), and log Z of every token, (N,), without gradient: float64 for float64 states, else
        float32.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return _Chunked.apply(hidden, weight, bias, labels, form, each)
    with _plain(hidden.device):
        losses, log_z, _ = _walk(hidden, weight, bias, labels, form)
    return (losses if each else losses.sum()), log_z


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    form: Form,
    needs: tuple[bool, bool, bool] = (False, False, False),
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Grads]:
    """Losses (N,), log Z (N,), and the gradients that are needed, of the losses' sum, weighted by `upstream` (N,)."""
    high = accumulator(hidden.dtype)
    low = form.lower or high
    tokens, mine = len(hidden), weight.to(low)
    losses, log_z = (hidden.new_empty(tokens, dtype=high) for _ in "ab")
    for_hidden = torch.empty_like(hidden) if needs[0] else None
    for_weight = torch.zeros_like(weight, dtype=high) if needs[1] else None
    for_bias = torch.zeros_like(bias, dtype=high) if bias is not None and needs[2] else None
    for start in range(0, tokens, form.chunk):
        part = slice(start, start + form.chunk)
        z = slope = None  # those of the chunk before go before the next ones come
        states = hidden[part].to(low)
        real = (labels[part] != form.ignore_index)[:, None]
        label = torch.where(real, labels[part, None], 0)
        z = _product(states, mine.T, high)
        slope = _finish(z, bias, form, any(needs))
        top, picked = z.amax(1, keepdim=True), z.gather(1, label)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        found = top + total.log()
        log_z[part] = found[:, 0]
        losses[part] = torch.where(real, found - picked + form.z_loss * found.square(), 0.0)[:, 0]
        if not any(needs):
            continue
        share = torch.where(real, 1.0 if upstream is None else upstream[part, None].to(high), 0.0).to(high)
        z.mul_(share * (1 + 2 * form.z_loss * found) / total)
        z.scatter_add_(1, label, -share)
        if slope is not None:
            z.mul_(slope)
        if form.scale != 1.0:
            z.mul_(form.scale)
        if for_bias is not None:
            for_bias += z.sum(0)
        z = z.to(low)  # of a 16-bit type from here on, as the other factors of its products are
        if for_hidden is not None:
            for_hidden[part] = z @ mine
        if for_weight is not None:
            if low == high:
                for_weight.addmm_(z.T, states)
            else:
                for_weight += _product(z.T, states, high)
    return losses, log_z, (for_hidden, for_weight, for_bias)


def _product(a: Tensor, b: Tensor, high: torch.dtype) -> Tensor:
    return a @ b if a.dtype == high else torch.mm(a, b, out_dtype=high)


def _finish(z: Tensor, bias: Tensor | None, form: Form, grad: bool) -> Tensor | None:
    """Bias, scale and cap, in place; the cap's slope where a gradient will need it."""
    if bias is not None:
        z.add_(bias)
    if form.scale != 1.0:
        z.mul_(form.scale)
    if form.softcap is None:
        return None
    z.div_(form.softcap).tanh_()
    slope = z.square().neg_().add_(1.0) if grad else None
    z.mul_(form.softcap)
    return slope


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: Form, each: bool
    ) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.form, ctx.grads = form, None
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        needs = (False, False, False) if each else ctx.needs_input_grad[:3]
        with _plain(hidden.device):
            losses, log_z, grads = _walk(hidden, weight, bias, labels, form, needs)
        ctx.mark_non_differentiable(log_z)
        if not each:
            ctx.grads = grads
        return (losses if each else losses.sum()), log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads, ctx.grads = ctx.grads, None  # once: they are scaled where they are, which saves a copy of the largest
        if grads is None:
            hidden, weight, bias, labels = ctx.saved_tensors
            share = upstream.expand(len(hidden))
            with _plain(hidden.device):
                _, _, grads = _walk(hidden, weight, bias, labels, ctx.form, ctx.needs_input_grad[:3], share)
        else:
            for grad in filter(lambda each: each is not None, grads):
                grad.mul_(upstream)
        own = (None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return (*own, None, None, None)


def _plain(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would round what is float32 on purpose."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
