"""One rank's messages: what is put around a payload, and what is made of one that came, or did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.gossip.message import HEADER_BYTES, BadMessage, Header, fingerprint, pack, unpack
from thinrank.optim.gossip.rounds import Came, PeerLost, Swap


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that has come whole.

    Attributes:
        payload: uint8; None where its sender has left out the step.
        hash: fingerprint of what its sender holds of itself, where it was told.
        wants: whether its sender asks for a whole copy.
    """

    payload: Tensor | None
    hash: int | None
    wants: bool


class Mail:
    """Sends and opens; knows who has been silent.

    Args:
        rank: whose it is.
        patience: rounds in a row without anything from a rank after which it is lost.
        compressor: the number of what payloads are made by (`identity_of`).
        numel: entries of what they stand for.
    """

    def __init__(self, rank: int, patience: int, compressor: int, numel: int) -> None:
        self.rank, self.patience, self.compressor, self.numel = rank, patience, compressor, numel
        self.counts: Counter[str] = Counter()
        self.silent: Counter[int] = Counter()

    def seal(
        self, step: int, payload: Tensor, *, valid: bool = True, held: Tensor | int | None = None, wants: bool = False
    ) -> Tensor:
        """A message of `payload`, and of the fingerprint of what is `held`, or that itself."""
        mark = fingerprint(held) if isinstance(held, Tensor) else held
        header = Header(
            codec=self.compressor,
            step=step,
            part=0,
            source=self.rank,
            numel=self.numel,
            valid=valid,
            wants_repair=wants,
            replica=mark,
        )
        return pack(header, payload)

    def swap(
        self,
        step: int,
        sends: Mapping[int, Tensor],
        expects: Mapping[int, int],
        *,
        weights: Tensor | None = None,
    ) -> Generator[Swap, Any, dict[int, Letter]]:
        """One round; of what came, what can be read, by its sender. `expects` are bytes of payloads.

        Raises:
            PeerLost: a neighbour was silent for too long.
        """
        sizes = {j: HEADER_BYTES + size for j, size in expects.items()}
        came: Came = yield Swap(sends=sends, expects=sizes, weights=weights)
        opened = {j: self._open(j, step, came.get(j), expects[j]) for j in sorted(expects)}
        return {j: letter for j, letter in opened.items() if letter is not None}

    def _open(self, source: int, step: int, message: Tensor | None, size: int) -> Letter | None:
        if message is None:
            self.counts["lost"] += 1
            self.silent[source] += 1
            if self.silent[source] > self.patience:
                raise PeerLost(
                    f"rank {source} has not been heard of by rank {self.rank} in {self.silent[source]} exchanges: "
                    "go on from the last checkpoint without it",
                    (source,),
                )
            return None
        try:
            header, payload = unpack(
                message, nbytes=size, codec=self.compressor, step=step, source=source, numel=self.numel
            )
        except BadMessage:
            self.counts["corrupt"] += 1
            return None
        self.silent[source] = 0
        self.counts["skipped"] += not header.valid
        return Letter(payload if header.valid else None, header.replica, header.wants_repair)


def as_bytes(values: Tensor) -> Tensor:
    """float32 as they lie in memory."""
    return values.contiguous().view(torch.uint8)


def as_floats(payload: Tensor) -> Tensor:
    return payload.clone().view(torch.float32)


def to_all(ranks: Iterable[int], message: Tensor) -> dict[int, Tensor]:
    return dict.fromkeys(ranks, message)
