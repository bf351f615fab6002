"""Bytes that an optimizer adds to what FSDP2 sends by itself, or sends as thinrank_owned, counted beside the formula.

    python benchmarks/wire_sharded.py                                    # 1b, rank 128, on 4 ranks of this machine
    python benchmarks/wire_sharded.py --preset 9m --rank 32 --ranks 2 --methods galore muon

Weights of the preset's shapes and gradients drawn at random (what is counted does not depend on their values), in
bfloat16; a first step, which chooses subspaces, and a second one. What leaves a rank is the mean over the ranks. FSDP2
itself gathers weights before forward and before backward and scatters gradients: 3 × 2 bytes a weight × (N−1)/N.

The formula is a plan's (`thinrank.trainers.plan.owners`), which knows shapes alone: under FSDP2 a matrix that is cut
along its long side sends nothing between renewals but its method's small sums, and one that is cut along the other, or
whose method needs it whole, sends (N−1)/N of a gradient to its owner and as much of an update back; owned, a matrix's
coordinates go to its owner and directions come back (of methods whose update is as large as the weight, gradients and
weights), and what is stepped element by element is scattered and gathered.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import page, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from wire import configured

from thinrank.optim import METHODS, LowRankConfig, MethodConfig, build, route
from thinrank.trainers.models import PRESETS, build_model
from thinrank.trainers.plan.held import Around
from thinrank.trainers.plan.owners import Owners, Pieces


def sharded(preset: str, vocabulary: int, ranks: int) -> torch.nn.Module:
    """The preset under FSDP2, each block by itself, without ever being whole."""
    model = build_model(PRESETS[preset], vocabulary, seed=0, meta=True).bfloat16()
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.model.layers:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cpu")


def formula(config: MethodConfig, model: torch.nn.Module, ranks: int, strategy: str) -> float:
    """Bytes that leave a rank, in the mean, in a step between renewals, as a plan says it."""
    routing = route(model, config)
    around = Around(routing=routing)
    plan = Pieces.of_rows(around, ranks) if strategy == "fsdp2" else Owners.of(around, ranks, dtype=torch.bfloat16)
    return plan.sent(routing.rows, ranks).leaving("between", ranks)


def rank_of(place: int, ranks: int, folder: str, args: argparse.Namespace, answers: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=place, world_size=ranks)
    for name in args.methods:
        if args.strategy == "fsdp2":
            model = sharded(args.preset, args.vocabulary, ranks)
        else:
            model = build_model(PRESETS[args.preset], args.vocabulary, seed=0, meta=True).bfloat16()
            model = model.to_empty(device="cpu")
        with torch.no_grad():
            for param in model.parameters():
                (param.to_local() if isinstance(param, DTensor) else param).normal_(0.0, 0.02)
        optimizer = build(model, configured(name, args.rank, args.gap, "dense"))
        if args.strategy == "owned":
            optimizer.own(dtype=torch.bfloat16, overlap=False, check_every=None)
        assert optimizer.wire is not None
        sent, generator = [0.0], torch.Generator().manual_seed(place)
        for _ in range(2):
            for param in model.parameters():
                own = param.to_local() if isinstance(param, DTensor) else param.data
                drawn = torch.randn(own.shape, generator=generator, dtype=own.dtype)
                if isinstance(param, DTensor):
                    drawn = DTensor.from_local(
                        drawn,
                        param.device_mesh,
                        param.placements,
                        run_check=False,
                        shape=param.shape,
                        stride=param.stride(),
                    )
                param.grad = drawn
            optimizer.step()
            optimizer.zero_grad()
            sent.append(optimizer.wire.egress)
        both = torch.tensor([sent[1], sent[2] - sent[1], float(optimizer.state_bytes())], dtype=torch.float64)
        most = both.clone()
        dist.all_reduce(both)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if place == 0:
            answers.put((name, [*(both / ranks).tolist(), float(most[2])]))
        del model, optimizer
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b", choices=sorted(PRESETS))
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--strategy", default="fsdp2", choices=["fsdp2", "owned"])
    parser.add_argument("--methods", nargs="+", default=["galore", "fira", "dion"], choices=sorted(METHODS))
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    shapes = build_model(PRESETS[args.preset], args.vocabulary, seed=0, meta=True).bfloat16()
    weights = sum(param.numel() for param in shapes.parameters())
    share = (args.ranks - 1) / args.ranks
    engine = {"fsdp2": 3 * 2 * weights * share, "owned": 2 * 2 * weights * share}[args.strategy]
    what = {"fsdp2": "FSDP2 itself", "owned": "DDP in bfloat16"}[args.strategy]
    head = ("method", "between renewals", "formula", "counted ÷ formula", "renewal", "averaged")
    head = (*head, f"averaged ÷ {what}", "state a rank")
    facts = [
        f"{args.preset}: {weights:,} weights, bfloat16, {args.ranks} ranks; rank {args.rank}, a renewal every "
        f"{args.gap} steps; MiB that leave a rank in a step, in the mean over ranks; state: the most that a rank has",
        f"{what}: {engine / 2**20:,.1f} MiB",
    ]
    lines = page(f"What optimizers send: {args.strategy}", facts, head)
    print("\n".join(lines), flush=True)
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, args=(args.ranks, folder, args, answers), nprocs=args.ranks)
        for _ in args.methods:
            name, (first, between, _, state) = answers.get()
            config = configured(name, args.rank, args.gap, "dense")
            expected = formula(config, shapes, args.ranks, args.strategy)
            gap = args.gap if isinstance(METHODS[name](), LowRankConfig) else 1
            averaged = between + (first - between) / gap
            sizes = [f"{size / 2**20:,.1f}" for size in (between, expected, first, averaged)]
            ratio = f"{between / expected:.4f}" if expected else "—"
            cells = [name, sizes[0], sizes[1], ratio, sizes[2], sizes[3], f"{averaged / engine:.4f}"]
            lines.append("| " + " | ".join([*cells, f"{state / 2**20:,.1f}"]) + " |")
            print(lines[-1], flush=True)
    save([*lines, ""], args.out)


if __name__ == "__main__":
    main()
