"""DCD, ECD and CHOCO: differences travel, compressed, and every neighbour keeps a copy that they are added to.

The three differ in what is compressed, how a copy absorbs it, and how copies are mixed. Told once, here, is how copies
stay the same on both ends: a message that its sender leaves out is left out on both; a fingerprint that travels now and
then shows a copy that has missed one, which is then sent whole. What may happen, and what becomes of it:

- A message is lost or damaged: its receiver uses the copy it has, which is right again after the next check. A check
  that is lost is taken for a difference; a question or a copy that is lost is asked for again at the next check.
- Ranks are parted for a while: each side goes on with the copies it has, and the first check afterwards mends them.
- A rank's update is not finite: nothing of it is absorbed anywhere; its weights stay as they are in DCD and ECD, and
  are averaged in CHOCO.
- A rank is late: who hears it waits. Nothing else changes.
- Nothing that can be read comes from a rank for more than `patience` exchanges: `PeerLost` names it. Between processes
  a connection that ends says so at once (`Peers`), and as torch's groups cannot lose a rank, the others end and go on
  from the last checkpoint with fewer ranks. Where messages may be lost, all who are left begin again on a graph without
  it (`Scheme.reform`).
- A rank joins: `Scheme.reform` as well, in which its neighbours give it their weights first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import Codec
from thinrank.optim.gossip.mail import Letter, to_all
from thinrank.optim.gossip.message import fingerprint
from thinrank.optim.gossip.rounds import Step
from thinrank.optim.gossip.schemes.base import Place, Scheme
from thinrank.optim.gossip.topology import Topology


class Copies(Scheme):
    """Keeps what a rank has told of itself (`public`) and the same of each source (`copies`), equal to the bit.

    With every `check_every`-th message goes the fingerprint of `public`. Whoever finds that a copy has another asks for
    it, and gets it whole: two more rounds, of a header for each neighbour, and of what was asked for. Until then the
    copy is used as it is; one that was never had counts as one's own weights.
    """

    STATIC = True

    def __init__(self, place: Place, codec: Codec) -> None:
        super().__init__(place, codec)
        self.copies: dict[int, Tensor] = {}

    @property
    def public(self) -> Tensor:
        return self.copies[self.place.rank]

    def start(self, weights: Tensor) -> None:
        self.copies = {j: weights.clone() for j in (self.place.rank, *self.sources)}

    def introduce(self, weights: Tensor) -> Step:
        self.copies = {self.place.rank: weights.clone()}
        yield from self._whole(self.targets, self.sources, weights)
        return weights

    @classmethod
    def holds(cls, graph: Topology, rank: int, codec: Codec, options: Mapping[str, Any]) -> int:
        copies = len(graph.sources(rank)) + (cls.NAME != "dcd")  # whose public copy is its weights
        return torch.float32.itemsize * codec.numel * copies

    # --- what the methods differ in ---------------------------------------------------------------------------------

    @abstractmethod
    def aim(self, weights: Tensor, update: Tensor) -> tuple[Tensor | None, Tensor]:
        """The new weights, where neither compression nor messages matter to them, and what is to be compressed."""

    @abstractmethod
    def absorbed(self, copy: Tensor, told: Tensor) -> Tensor:
        """The copy after a message. `told` may be used up, `copy` may not be changed."""

    def settled(self, weights: Tensor, new: Tensor | None, told: bool) -> Tensor | None:
        """The new weights once `public` has absorbed what was told, if anything was; None: once messages have come."""
        return new

    def met(self, weights: Tensor, update: Tensor, new: Tensor | None) -> Tensor:
        """The new weights after messages have come: those of `settled`, which a method that gives none makes here."""
        assert new is not None
        return new

    # --- one exchange -----------------------------------------------------------------------------------------------

    def _step(self, weights: Tensor, update: Tensor, good: bool) -> Step:
        new, difference = self.aim(weights, update)
        if good:
            payload = self.codec.encode(difference, self.key())
            told = self.codec.decode(payload, self.key())
            self.tally.error.add(difference, told)
            self.copies[self.place.rank] = self.absorbed(self.public, told)
        else:
            payload = torch.zeros(self.codec.nbytes, dtype=torch.uint8, device=weights.device)
        new = self.settled(weights, new, good)
        due = (self.steps + 1) % self.place.check_every == 0
        message = self.mail.seal(self.steps, payload, valid=good, held=self.public if due else None)
        expects = dict.fromkeys(self.sources, self.codec.nbytes)
        letters = yield from self.mail.swap(self.steps, to_all(self.targets, message), expects, weights=new)
        for j, letter in letters.items():
            if letter.payload is not None and j in self.copies:
                told = self.codec.decode(letter.payload, self.key(rank=j))
                self.copies[j] = self.absorbed(self.copies[j], told)
        if due:
            yield from self._repair(letters, new)
        return self.met(weights, update, new)

    def _repair(self, letters: Mapping[int, Letter], weights: Tensor | None) -> Any:
        bad = [j for j in self.sources if j not in letters or not self._same(j, letters[j].hash)]
        device = self.public.device
        asking = yield from self.mail.ask(self.steps, bad, self.sources, self.targets, weights=weights, device=device)
        self.tally.counts["repaired"] += yield from self._whole(asking, bad, weights)

    def _same(self, j: int, mark: int | None) -> bool:
        return j in self.copies and fingerprint(self.copies[j]) == mark

    def _whole(self, targets: Iterable[int], sources: Iterable[int], weights: Tensor | None) -> Any:
        """Sends `public` to some and takes copies from others; how many have come."""
        got = yield from self.mail.whole(self.steps, self.public, targets, sources, weights=weights)
        self.copies |= got
        return len(got)

    def average(self) -> Tensor:
        """Σⱼ Wᵢⱼ of the copies."""
        return self.mixed(self.public, self.copies)

    # --- memory -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        return {f"copy.{j}": copy for j, copy in sorted(self.copies.items())}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        super().load(state, steps)
        self.copies = {int(name.removeprefix("copy.")): copy for name, copy in state.items()}


class DCD(Copies):
    """DCD-PSGD (Tang, Gan, Zhang, Zhang and Liu 2018, algorithm 1): a rank moves by what it has told, and no further.

    z = Σⱼ Wᵢⱼ xⱼ + u − x,  x ← x + C(z), and so does every copy of x: copies are the neighbours' weights themselves.

    The theorem wants an unbiased C with √(E‖C(z)−z‖²/‖z‖²) < (1−ρ)/(2μ), `Topology.dcd_limit`.
    """

    NAME = "dcd"
    SYMMETRIC = True
    USUAL = "uniform8"

    @classmethod
    def limit(cls, graph: Topology) -> tuple[float, str]:
        return graph.dcd_limit, "the theorem"

    def aim(self, weights: Tensor, update: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, self.average().add_(update).sub_(weights)

    def absorbed(self, copy: Tensor, told: Tensor) -> Tensor:
        return told.add_(copy)

    def settled(self, weights: Tensor, new: Tensor | None, told: bool) -> Tensor:
        return self.public


class ECD(Copies):
    """ECD-PSGD (Tang et al. 2018, algorithm 2): weights move exactly, and copies estimate them from extrapolations.

    At step t = 1, 2, …:  x' = Σⱼ Wᵢⱼ yⱼ + u,  z = (1 − t/2) x + (t/2) x',  yⱼ ← (1 − 2/t) yⱼ + (2/t) C(zⱼ).

    The error of a copy follows e' = (1 − 2/t) e + (2/t)(C(z) − z), and so goes down as 1/t in variance where that of C
    is bounded in itself. A scale for each bucket makes it grow with z instead, which grows with t.

    Args:
        restart: t begins again at 1 after so many steps; ours; None: never, as in the paper.
    """

    NAME = "ecd"
    SYMMETRIC = True
    USUAL = "uniform8"

    def __init__(self, place: Place, codec: Codec, *, restart: int | None = None) -> None:
        super().__init__(place, codec)
        self.restart = restart

    @property
    def time(self) -> int:
        """t of this step."""
        return 1 + (self.steps if self.restart is None else self.steps % self.restart)

    def aim(self, weights: Tensor, update: Tensor) -> tuple[Tensor | None, Tensor]:
        new = self.average().add_(update)
        return new, torch.lerp(weights, new, self.time / 2)

    def absorbed(self, copy: Tensor, told: Tensor) -> Tensor:
        return told.mul_(2 / self.time).add_(copy, alpha=1 - 2 / self.time)

    def settled(self, weights: Tensor, new: Tensor | None, told: bool) -> Tensor | None:
        return new if told else weights


class CHOCO(Copies):
    """CHOCO-SGD (Koloskova, Stich and Jaggi 2019): compression touches how far ranks agree, and never their mean.

    p = x + u,  x̂ ← x̂ + C(p − x̂) on this rank and on its neighbours,  x ← p + γ (Σⱼ Wᵢⱼ x̂ⱼ − x̂ᵢ).

    C may be biased, if it is contractive. With the order `then`, the above, messages must come before the weights are
    known; `with` (the authors' second variant) steps by the copies there are, x ← p + γ (Σⱼ Wᵢⱼ x̂ⱼ − x̂ᵢ), and tells of
    that, so that messages travel while the next gradient is computed.

    Args:
        gamma: γ. 1 suits quantisers of 3 bits and more, 0.5 signs and the largest tenth of entries, 0.05 the largest
            hundredth (`consensus_gamma` finds it).
        order: `then` or `with`.
    """

    NAME = "choco"
    SYMMETRIC = True
    USUAL = "uniform4"

    @classmethod
    def limit(cls, graph: Topology) -> tuple[float, str]:
        return 1.0, "what still brings copies nearer"

    def __init__(self, place: Place, codec: Codec, *, gamma: float = 1.0, order: str = "then") -> None:
        super().__init__(place, codec)
        self.gamma, self.order = gamma, order

    def aim(self, weights: Tensor, update: Tensor) -> tuple[Tensor | None, Tensor]:
        new = self.met(weights, update, None) if self.order == "with" else None
        return new, (weights + update if new is None else new) - self.public

    def absorbed(self, copy: Tensor, told: Tensor) -> Tensor:
        return told.add_(copy)

    def met(self, weights: Tensor, update: Tensor, new: Tensor | None) -> Tensor:
        if new is not None:
            return new
        return self.average().sub_(self.public).mul_(self.gamma).add_(weights).add_(update)
