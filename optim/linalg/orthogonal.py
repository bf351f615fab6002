"""Nearest orthonormal matrices, by matrix products alone or by factorisations.

Singular values are moved towards one by odd polynomials, `σ ← a σ + b σ³ + c σ⁵`, applied to the whole matrix. Which
coefficients, and how far from one they leave what, is the choice that names the sets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.linalg.norms import frobenius, reciprocal_peak
from thinrank.optim.linalg.products import product

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Polynomials that are applied one after the other, and how their input is normalised.

    Attributes:
        triples: `(a, b, c)` of each iteration.
        safety: the input is divided by this times its Frobenius norm, so that no singular value is above 1/safety.
        eps: added to that norm, in units of the largest entry.
    """

    triples: tuple[Triple, ...]
    safety: float = 1.0
    eps: float = 1e-7

    def first(self, steps: int) -> Coefficients:
        """The same with the first `steps` iterations alone."""
        return replace(self, triples=self.triples[:steps])


JORDAN = Coefficients(((3.4445, -4.7750, 2.0315),) * 5)
"""Jordan et al. 2024 (Muon, and `torch.optim.Muon`): singular values above 3e-3 of the norm end in [0.68, 1.20]."""

YOU = Coefficients(
    (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )
)
"""You 2025: above 1e-2 of the norm in [0.978, 1.032], below slower than the others; for well-conditioned factors."""

POLAR_EXPRESS = Coefficients(
    (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    safety=1.02,
    eps=1e-6,
)
"""Amsel et al. 2025 (Polar Express), with their safety factor: above 1e-3 of the norm in [0.85, 1.14]."""

SETS = {"jordan": JORDAN, "you": YOU, "polar_express": POLAR_EXPRESS}

DTYPES: dict[str, torch.dtype | None] = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `newton_schulz` computes its products in, by the name that a configuration uses."""

FORMS = ("auto", "plain", "gram")

GRAM_FROM = 2.0
"""long/short from which `auto` takes the Gram form. Counted in products the forms are even at 1.5 (8 s² l + 28 s³
against 20 s² l + 10 s³). Measured in float32 on a two-core AMD EPYC, short 128 and 768, least CPU time of several: Gram
takes 1.2 of the plain time for squares, 1.0 at 1.5, 0.9 at 2, 0.8 at 2.7, 0.7 at 4."""

RESTART = 2
"""Before this iteration the Gram form goes back to the matrix: what rounding added to the Gram matrix would grow."""


def newton_schulz(
    x: Tensor,
    coefficients: Coefficients = JORDAN,
    *,
    dtype: torch.dtype | None = None,
    form: str = "auto",
    axis: Axis = WHOLE,
) -> Tensor:
    """`U Vᵀ` for `x = U S Vᵀ`, nearly: the polynomials of `coefficients` one after the other (Jordan et al. 2024).

    `x` is divided by its largest entry first, so that its size does not matter, be it 1e-30 or 1e30 (ours; elsewhere a
    small norm is raised to 1e-7).

    Args:
        x: (..., long, short) in either orientation; a zero matrix stays zero.
        coefficients: which polynomials.
        dtype: of the products; None: bfloat16 on a GPU, float32 on a CPU. Norms are float32 in any case.
        form: `plain` multiplies the matrix itself in every iteration, `gram` a (short, short) one, in float32 at least
            (Gram Newton-Schulz, Dao-AILab 2026), `auto` whichever is faster; they differ by rounding.
        axis: the ranks that share the rows (the first side) of `x`. Only (columns, columns) matrices travel.

    Returns:
        (..., long, short), float32, or float64 where `dtype` is.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if dtype is None:
        dtype = torch.bfloat16 if x.is_cuda or x.is_meta else torch.float32  # meta: to plan for a GPU
    tall = not axis.whole or x.shape[-2] >= x.shape[-1]
    gram = form == "gram" or (form == "auto" and _gram_pays(x, dtype)) or not axis.whole
    precise = torch.promote_types(dtype, torch.float32)
    if gram:
        dtype = precise  # its squares need the digits: in bfloat16 its error is up to six times the plain form's
    y = x.to(precise).flatten(0, -3) if x.ndim > 2 else x.to(precise).unsqueeze(0)
    y = y * reciprocal_peak(y, axis)
    y.div_((coefficients.safety * frobenius(y, axis) + coefficients.eps)[:, None, None])
    y = (y if tall else y.mT).to(dtype)
    y = _gram(y, coefficients.triples, axis) if gram else _plain(y, coefficients.triples)
    return (y if tall else y.mT).to(precise).reshape(x.shape)


def _gram_pays(x: Tensor, dtype: torch.dtype) -> bool:
    short, long = sorted(x.shape[-2:])
    return dtype in (torch.float32, torch.float64) and long >= GRAM_FROM * short


def _plain(y: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    for a, b, c in triples:
        gram = product(y.mT, y)
        y = torch.baddbmm(y, y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
    return y


def _gram(y: Tensor, triples: tuple[Triple, ...], axis: Axis) -> Tensor:
    for part in (triples[:RESTART], triples[RESTART:]):
        if part:
            y = product(y, _factors(axis.sum(product(y.mT, y)), part))
    return y


def _factors(gram: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """What the iterations multiply a matrix by whose Gram matrix is `gram`.

    One iteration is y ← y p with p = a + b g + c g², g = yᵀy. After it yᵀy is p g p, for all of these commute.
    """
    (a, b, c), *rest = triples
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor @ _factors(factor @ (gram @ factor), tuple(rest)) if rest else factor


def exact_polar(x: Tensor) -> Tensor:
    """`U Vᵀ` for `x = U S Vᵀ` by a factorisation, in `x`'s dtype: the nearest matrix with singular values of one.

    For tests and small matrices. Directions that `x` does not have (singular values of rounding alone) stay zero, as
    Newton-Schulz leaves them.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    least = s[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    return (u * (s > least).to(x.dtype).unsqueeze(-2)) @ vh


SHAPE_SCALES = ("original", "spectral", "match_rms_adamw", "none")


def shape_scale(name: str, rows: int, columns: int) -> float:
    """What an orthonormal update of a weight of `rows` outputs and `columns` inputs is multiplied by.

    `original` is sqrt(max(1, rows/columns)) (Jordan et al. 2024), `spectral` sqrt(rows/columns), which keeps the change
    of outputs of unit size independent of the width (Bernstein 2025), `match_rms_adamw` 0.2 sqrt(max(rows, columns)),
    which gives entries the size of AdamW's steps, so that its rates and decay can be kept (Liu et al. 2025, Moonlight),
    `none` 1.
    """
    if name == "original":
        return max(1.0, rows / columns) ** 0.5
    if name == "spectral":
        return (rows / columns) ** 0.5
    if name == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    if name == "none":
        return 1.0
    raise ValueError(f"a shape scale is one of {', '.join(SHAPE_SCALES)}, got {name!r}")


def cholesky_qr(x: Tensor, axis: Axis = WHOLE) -> Tensor:
    """Q of the QR decomposition of `x` whose R has a positive diagonal, by products and r × r Cholesky factors alone.

    Three rounds of `x ← x R⁻¹`, `RᵀR = xᵀx`, the first two with a shift on the diagonal (shifted Cholesky QR, Fukaya
    et al. 2020): one round without it breaks down in float32 from a condition of about 3e3 on. The host never waits.

    Ours: columns are first brought to length one, so that neither their size (1e-30, 1e30) nor its differences matter;
    and a column that lies in the span of those before it, but for a part as small as rounding (a few millionths of it
    in float32), comes out as zero, where a direction at random or NaN would be found. The others are orthonormal, to
    about 1e-6 in float32.

    Args:
        x: (..., long, r), long ≥ r; its rows may be spread along `axis`: r × r matrices travel.

    Returns:
        (..., long, r), in `x`'s dtype; not finite where `x` is not.
    """
    if x.shape[-2]:
        size = axis.sum(x.abs().amax(-2, keepdim=True))
    else:  # a rank without rows; a maximum of nothing is refused by torch
        size = axis.sum(x.new_zeros(*x.shape[:-2], 1, x.shape[-1]))
    x = x / size.clamp(min=torch.finfo(x.dtype).tiny)
    gram = axis.sum(product(x.mT, x))
    unit = _reciprocal(gram.diagonal(dim1=-2, dim2=-1).sqrt(), 0.0)
    shift = _rounding(x)
    x = x @ (unit.unsqueeze(-1) * _inverse_factor(unit.unsqueeze(-1) * gram * unit.unsqueeze(-2), shift))
    x = x @ _inverse_factor(axis.sum(product(x.mT, x)), shift)
    # a column whose own part was ρ is ρ/√shift long after one round (where that is below one), and ρ/shift after two
    gram = axis.sum(product(x.mT, x))
    unit = _reciprocal(gram.diagonal(dim1=-2, dim2=-1).sqrt(), OWN)
    gram = unit.unsqueeze(-1) * gram * unit.unsqueeze(-2)
    gram.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return x @ (unit.unsqueeze(-1) * _inverse_factor(gram, 0.0))


def householder_qr(x: Tensor, *, complete: bool = False) -> Tensor:
    """What `cholesky_qr` gives, by Householder reflections: `x` (..., long, r), long ≥ r, must be whole on this rank.

    R's diagonal is made positive: without a fixed sign a column may turn over from one step to the next where `x`
    hardly changed.

    Where columns stand behind one that is zero here, they lose what they have of the direction that the reflections
    put in its place.

    Args:
        complete: leave that direction in its place, so that all columns are orthonormal whatever `x` is.
    """
    q, r = torch.linalg.qr(x * reciprocal_peak(x))
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)
    if not complete:
        signs = signs * (diagonal.abs() > OWN * _rounding(x) * torch.linalg.vector_norm(r, dim=-2))
    return q * signs.unsqueeze(-2)


OWN = 0.3
"""How much of a column, in units of its rounding, must lie outside the span of the others to be a direction."""


def _rounding(x: Tensor) -> float:
    """More than rounding makes of a Gram matrix of unit columns, or of a product's columns."""
    return max(x.shape[-1], 64) * torch.finfo(x.dtype).eps


def _reciprocal(length: Tensor, least: float) -> Tensor:
    return torch.where(length > least, length.reciprocal(), 0.0)


def _inverse_factor(gram: Tensor, shift: float) -> Tensor:
    """`R⁻¹` of `RᵀR = gram + shift`."""
    gram.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, _ = torch.linalg.cholesky_ex(gram, upper=True)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(factor, unit, upper=True)
