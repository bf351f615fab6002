"""All-reduce of compressed updates: what decentralised exchange is to be compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import Codec
from thinrank.optim.gossip.compress.cast import Float32Codec
from thinrank.optim.gossip.mail import to_all
from thinrank.optim.gossip.rounds import Mean, Step
from thinrank.optim.gossip.schemes.alike import Alike
from thinrank.optim.gossip.schemes.base import Place


class Averaging(Alike):
    """Has the mean over all ranks, exact with `float32`, else by pieces that are compressed twice.

    A vector is cut into as many pieces as there are ranks. Everyone sends each rank its piece, compressed, and that
    rank the mean of what came, in float32 and then compressed again, back to all: 2 (n − 1) / n of the compressed
    vector in all, as of an all-reduce in a ring. All ranks decode the same n messages, and so have the same mean to the
    bit. Nothing is remembered of what compression loses: a compressor should be unbiased.
    """

    def __init__(self, place: Place, codec: Codec) -> None:
        super().__init__(place, codec)
        self.exact = isinstance(codec, Float32Codec)
        self._pieces: dict[int, Codec] = {}

    def piece(self, numel: int) -> Codec:
        """Of one rank's piece of a vector."""
        if numel not in self._pieces:
            self._pieces[numel] = self.place.compressor.bind([(-(-numel // len(self.ranks)),)])
        return self._pieces[numel]

    def mean(self, values: Tensor, good: bool, weights: Tensor | None = None) -> Any:
        """Over the ranks whose `values` are good, which all ranks find alike; zeros where there are none."""
        if not self.exact:
            return (yield from self._in_pieces(values, good, weights))
        own = values if good else torch.zeros_like(values)
        mean = yield Mean(values=torch.cat([own, own.new_full((1,), float(good))]), weights=weights)
        return mean[:-1].div_(mean[-1].clamp(min=0.5 / len(self.ranks)))

    def _in_pieces(self, values: Tensor, good: bool, weights: Tensor | None) -> Any:
        codec, ranks, own = self.piece(values.numel()), self.ranks, self.place.rank
        filled = torch.nn.functional.pad(values, (0, len(ranks) * codec.numel - values.numel()))
        pieces = dict(zip(ranks, filled.split(codec.numel), strict=True)) if codec.numel else {}
        if not pieces:
            return values
        told = {j: codec.encode(piece, self.key(j)) for j, piece in pieces.items()}
        sends = {j: self.mail.seal(self.steps, told[j], valid=good) for j in self.others}
        expects = dict.fromkeys(self.others, codec.nbytes)
        letters = yield from self.mail.swap(self.steps, sends, expects, weights=weights)
        came = {j: letter.payload for j, letter in letters.items()} | ({own: told[own]} if good else {})
        found = [codec.decode(part, self.key(own, j)) for j, part in sorted(came.items()) if part is not None]
        mean = torch.stack(found).mean(0) if found else torch.zeros_like(pieces[own])

        result = codec.encode(mean, self.key(len(ranks) + own))
        message = self.mail.seal(self.steps, result, valid=bool(found))
        letters = yield from self.mail.swap(self.steps, to_all(self.others, message), expects, weights=weights)
        means = {j: letter.payload for j, letter in letters.items()} | ({own: result} if found else {})
        for j, piece in pieces.items():
            part = means.get(j)
            piece.zero_() if part is None else piece.copy_(codec.decode(part, self.key(len(ranks) + j, j)))
        self.tally.error.add(mean, pieces[own])
        return filled[: values.numel()]


class AllReduce(Averaging):
    """x ← x + mean of u, over all ranks: what averaging gradients is to plain SGD; of other optimizers the updates.

    Weights stay equal on all ranks. With `float32` this is the exact mean; with another compressor see `Averaging`. The
    honest baseline: an 8-bit ring of neighbours sends 2 bytes for each weight, and this 1.75 among 8 ranks.

    An update that is not finite is left out of the mean on all ranks.
    """

    NAME = "allreduce"

    def _step(self, weights: Tensor, update: Tensor, good: bool) -> Step:
        mean = yield from self.mean(update, good)
        new = weights + mean
        return new if self.exact else (yield from self.agreed(new))
