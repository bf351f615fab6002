"""Simulated ranks in one process that train one model together, by means of gradients or by exchanges of weights.

Of methods that average gradients all ranks have the same weights, so that one model stands for them. With the others
each rank has a model, an optimizer and a side of the exchange of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from gossip_clocks import Recorder, Round, Trace, ranks_of, timed
from torch import Tensor, nn

from thinrank.optim import AdamWConfig, build
from thinrank.optim.gossip.compress import compressor
from thinrank.optim.gossip.simulator import run
from thinrank.trainers.gradients import total_norm
from thinrank.trainers.schedule import ScheduleConfig, build_scheduler

Rows = Mapping[str, Any]
"""`input_ids` and `labels`, int64 (rows, length), labels already shifted."""
CLIP = 1.0  # as launch/pretrain.py has it


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the training of each method has in common.

    Attributes:
        model: gives a new one, with the same weights each time.
        ranks: how many.
        steps: of the whole training, for the schedule of the learning rate.
        lr: of AdamW, for matrices.
        embedding_lr: for the rest.
        seed: of what is random about compression.
    """

    model: Callable[[], nn.Module]
    ranks: int
    steps: int
    lr: float
    embedding_lr: float
    seed: int = 0


class Training(Protocol):
    """Ranks in training.

    Attributes:
        trace: what they have sent.
        computed: processor seconds of a rank in a step, its forward, backward and optimizer, of each rank and step.
        coded: processor seconds of a rank in an exchange, of each.
    """

    trace: Trace
    computed: list[float]
    coded: list[float]

    def step(self, rows: Sequence[Rows]) -> None:
        """One step, on a part of the batch for each rank."""
        ...

    def models(self) -> Sequence[nn.Module]:
        """Of the ranks; one, where all are alike."""
        ...


class Learner:
    """A model with its optimizer and the schedule of its learning rate."""

    def __init__(self, recipe: Recipe, config: Any = None) -> None:
        self.model = recipe.model()
        config = AdamWConfig(lr=recipe.lr, embedding_lr=recipe.embedding_lr) if config is None else config
        self.optimizer = build(self.model, config)
        self.schedule = build_scheduler(self.optimizer, ScheduleConfig(), recipe.steps)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.shapes = [tuple(p.shape) for p in self.params]

    def gradient(self, rows: Rows) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(input_ids=rows["input_ids"], use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten()).backward()

    def update(self) -> None:
        nn.utils.clip_grads_with_norm_(self.params, CLIP, total_norm(self.params))
        self.optimizer.step()
        self.schedule.step()

    def grads(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]

    def read(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def write(self, flat: Tensor) -> None:
        for p, part in zip(self.params, flat.split([p.numel() for p in self.params]), strict=True):
            p.data.copy_(part.view(p.shape))


class Average(Protocol):
    """The mean of gradients over the ranks, of each parameter, and the rounds that it took."""

    def __call__(self, grads: list[list[Tensor]]) -> tuple[list[Tensor], tuple[Round, ...]]: ...


class Replicas:
    """Ranks that average gradients, and so are all alike.

    Args:
        recipe: of the training.
        average: of gradients.
        config: of the optimizer; None: AdamW.
    """

    def __init__(self, recipe: Recipe, average: Callable[[Learner], Average], config: Any = None) -> None:
        self.learner = Learner(recipe, config)
        self.average = average(self.learner)
        self.trace, self.computed, self.coded = Trace(), [], []

    def step(self, rows: Sequence[Rows]) -> None:
        grads, spent = [], []
        for part in rows:
            before = time.process_time()
            self.learner.gradient(part)
            spent.append(time.process_time() - before)
            grads.append([grad.clone() for grad in self.learner.grads()])
        before = time.process_time()
        with torch.no_grad():
            mean, rounds = self.average(grads)
        self.coded.append((time.process_time() - before) / len(rows))  # all ranks' work is done here
        for p, grad in zip(self.learner.params, mean, strict=True):
            p.grad = grad
        before = time.process_time()
        self.learner.update()
        more = time.process_time() - before
        self.computed += [each + more for each in spent]
        self.trace.add(rounds)

    def models(self) -> Sequence[nn.Module]:
        return [self.learner.model]


class Apart:
    """Ranks that exchange weights, each with its own.

    Args:
        recipe: of the training.
        scheme: a name of `SCHEMES`.
        codec: a compressor's name.
        interval: steps between two exchanges.
        options: of the scheme.
    """

    def __init__(
        self, recipe: Recipe, scheme: str, codec: str, interval: int = 1, options: Mapping[str, Any] | None = None
    ) -> None:
        self.learners = [Learner(recipe) for _ in range(recipe.ranks)]
        shapes = self.learners[0].shapes
        self.schemes = ranks_of(scheme, recipe.ranks, compressor(codec), shapes, recipe.seed, options or {})
        self.weights = [learner.read() for learner in self.learners]
        for side, weights in zip(self.schemes, self.weights, strict=True):
            side.start(weights)
        self.simulator, self.interval, self.calls = Recorder(recipe.ranks), interval, 0
        self.trace, self.computed, self.coded = Trace(), [], []

    def step(self, rows: Sequence[Rows]) -> None:
        for learner, part in zip(self.learners, rows, strict=True):
            before = time.process_time()
            learner.gradient(part)
            learner.update()
            self.computed.append(time.process_time() - before)
        self.calls += 1
        if self.calls % self.interval:
            self.trace.add(())
            return
        with torch.no_grad():
            moved = [learner.read() - x for learner, x in zip(self.learners, self.weights, strict=True)]
            parts = zip(self.schemes, self.weights, moved, strict=True)
            self.weights = run(self.simulator, [timed(side.step(x, u), self.coded) for side, x, u in parts])
            for learner, weights in zip(self.learners, self.weights, strict=True):
                learner.write(weights)
        self.trace.add(tuple(self.simulator.rounds))

    def models(self) -> Sequence[nn.Module]:
        return [learner.model for learner in self.learners]
