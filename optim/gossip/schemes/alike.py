"""What exchanges among all ranks have in common: everyone hears everyone, and keeps the same weights to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinrank.optim.gossip.mail import as_bytes, as_floats, to_all
from thinrank.optim.gossip.message import fingerprint
from thinrank.optim.gossip.rounds import Mean, Step
from thinrank.optim.gossip.schemes.base import Scheme


class Alike(Scheme):
    """All ranks exchange with all, whatever graph is given, of which only the number of ranks matters.

    What ranks have in common is the same on all, to the bit, as long as no message is lost. A rank that misses one goes
    on from other weights than the others. With every `check_every`-th step the first rank and each other tell each
    other the fingerprint of what should be the same, a header each way, and who has another takes the first one's.
    """

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who takes part, ascending."""
        return self.place.topology.alive

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(j for j in self.ranks if j != self.place.rank)

    def start(self, weights: Tensor) -> None:
        """Nothing to remember."""

    def introduce(self, weights: Tensor) -> Step:
        """Begins at the mean of all ranks' weights."""
        mean = yield Mean(values=weights)
        self.start(mean)
        return mean

    def gathered(self, payload: Tensor, good: bool) -> Any:
        """Every rank's payload, of one length, this rank's among them; not of those that have left out the step."""
        message = self.mail.seal(self.steps, payload, valid=good)
        expects = dict.fromkeys(self.others, payload.numel())
        letters = yield from self.mail.swap(self.steps, to_all(self.others, message), expects)
        found = {j: letter.payload for j, letter in letters.items() if letter.payload is not None}
        return dict(sorted((found | ({self.place.rank: payload} if good else {})).items()))

    def agreed(self, common: Tensor, weights: Tensor | None = None) -> Any:
        """What should be the same on all, or the first rank's where it is not; looked at when a check is due."""
        if (self.steps + 1) % self.place.check_every or not self.others:
            return common
        first, nothing = self.ranks[0], torch.empty(0, dtype=torch.uint8, device=common.device)
        peers = self.others if self.place.rank == first else (first,)
        mark = fingerprint(common)
        message = self.mail.seal(self.steps, nothing, held=mark)
        expects = dict.fromkeys(peers, 0)
        letters = yield from self.mail.swap(self.steps, to_all(peers, message), expects, weights=weights)
        apart = [j for j, letter in letters.items() if letter.hash != mark]
        leads = self.place.rank == first
        message = self.mail.seal(self.steps, as_bytes(common) if leads else nothing)
        expects = dict.fromkeys(apart, 0 if leads else common.nbytes)
        letters = yield from self.mail.swap(self.steps, to_all(apart, message), expects, weights=weights)
        letter = None if leads else letters.get(first)
        if letter is None or letter.payload is None:
            return common
        self.tally.counts["repaired"] += 1
        return as_floats(letter.payload)
