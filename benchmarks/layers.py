"""What a forward and backward through layers of factors costs beside dense ones, at a preset's shapes, in one run.

    python benchmarks/layers.py                              # the seven matrices of a block of the 130m preset
    python benchmarks/layers.py --tokens 512 4096 --rank 256 --out benchmarks/results/layers-cpu-130m.md

The layers of a block are timed in turns, `--repeat` times each, and the medians compared; predicted is the count of
multiplications, in the forward and in both directions, with the input's gradient. LOST has δ = 1 %, without and with
SiLU; SST is timed in both forms and predicted by its own formulas.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from machine import page, save
from torch import nn

from thinrank.optim.layers import LOST, SST, CoLA, LowRank, ReLoRA, SLTrain, convert
from thinrank.optim.layers.spectral import dense_cost, factor_cost
from thinrank.trainers.models import PRESETS

KINDS = {
    "dense": None,
    "low rank": LowRank(rank=1),
    "LOST": LOST(rank=1, act="identity"),
    "LOST, SiLU": LOST(rank=1),
    "CoLA": CoLA(rank=1),
    "SLTrain": SLTrain(rank=1),
    "ReLoRA": ReLoRA(rank=1),
    "SST, factors": SST(rank=1, engine="factors"),
    "SST, dense": SST(rank=1, engine="dense"),
}


def block(preset: str) -> list[tuple[int, int]]:
    """(out, in) of the matrices of a block."""
    sizes = PRESETS[preset]
    d, f = sizes.hidden_size, sizes.intermediate_size
    assert f is not None
    return [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]


def layers(kind: str, shapes: list[tuple[int, int]], rank: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for out, width in shapes:
        model = nn.Sequential(nn.Linear(width, out, bias=False))
        config = KINDS[kind]
        if config is not None:
            convert(model, type(config)(**{**vars(config), "rank": rank}))
        found.append(model[0])
    return found


def predicted(kind: str, shapes: list[tuple[int, int]], rank: int, tokens: int) -> float:
    """Multiplications of both directions, in parts of the dense layers'."""
    dense = sum(3 * tokens * out * width for out, width in shapes)
    own = 0
    for out, width in shapes:
        one, k = tokens * out * width, min(out, width)
        factors = tokens * rank * (out + width)
        if kind.startswith("SST"):
            cost = factor_cost if "factors" in kind else dense_cost
            own += cost(tokens, out, width, k, rank, trained=True)
        elif kind == "dense":
            own += 3 * one
        elif kind == "SLTrain":  # the weight twice, its gradient once, and products with both factors
            own += 3 * one + 4 * rank * out * width
        elif kind == "ReLoRA":
            own += 2 * one + 3 * factors
        else:
            own += 3 * factors + (3 * tokens * int(0.01 * width) * out if kind.startswith("LOST") else 0)
    return own / dense


def seconds(modules: list[nn.Module], inputs: list[torch.Tensor], grads: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    for module, x, grad in zip(modules, inputs, grads, strict=True):
        module(x).backward(grad)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    for module, x in zip(modules, inputs, strict=True):
        module.zero_grad()
        x.grad = None
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="130m", choices=sorted(PRESETS))
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, asked.dtype)
    shapes = block(asked.preset)
    torch.manual_seed(0)
    made = {kind: [m.to(device, dtype) for m in layers(kind, shapes, asked.rank)] for kind in KINDS}
    head = ["layers", "entries"]
    for tokens in asked.tokens:
        head += [f"{tokens:,} tokens, ms", "÷ dense", "predicted"]
    lines = page(
        f"Layers of factors beside dense ones, {asked.preset} shapes, rank {asked.rank}",
        [
            "forward and backward through the seven matrices of a block, gradients of their inputs included",
            f"median of {asked.repeat} turns, the kinds one after the other in each; ratios are to dense layers",
        ],
        head,
        device=device,
    )
    rows = {kind: [f"{sum(p.numel() for m in modules for p in m.parameters()):,}"] for kind, modules in made.items()}
    for tokens in asked.tokens:
        inputs = [torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True) for _, width in shapes]
        grads = [torch.randn(tokens, out, device=device, dtype=dtype) for out, _ in shapes]
        taken: dict[str, list[float]] = {kind: [] for kind in made}
        for turn in range(asked.repeat + 1):
            for kind, modules in made.items():
                found = seconds(modules, inputs, grads)
                if turn:  # the first one is for the caches
                    taken[kind].append(found)
        medians = {kind: statistics.median(found) for kind, found in taken.items()}
        for kind, median in medians.items():
            rows[kind] += [
                f"{1000 * median:,.1f}",
                f"{median / medians['dense']:.2f}",
                f"{predicted(kind, shapes, asked.rank, tokens):.2f}",
            ]
    lines += [f"| {kind} | {' | '.join(cells)} |" for kind, cells in rows.items()]
    lines += [""]
    print("\n".join(lines))
    save(lines, asked.out)


if __name__ == "__main__":
    main()
