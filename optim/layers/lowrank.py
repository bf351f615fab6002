"""One low-rank linear layer; its variants are what stands beside the factors and how they begin.

y = scale · B act(A x) + b        A (r, in), B (out, r)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from thinrank.optim.layers.base import Layer, NotMergeable, RankedReparam, kaiming_, like, normal_
from thinrank.optim.layers.dense import Dense
from thinrank.optim.linalg.factor import balanced, init_scale
from thinrank.optim.methods.config import choice

ACTIVATIONS = ("identity", "silu")
STARTS = ("svd", "xavier", "normal", "lora")


class LowRankLinear(Layer):
    """Two factors in the place of a matrix.

    Args:
        dense: the layer that is replaced.
        rank: r.
        act: between the factors, `identity` or `silu`.
        scale: multiplies their product.

    Attributes:
        A: (r, in).
        B: (out, r).
    """

    def __init__(self, dense: Dense, rank: int, *, act: str = "identity", scale: float = 1.0) -> None:
        super().__init__(dense)
        self.rank, self.act, self.scale = rank, act, scale
        self.A = like(dense, rank, self.in_features)
        self.B = like(dense, self.out_features, rank)

    def start_(self, how: str, dense: Dense, generator: torch.Generator) -> LowRankLinear:
        """Gives the factors their first values (in place).

        Args:
            how: `svd`, the best approximation of the weight that was there; `xavier`, both normal with variance
                2/(rows + columns); `normal`, so that entries of B A have variance 1/(out + in); `lora`, A uniform and
                B zero.
        """
        if dense.is_meta:
            return self
        with torch.no_grad():
            if how == "svd":
                left, right = balanced(dense.weight, self.rank)
                self.B.copy_(left)
                self.A.copy_(right)
            elif how == "lora":
                kaiming_(self.A, generator)
                self.B.zero_()
            else:
                for factor in (self.A, self.B):
                    std = init_scale(self.rank, *dense.shape) if how == "normal" else (2 / sum(factor.shape)) ** 0.5
                    normal_(factor, std, generator)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.hidden(x), self.B, self.bias)

    def hidden(self, x: Tensor) -> Tensor:
        """What B multiplies, (…, r)."""
        z = F.linear(x, self.A)
        z = F.silu(z) if self.act == "silu" else z
        return z if self.scale == 1.0 else z * self.scale

    def product(self) -> Tensor:
        """scale · B A."""
        self.refuse_nonlinear()
        return (self.B @ self.A).mul_(self.scale) if not torch.is_grad_enabled() else self.B @ self.A * self.scale

    def weight(self) -> Tensor:
        return self.product()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        self.refuse_nonlinear()
        if type(self).weight is not LowRankLinear.weight:  # a variant with something beside the product
            return None
        return self.B * self.scale, self.A

    def refuse_nonlinear(self) -> None:
        if self.act == "identity":
            return
        with torch.no_grad():
            sizes = [float(torch.linalg.matrix_norm(f.float(), 2)) for f in (self.B, self.A)]
        bound = abs(self.scale) * sizes[0] * sizes[1] / 2
        raise NotMergeable(
            f"there is a SiLU between its factors, and no matrix does the same: with half of its input in its place, "
            f"which is nearest for small ones, y would be off by up to {bound:.3g} times the length of x; keep the "
            "factors (export writes them with a loader)"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, act={self.act}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class LowRank(RankedReparam):
    """Factors alone: W = B A.

    Defaults: ours are rank=0.25, init=svd, which begins with the best approximation of the weight that was there, and
    what the shared class says is.
    """

    name: str = field(default="lowrank", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    init: str = field(default="svd", metadata={"help": "first values: svd (of the weight), xavier, normal"})

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("init", self.init, ("svd", "xavier", "normal"))

    def layer(self, dense: Dense, generator: torch.Generator) -> Layer:
        return LowRankLinear(dense, self.rank_of(dense)).start_(self.init, dense, generator)


@dataclass(frozen=True, kw_only=True)
class CoLA(RankedReparam):
    """CoLA (Liu et al. 2025, arXiv 2502.10940): a non-linearity between the factors, y = B silu(A x).

    Both factors begin normal with standard deviation r^(-1/4) (out + in)^(-1/4), as in the authors' code, so that the
    entries of B A have variance 1/(out + in). Theirs drops the activation of SwiGLU from their larger sizes on, since
    there is one inside already; here the model keeps its own, as their small ones do.

    Defaults: the authors' are rank=0.25, of the hidden size there, here of each layer's shorter side, and act=silu;
    what the shared class says is ours.
    """

    name: str = field(default="cola", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    act: str = field(default="silu", metadata={"help": "between the factors: silu, identity"})

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("act", self.act, ACTIVATIONS)

    def layer(self, dense: Dense, generator: torch.Generator) -> Layer:
        return LowRankLinear(dense, self.rank_of(dense), act=self.act).start_("normal", dense, generator)
