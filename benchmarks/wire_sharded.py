"""Bytes that an optimizer adds to what FSDP2 or DeepSpeed's ZeRO sends by itself, or sends as thinrank_owned, counted
beside the formula.

    python benchmarks/wire_sharded.py                                    # 1b, rank 128, on 4 ranks of this machine
    python benchmarks/wire_sharded.py --preset 9m --rank 32 --ranks 2 --methods galore muon
    python benchmarks/wire_sharded.py --strategy zero3 --preset 60m                 # trains in DeepSpeed's own engine
    python benchmarks/wire_sharded.py --strategy zero3 --laid-out                   # its layout of 1b, without weights

Weights of the preset's shapes and gradients drawn at random (what is counted does not depend on their values), in
bfloat16; a first step, which chooses subspaces, and a second one; in both the norm of gradients is asked for. What
leaves a rank is the mean over the ranks. FSDP2 itself gathers weights before forward and before backward and scatters
gradients: 3 × 2 bytes a weight × (N−1)/N. So does ZeRO-3; ZeRO-1 and 2 gather weights once.

Under ZeRO the engine is DeepSpeed's with its own settings, on tokens drawn at random, and its own messages are counted
as well, by torch's functions through which they pass: of a small model ZeRO-3 gathers weights once and keeps them for
backward, and ZeRO-1 and 2 sum gradients up for all. With `--laid-out` there is no engine: the optimizer steps pieces
that lie as ZeRO lays them out and that all have one memory, so that 1b fits; its messages are real ones.

The formula is a plan's (`thinrank.trainers.plan.owners`), which knows shapes alone: of weights in pieces a matrix that
is cut along its long side sends nothing between renewals but its method's small sums, and one that is cut along the
other, or whose method needs it whole, sends (N−1)/N of a gradient to its owner and as much of an update back; owned, a
matrix's coordinates go to its owner and directions come back (of methods whose update is as large as the weight,
gradients and weights), and what is stepped element by element is scattered and gathered.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import page, save
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from wire import configured

from thinrank.optim import METHODS, LowRankConfig, MatrixOptimizer, MethodConfig, build, route
from thinrank.optim.exchange.shards import Span, length
from thinrank.optim.exchange.wire import Wire
from thinrank.trainers.models import PRESETS, build_model
from thinrank.trainers.plan.held import Around
from thinrank.trainers.plan.owners import Owners, Pieces, Zero

WITHIN = {"fsdp2": "FSDP2 itself", "owned": "DDP in bfloat16"} | {f"zero{n}": f"ZeRO-{n} itself" for n in (1, 2, 3)}
TOKENS = 16

Step = Callable[[], None]


def method(name: str, args: argparse.Namespace) -> MethodConfig:
    """The method as `wire.py` has it, with the way of choosing subspaces that was asked for."""
    config = configured(name, args.rank, args.gap, "dense")
    return replace(config, svd=args.svd) if "svd" in {field.name for field in fields(config)} else config


def shapes(args: argparse.Namespace) -> torch.nn.Module:
    return build_model(PRESETS[args.preset], args.vocabulary, seed=0, meta=True).bfloat16()


def planned(config: MethodConfig, model: torch.nn.Module, ranks: int, strategy: str) -> tuple[float, float]:
    """Bytes that leave a rank, in the mean, in a step between renewals, as a plan says it; and for the framework."""
    routing = route(model, config)
    around = Around(routing=routing)
    if strategy == "owned":
        plan = Owners.of(around, ranks, dtype=torch.bfloat16)
    elif strategy == "fsdp2":
        plan = Pieces.of_rows(around, ranks)
    else:
        plan = Zero.of(around, ranks, stage=int(strategy[-1]))
    traffic = plan.sent(routing.rows, ranks)
    return traffic.leaving("between", ranks), traffic.by_framework(ranks)


# --- what steps -------------------------------------------------------------------------------------------------------


def drawn(model: torch.nn.Module, optimizer: MatrixOptimizer, place: int) -> Step:
    """A step by gradients drawn at random."""
    generator = torch.Generator().manual_seed(place)

    def step() -> None:
        for param in model.parameters():
            own = param.to_local() if isinstance(param, DTensor) else param.data
            grad = torch.randn(own.shape, generator=generator, dtype=own.dtype)
            if isinstance(param, DTensor):
                how = {"run_check": False, "shape": param.shape, "stride": param.stride()}
                grad = DTensor.from_local(grad, param.device_mesh, param.placements, **how)
            param.grad = grad
        optimizer.gradient_norm()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp2(config: MethodConfig, args: argparse.Namespace, place: int) -> tuple[MatrixOptimizer, Step]:
    """The preset under FSDP2, each block by itself, without ever being whole."""
    model: Any = shapes(args)
    mesh = init_device_mesh("cpu", (args.ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.to_local().normal_(0.0, 0.02)
    optimizer = build(model, config)
    return optimizer, drawn(model, optimizer, place)


def owned(config: MethodConfig, args: argparse.Namespace, place: int) -> tuple[MatrixOptimizer, Step]:
    model = shapes(args).to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0.0, 0.02)
    optimizer = build(model, config)
    optimizer.own(dtype=torch.bfloat16, overlap=False, check_every=None)
    return optimizer, drawn(model, optimizer, place)


def deepspeed(config: MethodConfig, args: argparse.Namespace, place: int) -> tuple[MatrixOptimizer, Step]:
    """DeepSpeed's engine, with bfloat16 weights and float32 masters."""
    from thinrank.trainers import zero

    # how DeepSpeed calls torch: not ours to repair
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    zero.load_deepspeed().utils.logging.logger.setLevel("ERROR")
    model = build_model(PRESETS[args.preset], args.vocabulary, seed=0)
    optimizer = build(model, config)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": int(args.strategy[-1])},
    }
    run = zero.initialize(model, optimizer, settings)
    generator = torch.Generator().manual_seed(place)

    def step() -> None:
        tokens = torch.randint(args.vocabulary, (1, TOKENS), generator=generator)
        logits = run.engine(input_ids=tokens, use_cache=False).logits
        run.engine.backward(torch.nn.functional.cross_entropy(logits[0].float(), tokens[0]))
        run.gradient_norm()
        run.engine.step()

    return optimizer, step


@dataclass
class LaidOut:
    """Pieces that lie as ZeRO lays them out (`Shards`), all of them in one memory."""

    lies: dict[Tensor, Sequence[Span]]
    place: int
    group: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    wire: Wire = field(default_factory=Wire)

    def __post_init__(self) -> None:
        most = max(length(spans[self.place]) for spans in self.lies.values())
        self._weight, self._gradient = torch.zeros(most), torch.randn(most)

    def __contains__(self, param: Tensor) -> bool:
        return True

    def shape(self, param: Tensor) -> tuple[int, ...]:
        return tuple(param.shape)

    def spans(self, param: Tensor) -> Sequence[Span]:
        return self.lies[param]

    def weight(self, param: Tensor) -> Tensor:
        return self._weight[: length(self.lies[param][self.place])]

    def gradient(self, param: Tensor) -> Tensor:
        return self._gradient[: length(self.lies[param][self.place])]


def laid_out(config: MethodConfig, args: argparse.Namespace, place: int) -> tuple[MatrixOptimizer, Step]:
    """The optimizer without an engine: `LaidOut`."""
    model = shapes(args)
    routing = route(model, config)
    plan = Zero.of(Around(routing=routing), args.ranks, stage=int(args.strategy[-1]))
    lies = {member.name: member.place.spans for member in plan.divided}
    optimizer = build(model, config)
    optimizer.shard(LaidOut({param: lies[name] for name, param in model.named_parameters()}, place))

    def step() -> None:
        optimizer.gradient_norm()
        optimizer.step_of(model.parameters())

    return optimizer, step


def steps_of(args: argparse.Namespace) -> Callable[..., tuple[MatrixOptimizer, Step]]:
    if args.strategy == "fsdp2":
        return fsdp2
    if args.strategy == "owned":
        return owned
    return laid_out if args.laid_out else deepspeed


# --- counting ---------------------------------------------------------------------------------------------------------

PASSES = {
    "all_reduce": ("tensor", lambda n: 2 * (n - 1) / n),
    "all_gather": ("tensor", lambda n: n - 1),
    "all_gather_into_tensor": ("output_tensor", lambda n: (n - 1) / n),
    "reduce_scatter_tensor": ("input", lambda n: (n - 1) / n),
    "broadcast": ("tensor", lambda n: (n - 1) / n),
    "reduce": ("tensor", lambda n: (n - 1) / n),
}
"""Of torch's functions that an engine calls, which argument travels, and how often it leaves a rank in a ring."""


@contextmanager
def passing(sums: dict[str, float]) -> Iterator[None]:
    """Adds up what of all messages through `PASSES`, but for the optimizer's, leaves this rank, by function."""
    before = {name: getattr(dist, name) for name in PASSES}

    def watching(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature, (argument, leaves) = inspect.signature(function), PASSES[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if not sys._getframe(1).f_globals["__name__"].startswith("thinrank.optim."):
                given = signature.bind(*args, **kwargs).arguments
                size = given[argument].numel() * given[argument].element_size()
                sums[name] = sums.get(name, 0.0) + size * leaves(dist.get_world_size(given.get("group")))
            return function(*args, **kwargs)

        return call

    for name, function in before.items():
        setattr(dist, name, watching(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def rank_of(place: int, ranks: int, folder: str, args: argparse.Namespace, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(place)  # which DeepSpeed insists on
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=place, world_size=ranks)
    engine: dict[str, float] = {}
    with passing(engine):  # from the first engine on, which keeps some of the functions
        for name in args.methods:
            optimizer, step = steps_of(args)(method(name, args), args, place)
            assert optimizer.wire is not None
            if not args.renewal:
                for state in optimizer.state.values():
                    if "step" in state:
                        state["step"].fill_(1)
            sent = [optimizer.wire.egress]
            for _ in range(1 + args.renewal):
                engine.clear()
                step()
                sent.append(optimizer.wire.egress)
            figures = [sent[1] - sent[0], sent[-1] - sent[-2], sum(engine.values()), float(optimizer.state_bytes())]
            both = torch.tensor(figures, dtype=torch.float64)
            most = both.clone()
            dist.all_reduce(both)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            if place == 0:
                answers.put((name, [*(both / ranks).tolist()[:3], float(most[3])]))
            del optimizer, step
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b", choices=sorted(PRESETS))
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--strategy", default="fsdp2", choices=list(WITHIN))
    parser.add_argument("--laid-out", action="store_true", help="ZeRO's layout, without DeepSpeed and without weights")
    parser.add_argument("--methods", nargs="+", default=["galore", "fira", "dion"], choices=sorted(METHODS))
    parser.add_argument("--svd", default="power", choices=["power", "exact"], help="how subspaces are chosen")
    parser.add_argument("--no-renewal", dest="renewal", action="store_false", help="count steps between renewals alone")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    if args.laid_out and not args.strategy.startswith("zero"):
        parser.error("--laid-out is for ZeRO: give it with --strategy zero1, zero2 or zero3")
    model = shapes(args)
    weights = sum(param.numel() for param in model.parameters())
    what, engine = WITHIN[args.strategy], planned(method(args.methods[0], args), model, args.ranks, args.strategy)[1]
    if args.strategy == "owned":
        engine = 2 * 2 * weights * (args.ranks - 1) / args.ranks
    counts = args.strategy.startswith("zero") and not args.laid_out
    head = ["method", "between renewals", "formula", "counted ÷ formula", "renewal", "averaged"]
    head += [f"{what}, counted"] * counts + [f"averaged ÷ {what}", "state a rank"]
    how = {True: "in DeepSpeed's engine", False: "as ZeRO lays weights out, without DeepSpeed"}[not args.laid_out]
    facts = [
        f"{args.preset}: {weights:,} weights, bfloat16, {args.ranks} ranks; rank {args.rank}, a renewal every "
        f"{args.gap} steps, svd={args.svd}; MiB that leave a rank in a step, in the mean over ranks; state: the most "
        "that a rank has",
        *([how] if args.strategy.startswith("zero") else []),
        f"{what}, by the formula: {engine / 2**20:,.1f} MiB",
    ]
    lines = page(f"What optimizers send: {args.strategy}", facts, head)
    print("\n".join(lines), flush=True)
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, args=(args.ranks, folder, args, answers), nprocs=args.ranks)
        for _ in args.methods:
            name, (first, between, by_engine, state) = answers.get()
            config = method(name, args)
            expected, _ = planned(config, model, args.ranks, args.strategy)
            gap = args.gap if isinstance(METHODS[name](), LowRankConfig) else 1
            averaged = between + (first - between) / gap
            sizes = [f"{size / 2**20:,.1f}" for size in (between, expected, first, averaged)]
            # below that the formula is flags and norms, which only an engine's front sends
            ratio = f"{between / expected:.4f}" if expected >= 2**20 / 20 else "—"
            cells = [name, sizes[0], sizes[1], ratio, sizes[2] if args.renewal else "—", sizes[3]]
            cells += [f"{by_engine / 2**20:,.1f}"] * counts
            cells += [f"{averaged / (by_engine if counts else engine):.4f}", f"{state / 2**20:,.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    save([*lines, ""], args.out)


if __name__ == "__main__":
    main()
