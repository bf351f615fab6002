"""Fixed orthogonal bases, and the choice of a few of their columns.

A basis is an orthogonal `C` (n, n) whose ROWS are its atoms, so that `x @ C.T` are the coordinates of the rows of `x`.
For `dct` these are the orthonormal DCT-II, in the matrix engine and in the FFT engine alike (the DCT-AdamW authors'
code uses another basis in each of the two).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Axis

BASES = ("dct", "identity", "hadamard", "random")
NORMS = ("l1", "l2")


def dct_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Orthonormal DCT-II (n, n): `C[k, j] = sqrt(2/n) cos(πk(2j+1)/2n)`, row 0 times `sqrt(1/2)`.

    The angle is reduced in integers, `k(2j+1) mod 4n`, before the cosine: a float32 angle is off by 1e-3 at n = 4096.
    """
    table = torch.cos(torch.arange(4 * n, dtype=torch.float64) * (math.pi / (2 * n)))
    k, j = torch.arange(n).unsqueeze(1), torch.arange(n).unsqueeze(0)
    matrix = table[(k * (2 * j + 1)) % (4 * n)] * math.sqrt(2.0 / n)
    matrix[0] *= math.sqrt(0.5)
    return matrix.to(dtype)


def hadamard_matrix(n: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(n); for n = 2^k·q, q odd, its Kronecker product with the DCT of size q."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    matrix = dct_matrix(odd)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) * math.sqrt(0.5)
    while matrix.shape[0] < n:
        matrix = torch.kron(two, matrix)
    return matrix


def random_orthogonal(n: int, seed: int = 0) -> Tensor:
    """A Haar-distributed orthogonal matrix (n, n): QR of a normal matrix with the signs of R's diagonal divided out."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return q * torch.sign(torch.diagonal(r))


def basis_matrix(name: str, n: int, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Tensor:
    """The basis `name` of size n: built in float64 on the CPU, then rounded once to `dtype`."""
    if name == "dct":
        matrix = dct_matrix(n)
    elif name == "identity":
        matrix = torch.eye(n, dtype=torch.float64)
    elif name == "hadamard":
        matrix = hadamard_matrix(n)
    elif name == "random":
        matrix = random_orthogonal(n, seed)
    else:
        raise ValueError(f"basis must be one of {', '.join(BASES)}, got {name!r}")
    return matrix.to(device=device, dtype=dtype)


def makhoul_order(n: int) -> Tensor:
    """Even samples rising, then odd samples falling: the order in which one FFT of length n gives a DCT-II."""
    return torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])


@lru_cache(maxsize=64)
def _makhoul(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # remembered because every step needs them; pure functions of their arguments, so they are not state
    angle = torch.arange(n // 2 + 1, dtype=torch.float64) * (math.pi / (2 * n))
    twiddle = torch.polar(torch.full_like(angle, math.sqrt(2.0 / n)), -angle)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    return makhoul_order(n).to(device), twiddle.to(device, wide)


FFT_BYTES = 2**20
"""On a CPU the FFT works on as many rows at a time: temporaries beyond the cache made it two to four times slower."""


def dct_rows_fft(x: Tensor) -> Tensor:
    """DCT-II of the rows (last dimension) of `x` (..., long, n) by real FFTs of the same length (Makhoul 1980).

    Returns a tensor laid out as `x` is: a batch that was stored transposed is transformed as it lies.
    """
    n = x.shape[-1]
    transposed = x.ndim > 1 and x.stride(-1) != 1 and x.stride(-2) == 1
    stored, dim = (x.mT, -2) if transposed else (x.reshape(-1, n), -1)
    other = -3 - dim
    out = torch.empty_like(stored, memory_format=torch.contiguous_format)
    if not x.numel():
        return out.mT if transposed else out.view(x.shape)
    rows = stored.shape[other]
    if x.device.type == "cpu":
        rows = max(1, FFT_BYTES * rows // (x.element_size() * x.numel()))
    order, twiddle = _makhoul(n, x.dtype, x.device)
    twiddle = twiddle.unsqueeze(-1) if transposed else twiddle
    half = n // 2 + 1
    for part, into in zip(stored.split(rows, other), out.split(rows, other), strict=True):
        z = torch.fft.rfft(part.index_select(dim, order), dim=dim).mul_(twiddle)
        into.narrow(dim, 0, half).copy_(z.real)
        torch.neg(z.imag.narrow(dim, 1, n - half).flip(dim), out=into.narrow(dim, half, n - half))
        into.select(dim, 0).mul_(math.sqrt(0.5))
    return out.mT if transposed else out.view(x.shape)


def column_norms(coordinates: Tensor, norm: str, axis: Axis = WHOLE) -> Tensor:
    """l1 or squared l2 norms of the columns of (..., long, n), summed along the axis: (..., n)."""
    # for a batch that fits the cache, torch's norm over a dimension that is not the last takes a CPU five to twelve
    # times longer than these two passes
    entries = coordinates.abs() if norm == "l1" else coordinates.square()
    return axis.sum(entries.sum(-2))


def select_columns(norms: Tensor, previous: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` columns of largest norm, in stable slots.

    A column that stays chosen stays in its slot; freed slots take the new columns in rising order. Moments then need no
    rotation: a slot either keeps its meaning or is new. Equal norms are resolved by the lower column.

    Args:
        norms: (batch, n).
        previous: (batch, rank) columns chosen before, or None.

    Returns:
        columns (batch, rank) int64, and kept (batch, rank) bool, false where a slot changed its column.
    """
    order = torch.sort(norms, dim=-1, descending=True, stable=True).indices[..., :rank]
    if previous is None:
        chosen = order.sort(-1).values
        return chosen, torch.zeros_like(chosen, dtype=torch.bool)
    previous = previous.long()
    member = torch.zeros_like(norms, dtype=torch.bool).scatter_(-1, order, True)
    kept = member.gather(-1, previous)
    fresh = member.scatter(-1, previous, False)  # chosen now, not before
    # rank-many candidates with the new columns first, rising; as many as there are freed slots are used
    n = norms.shape[-1]
    number = torch.arange(n, device=norms.device).expand_as(norms)
    candidates = torch.where(fresh, number, number + n).sort(-1).values[..., :rank] % n
    turn = (~kept).cumsum(-1) - 1
    return torch.where(kept, previous, candidates.gather(-1, turn.clamp(min=0))), kept
