"""A topology as what it does: a matrix of weights, or a schedule of them, and what the theory reads from it.

Everything is measured on the space where the ranks' vectors differ from their mean. There a doubly stochastic W acts as
W - J, J = (1/n)11ᵀ, whose spectral norm is the second singular value of W, and for a symmetric W the largest |λ| but
for the 1: one formula for both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

SLACK = 1e-12
"""How far a sum of weights may be from 1, and symmetric weights from symmetry: some thousand float64 roundings. A mean
that drifts by as much a step has moved by a millionth after a million of them."""

MIXES = 1e-9
"""The least 1 - |λ| that counts as connected: a ring of fifty thousand ranks has five times as much."""

GRID = 2.0**40
"""A digest reads weights in steps of 1 / GRID: a sum's last bit may differ between processors, its 40th does not."""


def centred_norm(weights: Tensor) -> float:
    """The second singular value of a doubly stochastic matrix (n, n): by how much it shrinks a disagreement at worst.

    0 where only rounding is left, so that exact averaging is known as such.
    """
    n = len(weights)
    norm = float(torch.linalg.matrix_norm(weights - 1.0 / n, ord=2))
    return norm if norm > 8 * n * torch.finfo(weights.dtype).eps else 0.0


def absorbed(weights: Tensor, gone: list[int]) -> Tensor:
    """Symmetric weights (n, n) without the ranks `gone`: what a rank would have given to one of them it keeps."""
    weights = weights.clone()
    lost = weights[:, gone].sum(1)
    weights[:, gone] = 0.0
    weights[gone] = 0.0
    weights.diagonal().add_(lost)
    weights[gone, gone] = 1.0
    return weights


def bridged(weights: Tensor, gone: list[int]) -> Tensor:
    """Any doubly stochastic weights (n, n) without the ranks `gone`, whose receivers hear their senders instead.

    The stochastic complement W_aa + W_ag (I - W_gg)⁻¹ W_ga (Meyer 1989): what went through a lost rank now skips it.
    Rows and columns still sum to 1, where a rank that kept a lost sender's weight would let the mean drift, since what
    it gets and what it gives differ. Used here against the loss of a rank: ours.
    """
    alive = [rank for rank in range(len(weights)) if rank not in set(gone)]
    through = torch.eye(len(gone), dtype=weights.dtype) - weights[gone][:, gone]
    # pinv, because ranks that are gone and had talked in this round to each other alone make it singular; nothing of
    # theirs reaches the others, so that what the inverse would be there is not read
    detour = weights[alive][:, gone] @ torch.linalg.pinv(through, rtol=1e-12) @ weights[gone][:, alive]
    kept = weights[alive][:, alive] + torch.where(detour > SLACK, detour, 0.0)
    result = torch.eye(len(weights), dtype=weights.dtype)
    result[torch.tensor(alive)[:, None], torch.tensor(alive)] = kept
    return result


def listed(ranks: Collection[int]) -> str:
    """As `rank 3` or `ranks 1, 2, 5`, of many the first eight."""
    ranks = sorted(ranks)
    names = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


@dataclass(frozen=True, eq=False)
class Topology:
    """Who averages with whom: weights W (n, n), float64 on the CPU, rows are receivers, x_i <- sum_j W_ij x_j.

    Every row and every column sums to 1, so that averaging keeps the mean, and the schedule as a whole connects all
    ranks; what does not is refused with a `ValueError`. Two topologies are compared by `digest()`.

    Args:
        name: what errors and reports call it.
        rounds: one W for a static graph, or a schedule: round t uses `rounds[t % len(rounds)]`. Copied; not to be
            written to.
        gone: ranks that no longer take part, whose rows and columns are those of the identity; `without` sets it. With
            some gone, the others need not be connected (`require_connected` asks).
    """

    name: str
    rounds: tuple[Tensor, ...] = field(repr=False)
    gone: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.rounds):
            raise ValueError(f"{self.name}: a topology needs at least one round of weights, got none")
        rounds = tuple(w.detach().to("cpu", torch.float64, copy=True) for w in self.rounds)
        object.__setattr__(self, "rounds", rounds)
        object.__setattr__(self, "gone", tuple(sorted(set(self.gone))))
        for t, weights in enumerate(rounds):
            self._check(weights, f"{self.name}, round {t}")
            if float((weights - weights.mT).abs().max()) <= SLACK:
                weights.copy_((weights + weights.mT) / 2.0)  # so that symmetric means exactly so
        if not self.gone:
            self.require_connected()

    def _check(self, weights: Tensor, where: str) -> None:
        """Refuses what is no doubly stochastic matrix of this topology's size."""
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not len(weights):
            shape = tuple(weights.shape)
            raise ValueError(f"{where}: weights must be a square matrix, a row and a column for each rank, got {shape}")
        n = len(self.rounds[0])
        if len(weights) != n:
            raise ValueError(f"{where}: all rounds must have as many ranks as the first, {n}, got {len(weights)}")
        for rule, bad in (("finite", ~torch.isfinite(weights)), ("at least 0", weights < 0)):
            if bad.any():
                i, j = bad.nonzero()[0].tolist()
                value = f"{float(weights[i, j]):g} for what rank {i} hears from rank {j}"
                raise ValueError(f"{where}: weights must be {rule}, got {value}: use 0 where nothing is sent")
        keep = "its own weight must be what the others leave of 1, in float64"
        give = "a rank must give as much as it gets, or the mean drifts, which from_edges sees to"
        for dim, kind, remedy in ((1, "row", keep), (0, "column", give)):
            sums = weights.sum(dim)
            for rank in ((sums - 1.0).abs() > SLACK).nonzero().flatten().tolist():
                value = f"{float(sums[rank]):.13g} in {kind} {rank}"
                raise ValueError(f"{where}: each {kind} of weights must sum to 1, got {value}: {remedy}")
        for rank in self.gone:
            if not 0 <= rank < n or weights[rank, rank] != 1.0:
                raise ValueError(f"{where}: a rank that is gone must have the weight 1 for itself, rank {rank} has not")

    @property
    def size(self) -> int:
        """How many ranks there are, those that are gone among them."""
        return len(self.rounds[0])

    @property
    def alive(self) -> tuple[int, ...]:
        """The ranks that take part, ascending."""
        return tuple(rank for rank in range(self.size) if rank not in self.gone)

    @property
    def static(self) -> bool:
        """Whether every round is the same one."""
        return len(self.rounds) == 1

    @cached_property
    def symmetric(self) -> bool:
        """Whether in every round two ranks give each other the same weight."""
        return all(torch.equal(w, w.mT) for w in self.rounds)

    def weights(self, t: int = 0) -> Tensor:
        """W of round `t` (n, n), float64 on the CPU; not to be written to."""
        return self.rounds[t % len(self.rounds)]

    def sources(self, rank: int, t: int = 0) -> tuple[int, ...]:
        """Whom `rank` hears in round `t`, ascending, itself not among them."""
        return self._others(self.weights(t)[self._known(rank)], rank)

    def targets(self, rank: int, t: int = 0) -> tuple[int, ...]:
        """Who hears `rank` in round `t`, ascending, itself not among them."""
        return self._others(self.weights(t)[:, self._known(rank)], rank)

    def _known(self, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise ValueError(f"{self.name}: rank must be from 0 to {self.size - 1}, got {rank}")
        return rank

    @staticmethod
    def _others(weights: Tensor, rank: int) -> tuple[int, ...]:
        return tuple(other for other in weights.nonzero().flatten().tolist() if other != rank)

    @cached_property
    def degree(self) -> int:
        """The most messages that any rank sends in any round."""
        return max(int(((w > 0).sum(0) - (w.diagonal() > 0).long()).max()) for w in self.rounds)

    def _among_alive(self) -> list[Tensor]:
        alive = list(self.alive)
        return [w[alive][:, alive] for w in self.rounds]

    def _product(self) -> Tensor:
        """What a whole schedule does to those that take part (alive, alive): the first round stands rightmost."""
        first, *others = self._among_alive()
        for weights in others:
            first = weights @ first
        return first

    @cached_property
    def second(self) -> float:
        """rho: by how much a round shrinks the disagreement at worst, from 0 (exact at once, or after a whole schedule)
        to 1.

        The largest |λ| but for the 1, of a symmetric W; the second singular value of one that is not, and of the
        product of a schedule, whose T-th root is taken: T rounds shrink it by rho^T. A W that is not normal may have
        1 and still average within several rounds: give it as a schedule of itself, `from_matrix([W] * T)`.
        """
        return min(1.0, centred_norm(self._product())) ** (1.0 / len(self.rounds))

    @property
    def gap(self) -> float:
        """The spectral gap 1 - rho."""
        return 1.0 - self.second

    @cached_property
    def spread(self) -> float:
        """mu = max over i >= 2 of |λ_i - 1|, from 0 (one rank) to 2: the spectral norm of W - I, which is that for a
        symmetric W; of a schedule its largest. The letter beta of the CHOCO papers.
        """
        return max(float(torch.linalg.matrix_norm(w - torch.eye(self.size, dtype=w.dtype), ord=2)) for w in self.rounds)

    @property
    def dcd_limit(self) -> float:
        """(1 - rho) / 2 mu: the noise over the signal of a compressor, ||C(z) - z|| / ||z||, below which DCD-PSGD is
        proven to converge (Tang et al. 2018, of symmetric static graphs; a guide for others). Infinite for one rank.
        """
        return self.gap / (2.0 * self.spread) if self.spread else math.inf

    @property
    def dcd_safe(self) -> float:
        """(1 - rho) / (2 sqrt(2) mu): the bound of the paper's corollary, under which its rate holds."""
        return self.dcd_limit / math.sqrt(2.0)

    def digest(self) -> str:
        """A hash (64 hexadecimal digits) of name, ranks that are gone and weights, equal on ranks that made the same.

        Weights count to 2^-40, so that two kinds of processor agree.
        """
        found = hashlib.sha256(repr((self.name, self.gone, self.size, len(self.rounds))).encode())
        for weights in self.rounds:
            found.update((weights * GRID).round().to(torch.int64).numpy().astype("<i8").tobytes())
        return found.hexdigest()

    def without(self, ranks: Collection[int]) -> Topology:
        """The same without some ranks, for a step or for good: the others keep their mean and average on.

        In a symmetric round each keeps the weight that it gave to a lost neighbour, which needs no new link; in another
        one the receivers of a lost rank hear its senders instead (`bridged`; ours), since otherwise the mean would
        drift. All ranks must leave out the same ones in the same step. Whether the others are still connected is not
        asked, since for a step it does not matter: see `require_connected`.
        """
        gone = sorted({self._known(rank) for rank in ranks} | set(self.gone))
        if len(gone) == self.size:
            raise ValueError(f"{self.name}: at least one of {self.size} ranks must remain, got all of them as gone")
        if len(gone) == len(self.gone):
            return self
        leave = [(absorbed if torch.equal(w, w.mT) else bridged)(w, gone) for w in self.rounds]
        return Topology(self.name, tuple(leave), tuple(gone))

    def require_symmetric(self, by: str = "this exchange") -> Topology:
        """Itself, or a `ValueError` that names two ranks which give each other different weights."""
        for t, w in enumerate(self.rounds):
            if not torch.equal(w, w.mT):
                i, j = (w != w.mT).nonzero()[0].tolist()
                raise ValueError(
                    f"{self.name}, round {t}: {by} needs symmetric weights, but rank {i} hears rank {j} with "
                    f"{float(w[i, j]):g} and is heard with {float(w[j, i]):g}: use ring, torus, hypercube, complete, "
                    "star or edges"
                )
        return self

    def require_static(self, by: str = "this exchange") -> Topology:
        """Itself, or a `ValueError` where neighbours change: replicas of neighbours need to hear all that they send."""
        if not self.static:
            raise ValueError(
                f"{self.name}: {by} needs the same neighbours in every round, got a schedule of {len(self.rounds)} "
                "rounds: use ring, torus, exponential, complete, star or edges"
            )
        return self

    def require_connected(self) -> Topology:
        """Itself, or a `ValueError` that names ranks which the others never hear of."""
        if self.second < 1.0 - MIXES:
            return self
        product = self._product()
        # a matrix that is not normal may be connected and yet keep the length of some vector for a round
        if float(torch.linalg.eigvals(product - 1.0 / len(product)).abs().max()) < 1.0 - MIXES:
            return self
        apart = self._apart()
        if apart:
            first = self.alive[0]
            raise ValueError(
                f"{self.name}: all ranks must be connected, but nothing of rank {first} ever reaches {listed(apart)}: "
                "add edges between the parts"
            )
        raise ValueError(
            f"{self.name}: ranks must average, but these only swap what they hold for ever: "
            "give each rank a positive weight for itself"
        )

    def _apart(self) -> set[int]:
        """Ranks that no path of any rounds joins to the first. Paths are followed against their direction, which is no
        matter: where columns sum to 1, too, what leaves a part comes back."""
        linked = torch.stack(self.rounds).sum(0) > 0
        reached, fresh = {self.alive[0]}, [self.alive[0]]
        while fresh:
            others = set(linked[fresh.pop()].nonzero().flatten().tolist()) - reached
            reached |= others
            fresh.extend(others)
        return set(self.alive) - reached
