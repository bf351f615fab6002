"""Tokens to rows: an endless stream cut at every `length` tokens, and the order in which its rows are visited.

The training tokens, repeated pass after pass, form one endless stream. Row `i` has the stream's tokens
`[i * length, (i + 1) * length)` as inputs and, one further, `[i * length + 1, (i + 1) * length + 1)` as labels. So in
every pass each token is exactly once an input and exactly once a label, no row is padded, and the tokens after a pass's
last full row are not dropped: their row goes on with the next pass. The last token of a pass (an end of text) has the
first token of the next as its label, as any end of text has the first token of the next document.

An epoch is the rows that begin within one pass. They are visited in an order drawn from `(seed, epoch)`. Sample number
`i` of a run is thus a pure function of `i`; the number of processes and the batch size do not enter.
"""

from __future__ import annotations

import numpy as np


class EpochOrder:
    """Which row of the endless stream is the `i`-th sample of a run.

    Args:
        tokens: Tokens in a pass, at least `length`.
        length: Tokens in a row.
        seed: Seed of the order, at least 0.
    """

    def __init__(self, tokens: int, length: int, seed: int):
        if tokens < length:
            raise ValueError(f"a pass must have at least one row of {length} tokens, got {tokens}")
        self.tokens = tokens
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def epoch_of(self, sample: int) -> int:
        """The epoch that a sample belongs to; epochs count from 0."""
        return sample * self.length // self.tokens

    def first(self, epoch: int) -> int:
        """The first sample of an epoch, which is also its first row of the stream."""
        return -(-epoch * self.tokens // self.length)

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in the order of their visit, counted from the epoch's first row: int64 (rows,)."""
        if epoch != self._epoch:
            rows = self.first(epoch + 1) - self.first(epoch)
            # NumPy promises that the raw numbers of a bit generator never change between releases, unlike those of
            # Generator.permutation; so a run resumes with the same order under another NumPy.
            keys = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(rows)
            self._order = np.argsort(keys, kind="stable")
            self._epoch = epoch
        return self._order

    def rows(self, start: int, count: int) -> np.ndarray:
        """Rows of the samples `start` to `start + count - 1`: int64 (count,)."""
        rows = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch = self.epoch_of(start + done)
            first, end = self.first(epoch), self.first(epoch + 1)
            take = min(count - done, end - start - done)
            rows[done : done + take] = first + self.order(epoch)[start + done - first :][:take]
            done += take
        return rows


def windows(tokens: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
    """Rows of the endless repetition of `tokens`, each with the token after it: int64 (rows, length + 1)."""
    # Row numbers repeat their tokens after len(tokens) rows; the small number keeps the product far from overflow.
    places = (rows % len(tokens))[:, None] * length + np.arange(length + 1)
    return tokens[places % len(tokens)].astype(np.int64)


def token_type(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds the ids below `vocab_size`: uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
