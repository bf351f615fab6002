"""A gradient as its coordinates and the rest, of which replicas may say less."""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.lowrank.feedback import NoFeedback
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import Subspace
from thinrank.optim.rule import MatrixRule, State


def leaves_remainder(rule: MatrixRule | None) -> bool:
    """True for a rule that needs whole gradients, and whose subspace is orthonormal and stays for some steps: what is
    outside of it may then be told apart, and coarser."""
    return (
        isinstance(rule, LowRank)
        and not rule.linear
        and isinstance(rule.feedback, NoFeedback)
        and rule.subspace.orthonormal
        and (rule.subspace.every > 1 or rule.renewals.lazy is not None)
    )


def remembers_untold(rule: MatrixRule | None) -> bool:
    """True for a rule with room for what has not been told of a remainder (`sign_feedback`)."""
    return leaves_remainder(rule) and isinstance(rule, LowRank) and bool(rule.memory)


def apart(grad: Tensor, subspace: Subspace, state: State) -> tuple[Tensor, Tensor]:
    """Coordinates (batch, long, r) of `grad` (batch, long, short), and what they do not show of it, float32."""
    low = subspace.down(grad, state)
    return low, grad.float() - subspace.up(low, state, grad.shape[-1]).materialise().float()


def together(low: Tensor, rest: Tensor, subspace: Subspace, state: State) -> Tensor:
    """The matrix nearest to `rest` (batch, long, short) that has the coordinates `low`: `rest + up(low − down(rest))`.

    Whatever has become of the rest on its way, what is in the subspace is exact.
    """
    found = subspace.up(low - subspace.down(rest, state), state, rest.shape[-1]).materialise()
    return rest + found


def with_untold(rest: Tensor, owing: Tensor) -> tuple[Tensor, Tensor]:
    """`rest + owing`, which is to be told, and what signs and one size a row do not tell of it (all float32).

    Error feedback (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847): `left = x − mean|x| ∘ sign(x)` of a row;
    that replicas do it with a remainder is ours. Where `rest` is no number, what is owed stays.
    """
    whole = rest + owing
    left = whole - whole.abs().mean(-1, keepdim=True) * torch.where(whole < 0, -1.0, 1.0)
    return whole, torch.where(left.isfinite().all(), left, owing)
