"""One rank's messages: what is put around a payload, and what is made of one that came, or did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.gossip.message import HEADER_BYTES, BadMessage, Header, fingerprint, pack, unpack
from thinrank.optim.gossip.mixing import listed
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


FLOAT = torch.float32.itemsize

SAID = 3
"""How often a question is said in its message: one flipped bit, or a burst of them, leaves one that can be read."""


class Mail:
    """Sends and opens; knows who has been silent.

    Silence is counted in exchanges: of several rounds in one exchange any message will do that can be read. One that
    can not is none, so that ranks which have fallen out of step, or a link that spoils everything, do not go unnoticed.

    Args:
        rank: whose it is.
        patience: exchanges in a row without a message from a rank that are borne; one more, and it is lost.
        compressor: the number of what payloads are made by (`identity_of`).
        numel: entries of what they stand for.
    """

    def __init__(self, rank: int, patience: int, compressor: int, numel: int) -> None:
        self.rank, self.patience, self.compressor, self.numel = rank, patience, compressor, numel
        self.counts: Counter[str] = Counter()
        self.silent: Counter[int] = Counter()
        self._heard: dict[int, int] = {}
        self._missed: dict[int, int] = {}  # the last exchange in which somebody was heard, or missed

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
        came = yield from self._swap(step, sends, expects, weights)
        letters = {j: letter for j, (letter,) in came.items() if letter is not None}
        self.counts["skipped"] += sum(letter.payload is None for letter in letters.values())
        return letters

    def ask(
        self,
        step: int,
        wanted: Collection[int],
        sources: Iterable[int],
        targets: Iterable[int],
        *,
        weights: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Generator[Swap, Any, list[int]]:
        """Tells each source whether this rank wants a copy of it, and hears who of the targets wants one of this rank.

        Both ends must know alike whether a copy will travel, or one would wait for what nobody sends. Where messages
        arrive always they do: what is asked is said three times, and if none can be read, which takes more than one
        fault, this ends with an error instead. Where they may be lost, nobody waits for ever, and a question that is
        lost is asked again at the next check.

        Raises:
            PeerLost: a neighbour was silent for too long, or it cannot be read what it wants.
        """
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        sends = {j: self.seal(step, nothing, wants=j in wanted).repeat(SAID) for j in sources}
        came = yield from self._swap(step, sends, dict.fromkeys(targets, 0), weights, SAID)
        asking: list[int] = []
        for j, said in came.items():
            read = [letter for letter in said if letter is not None]
            if not read:
                raise PeerLost(
                    f"rank {self.rank} cannot read whether rank {j} waits for a copy of its weights, so that the two "
                    "would fall out of step: test the link and the memory of both, and go on from the last checkpoint",
                    (j,),
                )
            if read[0].wants:
                asking.append(j)
        return asking

    def whole(
        self,
        step: int,
        own: Tensor | None,
        targets: Iterable[int],
        sources: Iterable[int],
        *,
        weights: Tensor | None = None,
    ) -> Generator[Swap, Any, dict[int, Tensor]]:
        """Sends a vector as it is (None: to nobody), and takes such vectors from others; those that have come."""
        sends = {} if own is None else to_all(targets, self.seal(step, as_bytes(own)))
        letters = yield from self.swap(step, sends, dict.fromkeys(sources, FLOAT * self.numel), weights=weights)
        return {j: as_floats(letter.payload) for j, letter in letters.items() if letter.payload is not None}

    def forgive(self) -> None:
        """Begins anew to count who is silent, as after a change of neighbours."""
        self.silent.clear()
        self._heard.clear()
        self._missed.clear()

    def _swap(
        self, step: int, sends: Mapping[int, Tensor], sizes: Mapping[int, int], weights: Tensor | None, parts: int = 1
    ) -> Generator[Swap, Any, dict[int, list[Letter | None]]]:
        """One round of messages in some parts; those of each that came, None where unreadable, in the ranks' order."""
        expects = {j: parts * (HEADER_BYTES + size) for j, size in sizes.items()}
        came: Came = yield Swap(sends=sends, expects=expects, weights=weights)
        found: dict[int, list[Letter | None]] = {}
        for j in sorted(sizes):
            message = came.get(j)
            if message is not None:
                found[j] = [self._open(j, step, part, sizes[j]) for part in message.chunk(parts)]
            read = [letter is not None for letter in found.get(j, ())]
            self.counts["lost"] += message is None
            self.counts["corrupt"] += not all(read)
            if any(read):
                self._heard[j], self.silent[j] = step, 0
            elif step not in (self._heard.get(j), self._missed.get(j)):
                self._missed[j] = step
                self.silent[j] += 1
        gone = tuple(j for j in sorted(sizes) if self.silent[j] > self.patience)
        if gone:
            raise PeerLost(
                f"rank {self.rank} has heard nothing that can be read of {listed(gone)} for {self.patience + 1} "
                "exchanges: go on from the last checkpoint without, or reform the graph where messages may be lost",
                gone,
            )
        return found

    def _open(self, source: int, step: int, message: Tensor, size: int) -> Letter | None:
        try:
            header, payload = unpack(
                message, nbytes=size, codec=self.compressor, step=step, source=source, numel=self.numel
            )
        except BadMessage:
            return None
        return Letter(payload if header.valid else None, header.replica, header.wants_repair)


def as_bytes(values: Tensor) -> Tensor:
    """float32 as they lie in memory."""
    return values.contiguous().view(torch.uint8)


def as_floats(payload: Tensor) -> Tensor:
    return payload.clone().view(torch.float32)


def to_all(ranks: Iterable[int], message: Tensor) -> dict[int, Tensor]:
    return dict.fromkeys(ranks, message)
