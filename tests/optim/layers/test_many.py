"""Layers of factors on several ranks: two that share the data equal one process, under whatever shares the work."""

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Mlp, batch, layers
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from thinrank.optim import AdamWConfig, build, own, replicate
from thinrank.optim.layers import LORO, LOST, SST, CoLA, ReLoRA, SLTrain, Upkeep, convert

STEPS = 10
CONFIGS = {
    "sst": SST(rank=3, every=4, iterations=2, warmup=0),
    "sst/dense": SST(rank=2, every=3, iterations=1, warmup=0, engine="dense"),
    "lost": LOST(rank=3, delta=0.4),
    "cola": CoLA(rank=3),
    "sltrain": SLTrain(rank=3, delta=0.2),
    "loro": LORO(rank=3, every=4, warmup=0),
    "relora": ReLoRA(rank=3, every=4, warmup=0),
    "relora/zeros": ReLoRA(rank=3, every=4, warmup=0, keep=0.0),
}
ZERO = {name: CONFIGS[name] for name in ("sst", "lost", "sltrain", "loro", "relora/zeros")}
METHOD = AdamWConfig(lr=1e-3, eps=1e-4)
"""Singular values stay above zero, where vectors would be anybody's choice; a gradient of rounding is no whole step."""
DOUBLE, SINGLE = 1e-9, 1e-4
"""As far as rounding takes ten steps of Adam, whose first ones are signs, in float64 and float32."""


def converted(config, dtype=torch.float64):
    model = Mlp(dtype=dtype)
    convert(model, config)
    return model


def loss_on(model, step, dtype=torch.float64):
    """Of this rank's share of the data."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = (part.chunk(ranks)[rank] for part in batch(step, dtype=dtype))
    return F.mse_loss(model(x), y)


def trained(called, optimizer, dtype=torch.float64):
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_on(called, step, dtype).backward()
        optimizer.step()


def alone(config, dtype=torch.float64):
    model = converted(config, dtype)
    optimizer = build(model, METHOD)
    Upkeep(model, optimizer)
    trained(model, optimizer, dtype)
    assert all(bool((layer.s > 0).all()) for layer in layers(model).values() if isinstance(config, SST))
    return told(model, config)


def mergeable(config):
    return getattr(config, "act", "identity") == "identity"


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def told(model, config):
    """What is compared: weights, since factors of a weight may differ by rounding in signs and order; else all."""
    return (
        {name: layer.weight().detach() for name, layer in layers(model).items()} if mergeable(config) else state(model)
    )


def under(how, configs):
    found = {}
    for name, config in configs.items():
        model = converted(config)
        if how == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(model.square, mesh=mesh)
            fully_shard(model, mesh=mesh)
        called = DistributedDataParallel(model) if how == "ddp" else model
        optimizer = build(model, METHOD)
        if how == "replicate":
            replicate(model, optimizer)
        elif how == "own":
            own(model, optimizer)
        Upkeep(model, optimizer)
        trained(called, optimizer)
        if how == "fsdp2":
            whole = {key: p.full_tensor().detach() for key, p in model.named_parameters()}
            whole |= {key: b.detach() for key, b in model.named_buffers()}
            model = converted(config)
            model.load_state_dict(whole)
        found[name] = told(model, config)
    return found


def apart(found, expected):
    return max(float((found[key] - expected[key]).abs().max() / expected[key].abs().max()) for key in expected)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("ranks_", [2, 4])
@pytest.mark.parametrize("how", ["ddp", "replicate", "own", "fsdp2"])
def test_ranks_that_share_the_data_are_one_process(ranks, ranks_, how):
    answers = ranks(ranks_).run(under, how, CONFIGS, timeout=150)
    for name, config in CONFIGS.items():
        expected = alone(config)
        for found in answers:
            assert apart(found[name], expected) <= DOUBLE, (how, name)


def under_zero(stage, configs):
    from thinrank.trainers import zero

    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    zero.load_deepspeed().utils.logging.logger.setLevel("ERROR")
    found = {}
    for name, config in configs.items():
        model = converted(config, torch.float32)
        optimizer = build(model, METHOD)
        settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0}
        settings["zero_optimization"] = {"stage": stage}
        run = zero.initialize(model, optimizer, settings)
        Upkeep(model, optimizer)
        for step in range(STEPS):
            run.engine.backward(loss_on(run.engine, step, torch.float32))
            run.engine.step()
        weights = run.weights()
        run.release()
        if dist.get_rank() == 0:
            again = converted(config, torch.float32)
            again.load_state_dict(weights)
            found[name] = told(again, config)
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_one_process(ranks, stage):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    answers = ranks(2).run(under_zero, stage, ZERO, timeout=200)
    for name, config in ZERO.items():
        assert apart(answers[0][name], alone(config, torch.float32)) <= SINGLE, name


def bytes_of(config, how):
    model = converted(config)
    optimizer = build(model, METHOD)
    (replicate if how == "replicate" else own)(model, optimizer)
    Upkeep(model, optimizer)
    trained(model, optimizer)
    wire: Any = optimizer.wire
    return dict(wire.payload), dict(wire.rare.payload), sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_only_gradients_of_trained_factors_travel(ranks):
    """And, in rounds, what one rank has decomposed for all: U, s and V of every layer, once every two iterations."""
    ((sent, rare, trained_), _) = ranks(2).run(bytes_of, CONFIGS["sst"], "replicate")
    assert sent["dense"] == STEPS * 8 * trained_
    assert set(sent) == {"dense", "present"}
    own = layers(converted(CONFIGS["sst"])).values()
    assert rare["weights"] == 8 * sum(each.short * (each.out_features + each.in_features + 1) for each in own)
