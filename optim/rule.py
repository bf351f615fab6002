"""What the optimizer asks of a rule, and what it tells it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from thinrank.optim.axis import WHOLE, Asking, Axis
from thinrank.optim.update import Update

State = dict[str, Tensor]
"""Named tensors, created at construction, with the same keys and shapes ever after; first dimension = the batch."""


def beside(values: Sequence[int], device: torch.device) -> Tensor:
    """`values` as (batch,) int64 on `device`, without making the host wait for it."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=torch.int64, device=device)
    host = torch.tensor(list(values), dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def key_of(name: str) -> int:
    """A stable number below 2³² for a name, by which its randomness is seeded."""
    return zlib.crc32(name.encode())


def seed_of(seed: int, key: int, count: int) -> int:
    """The seed of what is random about one matrix in one step."""
    return (seed * 0x9E3779B1 + key * 0x85EBCA6B + count * 0xC2B2AE35) & 0x7FFFFFFFFFFFFFFF


NOT_FINITE = "its gradient was not finite"
FAILED = "the factorisation of its gradient did not converge"
SVD_FAILED = "its exact SVD did not converge"
"""Why a matrix keeps its subspace, or has one by subspace iteration (the last)."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that went wrong with a matrix without stopping it.

    Attributes:
        matrix: its place in the batch.
        cause: one sentence, without the matrix's name.
        skipped: True when a renewal of the subspace was left out, False when it was done another way.
    """

    matrix: int
    cause: str
    skipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The circumstances of one update of a batch of equal matrices.

    Attributes:
        count: updates completed before this one, for each matrix of the batch.
        keys: a stable number for each matrix (from its name), which with `seed` and `count` seeds its randomness, so
            that no rule ever reads or moves a global generator.
        seed: the user's projection seed.
        axis: the ranks that share the matrices.
        transposed: True when a rule's (long, short) is the transpose of how the weight is stored.
        record: where a rule leaves what it measured, one value for each matrix, or None when nobody asks.
        notes: where a rule leaves what went wrong with a matrix without stopping it, or None when nobody asks.
        held: where a rule leaves, at renewals, which subspaces stayed as they were because a gradient was not finite,
            if it knows that on the device only: places in the batch, and for each of them a bool; None when nobody
            asks.
        overlaps: where a rule leaves, at renewals, the share of the old subspaces in the new ones (`Change.overlap`):
            places in the batch and their values, on the device; None when nobody asks.
    """

    count: Sequence[int]
    keys: Sequence[int] = ()
    seed: int = 0
    axis: Axis = WHOLE
    transposed: bool = False
    record: dict[str, Tensor] | None = None
    notes: list[Note] | None = None
    held: list[tuple[Sequence[int], Tensor]] | None = None
    overlaps: list[tuple[list[int], Tensor]] | None = None

    def note(self, matrix: int, cause: str, *, skipped: bool) -> None:
        """Tells that a renewal of a matrix of the batch went otherwise than it should."""
        if self.notes is not None:
            self.notes.append(Note(matrix, cause, skipped))

    def hold(self, which: Sequence[int], held: Tensor) -> None:
        """Tells which of the matrices `which` kept their subspaces, `held` (len(which),) bool, without looking."""
        if self.held is not None:
            self.held.append((which, held))

    def only(self, which: Sequence[int]) -> Step:
        """The same circumstances for some matrices of the batch; what these measure is not recorded."""
        keys = [self.keys[i] for i in which] if self.keys else ()
        count = [self.count[i] for i in which]
        return Step(count=count, keys=keys, seed=self.seed, axis=self.axis, transposed=self.transposed)

    def stored(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the weights whose batch (batch, long, short) is `x`, with all ranks' rows together."""
        long, short = x.shape[-2:]
        if not self.axis.whole:  # the host waits here, for one number
            long = int(self.axis.sum(torch.full((), float(long), device=x.device)))
        return (short, long) if self.transposed else (long, short)

    def generator(self, index: int) -> torch.Generator:
        """A CPU generator that depends on the seed, the matrix and its count alone."""
        key = self.keys[index] if self.keys else index
        return torch.Generator().manual_seed(seed_of(self.seed, key, self.count[index]))


@dataclass(frozen=True, slots=True)
class Decay:
    """Decoupled weight decay and when it acts: before the update (torch, DCT-AdamW) or after it (GaLore)."""

    after: bool = False

    def factors(self, lr: float, weight_decay: float) -> tuple[float, float]:
        """`(keep, gain)`: the weight is multiplied by `keep`, the update by `gain`, in one pass."""
        keep = 1.0 - lr * weight_decay
        return keep, keep if self.after else 1.0


class MatrixRule(Protocol):
    """A rule for a batch of equal matrices `(batch, long, short)`."""

    @property
    def scale(self) -> float:
        """Multiplies the learning rate (GaLore's alpha)."""
        ...

    @property
    def decay(self) -> Decay: ...

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        """The state of a batch of matrices of `shape` (batch, long, short)."""
        ...

    def update(self, grad: Tensor, state: State, step: Step) -> Update:
        """The direction for `grad` (batch, long, short) of any floating dtype; changes `state` in place."""
        ...


@runtime_checkable
class ByRows(Protocol):
    """A rule that knows whether ranks may hold other rows of a matrix each (`Step.axis`) at little cost."""

    @property
    def by_rows(self) -> bool: ...


@runtime_checkable
class Remembers(Protocol):
    """A rule that keeps of gradients what its updates did not use, linearly, and asks of other replicas no more than
    means of small products: with gradients of their own, replicas make the update of the mean gradient."""

    @property
    def remembers(self) -> bool:
        """False where, with these settings, it is a rule like any other."""
        ...

    @property
    def memory(self) -> tuple[str, ...]:
        """Names of the state that is of a replica's own gradients; the rest of the state is the same on all."""
        ...

    def recall(self, state: State, short: int) -> Tensor:
        """What is remembered, float32 (batch, long, short); its mean over the replicas is what one process would
        remember."""
        ...

    def remember(self, value: Tensor, state: State) -> None:
        """Puts `value` in the place of what `recall` gives."""
        ...

    def exchange(self, grad: Tensor, state: State, step: Step) -> Asking[Update]:
        """`update` of the mean of the replicas' gradients, which are asked for what this yields."""
        ...

    def asks(self, shape: tuple[int, int, int], *, choosing: bool = False) -> int:
        """How many numbers `exchange` yields for a batch of `shape` (batch, long, short); `choosing`: in a step that
        chooses a subspace by whole gradients."""
        ...


def remembers(rule: MatrixRule | None) -> bool:
    """True where replicas with gradients of their own, and memories of their own, need but small products of each
    other's."""
    return isinstance(rule, Remembers) and rule.remembers


Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


@runtime_checkable
class Tells(Protocol):
    """A rule whose update is made of few numbers, by which who did not compute it can make it as well."""

    def shared(self, shape: tuple[int, int, int]) -> tuple[str, ...]:
        """Names of the state that replicas need to send less than gradients; it changes when the rule `chooses`."""
        ...

    def told(self, shape: tuple[int, int, int], step: Step) -> dict[str, Form] | None:
        """What `tell` gives for a batch of `shape` (batch, long, short); None where the update is no less than that."""
        ...

    def tell(self, update: Update, state: State) -> State: ...

    def hear(self, told: State, state: State, short: int) -> Update:
        """The update that `tell` was given, from what it gave and the shared state: to the bit."""
        ...


@dataclass
class Probe:
    """Collects what is measured in a step that somebody wants to see."""

    matrices: dict[str, dict[str, float]] = field(
        default_factory=lambda: {"captured_energy": {}, "subspace_overlap": {}}
    )
    squares: dict[str, float] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)

    def measured(self, what: str, values: Mapping[str, float]) -> None:
        """Takes one value a matrix; those that are no number were not measured in this step."""
        self.matrices[what].update({name: value for name, value in values.items() if not math.isnan(value)})

    def saw(self, label: str, update: Tensor) -> None:
        """Counts an update (before the learning rate) towards the root mean square of its group."""
        self.squares[label] = self.squares.get(label, 0.0) + float(update.float().square().sum())
        self.elements[label] = self.elements.get(label, 0) + update.numel()

    def join(self, other: Probe) -> None:
        """Takes what another rank has measured of other weights, or of other pieces."""
        for what, values in other.matrices.items():
            self.matrices.setdefault(what, {}).update(values)
        for label, total in other.squares.items():
            self.squares[label] = self.squares.get(label, 0.0) + total
            self.elements[label] = self.elements.get(label, 0) + other.elements[label]

    def update_rms(self) -> dict[str, float]:
        return {label: (total / self.elements[label]) ** 0.5 for label, total in self.squares.items()}
