"""One optimizer step, one renewal of the subspace, and the bytes of state, beside the peers in the same run.

    make bench                                       # 9m and 130m presets, on a GPU where there is one
    make bench ARGS="--presets 9m --out table.md"
    make bench ARGS="--only GaLore galore-torch"       # rows that begin so
    make bench ARGS="--presets 130m --only apollo-torch Apollo 'torch Muon' Muon"

Every method steps the same matrices (the linear layers of the preset) with the same gradients, in turns, so that a
drifting machine hurts all alike; the table shows medians and ratios of medians. `step` is a step between renewals,
`renewal` what a step costs more when every subspace is renewed in it, `at gap 200` their amortised sum.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from machine import command_line, describe, save
from torch import nn

from thinrank.optim import (
    AdamWConfig,
    ApolloConfig,
    DCTAdamWConfig,
    Dion2Config,
    DionConfig,
    FiraConfig,
    GaLoreConfig,
    GaLorePlusConfig,
    LDAdamConfig,
    LowRankConfig,
    MethodConfig,
    MuonConfig,
    SubspaceAdamWConfig,
    TrionConfig,
    build,
)
from thinrank.optim.linalg.fixed import column_norms, dct_matrix, dct_rows_fft, select_columns
from thinrank.optim.linalg.products import fast_products, pays, product
from thinrank.optim.optimizer import batch_size
from thinrank.trainers.models import PRESETS, build_model

GAP = 200
NEVER = 10**9


@dataclass
class Contender:
    """A method: how to build it for some parameters with a given gap, and whether it has renewals."""

    name: str
    make: Callable[[nn.Module, int], torch.optim.Optimizer]
    renews: bool = True


def ours(name: str, config: MethodConfig) -> Contender:
    if not isinstance(config, LowRankConfig):
        return Contender(name, lambda model, gap: build(model, config), renews=False)
    return Contender(name, lambda model, gap: build(model, replace(config, update_proj_gap=gap)))


def torch_adamw(**kwargs: Any) -> Callable[[nn.Module, int], torch.optim.Optimizer]:
    return lambda model, gap: torch.optim.AdamW(model.parameters(), lr=1e-3, **kwargs)


def galore_group(model: nn.Module, gap: int, rank: int, scale: str) -> dict[str, Any]:
    return {
        "params": list(model.parameters()),
        "rank": rank,
        "update_proj_gap": gap,
        scale: 0.25,
        "proj_type": "std",
    }


def galore_torch(model: nn.Module, gap: int, rank: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    return cast("Any", GaLoreAdamW)([galore_group(model, gap, rank, "scale")], lr=0.01, no_deprecation_warning=True)


def fira(model: nn.Module, gap: int, rank: int) -> torch.optim.Optimizer:
    from fira import FiraAdamW

    return cast("Any", FiraAdamW)([galore_group(model, gap, rank, "alpha")], lr=0.01, no_deprecation_warning=True)


def apollo_torch(model: nn.Module, gap: int, rank: int) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    group = galore_group(model, gap, rank, "scale") | {"scale": 1.0, "proj": "random", "scale_type": "channel"}
    return cast("Any", APOLLOAdamW)([group], lr=0.01)


def torch_muon(model: nn.Module, gap: int) -> torch.optim.Optimizer:
    return torch.optim.Muon(model.parameters(), lr=0.02)


def contenders(rank: int) -> list[Contender]:
    """Who is measured; `rank` is a quarter of the preset's width, for all. A peer stands before its method.

    "shared heads" are those that share a basis by default; in the other rows of GaLore+ every matrix has its own.
    """
    shared = GaLorePlusConfig(rank=rank, warmup=0)
    plus = replace(shared, cross_heads=[])
    return [
        Contender("torch AdamW, fused", torch_adamw(fused=True), renews=False),
        Contender("torch AdamW, foreach", torch_adamw(foreach=True), renews=False),
        ours("AdamW", AdamWConfig()),
        Contender("galore-torch 1.0", lambda model, gap: galore_torch(model, gap, rank)),
        ours("GaLore, svd=exact", GaLoreConfig(rank=rank)),
        ours("GaLore, svd=power", GaLoreConfig(rank=rank, svd="power")),
        ours("GaLore, svd=power, 8-bit states", GaLoreConfig(rank=rank, svd="power", state_bits=8)),
        ours("GaLore, svd=power, bfloat16", GaLoreConfig(rank=rank, svd="power", projection_dtype="bfloat16")),
        ours("GaLorePlus, density 0", replace(plus, density=0.0)),
        ours("GaLorePlus, density 0, bfloat16", replace(plus, density=0.0, projection_dtype="bfloat16")),
        ours("GaLorePlus, density 1 %", plus),
        ours("GaLorePlus, shared heads, density 0", replace(shared, density=0.0)),
        ours(
            "GaLorePlus, shared heads, density 0, bfloat16", replace(shared, density=0.0, projection_dtype="bfloat16")
        ),
        ours("GaLorePlus, shared heads, density 1 %", shared),
        Contender("fira 1.0.2", lambda model, gap: fira(model, gap, rank)),
        ours("Fira, svd=exact", FiraConfig(rank=rank)),
        ours("Fira, svd=power", FiraConfig(rank=rank, svd="power")),
        Contender("apollo-torch 1.0.3", lambda model, gap: apollo_torch(model, gap, rank)),
        ours("Apollo", ApolloConfig(rank=rank)),
        ours("LDAdam", LDAdamConfig(rank=rank)),
        ours("DCTAdamW", DCTAdamWConfig(rank=rank)),
        ours("DCTAdamW, bfloat16", DCTAdamWConfig(rank=rank, projection_dtype="bfloat16")),
        ours("SubspaceAdamW", SubspaceAdamWConfig(rank=rank)),
        ours("SubspaceAdamW, bfloat16", SubspaceAdamWConfig(rank=rank, projection_dtype="bfloat16")),
        Contender("torch Muon (bfloat16)", torch_muon, renews=False),
        ours("Muon", MuonConfig()),
        ours("Muon, bfloat16", MuonConfig(ns_dtype="bfloat16")),
        ours("Dion", DionConfig(rank=rank)),
        ours("Trion", TrionConfig(rank=rank)),
        ours("Dion2", Dion2Config(rank=rank)),
    ]


class Matrices(nn.Module):
    """The linear layers of a preset, without embeddings and head: what the methods differ in.

    They have the names and the configuration that they have in the model, by which heads are found.
    """

    def __init__(self, preset: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        model = build_model(PRESETS[preset], 1024, seed=0, meta=True)
        self.config = model.config
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and "head" not in name:
                own = nn.Linear(layer.in_features, layer.out_features, bias=False, device=device, dtype=dtype)
                self._put(name.split("."), own)
        self.width = PRESETS[preset].hidden_size
        generator = torch.Generator(device).manual_seed(0)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=generator, device=device).mul_(1e-2).to(dtype)

    def _put(self, path: list[str], layer: nn.Module) -> None:
        holder: nn.Module = self
        for part in path[:-1]:
            if part not in dict(holder.named_children()):
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.add_module(path[-1], layer)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in the state, projector objects included."""

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for each in value:
                yield from tensors(each)
        elif hasattr(value, "ortho_matrix"):
            yield from tensors(value.ortho_matrix)

    found = (t for state in optimizer.state.values() for value in state.values() for t in tensors(value))
    return sum(t.numel() * t.element_size() for t in found)


def measure(
    model: Matrices, device: torch.device, rounds: int, renewals: int, only: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each contender; the two that the ratios are of always run."""
    always = ("torch AdamW, fused", "galore-torch")
    everybody = [c for c in contenders(model.width // 4) if not only or c.name.startswith((*always, *only))]
    rows: list[dict[str, Any]] = []
    steppers = []
    for contender in everybody:
        optimizer = contender.make(model, NEVER)
        optimizer.step()
        optimizer.step()
        rows.append({"name": contender.name, "state": state_bytes(optimizer), "steps": [], "renewals": []})
        steppers.append(optimizer)
    for _ in range(rounds):
        for row, optimizer in zip(rows, steppers, strict=True):
            row["steps"].append(timed(optimizer.step, device))
    del steppers
    gc.collect()
    for row, contender in zip(rows, everybody, strict=True):
        if contender.renews:
            optimizer = contender.make(model, 1)
            optimizer.step()
            row["renewals"] = [timed(optimizer.step, device) for _ in range(renewals)]
            del optimizer
            gc.collect()
    for row in rows:
        row["step"] = statistics.median(row["steps"])
        row["renewal"] = max(0.0, statistics.median(row["renewals"]) - row["step"]) if row["renewals"] else 0.0
        row["amortised"] = row["step"] + row["renewal"] / GAP
    return rows


def table(rows: list[dict[str, Any]], model: Matrices) -> str:
    by_name = {row["name"]: row for row in rows}
    fused, galore = by_name["torch AdamW, fused"], by_name["galore-torch 1.0"]
    weights = sum(p.numel() for p in model.parameters())
    lines = [
        "| method | step, ms | renewal, ms | at gap 200, ms "
        "| ÷ fused AdamW | ÷ galore-torch | state, bytes | bytes a weight |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['name']} | {row['step']:.2f} | {row['renewal']:.1f} | {row['amortised']:.2f} | "
        f"{row['amortised'] / fused['amortised']:.2f} | {row['amortised'] / galore['amortised']:.2f} | "
        f"{row['state']:,} | {row['state'] / weights:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def selection(model: Matrices, device: torch.device, rounds: int) -> str:
    """The choice of DCT columns beside a plain product as torch has it, in batches as an optimizer makes them."""
    shapes: dict[tuple[int, int], list[torch.Tensor]] = {}
    for p in model.parameters():
        grad = p.grad.float() if p.grad is not None else p.float()
        grad = grad if grad.shape[0] >= grad.shape[1] else grad.mT
        shapes.setdefault((grad.shape[0], grad.shape[1]), []).append(grad)
    lines = [
        "| (matrices, long, short) | matrix product, ms | choice by product, ms | ÷ | choice by FFT, ms | ÷ |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (long, short), grads in shapes.items():
        batches = torch.stack(grads).split(batch_size(long * short, device))
        basis = dct_matrix(short, torch.float32).to(device)
        rank = model.width // 4

        def choose(coordinates: torch.Tensor, rank: int = rank) -> torch.Tensor:
            columns, _ = select_columns(column_norms(coordinates, "l1"), None, rank)
            return coordinates.gather(-1, columns.unsqueeze(-2).expand(-1, coordinates.shape[-2], -1))

        def over(work: Callable[[torch.Tensor], Any], batches: Any = batches, ours: bool = True) -> Callable[[], None]:
            def run() -> None:
                with fast_products(device) if ours else nullcontext():
                    for x in batches:
                        work(x)  # let go at once: results kept would make the allocator a part of the product's time

            return run

        calls = [
            over(lambda x, basis=basis: x @ basis.T, ours=False),
            over(lambda x, basis=basis, choose=choose: choose(product(x, basis.T))),
            over(lambda x, choose=choose: choose(dct_rows_fft(x))),
        ]
        for call in calls:
            call()
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, own in zip(calls, times, strict=True):
                own.append(timed(call, device))
        plain, matmul, fft = (statistics.median(own) for own in times)
        lines.append(
            f"| ({len(grads)}, {long}, {short}) | {plain:.2f} | {matmul:.2f} | {matmul / plain:.2f} "
            f"| {fft:.2f} | {fft / plain:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["9m", "130m"], choices=sorted(PRESETS), help="matrix shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and gradients")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each method")
    parser.add_argument("--renewals", type=int, default=3, help="timed steps with a renewal of each method")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="rows that begin so (default: all)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--out", type=Path, default=None, help="write the tables to this file too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    text = ["# Optimizer step", "", command_line(), ""]
    text += [f"- {line}" for line in describe(device)] + [f"- weights and gradients {args.dtype}, rank = width / 4"]
    if device.type == "cpu":
        text.append(f"- float32 products of our steps by {'oneDNN' if pays() else 'MKL'}, the peers' as torch has them")
    text.append("")
    for preset in args.presets:
        model = Matrices(preset, device, getattr(torch, args.dtype))
        count, weights = len(list(model.parameters())), sum(p.numel() for p in model.parameters())
        text += [f"## {preset}: {count} matrices, {weights:,} weights", ""]
        text += [table(measure(model, device, args.rounds, args.renewals, args.only), model), ""]
        text += [f"### Choosing DCT columns, {preset}", "", selection(model, device, args.rounds), ""]
        print("\n".join(text[-7:]), flush=True)
    save(text, args.out)


if __name__ == "__main__":
    main()
