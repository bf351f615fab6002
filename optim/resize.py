"""The state of a matrix at another rank."""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.rule import State


def resized(old: State, new: State) -> State:
    """`new`, the state that a matrix begins with at a new rank, filled with what its state `old` at another rank holds.

    A smaller rank keeps the first directions (the strongest, where the method orders them) with their moments; a larger
    one adds directions orthogonal to them, or columns not yet chosen, with moments of zero. What else a matrix
    remembers is kept. With other names (projected or element by element; at rank 1, moments in float32 that were 8-bit
    codes), and before the first update, only the float32 copy of the weight is.
    """
    begun = set(old) == set(new) and float(old["step"]) > 0
    for key, value in new.items():
        if begun or (key == "master" and key in old):
            value.copy_(_RESIZED.get(key.rpartition(".")[2], _common)(old[key], value))
    return new


def _common(old: Tensor, like: Tensor) -> Tensor:
    """`like` with what `old` has of it."""
    new = like.clone()
    part = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
    new[part] = old[part]
    return new


def _basis(old: Tensor, like: Tensor) -> Tensor:
    """The first columns of the orthonormal `old`, or all of them and some of their complement."""
    held, wanted = old.shape[-1], like.shape[-1]
    if wanted <= held:
        return old[..., :wanted]
    return torch.cat([old, torch.linalg.qr(old.float(), mode="complete").Q[..., held:wanted]], -1)


def _columns(old: Tensor, like: Tensor) -> Tensor:
    """The first of the chosen columns, or all of them and the lowest of the others."""
    held, wanted = old.shape[-1], like.shape[-1]
    if wanted <= held:
        return old[..., :wanted]
    most = int(old.max()) + 1 + wanted  # the lowest free ones lie below, and below the short side
    member = torch.zeros(*old.shape[:-1], most, dtype=torch.bool, device=old.device).scatter_(-1, old.long(), True)
    free = torch.sort(member.to(torch.uint8), dim=-1, stable=True).indices[..., : wanted - held]
    return torch.cat([old, free.to(old.dtype)], -1)


_RESIZED = {"basis": _basis, "basis_long": _basis, "columns": _columns}
"""State that is not carried by copying what both sizes have."""
