"""DeepSpeed's engine of stage 0: it steps, nothing of its gradients leaves a rank, and weights are exchanged."""

import contextlib
import io
import os
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_gossip_ranks import batch, model_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from thinrank.optim import build
from thinrank.optim.gossip.engine import EngineGossip, refuse_engine
from thinrank.optim.gossip.exchange import Gossip
from thinrank.optim.methods import AdamWConfig, GaLoreConfig

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = pytest.mark.timeout(120)

STEPS = 9
BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def engine_of(model, optimizer, scheduler=None, **settings: Any) -> Any:
    from thinrank.trainers import zero

    # how DeepSpeed calls torch: not ours to repair
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # as torchrun does
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    deepspeed = zero.load_deepspeed()
    deepspeed.utils.logging.logger.setLevel("ERROR")
    config = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 0}, **settings}
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)[0]


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def model_for(settings):
    """Ranks begin apart. A batch norm of 16 bits has float32 statistics under DeepSpeed, which a CPU does not know."""
    model = model_of(dist.get_rank())
    if settings:
        model.norm = nn.LayerNorm(16)
    return model


def loss_of(model, step, part=0, rank=None):
    tokens, wanted = batch(dist.get_rank() if rank is None else rank, 10 * step + part)
    return nn.functional.cross_entropy(model(tokens).float(), wanted)


def drive(exchange, steps, parts=1):
    for step in steps:
        for part in range(parts):
            exchange.engine.backward(loss_of(exchange.engine, step, part))
            exchange.engine.step()
            exchange.step()
    exchange.finish()


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# --- steps ------------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "torch": adamw,
    "galore": lambda model: build(model, GaLoreConfig(lr=1e-2, rank=4, update_proj_gap=5)),
    "own": lambda model: build(model, AdamWConfig(lr=1e-2)),
}


def both(name, parts, clip, interval):
    """The weights of an engine and of a loop of one's own."""
    rank, found = dist.get_rank(), []
    for by_engine in (True, False):
        model = model_of(rank)
        optimizer = OPTIMIZERS[name](model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        options: dict[str, Any] = {"scheme": "choco", "compressor": "uniform8", "interval": interval, "check_every": 4}
        if by_engine:
            settings = {"gradient_accumulation_steps": parts, "gradient_clipping": clip}
            exchange = EngineGossip(engine_of(model, optimizer, scheduler, **settings), **options)
            drive(exchange, range(STEPS), parts)
        else:
            exchange = Gossip(model, optimizer, **options)
            for step in range(STEPS):
                optimizer.zero_grad()
                for part in range(parts):
                    (loss_of(model, step, part) / parts).backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                exchange.step()
        found.append((weights_of(model), exchange.consensus(), exchange.wire.payload["gossip"]))
    return found


@pytest.mark.parametrize(
    ("name", "parts", "clip", "interval"),
    [("torch", 1, 0.0, 1), ("torch", 2, 0.3, 1), ("galore", 1, 0.3, 2), ("galore", 4, 0.0, 1), ("own", 1, 0.0, 1)],
)
def test_float32_is_to_the_bit_a_loop_of_ones_own(ranks, name, parts, clip, interval):
    """Clipped by the norm of this rank's gradient, exchanged after whole steps only, with the engine's scheduler.

    Parts are a power of two: some versions divide the loss by their number, and some what it leads to."""
    answers = ranks(2).run(both, name, parts, clip, interval)
    for engine, loop in answers:
        assert all(torch.equal(engine[0][key], loop[0][key]) for key in loop[0])
        assert engine[1:] == loop[1:]
        assert 0 < engine[1] < 0.5
        assert engine[2] > 0
    assert not torch.equal(answers[0][0][0]["up.weight"], answers[1][0][0]["up.weight"])


def in_bfloat16():
    found = []
    for settings in ({}, BF16):
        model = model_for(BF16)
        exchange = EngineGossip(engine_of(model, adamw(model), **settings), scheme="choco", compressor="uniform8")
        drive(exchange, range(20))
        own = weights_of(model)
        with exchange.averaged():
            inside = weights_of(model)
        found.append((own, exchange.average(), inside, weights_of(model), exchange.consensus()))
    zero = exchange.engine.optimizer
    masters = {
        next(name for name, each in model.named_parameters() if each is param): (param.detach(), master.detach())
        for params, wide in zip(zero.fp16_groups, zero.fp32_groups, strict=True)
        for param, master in zip(params, wide, strict=True)
        if param.requires_grad  # DeepSpeed 0.19.0 has masters of all
    }
    return found, masters


def test_masters_are_exchanged_and_weights_are_their_rounding(ranks):
    answers = ranks(2).run(in_bfloat16)
    means = {name: sum(masters[name][1].double() for _, masters in answers) / 2 for name in answers[0][1]}
    for ((wide, *_), (own, mean, inside, after, consensus)), masters in answers:
        assert masters.keys() == mean.keys()
        for name, (param, master) in masters.items():
            assert param.dtype is torch.bfloat16
            assert master.dtype is mean[name].dtype is torch.float32
            assert torch.equal(param, master.bfloat16())
            assert not torch.equal(master, param.float()), name
            torch.testing.assert_close(mean[name].double(), means[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(inside[name], mean[name].bfloat16())
            assert float((master - wide[name]).norm()) < 0.1 * float(wide[name].norm()), name
        assert all(torch.equal(own[name], after[name]) for name in own)
        assert 0 < consensus < 0.3


def alone_in_skipping():
    """With a gradient on the second rank that is not finite; what ranks have, and how often they stepped."""
    model, rank = model_for(BF16), dist.get_rank()
    engine = engine_of(model, adamw(model), **BF16)
    exchange = EngineGossip(engine, scheme="dcd", compressor="uniform8", check_every=3)
    for step in range(8):
        engine.backward(loss_of(engine, step))
        if (rank, step) == (1, 3):
            model.up.weight.grad = torch.full_like(model.up.weight, torch.inf)
        before = exchange.wire.payload["gossip"], model.up.weight.detach().clone()
        engine.step()
        assert torch.equal(before[1], model.up.weight) == ((rank, step) == (1, 3))
        exchange.step()
        assert exchange.wire.payload["gossip"] > before[0]
    exchange.finish()
    return weights_of(model), engine.skipped_steps, exchange.measured()["repaired"]


def test_a_rank_leaves_a_step_out_alone_and_exchanges_all_the_same(ranks):
    answers = ranks(2).run(alone_in_skipping)
    assert [skipped for _, skipped, _ in answers] == [0, 1]
    for weights, _, repaired in answers:
        assert all(bool(value.isfinite().all()) for value in weights.values())
        assert repaired == 0


class Messages(TorchDispatchMode):
    """Names of all that processes say to each other meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def collectives(**settings):
    """Of the engine's part of two steps with accumulation, with its own exchange and with that of weights."""
    found = []
    for apart in (False, True):
        model = model_for(settings)
        engine = engine_of(model, adamw(model), gradient_clipping=0.1, gradient_accumulation_steps=2, **settings)
        exchange = EngineGossip(engine) if apart else None
        with Messages() as messages:
            for step in range(4):
                engine.backward(loss_of(engine, step))
                engine.step()
        found.append(messages.names)
        assert engine.global_steps == 2
        payloads = []
        for step in range(4 if exchange else 0):
            assert exchange is not None
            engine.backward(loss_of(engine, step))
            engine.step()
            exchange.step()
            payloads.append(exchange.wire.payload["gossip"])
        if exchange:
            exchange.finish()
            assert payloads[0] < payloads[1] == payloads[2] < payloads[3], payloads
    return found


@pytest.mark.parametrize("settings", [{}, BF16, AUTOCAST], ids=["float32", "bfloat16", "autocast"])
def test_nothing_of_gradients_leaves_a_rank(ranks, settings):
    """Neither they themselves, nor their norm, nor whether they are finite."""
    for own, apart in ranks(2).run(collectives, **settings):
        assert len(own) >= 2
        assert apart == []


# --- memory -----------------------------------------------------------------------------------------------------------


def resumed(settings):
    kept, ends = io.BytesIO(), []
    for begin in (0, 11):
        model = model_for(settings)
        optimizer = adamw(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        engine = engine_of(model, optimizer, scheduler, gradient_accumulation_steps=2, **settings)
        exchange = EngineGossip(engine, scheme="choco", compressor="uniform4", interval=2, check_every=4)
        if begin:
            stepped, scheduled, exchanged = torch.load(kept, weights_only=True)
            engine.optimizer.load_state_dict(stepped)
            scheduler.load_state_dict(scheduled)
            exchange.load_state_dict(exchanged)
        else:
            drive(exchange, range(11), 2)
            torch.save((engine.optimizer.state_dict(), scheduler.state_dict(), exchange.state_dict()), kept)
            kept.seek(0)
        drive(exchange, range(11, 18), 2)
        masters = [master for group in getattr(engine.optimizer, "fp32_groups", []) for master in group]
        ends.append([*weights_of(model).values(), *(master.detach().clone() for master in masters)])
    return ends


@pytest.mark.parametrize("settings", [{}, BF16], ids=["float32", "bfloat16"])
def test_it_goes_on_to_the_bit(ranks, settings):
    for one, other in ranks(2).run(resumed, settings):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def restarted():
    """After another model was loaded on each rank: the first rank's everywhere, masters too."""
    model = model_for(BF16)
    engine = engine_of(model, adamw(model), **BF16)
    exchange = EngineGossip(engine, scheme="choco", compressor="uniform8")
    begun = exchange.consensus()
    drive(exchange, range(5))
    with torch.no_grad():
        model.up.weight.add_(1.0 + dist.get_rank())  # its masters must follow, and all others are as fine as they were
    exchange.restart()
    found = [master.detach().clone() for group in engine.optimizer.fp32_groups for master in group]
    rounding = [param.detach().clone() for group in engine.optimizer.fp16_groups for param in group]
    same = exchange.consensus()
    drive(exchange, range(5, 10))
    exchange.settle()
    settled = [master.detach().clone() for group in engine.optimizer.fp32_groups for master in group]
    return begun, same, found, rounding, settled, exchange.measured()["repaired"]


def test_masters_follow_what_was_loaded(ranks):
    first, second = ranks(2).run(restarted)
    for begun, same, masters, rounding, settled, repaired in (first, second):
        assert begun == same == repaired == 0.0
        assert all(torch.equal(a, b) for a, b in zip(masters, first[2], strict=True))
        assert all(torch.equal(a.bfloat16(), b) for a, b in zip(masters, rounding, strict=True))
        finer = [not torch.equal(a, b.float()) for a, b in zip(masters, rounding, strict=True)]
        assert sum(finer) == len(finer) - 1
        assert all(torch.equal(a, b) for a, b in zip(settled, first[4], strict=True))


def masters_of_thinrank():
    """In a loop of one's own, of models that begin apart."""
    model = model_of(dist.get_rank(), torch.bfloat16)
    exchange = Gossip(model, build(model, AdamWConfig(lr=1e-2, half_weights="master")), scheme="dpsgd")
    return exchange.consensus()


def test_masters_begin_alike_too(ranks):
    """They are made before weights become the first rank's, and were exchanged as each rank had made them."""
    assert ranks(2).run(masters_of_thinrank) == [0.0, 0.0]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusals():
    said: dict[str, Any] = {}

    def note(name, make):
        with contextlib.suppress(NotImplementedError):
            try:
                make()
            except ValueError as error:
                said[name] = str(error)

    def plain(**settings):
        model = model_of(0)
        return engine_of(model, adamw(model), **settings)

    for stage in (1, 2, 3):
        engine = plain(zero_optimization={"stage": stage})
        note(f"stage {stage}", lambda engine=engine: EngineGossip(engine))
        assert engine.enable_backward_allreduce
    note("model", lambda: EngineGossip(model_of(0)))
    engine = plain()
    note("gossip of an engine", lambda: Gossip(engine, engine.optimizer))
    note("bad settings", lambda: EngineGossip(engine, scheme="gossip"))
    assert engine.enable_backward_allreduce
    note("offload", lambda: EngineGossip(plain(zero_optimization={"stage": 0, "offload_param": {"device": "cpu"}})))
    wrapped = nn.parallel.DistributedDataParallel(model_of(0))
    note("DDP", lambda: EngineGossip(engine_of(wrapped, adamw(wrapped))))
    for name, value in {"pipeline_parallelism": True, "has_moe_layers": True, "mp_world_size": 2}.items():
        engine = plain()
        setattr(engine, name, value)
        note(name, lambda engine=engine: refuse_engine(engine))
    engine = plain()
    engine.fp16_enabled = lambda: True  # DeepSpeed itself knows no float16 on a CPU
    note("float16", lambda: refuse_engine(engine))
    engine = plain(torch_autocast={"enabled": True, "dtype": "float16"})
    note("autocast", lambda: refuse_engine(engine))
    engine = plain(**BF16)
    engine.optimizer = type("BF16_Optimizer", (), {})()
    note("wrapper", lambda: refuse_engine(engine))
    engine = plain(**BF16)
    del engine.optimizer.overflow_checker
    note("insides", lambda: refuse_engine(engine))
    refuse_engine(plain(**AUTOCAST))
    return said


def test_engines_that_it_does_not_suit_are_refused(ranks):
    words = {
        "stage 1": "ZeRO-1 has each rank step a piece .* set zero_optimization.stage to 0",
        "stage 2": "ZeRO-2 has",
        "stage 3": "ZeRO-3 has",
        "model": "takes DeepSpeed's engine, got Model: give it what deepspeed.initialize",
        "gossip of an engine": "DeepSpeed's engine averages gradients .* EngineGossip",
        "bad settings": "scheme must be one of",
        "offload": "offload keeps values",
        "DDP": "DistributedDataParallel averages",
        "pipeline_parallelism": "a pipeline has",
        "has_moe_layers": "experts differ",
        "mp_world_size": "tensor or sequence parallelism",
        "float16": "float16 needs a scale .* use bf16",
        "autocast": "float16 needs a scale",
        "wrapper": "through a BF16_Optimizer",
        "insides": "has no overflow_checker in its FP16_UnfusedOptimizer",
    }
    for said in ranks(2).run(refusals):
        assert said.keys() == words.keys()
        for name, sentence in said.items():
            assert re.search(words[name], sentence), (name, sentence)
