"""DeepSpeed's ZeRO-1, 2 and 3: gradients are read as one process has them, and N ranks step as one process does."""

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, small
from test_replicated import PLAIN, STEPS, TINY, alone, apart, bound, loss, mine, seeded_model, shares, tokens
from torch import nn

from thinrank.optim import build

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

STAGES = (1, 2, 3)


def engine(config, stage, *, model=None, start=0, **settings):
    """A run of `Language` under ZeRO, and its optimizer."""
    from thinrank.trainers import zero

    # how DeepSpeed calls torch: not ours to repair
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # torchrun says so
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    zero.load_deepspeed().utils.logging.logger.setLevel("ERROR")
    model = seeded_model(start, all_alike=True) if model is None else model
    optimizer = build(model, config)
    base = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, **settings}
    return zero.initialize(model, optimizer, base), optimizer


def run(zero, parts=1, steps=range(STEPS), cast=False):
    """Trains on this rank's share of a step's data, in `parts` micro-batches."""
    for step in steps:
        for share in mine(parts):
            zero.engine.backward(loss(zero.engine, step, share))
            zero.engine.step()
    found = zero.weights()
    zero.release()
    return found


def together(configs, stage, parts=1, **settings):
    found = {}
    for name, config in configs.items():
        zero, _ = engine(config, stage, start=dist.get_rank(), gradient_accumulation_steps=parts, **settings)
        found[name] = run(zero, parts)
    return found


# --- what is read -----------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Shapes that no number of ranks divides, some with fewer entries than ranks."""

    def __init__(self, with_empty):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)
        self.c = nn.Conv1d(1, 1, 1, bias=False)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(3))
        if with_empty:
            self.empty = nn.Parameter(torch.empty(0, 4))
        self.never = nn.Parameter(torch.ones(2, 5))

    def forward(self, x, use_gain):
        y = self.frozen(self.b(torch.tanh(self.a(x))))
        y = self.c(y[:, None])[:, 0]
        return (y * self.gain if use_gain else y).square().mean()


def odd(stage=1):
    torch.manual_seed(1)
    return Odd(with_empty=stage < 3)  # ZeRO-3 itself stops at parameters without entries


def rows(step, ranks, parts):
    """(parts, rows of a rank, 5) for every rank."""
    data = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return data.view(ranks, parts, -1, 5)


def pieces(stage, parts, clip):
    """By step and name: the shape, where this rank's piece lies, its gradient, and the norm of all."""
    zero, optimizer = engine(
        small("galore", svd="power", rank=1), stage, model=odd(stage), gradient_accumulation_steps=parts, gradient_clipping=clip or 0.0
    )
    shards, rank = zero.front.shards, dist.get_rank()
    read = {}
    optimizer.step_of = lambda params, last: read.update({p: shards.gradient(p) for p in params})
    found = []
    for step in range(3):
        read.clear()
        for part in rows(step, dist.get_world_size(), parts)[rank]:
            zero.engine.backward(zero.engine(part, step != 1))
            norm = zero.gradient_norm() if part is not None and zero.engine.is_gradient_accumulation_boundary() else None
            zero.engine.step()
        names = {param: name for name, param in zero.engine.module.named_parameters()}
        assert norm is not None
        assert float(norm) == pytest.approx(float(zero.engine.get_global_grad_norm()), rel=1e-6)
        found.append(
            (
                float(norm),
                {
                    names[p]: (shards.shape(p), shards.spans(p), None if g is None else g.clone(), shards.weight(p).numel())
                    for p, g in read.items()
                },
            )
        )
    zero.release()
    return found


@pytest.mark.timeout(150)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("ranks_", "parts", "clip"), [(1, 1, None), (2, 2, None), (4, 1, None), (2, 1, 0.01)])
def test_all_pieces_together_are_the_gradient_of_one_process(ranks, stage, ranks_, parts, clip):
    """Averaged and clipped; where nobody had a gradient there is none, though ZeRO has zeros, or what was before."""
    answers = ranks(ranks_).run(pieces, stage, parts, clip, timeout=140)
    for step in range(3):
        model = odd(stage)
        for part in rows(step, ranks_, parts).flatten(0, 1):
            (model(part, step != 1) / (ranks_ * parts)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.numel()}
        norm = torch.nn.utils.get_total_norm([grad for grad in grads.values() if grad is not None])
        scale = 1.0 if clip is None else clip / float(norm + 1e-6)
        assert scale <= 1.0
        assert (step == 1) == (grads["gain"] is None)
        for found_norm, found in (answer[step] for answer in answers):
            assert found_norm == pytest.approx(float(norm), rel=1e-5)
            assert found.keys() == grads.keys()
        for name, grad in grads.items():
            parts_of = [answer[step][1][name] for answer in answers]
            spans = parts_of[0][1]
            assert all(other[:2] == parts_of[0][:2] for other in parts_of)
            assert parts_of[0][0] == tuple(model.get_parameter(name).shape)
            assert [b - a for a, b in spans] == [other[3] for other in parts_of]
            if grad is None:
                assert all(other[2] is None for other in parts_of), name
                continue
            whole = torch.full((grad.numel(),), torch.nan)
            for (start, stop), other in zip(spans, parts_of, strict=True):
                whole[start:stop] = other[2]
            torch.testing.assert_close(whole.view(grad.shape), grad * scale, rtol=1e-5, atol=1e-6)
