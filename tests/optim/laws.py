"""What the tests of `optim` share: settings for properties, matrices with a known spectrum, twins."""

import torch
from hypothesis import settings
from torch import Tensor

LAW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
"""For properties: the same examples on every machine, and no database beside the code."""


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(long: int, short: int, *, ratio: float = 0.7, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix with singular values 1, ratio, ratio², …: what gradients look like, with nothing tied."""
    k = min(long, short)
    left = torch.linalg.qr(seeded(long, k, seed=2 * seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(seeded(short, k, seed=2 * seed + 1, dtype=torch.float64)).Q
    return ((left * ratio ** torch.arange(k, dtype=torch.float64)) @ right.mT).to(dtype)


def side_by_side(askings):
    """What comes of computations of several replicas (`Asking`), each of which is given the mean of what all yield."""
    found, asked = [], []

    def go_on(asking, mean):
        try:
            asked.append(asking.send(mean))
        except StopIteration as end:
            found.append(end.value)

    said = [None] * len(askings)
    while not found:
        for asking, mean in zip(askings, said, strict=True):
            go_on(asking, mean)
        assert not asked or not found, "all ask, or all have finished"
        said = [torch.stack(asked).mean(0) for _ in asked]
        asked.clear()
    return found


def eye_error(basis: Tensor) -> float:
    """Largest entry of `BᵀB − I`."""
    gram = basis.mT @ basis
    return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).abs().max())
