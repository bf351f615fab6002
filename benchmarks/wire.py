"""Bytes that replicas send for a step, counted on the wire, beside the formula and beside DDP.

    python benchmarks/wire.py                                  # 1b, rank 128, as in GaLore's comparison with 8 ranks
    python benchmarks/wire.py --methods fira --messages majority
    python benchmarks/wire.py --preset 9m --rank 32 --methods galore fira --out benchmarks/results/wire-9m.md

Weights of the preset's shapes and gradients drawn at random (what is counted does not depend on their values), a step
that chooses subspaces and one that does not, in a process group of one: a payload is the same on any number of ranks,
but for signs (`--messages signs`), whose counts take more bits with more ranks. The formula is
`thinrank.trainers.plan.wire`, which plans use. Ratios are of what leaves one of `--ranks` by that formula: 2 (N−1)/N of
the payload of a sum that all get, (N−1)/N of signs on their way up or down. DDP's payload is the gradients in bfloat16.

`projected` has embeddings and head stepped in a subspace as well (`optimizer.targets`); `dense` leaves them to AdamW,
and their gradients travel whole. GaLore+ chooses its entries in the first step here.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from machine import page, save

from thinrank.optim import METHODS, LowRankConfig, MethodConfig, build, route
from thinrank.optim.messages import MESSAGES
from thinrank.trainers.models import PRESETS, build_model
from thinrank.trainers.plan.wire import averaged_images

EMBEDDINGS = {"dense": ["all-linear"], "projected": ["all-linear", r".*embed_tokens.*", r"lm_head.*"]}


def configured(name: str, rank: int, gap: int, embeddings: str) -> MethodConfig:
    """The method with this rank, its cheapest renewal, and 8-bit states where it has them, so that 1b fits."""
    config = METHODS[name]()
    known = {field.name for field in fields(config)}
    values = {"rank": rank, "update_proj_gap": gap, "svd": "power", "targets": EMBEDDINGS[embeddings]}
    values |= {"state_bits": 8, "warmup": 1}
    return replace(config, **{key: value for key, value in values.items() if key in known})


def counted(config: MethodConfig, model: torch.nn.Module, dtype: torch.dtype, messages: str) -> tuple[int, int]:
    """The same, counted: payload bytes of a second and of a first step."""
    optimizer = build(model, config)
    optimizer.replicate(messages=messages, dtype=dtype, overlap=False, check_every=None)
    assert optimizer.wire is not None
    sums, generator = [0], torch.Generator().manual_seed(0)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()
        optimizer.zero_grad()
        sums.append(optimizer.wire.total())
    first, second = sums[1] - sums[0], sums[2] - sums[1]
    return second, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b", choices=sorted(PRESETS))
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=["galore", "galore_plus", "fira"], choices=sorted(METHODS))
    parser.add_argument("--embeddings", nargs="+", default=list(EMBEDDINGS), choices=list(EMBEDDINGS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the messages")
    parser.add_argument("--messages", default="auto", choices=MESSAGES)
    parser.add_argument("--ranks", type=int, default=8, help="of which what leaves one is compared with DDP")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        model = build_model(PRESETS[args.preset], args.vocabulary, seed=0, meta=True).bfloat16().to_empty(device="cpu")
        with torch.no_grad():
            for param in model.parameters():
                param.normal_(0.0, 0.02)
        ddp = 2 * sum(param.numel() for param in model.parameters())
        head = ("method", "embeddings", "between renewals", "formula", "counted ÷ formula", "renewal", "averaged")
        head = (*head, "DDP ÷ between", "DDP ÷ averaged")
        facts = [
            f"{args.preset}: {ddp // 2:,} weights, bfloat16; rank {args.rank}, a renewal every {args.gap} steps; "
            f"messages {args.messages}, in {args.dtype}; MiB of payload a step; ratios for {args.ranks} ranks",
            f"DDP in bfloat16: {ddp / 2**20:,.1f} MiB",
        ]
        lines = page("Bytes on the wire", facts, head, names=2)
        print("\n".join(lines), flush=True)
        for name in args.methods:
            for embeddings in args.embeddings:
                config = configured(name, args.rank, args.gap, embeddings)
                how = {"dtype": dtype, "messages": args.messages}
                rows = route(model, config).rows
                expected = averaged_images(rows, **how).payload("between")
                between, renewing = counted(config, model, **how)
                leaving = averaged_images(rows, world=args.ranks, **how)
                by_ddp = 2 * (args.ranks - 1) / args.ranks * ddp
                gap = config.update_proj_gap if isinstance(config, LowRankConfig) else 1
                averaged = between + (renewing - between) / gap
                sizes = [f"{size / 2**20:,.1f}" for size in (between, expected, renewing, averaged)]
                sizes.insert(2, f"{between / expected:.4f}")
                ratios = [f"{by_ddp / leaving.leaving(when, args.ranks):.1f}" for when in ("between", "averaged")]
                cells = [name, embeddings, *sizes, *ratios]
                lines.append("| " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
        save([*lines, ""], args.out)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
