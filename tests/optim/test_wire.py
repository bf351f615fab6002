"""Every byte that the optimizer's side hands to a collective is counted: torch's own functions beside the counter."""

import ast
import inspect
import sys
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import FunctionType

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, small
from test_replicated import mine, run, seeded_model
from test_sharded import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import thinrank.optim
from thinrank.optim import build
from thinrank.optim.exchange import sums
from thinrank.optim.gossip.exchange import Gossip
from thinrank.optim.layers import SST, Upkeep, convert
from thinrank.optim.owned import own
from thinrank.optim.replicated import replicate

OPTIM = Path(thinrank.optim.__file__).resolve().parent
QUERIES = {"get_rank", "get_world_size", "get_global_rank", "get_process_group_ranks", "is_available", "is_initialized"}
"""What may be asked of torch.distributed without sending anything."""

ON_GPUS = {"P2POp", "batch_isend_irecv"}
"""How the messages of `isend` and `irecv` leave a GPU, which no test here sees."""


def collectives():
    """Names of everything in torch.distributed that sends."""
    beginnings = ("all_", "reduce_", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv", "batch_isend")
    return {name for name, value in vars(dist).items() if type(value) is FunctionType and name.startswith(beginnings)}


def leaving(name, given, ranks, rank):
    """Bytes that leave a rank in a call, in the mean over the ranks where these send alike."""

    def size(tensor):
        return tensor.numel() * tensor.element_size()

    if name == "all_reduce":
        return Fraction(2 * (ranks - 1), ranks) * size(given["tensor"])
    if name == "broadcast":
        return Fraction(ranks - 1, ranks) * size(given["tensor"])
    if name == "all_gather":
        return (ranks - 1) * size(given["tensor"])
    if name == "isend":
        return Fraction(size(given["tensor"]))
    if name == "irecv":
        return Fraction(0)
    assert name == "all_to_all_single", f"nobody has said here what {name} sends"
    whole, splits = given["input"], given.get("input_split_sizes")
    stays = Fraction(size(whole), ranks) if splits is None else splits[rank] * whole.element_size()
    return size(whole) - stays


@cache
def ours(file):
    """The path of a file within `optim/`; None where it is elsewhere."""
    path = Path(file).resolve()
    return path.relative_to(OPTIM).as_posix() if OPTIM in path.parents else None


def site():
    """File and line in `optim/` that the call under way comes from, be it by way of others; None for other calls."""
    frame = sys._getframe(2)
    while frame is not None:
        file = ours(frame.f_code.co_filename)
        if file is not None:
            return file, frame.f_lineno
        frame = frame.f_back
    return None


@contextmanager
def watched():
    """Collects where in `optim/` messages come from and what of each leaves this rank."""
    seen: list[tuple[tuple[str, int], Fraction]] = []
    before = {name: getattr(dist, name) for name in collectives()}

    def watching(name, function):
        signature = inspect.signature(function)

        def call(*args, **kwargs):
            where = site()
            if where is not None:
                given = signature.bind(*args, **kwargs).arguments
                group = given.get("group")
                sent = leaving(name, given, dist.get_world_size(group), dist.get_rank(group))
                seen.append((where, Fraction(sent)))
            return function(*args, **kwargs)

        return call

    for name, function in before.items():
        setattr(dist, name, watching(name, function))
    try:
        yield seen
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def told(seen, wire):
    """Of one optimizer: where messages came from, what left this rank, and what the counter says of it."""
    left = Fraction(wire.egress) + Fraction(wire.rare.egress)
    return {where for where, _ in seen}, sum(sent for _, sent in seen), left


def everything(model, optimizer, save):
    """Steps with all that may travel beside them."""
    run(model, optimizer, mine(), clip=0.3, steps=range(3))
    optimizer.measure = True
    run(model, optimizer, mine(), steps=range(3, 4))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(model, optimizer, mine(), steps=range(4, 5))
    if save:  # replicas on islands hold what torch's checkpoints save
        optimizer.state_dict()
        optimizer.full_state_dict()


def joins_replicas(config, **how):
    model = seeded_model(dist.get_rank(), tied=False)
    optimizer = build(model, config)
    replicate(model, optimizer, check_every=2, **how)
    return model, optimizer, True


def joins_owners(config):
    model = seeded_model(dist.get_rank())
    optimizer = build(model, config)
    own(model, optimizer, even_from=64, check_every=2)
    return model, optimizer, True


def joins_pieces(config):
    model = fsdp()
    return model, build(model, config), True


def joins_islands(config):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fsdp(mesh["shard"])
    optimizer = build(model, config)
    optimizer.replicate(mesh["replicate"].get_group(), check_every=2)
    return model, optimizer, False


def joins_layers(config, cut):
    """Singular vectors that change places, and are computed by one rank for all, in three layers."""
    model = seeded_model(all_alike=True) if cut else seeded_model(dist.get_rank(), tied=False)
    convert(model, SST(rank=2, every=2, iterations=1, warmup=0), targets=["^(up|down|square)"])
    if cut:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for unit in (model.up, model.down, model):
            fully_shard(unit, mesh=mesh)
    optimizer = build(model, config)
    if not cut:
        replicate(model, optimizer, check_every=2)
    Upkeep(model, optimizer)
    return model, optimizer, not cut


GALORE = CONFIGS["galore/power"]
RUNS = {
    "replicas": (joins_replicas, GALORE, {"embeddings": "rows"}),
    "replicas with signs": (joins_replicas, small("fira", svd="power"), {"messages": "signs"}),
    "replicas with memories": (joins_replicas, CONFIGS["dion"], {"memories_every": 2}),
    "owners": (joins_owners, GALORE, {}),
    "owners of whole weights": (joins_owners, CONFIGS["muon"], {}),
    "pieces by rows": (joins_pieces, GALORE, {}),
    "pieces with owners": (joins_pieces, CONFIGS["muon"], {}),
    "islands": (joins_islands, GALORE, {}),
    "replicas of layers": (joins_layers, CONFIGS["adamw"], {"cut": False}),
    "pieces of layers": (joins_layers, CONFIGS["adamw"], {"cut": True}),
}


def counted(in_a_ring):
    """By run, `told`."""
    found, limit = {}, sums.DIRECT_BYTES
    for name, (join, config, how) in RUNS.items():
        sums.DIRECT_BYTES = 0 if name == in_a_ring else limit
        try:
            with watched() as seen:
                model, optimizer, save = join(config, **how)
                everything(model, optimizer, save)
        finally:
            sums.DIRECT_BYTES = limit
        found[name] = told(seen, optimizer.wire)
    return found


def exchanged():
    """`told` of ranks that exchange weights with neighbours, with checks, averages and a new beginning."""
    with watched() as seen:
        model = seeded_model(dist.get_rank(), all_alike=True)
        optimizer = build(model, CONFIGS["adamw"])
        exchange = Gossip(model, optimizer, scheme="dcd", compressor="uniform8", check_every=2)
        for step in range(5):
            run(model, optimizer, mine(), steps=range(step, step + 1))
            exchange.step()
        with exchange.averaged():
            exchange.consensus()
        exchange.state_dict()
        exchange.restart()
    return told(seen, exchange.wire)


def calls():
    """Every place in `optim/` where a function of torch.distributed is called: file, first and last line, name."""
    found = []
    for path in OPTIM.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "dist":
                found.append((path.relative_to(OPTIM).as_posix(), called.lineno, called.end_lineno, called.attr))
    return found


def unseen(where, seen):
    """Which of the messages in the files that are `where` did not come by."""
    places = [call for call in calls() if where(call[0]) and call[3] not in QUERIES | ON_GPUS]
    assert places
    return [p for p in places if not any(file == p[0] and p[1] <= line <= p[2] for file, line in seen)]


def test_whatever_is_called_of_torch_is_watched_or_sends_nothing():
    """With test_imports.py, which says who in `optim/` may import torch.distributed at all."""
    assert {name for *_, name in calls()} <= collectives() | QUERIES | ON_GPUS
    assert {"all_reduce", "all_to_all_single", "all_gather_object", "reduce_scatter_tensor"} <= collectives()


@pytest.mark.timeout(240)
def test_every_message_is_counted(ranks):
    """Bytes of all ranks together, to the byte, and every place in the source that sends was among them."""
    answers = ranks(4).run(counted, "replicas with memories", timeout=200)
    for name in RUNS:
        sent, counted_ = (sum(answer[name][i] for answer in answers) for i in (1, 2))
        assert sent == counted_ > 0, name
    seen = {where for answer in answers for places, *_ in answer.values() for where in places}
    apart = ranks(4).run(exchanged, timeout=60)
    assert sum(sent for _, sent, _ in apart) == sum(count for *_, count in apart) > 0
    seen |= {where for places, *_ in apart for where in places}
    assert unseen(lambda file: file != "exchange/zero.py", seen) == []


def counted_under_zero(stage):
    from test_zero import engine, train

    with watched() as seen:
        zero, optimizer = engine(GALORE, stage)
        train(zero, steps=range(3))
        optimizer.measure = True
        train(zero, steps=range(3, 4))
        zero.engine.backward(zero.engine(torch.zeros(1, 2, dtype=torch.long)).square().mean())
        zero.gradient_norm()
        zero.engine.step()
        zero.weights()
        optimizer.state_dict()
        zero.release()
    assert optimizer.wire is not None
    return told(seen, optimizer.wire), dict(optimizer.wire.payload)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("stage", [1, 3])
def test_every_message_under_zero_is_counted(ranks, stage):
    """Of ours, and of the norm that DeepSpeed is asked for; what the engine sends by itself is not."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    answers = ranks(2).run(counted_under_zero, stage, timeout=140)
    sent, counted_ = (sum(told_[i] for told_, _ in answers) for i in (1, 2))
    assert sent == counted_ > 0
    assert all(payload["present"] and payload["norms"] for _, payload in answers)
    assert unseen(lambda file: file == "exchange/zero.py", {where for told_, _ in answers for where in told_[0]}) == []
