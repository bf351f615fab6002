"""PowerGossip: neighbours exchange the leading part of what they differ in, of low rank (Vogels et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import Codec, key_of
from thinrank.optim.gossip.compress.base import generator_of
from thinrank.optim.gossip.compress.cast import Float32Codec
from thinrank.optim.gossip.mail import as_bytes, as_floats
from thinrank.optim.gossip.message import fingerprint
from thinrank.optim.gossip.rounds import Step
from thinrank.optim.gossip.schemes.base import Place, require_whole
from thinrank.optim.gossip.schemes.plain import DPSGD

Bases = tuple[list[Tensor], list[Tensor]]
"""Of one edge: p (m, r) of each matrix, and q (k, r) of each."""


class PowerGossip(DPSGD):
    """PowerGossip (Vogels, Karimireddy and Jaggi 2020): a power iteration on the difference of two ranks' weights.

    Every edge (a, b), a < b, has a p (m, r) and a q (k, r) for each matrix X (m, k), the same on both ends to the bit:

        p ← orthonormal(p),  each end sends Xᵀ p,  q ← X_bᵀ p − X_aᵀ p,  X_a ← X_a + W_ab p qᵀ,  X_b ← X_b − W_ab p qᵀ

    and at the edge's next turn with p and q the other way round. Iterations go on from step to step, and so find the
    leading r directions of what the two differ in; what all ranks have in mean stays. All messages of a step are of the
    same X. There is no γ to choose.

    Tensors of two dimensions and more are matrices of (first dimension, all others). Those with a dimension of r at
    most, and vectors, are averaged as they are, in the same message.

    Ours is what makes lost messages harmless. An end that has not heard the other cannot renew its q, and would from
    then on project on another basis than the other end, whose difference would be of the size of the weights. Each
    message therefore tells the fingerprint of the basis that it was made with. Where the two differ, matrices are left
    as they are, and p and q begin anew from (seed, a, b, step): on both ends at the first step in which both messages
    arrive, and by the same numbers. A message lost one way takes from the mean what the other way has brought, as in
    any averaging.

    Both ends must compute on processors of one kind: orthonormal bases of others differ in their last bits, and then
    begin anew at each step (`tally.counts["repaired"]`).

    Args:
        rank: r. A step sends r (m + k) / 2 numbers of a matrix to each neighbour, on average.
        order: of averaging and update, as of D-PSGD.
    """

    NAME = "powergossip"
    SYMMETRIC = True
    LINEAR = True

    def __init__(self, place: Place, codec: Codec, *, rank: int = 4, order: str = "with") -> None:
        super().__init__(place, codec, order=order)
        require_whole("rank", rank, 1, "use 1 to 8")
        if not isinstance(codec, Float32Codec):
            raise ValueError("powergossip sends products of few columns in float32: leave the compressor out")
        self.rank = rank
        self.sizes = [math.prod(shape) for shape in codec.shapes]
        rows = [shape[0] if len(shape) > 1 else 1 for shape in codec.shapes]
        sides = [(m, size // max(m, 1)) for m, size in zip(rows, self.sizes, strict=True)]
        self.matrices = {t: shape for t, shape in enumerate(sides) if rank < min(shape)}
        self.edges: dict[int, Bases] = {}  # by the neighbour

    def start(self, weights: Tensor) -> None:
        super().start(weights)
        graph, own = self.place.topology, self.place.rank
        met = {j for t in range(len(graph.rounds)) for j in graph.sources(own, t)}
        self.edges = {j: self._seeded(j, 0, weights.device) for j in sorted(met)}

    def introduce(self, weights: Tensor) -> Step:
        self.start(weights)
        return (yield from super().introduce(weights))

    def _seeded(self, j: int, step: int, device: torch.device) -> Bases:
        low, high = sorted((self.place.rank, j))
        generator = generator_of(key_of(self.place.seed, low, step, high), torch.device("cpu"))

        def drawn(side: int) -> list[Tensor]:
            rows = [shape[side] for shape in self.matrices.values()]
            return [torch.randn(n, self.rank, generator=generator).to(device) for n in rows]

        return drawn(0), drawn(1)

    # --- one exchange -----------------------------------------------------------------------------------------------

    def _average(self, own: Tensor, weights: Tensor | None) -> Step:
        turn = self.steps // len(self.place.topology.rounds) % 2  # all edges of a schedule have had their turn as often
        plain, matrices = self._parts(own, turn)
        sends: dict[int, Tensor] = {}
        told: dict[int, list[Tensor]] = {}
        marks: dict[int, int] = {}
        for j in self.sources:
            bases = self.edges[j][turn]
            bases[:] = [torch.linalg.qr(basis.double()).Q.float() for basis in bases]
            told[j] = plain + [matrix.mT @ basis for matrix, basis in zip(matrices, bases, strict=True)]
            marks[j] = fingerprint(_joined(bases))
            sends[j] = self.mail.seal(self.steps, as_bytes(_joined(told[j])), held=marks[j])
        expects = {j: sum(part.nbytes for part in parts) for j, parts in told.items()}
        letters = yield from self.mail.swap(self.steps, sends, expects, weights=weights)
        new = own.clone()
        for j, letter in letters.items():
            assert letter.payload is not None, "a rank always has weights to send"
            theirs = as_floats(letter.payload).split([part.numel() for part in told[j]])
            pairs = [(a.view_as(b), b) for a, b in zip(theirs, told[j], strict=True)]
            # of the higher rank less the lower one, on both ends: a zero must have the same sign, too
            differences = [a - b if j > self.place.rank else b - a for a, b in pairs]
            self._move(j, self._parts(new, turn), differences, turn, agreed=letter.hash == marks[j])
        return new

    def _move(
        self, j: int, parts: tuple[list[Tensor], list[Tensor]], differences: list[Tensor], turn: int, *, agreed: bool
    ) -> None:
        """Brings this rank's parts nearer to those of j; `differences` are of what the edge's ends have told."""
        weight = float(self.place.topology.weights(self.steps)[self.place.rank, j])
        weight = weight if j > self.place.rank else -weight
        plain, matrices = parts
        for part, difference in zip(plain, differences, strict=False):
            part.add_(difference, alpha=weight)
        if not agreed:
            self.edges[j] = self._seeded(j, self.steps + 1, matrices[0].device)
            self.tally.counts["repaired"] += 1
            return
        bases, others = self.edges[j][turn], self.edges[j][1 - turn]
        for t, (matrix, difference) in enumerate(zip(matrices, differences[len(plain) :], strict=True)):
            matrix.addmm_(bases[t], difference.mT, alpha=weight)
            others[t] = difference

    def _parts(self, flat: Tensor, turn: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views: what is averaged as it is, and matrices, turned so that the basis of this turn is of their rows."""
        parts = flat.split(self.sizes)
        matrices = [parts[t].view(shape) for t, shape in self.matrices.items()]
        plain = [part for t, part in enumerate(parts) if t not in self.matrices]
        return plain, [matrix.mT for matrix in matrices] if turn else matrices

    # --- memory -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        bases = {f"{'pq'[side]}.{j}": _joined(pair[side]) for j, pair in self.edges.items() for side in (0, 1)}
        return super().state() | bases

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        super().load(state, steps)
        self.edges = {
            int(name[2:]): (self._split(state, name, 0), self._split(state, name, 1))
            for name in state
            if name.startswith("p.")
        }

    def _split(self, state: Mapping[str, Tensor], name: str, side: int) -> list[Tensor]:
        flat = state["pq"[side] + name[1:]]
        parts = flat.split([shape[side] * self.rank for shape in self.matrices.values()])
        return [part.view(-1, self.rank) for part in parts]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0)
