"""Points of hyperbolic space in the Lorentz model, as functions of their space coordinates.

With curvature K < 0, a point of d dimensions is `x = [t; s]` in d + 1 numbers, the time t > 0 first:

    ⟨x, y⟩ = −t_x t_y + s_xᵀ s_y ,     ⟨x, x⟩ = 1/K   so that   t = sqrt(‖s‖² − 1/K)

    chord²     ⟨x − y, x − y⟩ = 2/K − 2 ⟨x, y⟩                     (Law et al. 2019: "squared Lorentzian distance")
    geodesic   arcosh(K ⟨x, y⟩) / sqrt(−K) = 2 arsinh(sqrt(−K chord²) / 2) / sqrt(−K)
    centroid   Σ w_i x_i / (sqrt(−K) sqrt(−⟨Σ w_i x_i, Σ w_i x_i⟩)) (Law et al. 2019: least Σ w_i chord²)

HyboNet (Chen et al. 2022, arXiv 2105.14686) measures and aggregates so. Ours: a point is always lifted from its space
coordinates, the centroid too, so that no rounding leads off the hyperboloid; chords are computed from differences,
t_x − t_y being (s_x − s_y)ᵀ(s_x + s_y) / (t_x + t_y), which is zero at equal points, loses nothing for near ones and
has a gradient everywhere, as has the squared geodesic distance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SERIES = 1e-3
"""Below it three terms of a series are nearer than what rounding leaves of the closed form in float32."""


def check_curvature(curvature: Any) -> None:
    """Raises ValueError for what is no negative number."""
    number = isinstance(curvature, (int, float)) and not isinstance(curvature, bool)
    if not number or not math.isfinite(curvature) or curvature >= 0:
        raise ValueError(f"curvature must be a negative number, got {curvature!r}: -1.0 is usual")


def inner(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ over the last axis, (…, d+1) twice → (…)."""
    return (x[..., 1:] * y[..., 1:]).sum(-1) - x[..., 0] * y[..., 0]


def lifted(space: Tensor, curvature: float = -1.0) -> Tensor:
    """The points over space coordinates (…, d), (…, d+1)."""
    time = (space.square().sum(-1, keepdim=True) - 1 / curvature).sqrt()
    return torch.cat([time, space], -1)


def from_tangent(vectors: Tensor, curvature: float = -1.0) -> Tensor:
    """Where one comes to from the origin `[1/sqrt(−K); 0]` by going ‖v‖ in the direction v.

    Args:
        vectors: space coordinates of tangent vectors at the origin, (…, d); their time is 0.

    Returns:
        Points (…, d+1): `s = v sinh(c ‖v‖) / (c ‖v‖)` with c = sqrt(−K).
    """
    z = vectors.square().sum(-1, keepdim=True) * -curvature
    small = z < SERIES
    root = torch.where(small, 1.0, z).sqrt()
    ratio = torch.where(small, 1 + z / 6 + z.square() / 120, root.sinh() / root)
    return lifted(vectors * ratio, curvature)


def chord2(x: Tensor, y: Tensor) -> Tensor:
    """⟨x − y, x − y⟩ ≥ 0 of points (…, d+1), zero where they are equal: (…)."""
    difference, total = x[..., 1:] - y[..., 1:], x[..., 1:] + y[..., 1:]
    time = (difference * total).sum(-1) / (x[..., 0] + y[..., 0])
    return (difference.square().sum(-1) - time.square()).clamp(min=0)


def distance2(x: Tensor, y: Tensor, curvature: float = -1.0) -> Tensor:
    """The square of the geodesic distance of points (…, d+1): (…)."""
    z = chord2(x, y) * -curvature
    small = z < SERIES
    angle = torch.where(small, 1.0, z).sqrt().div(2).asinh()
    return torch.where(small, z - z.square() / 12 + z**3 / 90, 4 * angle.square()) / -curvature


def centroid(weights: Tensor, points: Tensor, curvature: float = -1.0) -> Tensor:
    """Weighted means that are points themselves.

    Args:
        weights: (m, n), non-negative, and positive somewhere in each row; dense or sparse. A row's scale is without
            effect.
        points: (n, d+1).

    Returns:
        (m, d+1).
    """
    total = weights @ points
    length2 = total[..., :1].square() - total[..., 1:].square().sum(-1, keepdim=True)
    tiny = torch.finfo(total.dtype).eps * total[..., :1].square()
    return lifted(total[..., 1:] * (torch.maximum(length2, tiny) * -curvature).rsqrt(), curvature)
