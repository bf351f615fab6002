"""What a renewal of the subspace costs and keeps, on the gradients of a model in training, and how even steps are.

    python benchmarks/renewal.py                                   # the 1b preset's shapes, rank 128
    python benchmarks/renewal.py --preset 9m --rank 32 --gap 5     # a look in seconds

A Llama with few layers of the preset's sizes learns the bytes of Python's standard library with GaLore+, without
entries. Every `gap` steps the gradients of its first layer's matrices are factorised in several ways, each timed on its
own: `torch.linalg.svd`, once, and the others several times. `energy` is the share of the squared gradient that lies in
a basis, divided by what the SVD's holds. Warm ways start from their own basis of the renewal before.

The second table is of another preset's shapes: a whole gap of steps, all renewals in one of them or staggered.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from machine import command_line, describe, save
from step import Matrices, timed
from torch import Tensor, nn

from thinrank.optim import GaLorePlusConfig, build
from thinrank.optim.linalg.basis import random_columns, subspace_iteration
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.lowrank.subspace import PowerIteration
from thinrank.trainers.models import PRESETS, build_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT = PowerIteration(rank=1)
EXACT = "torch.linalg.svd"


def source(limit: int) -> Tensor:
    """Bytes of the standard library's sources, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    joined = bytearray()
    for file in sorted(folder.glob("*.py")):
        joined += file.read_bytes()
        if len(joined) >= limit:
            break
    return torch.frombuffer(joined[:limit], dtype=torch.uint8).long()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the matrices of the first layer, long side first."""
    named = {name: p for name, p in model.named_parameters() if ".layers.0." in name and p.ndim == 2}
    assert all(p.grad is not None for p in named.values())
    grads = {name.split(".")[-2]: p.grad.float() for name, p in named.items() if p.grad is not None}
    return {name: g if g.shape[0] >= g.shape[1] else g.mT.contiguous() for name, g in grads.items()}


def energy(x: Tensor, basis: Tensor) -> float:
    return float((x @ basis).square().sum() / x.square().sum())


def ways(x: Tensor, kept: dict[str, Tensor], rank: int, generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """What finds a basis (short, rank) of `x`, by name; `kept` are the bases of the renewal before, by dtype."""
    extra = DEFAULT.oversample

    def iterate(dtype: str, before: Tensor | None) -> Tensor:
        random = random_columns(x.shape[-1], extra + (rank if before is None else 0), generator, x.device)
        start = random if before is None else torch.cat([before, random], -1)
        turns = DEFAULT.cold if before is None else DEFAULT.warm
        with fast_products(x.device):  # as an optimizer's step has it
            return subspace_iteration(x, start, rank, iterations=turns, dtype=DTYPES[dtype])[0]

    found: dict[str, Callable[[], Tensor]] = {
        EXACT: lambda: torch.linalg.svd(x, full_matrices=False)[2][:rank].mT,
        "torch.svd_lowrank, niter=2": lambda: torch.svd_lowrank(x, rank + extra, niter=2)[2][:, :rank],
    }
    for dtype in DTYPES:
        found[f"cold, {dtype}"] = lambda dtype=dtype: iterate(dtype, None)
        if dtype in kept:
            found[f"warm, {dtype}"] = lambda dtype=dtype: iterate(dtype, kept[dtype])
    return found


def measured(call: Callable[[], Tensor], times: int, device: torch.device) -> tuple[float, Tensor]:
    """Median of the milliseconds of a call, and what it last returned."""
    found: list[Tensor] = []
    took = [timed(lambda: found.append(call()), device) for _ in range(times)]
    return statistics.median(took), found[-1]


def train(args: argparse.Namespace, device: torch.device) -> list[tuple[str, str, float, float]]:
    """(matrix, way, milliseconds, energy divided by the SVD's) of every renewal of every matrix."""
    generator = torch.Generator().manual_seed(0)
    preset = replace(PRESETS[args.preset], num_hidden_layers=args.layers)
    model = nn.Module.to(build_model(preset, 256, seed=0), device)
    config = GaLorePlusConfig(
        rank=args.rank, density=0.0, cross_heads=[], update_proj_gap=args.gap, lr=2e-3, embedding_lr=3e-4
    )  # small enough for the widest preset: gradients of a model that diverges are nobody's
    optimizer = build(model, config)
    tokens = source(4 * args.tokens * (args.renewals * args.gap + 1))
    kept: dict[str, dict[str, Tensor]] = {}
    rows = []
    for step in range(args.gap * (args.renewals - 1) + args.first):
        places = torch.randint(len(tokens) - args.length - 1, (args.tokens // args.length,), generator=generator)
        batch = torch.stack([tokens[i : i + args.length + 1] for i in places]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        if step >= args.first - 1 and (step - args.first + 1) % args.gap == 0:
            print(f"step {step + 1}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
            for name, x in gradients(model).items():
                mine, best, bases = kept.setdefault(name, {}), 0.0, {}
                for way, call in ways(x, mine, args.rank, generator).items():
                    milliseconds, bases[way] = measured(call, 1 if way == EXACT else args.repeats, device)
                    share = energy(x, bases[way])
                    best = share if way == EXACT else best
                    rows.append((f"{name} {x.shape[0]}×{x.shape[1]}", way, milliseconds, share / best))
                mine.update({dtype: bases.get(f"warm, {dtype}", bases[f"cold, {dtype}"]) for dtype in DTYPES})
        optimizer.step()
        optimizer.zero_grad()
    return rows


def first_table(rows: Sequence[tuple[str, str, float, float]]) -> str:
    lines = [
        "| matrix | way | ms | torch.linalg.svd's time ÷ this | energy ÷ the SVD's: least | mean |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for matrix, way in dict.fromkeys((matrix, way) for matrix, way, *_ in rows):
        own = [(ms, share) for m, w, ms, share in rows if (m, w) == (matrix, way)]
        exact = statistics.median(ms for m, w, ms, _ in rows if (m, w) == (matrix, EXACT))
        ms, shares = statistics.median(each for each, _ in own), [share for _, share in own]
        lines.append(
            f"| {matrix} | {way} | {ms:.1f} | {exact / ms:.1f} | {min(shares):.4f} | {statistics.fmean(shares):.4f} |"
        )
    return "\n".join(lines)


def even(preset: str, gap: int, device: torch.device) -> str:
    """How long the steps of one gap are, with all renewals at once and staggered."""
    model = Matrices(preset, device, torch.float32)
    lines = [
        "| renewals | median step, ms | 99 of 100 | longest | longest ÷ median |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for dtype in DTYPES:
        for stagger in (False, True):
            config = GaLorePlusConfig(
                rank=model.width // 4, density=0.0, cross_heads=[], update_proj_gap=gap, stagger=stagger,
                projection_dtype=dtype,
            )  # fmt: skip
            optimizer = build(model, config)
            for _ in range(gap):
                optimizer.step()  # the first step of every matrix renews
            times = sorted(timed(optimizer.step, device) for _ in range(gap))
            middle = statistics.median(times)
            lines.append(
                f"| {'staggered' if stagger else 'in one step'}, {dtype} | {middle:.1f} | {times[int(0.99 * gap)]:.1f} "
                f"| {times[-1]:.1f} | {times[-1] / middle:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b", choices=sorted(PRESETS), help="sizes of the model in training")
    parser.add_argument("--layers", type=int, default=2, help="of that model")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--first", type=int, default=10, help="the step of the first renewal that is looked at")
    parser.add_argument("--gap", type=int, default=20, help="steps between two renewals")
    parser.add_argument("--renewals", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each way but the SVD, at each renewal")
    parser.add_argument("--even-preset", default="130m", choices=sorted(PRESETS), help="sizes of the second table")
    parser.add_argument("--even-gap", type=int, default=200, help="gap of the second table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="write the tables to this file too")
    args = parser.parse_args()
    device = torch.device(args.device)
    text = ["# Renewals", "", command_line(), ""]
    text += [f"- {line}" for line in describe(device)]
    text += ["", f"## Ways to a basis of rank {args.rank}, {args.preset} with {args.layers} layers", ""]
    text += [first_table(train(args, device)), ""]
    text += [
        f"## Steps of one gap of {args.even_gap}, GaLore+ without entries on the matrices of {args.even_preset}",
        "",
    ]
    text += [even(args.even_preset, args.even_gap, device), ""]
    print("\n".join(text), flush=True)
    save(text, args.out)


if __name__ == "__main__":
    main()
