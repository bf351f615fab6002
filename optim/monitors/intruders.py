"""Directions that a weight has and its reference had not: intruder dimensions (Shuttleworth et al. 2024, arXiv
2410.21228).

A leading left singular vector u_j of W is an intruder if no left singular vector of the reference W₀ is like it:
max_i |⟨u_j, u⁰_i⟩| < ε. The authors find them after LoRA and not after full fine-tuning, and that forgetting goes with
them. The reference is what training began with. Training from random weights has no reference: against a snapshot of
some time ago the same count says how many leading directions are new since then.

What it cannot see: directions that W₀ had as a mixture. Where singular values of W₀ lie close together its vectors are
arbitrary turns of each other, and a turn within them looks like an intruder; so it is for weights near their random
start, whose bulk has no identity. Two random directions of d dimensions have 0.12 in common at d = 1024, about √(2 ln d
/ d) for the nearest of d; 0.5 is far from that, unless d is below some fifty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thinrank.optim.linalg.basis import random_columns, subspace_iteration
from thinrank.optim.monitors.spectrum import wide

TOP, LIKE = 10, 0.5
"""The authors' k and ε."""


class Intruders(NamedTuple):
    """What `intruders` finds.

    Attributes:
        similarity: (..., k) of each leading vector, that of the largest singular value first, in [0, 1].
        number: (...,) int64, how many are below ε.
    """

    similarity: Tensor
    number: Tensor


def left_vectors(weight: Tensor) -> Tensor:
    """All left singular vectors of `weight` (..., out, in) by falling singular value, (..., out, min(out, in)), float32
    at least: what to keep of a reference. bfloat16 is enough to keep them in.

    Raises:
        ValueError: an entry is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("has entries that are not finite and no singular vectors: mend or leave out that weight")
    return torch.linalg.svd(wide(weight), full_matrices=False)[0]


def leading_left_vectors(weight: Tensor, k: int = TOP, *, iterations: int = 20, seed: int = 0) -> Tensor:
    """The first k left singular vectors, nearly, by block power iteration with k more columns: (..., out, k).

    2 k · out · in operations an iteration, instead of a factorisation. Where singular values lie close the iteration
    has not told them apart, and the factorisation has; both are as arbitrary there.

    Args:
        seed: of the random start, whose generator is its own.
    """
    turned = wide(weight).mT  # its short side is the one whose vectors are wanted
    out, k = weight.shape[-2], min(k, *weight.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    start = random_columns(out, min(2 * k, *weight.shape[-2:]), generator, weight.device).to(turned.dtype)
    start = start.expand(*weight.shape[:-2], *start.shape)
    return subspace_iteration(turned, start, k, iterations=iterations)[0]


def intruders(vectors: Tensor, reference: Tensor, *, threshold: float = LIKE) -> Intruders:
    """Which of the leading `vectors` are unlike all of `reference`.

    Args:
        vectors: (..., out, k), left singular vectors of the weight now, of unit length.
        reference: (..., out, n), those of the reference, or of a snapshot; any dtype.
        threshold: ε.
    """
    u = wide(vectors)
    overlap = (u.mT @ wide(reference).to(u.dtype)).abs()
    similarity = overlap.amax(-1).clamp(max=1.0)
    return Intruders(similarity, (similarity < threshold).sum(-1))


def intruder_dimensions(weight: Tensor, reference: Tensor, *, k: int = TOP, threshold: float = LIKE) -> Intruders:
    """The same of two weights (..., out, in), by exact factorisations.

    Args:
        weight: the weight now, adapters merged.
        reference: the weight that training began with, of the same shape.
        k: leading vectors that are looked at, fewer for smaller matrices.

    Raises:
        ValueError: shapes that differ, or an entry that is not finite.
    """
    if weight.shape != reference.shape:
        raise ValueError(
            f"the weight is {tuple(weight.shape)} and its reference {tuple(reference.shape)}: compare a matrix with "
            "what it was before"
        )
    return intruders(left_vectors(weight)[..., :k], left_vectors(reference), threshold=threshold)


def new_directions(weight: Tensor, snapshot: Tensor, *, k: int = TOP, threshold: float = LIKE) -> Intruders:
    """How many of the k leading directions are new since `snapshot`, the same weight some time ago; for training from
    random weights, where there is no reference. The same measure (the name and the use are ours)."""
    return intruder_dimensions(weight, snapshot, k=k, threshold=threshold)
