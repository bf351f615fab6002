"""What replicas may send each other of a gradient, by name, and what it costs."""

from __future__ import annotations

import torch
from torch import Tensor

from thinrank.optim.backward import whole_because
from thinrank.optim.exchange.bits import digits
from thinrank.optim.exchange.replicas import BUCKET_BYTES as BUCKET_BYTES  # for who plans and counts bytes
from thinrank.optim.exchange.signs import ONE_WAY as ONE_WAY
from thinrank.optim.exchange.signs import TALLIES
from thinrank.optim.linalg.norms import SKETCH
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.rule import MatrixRule, remembers

MESSAGES = ("auto", "full", *TALLIES)
COARSE = tuple(TALLIES)
"""Of these, those by which what a subspace misses of gradients travels in signs."""
EMBEDDINGS = ("dense", "rows", "bfloat16", "rows_bfloat16")
"""How gradients of embeddings travel, and, rounded, those of the head."""
ROWS = ("rows",)
"""The place of a part that holds some rows of an embedding's gradient."""
REST = ("rest",)
"""And of coordinates, and of what they do not show of a gradient, by turns."""
NORMS = ("norms",)
"""And of a sketch, by which the norm of a mean gradient is known that nobody has."""

KINDS = {"low": "coordinates", "at_entries": "entries"}
"""What the parts of an image are called in the count of bytes."""


UNUSED_FEEDBACK = "takes memory and remembers nothing without messages=signs or majority: set it to off, or set these"
"""What is said of `sign_feedback` where no signs travel; it is not refused, so that a saved run can go on anywhere."""


def whole_messages_because(rule: MatrixRule | None, *, apart: bool = True) -> str | None:
    """Why replicas send whole gradients of the matrices of `rule` at every step, in words; None where they do not, or
    where no rule is.

    Args:
        apart: each rank may have a memory of its own, as replicas have, and owners have not.
    """
    if apart and remembers(rule):
        return None
    if isinstance(rule, LowRank) and not rule.stays and (rule.linear or rule.feedback.listens):
        return "each step chooses a new subspace (set update_proj_gap above 1 for smaller messages)"
    return whole_because(rule)


def sign_bytes(messages: str, ranks: int) -> dict[str, float]:
    """Bytes that an entry of what travels in signs costs on its way up and down, by kind, with these messages (of
    `COARSE`); `sizes` cost 4 a row and rank."""
    return {"signs": 1 / 8, "votes": 1 / digits(TALLIES[messages].most(ranks))}


def refuse_signs(messages: str, who: str) -> None:
    if messages in COARSE:
        raise ValueError(
            f"messages={messages!r} is for replicas that all step everything, and {who} do not: use messages='auto', "
            "or thinrank_ddp"
        )


def refuse_widened(embeddings: str, dtype: torch.dtype | None) -> None:
    if "bfloat16" in embeddings and dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"embeddings={embeddings!r} rounds gradients that messages of {dtype} would make wide again: leave the "
            "messages' dtype at None ('auto' in a configuration)"
        )


def sketch_bytes(param: Tensor) -> int:
    """Bytes of the sketch by which the norm of a parameter's gradient is known."""
    return 4 * min(SKETCH, param.numel())


NO_NORM = (
    "the norm of gradients is not known, since coordinates travel in their place and no norms: set norms=True in "
    "replicate or own (strategy.norms=always), or ask gradients_are_finite() where that is enough"
)
