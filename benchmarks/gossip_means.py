"""Means of gradients over simulated ranks, as DDP and its hooks find them, and what each of them sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from gossip_clocks import Recorder, Round, ranks_of
from gossip_ranks import Average, Learner
from torch import Tensor

from thinrank.optim.gossip.compress import compressor
from thinrank.optim.gossip.simulator import run

GAP = 50  # steps between two subspaces of GaLore, as in the study
RANK = 4  # of PowerSGD and PowerGossip


def exact(dtype: torch.dtype | None) -> Callable[[Learner], Average]:
    """As DDP, with a hook that casts where there is a `dtype`."""

    def average(grads: list[list[Tensor]]) -> tuple[list[Tensor], tuple[Round, ...]]:
        size = sum(grad.numel() for grad in grads[0])
        if dtype is None:
            return [torch.stack(each).mean(0) for each in zip(*grads, strict=True)], (Round(mean=4 * size),)
        total = [torch.zeros_like(grad, dtype=dtype) for grad in grads[0]]
        for each in grads:  # as torch's hook: first cast, then divided, and summed as it travels
            for into, grad in zip(total, each, strict=True):
                into.add_(grad.to(dtype).div_(len(grads)))
        return [each.float() for each in total], (Round(mean=size * dtype.itemsize),)

    return lambda learner: average


def quantised(ranks: int, seed: int) -> Callable[[Learner], Average]:
    """In 8 bits twice, there and back: the `allreduce` scheme, whose ranks have zeros for weights."""

    def make(learner: Learner) -> Average:
        sides = ranks_of("allreduce", ranks, compressor("uniform8"), learner.shapes, seed, {})
        simulator = Recorder(ranks)
        sizes = [p.numel() for p in learner.params]

        def average(grads: list[list[Tensor]]) -> tuple[list[Tensor], tuple[Round, ...]]:
            flat = [torch.cat([grad.reshape(-1) for grad in each]) for each in grads]
            found = run(simulator, [side.step(torch.zeros_like(g), g) for side, g in zip(sides, flat, strict=True)])
            parts = zip(found[0].split(sizes), learner.shapes, strict=True)
            return [part.view(shape) for part, shape in parts], tuple(simulator.rounds)

        return average

    return make


def powersgd(ranks: int, seed: int) -> Callable[[Learner], Average]:
    """PowerSGD (Vogels et al. 2019) as torch's hook has it: warm start, error feedback, from the third step on."""

    def make(learner: Learner) -> Average:
        sides = [(shape[0], math.prod(shape[1:])) for shape in learner.shapes]
        low = {t: (m, k) for t, (m, k) in enumerate(sides) if len(learner.shapes[t]) > 1 and 2 * RANK * (m + k) < m * k}
        generator = torch.Generator().manual_seed(seed)
        q = {t: torch.randn(k, RANK, generator=generator) for t, (_, k) in low.items()}
        errors = [{t: torch.zeros(side) for t, side in low.items()} for _ in range(ranks)]
        whole, plain = exact(None)(learner), exact(None)(learner)
        steps = 0

        def average(grads: list[list[Tensor]]) -> tuple[list[Tensor], tuple[Round, ...]]:
            nonlocal steps
            steps += 1
            if steps <= 2:
                return whole(grads)
            rest, rounds = plain([[g for t, g in enumerate(each) if t not in low] for each in grads])
            inputs = [
                {t: each[t].view(side) + error[t] for t, side in low.items()}
                for each, error in zip(grads, errors, strict=True)
            ]
            found, others = {}, iter(rest)
            for t in low:
                basis = torch.linalg.qr(q[t]).Q
                p = torch.linalg.qr(torch.stack([each[t] @ basis for each in inputs]).mean(0)).Q
                q[t] = torch.stack([each[t].mT @ p for each in inputs]).mean(0)
                found[t] = p @ q[t].mT
                for each, e in zip(inputs, errors, strict=True):
                    e[t] = each[t] - found[t]
            mean = [
                found[t].view(shape) if t in low else next(others) for t, shape in enumerate(learner.shapes)
            ]  # in the order of the parameters
            p_bytes, q_bytes = (4 * RANK * sum(side[i] for side in low.values()) for i in (0, 1))
            return mean, (*rounds, Round(mean=p_bytes), Round(mean=q_bytes))

        return average

    return make


def coordinates(learner: Learner) -> Average:
    """Gradients' coordinates in bfloat16 for what GaLore projects, as `thinrank_ddp` sends them; whole gradients in
    float32 in the steps that choose a subspace. The mean is taken before the projection, which is linear."""
    whole = exact(None)(learner)
    steps = 0

    def average(grads: list[list[Tensor]]) -> tuple[list[Tensor], tuple[Round, ...]]:
        nonlocal steps
        mean, rounds = whole(grads)
        if steps % GAP:
            rounds = (Round(mean=2 * low_numbers(learner.shapes, projected(learner))),)
        steps += 1
        return mean, rounds

    return average


def projected(learner: Learner) -> list[bool]:
    """Of each parameter, whether GaLore takes it for a matrix."""
    roles = {p: group.get("role") for group in learner.optimizer.param_groups for p in group["params"]}
    return [roles[p] == "matrix" for p in learner.params]


def low_numbers(shapes: Sequence[Sequence[int]], low: Sequence[bool]) -> int:
    """Numbers of the coordinates at rank 1/4 of matrices, and of all else."""
    return sum(
        max(shape) * round(min(shape) / 4) if small else math.prod(shape)
        for shape, small in zip(shapes, low, strict=True)
    )
