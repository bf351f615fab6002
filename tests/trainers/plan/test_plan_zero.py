"""Runs under DeepSpeed's ZeRO beside their plans: the state of every rank, and what the optimizer adds to the wire."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from test_plan_owners import GALORE, Tiny, tiny, when

from thinrank.optim import AdamWConfig, LDAdamConfig, MuonConfig, build, route
from thinrank.trainers.plan.held import Around
from thinrank.trainers.plan.owners import Zero

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytest.importorskip("thinrank.trainers.zero", reason="the engine for DeepSpeed is not there")

STEPS = 5
CONFIGS = {"adamw": AdamWConfig(), "galore": GALORE, "ldadam": LDAdamConfig(rank=3), "muon": MuonConfig()}


def ran(configs, stage):
    """By name: bytes of state, entries of masters, and the payload of each step by kind."""
    from thinrank.trainers import zero

    # how DeepSpeed calls torch: not ours to repair
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    zero.load_deepspeed().utils.logging.logger.setLevel("ERROR")
    found = {}
    for name, config in configs.items():
        model = tiny()
        optimizer = build(model, config)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        run = zero.initialize(model, optimizer, settings)
        wire, steps, before = optimizer.wire, [], {}
        assert wire is not None
        for step in range(STEPS):
            data = torch.randint(60, (4, 5), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            run.engine.backward(run.engine(data).square().mean())
            run.gradient_norm()
            run.engine.step()
            steps.append({kind: size - before.get(kind, 0) for kind, size in wire.payload.items()})
            before = dict(wire.payload)
        masters = sum(run.front.shards.weight(param).numel() for param in model.parameters())
        found[name] = optimizer.state_bytes(), masters, steps
        run.release()
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_ranks_hold_and_send_is_what_was_planned(ranks, stage):
    """To the byte, of models whose weights DeepSpeed lays out in the order of the optimizer's groups."""
    world = 2
    answers = ranks(world).run(ran, CONFIGS, stage, timeout=200)
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            routing = route(Tiny(), config)
        plan = Zero.of(Around(routing=routing), world, stage=stage)
        traffic = plan.sent(routing.rows, world)
        for rank, answer in enumerate(answers):
            state, masters, steps = answer[name]
            own = plan.rank(routing.rows, 0, rank)
            assert (own.state, own.masters) == (state, 4 * masters), (name, rank)
            for step, kinds in enumerate(steps):
                now = when(routing.rows, step)
                expected = {
                    each.kind: (each.ranks[rank] if each.ranks else each).size(now) for each in traffic.transfers
                }
                assert {k: v for k, v in kinds.items() if v} == {k: v for k, v in expected.items() if v}, (name, step)
