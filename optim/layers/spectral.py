"""Multiplying by a sum of singular triples, `y = U diag(s) Vᵀ x`, of which some vectors are trained: two ways.

With `G = δᵀ x` the gradient of the weight (out, in), of a triple

    ∂s_i = u_iᵀ G v_i ;   ∂u_i = s_i G v_i,  ∂v_i = s_i Gᵀ u_i                       (default)
                          g(u_i) = G v_i,    g(v_i) = Gᵀ u_i                        (enhanced)

The enhanced ones are SST's (Zhao et al. 2025, arXiv 2405.15481): directions with small s_i learn as fast as others. ∂s
and ∂x are the same.

*Factor form*: products with V and U for every token; G is never formed. *Dense form*: the weight is built, used and
dropped, and built again on the way back, where G is formed and projected at once; cheaper from some number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ENGINES = ("auto", "factors", "dense")


@contextmanager
def computed_in(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in autocast's dtype where there is autocast, which is off inside: for functions that have a way back
    of their own."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        yield tensors
        return
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        yield tuple(t.to(dtype) for t in tensors)


def flat(x: Tensor) -> Tensor:
    """Tokens as rows."""
    return x.reshape(-1, x.shape[-1])


def factor_cost(tokens: int, out: int, width: int, k: int, active: int, *, trained: bool) -> int:
    """Multiplications of the factor form, in the forward or, `trained`, in both directions."""
    one_way = tokens * k * (out + width)
    return 2 * one_way + tokens * active * (out + width) if trained else one_way


def dense_cost(tokens: int, out: int, width: int, k: int, active: int, *, trained: bool) -> int:
    """Multiplications of the dense form: the weight is built in each direction, G is formed and projected."""
    one_way = out * width * (tokens + k)
    return 2 * one_way + out * width * (tokens + k + active) if trained else one_way


class FactorForm(torch.autograd.Function):
    """`(x, U, V, U', V', s, s') → y`: trained vectors U, V (s: theirs), others U', V' (s': theirs).

    Args of `forward`: x (tokens, in), U (out, r), V (in, r), U' (out, k−r), V' (in, k−r), s (r,), s' (k−r,), and
    whether gradients of U and V are the enhanced ones. Returns (tokens, out).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        u_rest: Tensor,
        v_rest: Tensor,
        s: Tensor,
        rest: Tensor,
        enhanced: bool,
    ) -> Tensor:
        z, z_rest = x @ v, x @ v_rest
        ctx.save_for_backward(x, u, v, u_rest, v_rest, s, rest, z, z_rest)
        ctx.enhanced = enhanced
        return torch.addmm((z * s) @ u.mT, z_rest * rest, u_rest.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (delta,) = grads
        x, u, v, u_rest, v_rest, s, rest, z, z_rest = ctx.saved_tensors
        h, h_rest = delta @ u, delta @ u_rest
        dx = torch.addmm((h * s) @ v.mT, h_rest * rest, v_rest.mT) if ctx.needs_input_grad[0] else None
        ds, drest = (h * z).sum(0), (h_rest * z_rest).sum(0)
        du, dv = delta.mT @ z, x.mT @ h
        if not ctx.enhanced:
            du, dv = du.mul_(s), dv.mul_(s)
        return dx, du, dv, None, None, ds, drest, None


class DenseForm(torch.autograd.Function):
    """The same by way of the weight itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        u_rest: Tensor,
        v_rest: Tensor,
        s: Tensor,
        rest: Tensor,
        enhanced: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, u, v, u_rest, v_rest, s, rest)
        ctx.enhanced = enhanced
        return x @ built(u, v, u_rest, v_rest, s, rest).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (delta,) = grads
        x, u, v, u_rest, v_rest, s, rest = ctx.saved_tensors
        dx = delta @ built(u, v, u_rest, v_rest, s, rest) if ctx.needs_input_grad[0] else None
        g = delta.mT @ x
        du, dv = g @ v, g.mT @ u
        ds, drest = (u * du).sum(0), (u_rest * (g @ v_rest)).sum(0)
        if not ctx.enhanced:
            du, dv = du.mul_(s), dv.mul_(s)
        return dx, du, dv, None, None, ds, drest, None


def built(u: Tensor, v: Tensor, u_rest: Tensor, v_rest: Tensor, s: Tensor, rest: Tensor) -> Tensor:
    """The weight, (out, in)."""
    return torch.addmm((u * s) @ v.mT, u_rest * rest, v_rest.mT)
