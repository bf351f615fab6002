"""The fully hyperbolic linear layer of HyboNet (Chen et al. 2022, arXiv 2105.14686), with its matrix as a child.

Between points of hyperbolic spaces of curvature K < 0 (`thinrank.optim.linalg.lorentz`), x (n+1) ↦ y (m+1):

    z    = M h(x) + b                                        M (m, n+1)
    φ(x) = λ sigmoid(vᵀ x + b') z / ‖z‖                      space coordinates
    y    = [sqrt(‖φ‖² − 1/K); φ]

so M says in which direction y lies, v how far, at most λ. No Riemannian optimizer is needed, since only what M gives is
lifted; and since M is an `nn.Linear` of the layer's own, `linear`, `convert(model, SST(rank=…))` replaces that one and
leaves v, b' and λ as they are, which is how Sparse Spectral Training treats hyperbolic models (Zhao et al. 2025, arXiv
2405.15481).

The equation is HyboNet's, written from what we know of the paper; that λ is trained as its logarithm and begins at 10,
and the bound on ‖z‖ from below, are from memory of their code. Ours: v and b' apart from M (theirs are a row of it,
which a decomposition would mix with the others), v = 0 at the beginning, M's first values, and h as any module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinrank.optim.linalg.lorentz import check_curvature, lifted
from thinrank.optim.methods.config import number

SMALLEST = 1e-4
"""‖z‖ is taken for at least that, so that z = 0 has a gradient."""


class LorentzLinear(nn.Module):
    """HyboNet's linear layer between hyperbolic spaces of one curvature.

    Args:
        in_features, out_features: n and m, numbers of space coordinates; points have one more.
        curvature: K, negative.
        bias: whether there is b.
        inside: h, on whole points and before M, such as `nn.Dropout(0.1)` or `nn.ReLU()`; None: the identity.
        scale: λ at the beginning, the largest ‖φ‖.
        train_scale: whether λ is trained.

    Defaults: curvature=-1.0, bias=True and scale=10.0 are HyboNet's as far as we know; train_scale=True and inside=None
    are ours.

    Attributes:
        linear: M and b, an `nn.Linear` (n+1 → m), or what `convert` has put in its place.
        gate: v, (n+1,).
        gate_bias: b', (1,).
        log_scale: log λ, (1,).

    Raises:
        ValueError: for sizes below 1, a curvature that is not negative and a scale that is not positive.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        curvature: float = -1.0,
        bias: bool = True,
        inside: nn.Module | None = None,
        scale: float = 10.0,
        train_scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be at least 1 space coordinate, got {size!r}: leave the time out of it")
        check_curvature(curvature)
        number("scale", scale, open_low=True)
        self.in_features, self.out_features, self.curvature = in_features, out_features, float(curvature)
        self.first_scale = float(scale)
        self.inside = inside
        self.linear = nn.Linear(in_features + 1, out_features, bias=bias, device=device, dtype=dtype)
        self.gate = nn.Parameter(torch.empty(in_features + 1, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype), requires_grad=train_scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First values: v and b' zero, λ as it was given; M has those of `nn.Linear`."""
        self.gate.zero_()
        self.gate_bias.zero_()
        self.log_scale.fill_(math.log(self.first_scale))

    def space(self, x: Tensor) -> Tensor:
        """φ(x), (…, n+1) → (…, m)."""
        z = self.linear(x if self.inside is None else self.inside(x)).to(x.dtype)
        length = self.log_scale.exp() * torch.sigmoid(x @ self.gate + self.gate_bias)
        return F.normalize(z, dim=-1, eps=SMALLEST) * length.unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Points (…, n+1) → points (…, m+1)."""
        if x.shape[-1] != self.in_features + 1:
            raise ValueError(
                f"points of {self.in_features} space coordinates have {self.in_features + 1} numbers, got "
                f"{x.shape[-1]}: lift space coordinates by thinrank.optim.linalg.lorentz.lifted first"
            )
        return lifted(self.space(x), self.curvature)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, curvature={self.curvature:g}"
