"""Matrices as products of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinrank.optim.gossip.compress.base import Codec, Compressor, generator_of
from thinrank.optim.linalg.orthogonal import cholesky_qr


@dataclass(frozen=True, kw_only=True)
class LowRank(Compressor):
    """`X ≈ P (Xᵀ P)ᵀ`, the columns of P orthonormal and those of `X G`, G Gaussian: PowerSGD (Vogels et al. 2019).

    Without its warm start, because nothing is remembered: G follows from the key. A projection, so biased and
    contractive; of the square at least r / min(m, n) is kept on average, all of it where the rank is r or less. Tensors
    of more than two dimensions are matrices of their first dimension and the rest. Vectors, and matrices that would not
    become smaller, are sent as they are. All in float32.

    Products are the same to the bit on equal machines with equally many threads.

    Attributes:
        rank: r.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    @property
    def name(self) -> str:
        return "lowrank"

    def bind(self, shapes: Sequence[Sequence[int]]) -> Codec:
        return LowRankCodec(shapes, self)


class LowRankCodec(Codec):
    """`LowRank` bound to shapes. Payload, float32, tensor by tensor: P (m, r), then Xᵀ P (n, r); or the entries."""

    def __init__(self, shapes: Sequence[Sequence[int]], config: LowRank) -> None:
        self.rank = config.rank
        super().__init__(shapes, unbiased=False, error=0.0)
        kept = [self.rank / min(m, n) for m, n, thin in self.parts if thin]
        self.error = math.sqrt(1.0 - min(kept)) if kept else 0.0

    def _length(self) -> int:
        self.parts = [self._part(shape) for shape in self.shapes if math.prod(shape)]
        return 4 * sum(self._sent(*part) for part in self.parts)

    def _part(self, shape: tuple[int, ...]) -> tuple[int, int, bool]:
        m, n = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        return m, n, self.rank * (m + n) < m * n

    def _sent(self, m: int, n: int, thin: bool) -> int:
        return self.rank * (m + n) if thin else m * n

    def _write(self, flat: Tensor, payload: Tensor, key: int) -> None:
        generator = generator_of(key, flat.device)
        place = 0
        into = payload.view(torch.float32)
        for m, n, thin in self.parts:
            x, flat = flat[: m * n].view(m, n), flat[m * n :]
            sent = into[place : place + self._sent(m, n, thin)]
            place += sent.numel()
            if not thin:
                sent.copy_(x.view(-1))
                continue
            # X's size is taken out of G: only the directions of X G matter, and its entries could overflow
            sketch = torch.randn(n, self.rank, generator=generator, device=x.device)
            left = cholesky_qr(x @ sketch.div_(x.abs().amax().clamp_(min=1e-30)))
            sent[: m * self.rank] = left.reshape(-1)
            torch.mm(x.mT, left, out=sent[m * self.rank :].view(n, self.rank))

    def _read(self, payload: Tensor, flat: Tensor, key: int) -> None:
        taken = payload.view(torch.float32)
        for m, n, thin in self.parts:
            x, flat = flat[: m * n].view(m, n), flat[m * n :]
            sent, taken = taken[: self._sent(m, n, thin)], taken[self._sent(m, n, thin) :]
            if thin:
                left, right = sent[: m * self.rank].view(m, self.rank), sent[m * self.rank :].view(n, self.rank)
                torch.mm(left, right.mT, out=x)
            else:
                x.copy_(sent.view(m, n))
