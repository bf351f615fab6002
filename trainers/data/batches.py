"""Batches of token rows: which rank gets which rows of a micro-batch, for training and for the held-out set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from thinrank.trainers.data.encode import EncodedSplit
from thinrank.trainers.errors import UserError

IGNORE = -100  # the label that torch's cross entropy passes over


class EvalBatch(TypedDict):
    """Held-out rows of one rank.

    Keys:
        input_ids: int64 (rows, length).
        labels: int64 (rows, length), already shifted: the token after each input; -100 is no label.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


class Batch(EvalBatch):
    """Training rows of one rank.

    Keys:
        position: Samples consumed by all ranks together once this micro-batch is done.
    """

    position: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a global batch is divided: into micro-batches one after the other, each into equal parts of the ranks.

    Micro-batch `j` of `micro_batches` holds the samples `[j, j + 1) * batch_size / micro_batches` of the global batch,
    and rank `k` has the `k`-th contiguous part of them. Sample numbers never depend on `world`.

    Raises:
        ValueError: The batch cannot be divided evenly, or the rank is none of the world's.
    """

    batch_size: int
    micro_batches: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batches", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must lie in [0, {self.world}), got {self.rank}")
        parts = self.micro_batches * self.world
        if self.batch_size % parts:
            below, above = self.batch_size // parts * parts, (self.batch_size // parts + 1) * parts
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"batch_size must be divisible by {parts} ({self.micro_batches} micro-batches on {self.world} "
                f"processes), got {self.batch_size}; set it to {nearest}"
            )

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch on all ranks together."""
        return self.batch_size // self.micro_batches

    @property
    def share(self) -> slice:
        """This rank's rows of a micro-batch."""
        rows = self.micro_batch // self.world
        return slice(self.rank * rows, (self.rank + 1) * rows)


def to_batch(rows: np.ndarray, position: int) -> Batch:
    """A training batch from rows with the token after them, int64 (rows, length + 1)."""
    tensor = torch.from_numpy(rows)
    return {"input_ids": tensor[:, :-1].contiguous(), "labels": tensor[:, 1:].contiguous(), "position": position}


class TrainBatches:
    """This rank's endless training batches, from where training stands each time that iteration begins.

    It has no length on purpose: Lightning then sees one endless epoch, and `max_steps` ends the training.

    Args:
        layout: Which rows are this rank's.
        start: Gives the position at which an iteration begins.
        rows: Rows of the samples `start` to `start + count - 1` with the token after them; called with
            `(start, count, part)`, where `part` is the slice of them that is wanted.
        past: Where training goes on at a position, further on where samples are left out.
    """

    def __init__(
        self,
        layout: Layout,
        start: Callable[[], int],
        rows: Callable[[int, int, slice], np.ndarray],
        past: Callable[[int], int] = int,
    ):
        self._layout = layout
        self._start = start
        self._rows = rows
        self._past = past

    def __iter__(self) -> Iterator[Batch]:
        position = self._start()
        size, share = self._layout.micro_batch, self._layout.share
        while True:
            position = self._past(position)
            rows = self._rows(position, size, share)
            position += size
            yield to_batch(rows, position)


def past(position: int, left_out: Sequence[tuple[int, int]]) -> int:
    """`position`, or where the samples end that are left out from there: `left_out` has their first and their end, in
    order."""
    for first, end in left_out:
        if first <= position < end:
            position = end
    return position


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out tokens that a validation uses.

    Attributes:
        tokens: int64-compatible (tokens,): documents, each with its end-of-text token.
        bytes_per_token: UTF-8 bytes of the documents for each token, end-of-text tokens counted. A loss of `x` nats per
            token is `x / ln 2 / bytes_per_token` bits per byte.
    """

    tokens: np.ndarray
    bytes_per_token: float


def held_out(split: EncodedSplit, limit: int, *, after: int | None = None) -> HeldOut:
    """The first whole documents with together at most `limit` tokens (0: all).

    If the first document alone is longer, it is cut, and its bytes per token are those of the whole document.

    Args:
        split: The held-out documents.
        limit: Most tokens; 0 takes all.
        after: Leave out every document of which `held_out(split, after)` has a part.

    Raises:
        UserError: Nothing is left after those.
    """
    first = 0 if after is None else max(1, _within(split.documents, after))
    documents = split.documents[first:]
    if not len(documents):
        raise UserError(
            f"data.validation_tokens={after} covers all {len(split.documents)} held-out documents, so none is left "
            "for data.final_validation_unseen: lower the one, drop the other, or hold out more text"
        )
    start, count = int(split.documents[:first, 0].sum()), _within(documents, limit)
    tokens, size = documents[: max(count, 1)].sum(axis=0)
    return HeldOut(
        tokens=split.tokens[start : start + (int(tokens) if count else limit)],
        bytes_per_token=float(size) / float(tokens),
    )


def _within(documents: np.ndarray, limit: int) -> int:
    """How many of the first documents have together at most `limit` tokens (0: all)."""
    return int(np.searchsorted(documents[:, 0].cumsum(), limit, side="right")) if limit else len(documents)


class EvalBatches:
    """This rank's batches of the held-out tokens, the same number of batches of the same size on every rank.

    Every held-out token is the label of exactly one place of exactly one rank: the end-of-text token stands before the
    first, so that the first is predicted too, and the sum of the losses is the whole cost of the text. The last row,
    and the rows added to fill the last batch, have -100 as labels where there is no token.

    Args:
        tokens: Held-out tokens (tokens,).
        end_of_text: Id of the end-of-text token.
        length: Tokens in a row.
        layout: Which rows are this rank's; batches are as large as a micro-batch of training.
    """

    def __init__(self, tokens: np.ndarray, *, end_of_text: int, length: int, layout: Layout):
        self._tokens = tokens
        self._end_of_text = end_of_text
        self._length = length
        self._layout = layout

    def __len__(self) -> int:
        return -(-len(self._tokens) // (self._length * self._layout.micro_batch))

    def __iter__(self) -> Iterator[EvalBatch]:
        rows = self._layout.micro_batch // self._layout.world
        per_rank = rows * self._length
        for number in range(len(self)):
            start = number * self._layout.micro_batch * self._length + self._layout.rank * per_rank
            labels = np.asarray(self._tokens[start : start + per_rank], dtype=np.int64)
            inputs = np.full(per_rank, self._end_of_text, dtype=np.int64)
            inputs[1 : len(labels)] = labels[:-1]
            if start and len(labels):
                inputs[0] = self._tokens[start - 1]
            padded = np.full(per_rank, IGNORE, dtype=np.int64)
            padded[: len(labels)] = labels
            yield {
                "input_ids": torch.from_numpy(inputs.reshape(rows, self._length)),
                "labels": torch.from_numpy(padded.reshape(rows, self._length)),
            }
