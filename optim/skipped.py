"""Renewals that went otherwise than they should: told once of each kind, and counted where a subspace stayed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from thinrank.optim.bucket import Bucket
from thinrank.optim.rule import NOT_FINITE, Note, Step

_log = logging.getLogger(__name__)


class Skipped:
    """What an optimizer knows of them. Rules that cannot say without making the host wait leave it on the device."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._held: dict[tuple[str, ...], Tensor] = {}
        self._told: set[tuple[str, str]] = set()

    @property
    def counts(self) -> dict[str, int]:
        """How often a parameter kept its old subspace, by name; the host waits for what lies on the device."""
        self.fetch()
        return self._counts

    def hear(self, bucket: Bucket, active: Sequence[int], step: Step) -> None:
        """Takes what a rule has left in `step` about the parameters at `active`."""
        for note in step.notes or ():
            self._tell(bucket.prefix + bucket.names[active[note.matrix // bucket.view.blocks]], note)
        for which, held in step.held or ():
            host = held.device.type == "cpu"
            if host and not bool(held.any()):
                continue
            names = tuple(bucket.prefix + name for name in bucket.names)
            if names not in self._held:
                self._held[names] = torch.zeros(len(bucket.keys), dtype=torch.int32, device=held.device)
            self._held[names][bucket.places(active, which, held.device)] += held
            if host:
                self.fetch()

    def fetch(self) -> None:
        """Takes from the device which subspaces stayed as they were; the host waits for it."""
        for names, counts in self._held.items():
            for name, count in zip(names, counts.view(len(names), -1).sum(-1).tolist(), strict=True):
                for _ in range(count):
                    self._tell(name, Note(0, NOT_FINITE, skipped=True))
        self._held.clear()

    def _tell(self, name: str, note: Note) -> None:
        if note.skipped:
            self._counts[name] = self._counts.get(name, 0) + 1
        if (name, note.cause) not in self._told:
            self._told.add((name, note.cause))
            instead = "it keeps the subspace that it has" if note.skipped else "subspace iteration took its place"
            _log.warning("renewal of %s: %s; %s (said once)", name, note.cause, instead)
