"""Rows of tokens from a dataset that is read while training, with a position that can be saved and taken up again.

Documents are read in blocks, optionally shuffled within their block, tokenized a few at a time, and packed as one
endless stream: row after row of `length` tokens with labels one further, no token lost or repeated, the next pass after
the last document. The state is where the block began in the dataset, how much of it has been tokenized, and the tokens
left over: small, exact, and the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from thinrank.trainers.data.batches import Layout, TrainBatches
from thinrank.trainers.errors import UserError

CHUNK_DOCUMENTS = 32


class TokenStream:
    """An endless, resumable stream of token rows.

    Args:
        open_pass: Begins a pass over the dataset: an iterable of rows with `state_dict` and `load_state_dict`.
        text_of: The text of a row; None leaves the row out.
        encode: Token ids of some texts, each with its end-of-text token.
        length: Tokens in a row.
        shuffle: Documents in a block that is shuffled; 0 keeps the order.
        seed: Seed of the shuffling, at least 0.
    """

    def __init__(
        self,
        open_pass: Callable[[], Any],
        text_of: Callable[[dict[str, Any]], str | None],
        encode: Callable[[list[str]], list[np.ndarray]],
        *,
        length: int,
        shuffle: int = 0,
        seed: int = 0,
    ):
        self._open_pass = open_pass
        self._text_of = text_of
        self._encode = encode
        self._length = length
        self._block_documents = shuffle or CHUNK_DOCUMENTS
        self._shuffle = shuffle > 0
        self._seed = seed
        self._epoch, self._block = 0, -1
        self._begin_pass(None)
        self._texts: list[str] = []
        self._encoded = 0  # documents of the block that are in the buffer, or were before it
        self._chunk_start = 0
        self._carry = np.empty(0, dtype=np.int64)
        self._buffer = self._carry
        self._offset = 0

    def rows(self, count: int) -> np.ndarray:
        """The next rows, each with the token after it: int64 (count, length + 1)."""
        rows = np.empty((count, self._length + 1), dtype=np.int64)
        for row in rows:
            while len(self._buffer) - self._offset <= self._length:
                self._extend()
            row[:] = self._buffer[self._offset :][: self._length + 1]
            self._offset += self._length
        return rows

    def state(self) -> dict[str, Any]:
        """The position, cheap to take after every batch."""
        return {
            "epoch": self._epoch,
            "block": self._block,
            "dataset": self._block_state,
            "chunk_start": self._chunk_start,
            "carry": self._carry,
            "offset": self._offset,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to a position; the rows that follow are those that followed it."""
        begun = state["block"] >= 0  # before the first row no block has been read
        self._epoch, self._block = state["epoch"], state["block"] - begun
        self._begin_pass(state["dataset"])
        self._carry = self._buffer = np.asarray(state["carry"], dtype=np.int64)
        self._offset = 0
        self._texts, self._encoded, self._chunk_start = [], 0, 0
        if begun:
            self._read_block()
            self._encoded = state["chunk_start"]
            self._encode_chunk(self._carry)
        self._offset = state["offset"]

    def _begin_pass(self, state: dict[str, Any] | None) -> None:
        self._dataset = self._open_pass()
        if state is not None:
            self._dataset.load_state_dict(state)
        self._iterator = iter(self._dataset)
        self._next_state = state
        self._block_state = state
        self._fruitful = state is not None

    def _extend(self) -> None:
        """Puts the next few documents behind the tokens that are left."""
        left = self._buffer[self._offset :].copy()
        while self._encoded >= len(self._texts):
            self._read_block()
        self._encode_chunk(left)
        self._offset = 0

    def _encode_chunk(self, carry: np.ndarray) -> None:
        self._chunk_start = self._encoded
        texts = self._texts[self._encoded : self._encoded + CHUNK_DOCUMENTS]
        self._encoded += len(texts)
        self._carry = carry
        self._buffer = np.concatenate([carry, *self._encode(texts)])

    def _read_block(self) -> None:
        """Reads the next block of texts, from the next pass where this one has ended."""
        texts = list(self._take(self._block_documents))
        if not texts:
            if not self._fruitful:
                raise UserError(
                    "the dataset has no document to train on; correct data.path, data.split or data.data_files"
                )
            self._epoch, self._block = self._epoch + 1, -1
            self._begin_pass(None)
            texts = list(self._take(self._block_documents))
            if not texts:
                raise UserError("the dataset has no document any more; it was changed while it was read")
        self._fruitful = True
        self._block += 1
        if self._shuffle:
            # A key of its own for each block makes the order a pure function of the place in the stream.
            key = np.array([self._seed, self._epoch << 40 | self._block], dtype=np.uint64)
            order = np.argsort(np.random.Philox(key=key).random_raw(len(texts)), kind="stable")
            texts = [texts[index] for index in order]
        self._texts, self._encoded = texts, 0

    def _take(self, count: int) -> Iterator[str]:
        self._block_state = self._next_state
        taken = 0
        while taken < count:
            row = next(self._iterator, None)
            if row is None:
                break
            text = self._text_of(row)
            if text is not None:
                taken += 1
                yield text
        self._next_state = self._dataset.state_dict()


class StreamPositions:
    """States of a stream at the ends of recent batches, since a loader reads ahead of what training has consumed.

    Args:
        keep: How many positions are remembered beside the one that training is at.
    """

    def __init__(self, keep: int = 1024):
        self._keep = keep
        self._states: dict[int, dict[str, Any]] = {}

    def put(self, position: int, state: dict[str, Any], consumed: int) -> None:
        """Remembers a state; drops the oldest ones that are not `consumed` where there are too many."""
        self._states[position] = state
        while len(self._states) > self._keep:
            del self._states[min(key for key in self._states if key != consumed)]

    def forget_before(self, position: int) -> None:
        """Drops the states that no checkpoint will need."""
        self._states = {key: state for key, state in self._states.items() if key >= position}

    def at(self, position: int) -> dict[str, Any]:
        """The state at the end of a batch.

        Raises:
            ValueError: No batch that was read ends there.
        """
        if position not in self._states:
            raise ValueError(
                f"position must be that of a batch which was read from this stream, got {position}; "
                "pass the batch's own position to advance()"
            )
        return self._states[position]

    def portable(self, position: int) -> dict[str, Any]:
        """The state at a position in plain numbers, strings and lists, for a checkpoint."""
        state = self.at(position)
        return {**state, "carry": [int(token) for token in state["carry"]]}


class StreamBatches(TrainBatches):
    """This rank's batches of a stream. Every process reads and tokenizes the whole stream and keeps its rows of it.

    Args:
        layout: Which rows are this rank's.
        consumed: Where training is.
        new_stream: A stream at its beginning.
        positions: Where the states at the batches' ends are kept.
        past: Where training goes on at a position.
    """

    def __init__(
        self,
        layout: Layout,
        consumed: Callable[[], int],
        new_stream: Callable[[], TokenStream],
        positions: StreamPositions,
        past: Callable[[int], int] = int,
    ):
        def start() -> int:
            self._stream = new_stream()
            if consumed():
                self._stream.load(positions.at(consumed()))
            self._at = consumed()
            return consumed()

        def rows(first: int, count: int, part: slice) -> np.ndarray:
            while self._at < first:  # samples that are left out must be read to come to those after them
                self._at += len(self._stream.rows(min(count, first - self._at)))
            taken = self._stream.rows(count)
            self._at += count
            positions.put(first + count, self._stream.state(), consumed())
            return taken[part]

        self._stream: TokenStream
        self._at: int
        super().__init__(layout, start, rows, past)
