"""Peak GPU memory of a training step: weights, gradients, activations and optimizer state.

    python benchmarks/memory.py                                    # 7b in bfloat16, 8-bit GaLore, stepped in backward
    python benchmarks/memory.py --preset 1b --in-backward off --method adamw

Random tokens, batch 1, a few steps with one renewal among them; the peak is the allocator's
(`torch.cuda.max_memory_allocated`). GaLore's authors report 22.72 GB for the default setting without checkpointing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace

import torch
from machine import describe

from thinrank.optim import METHODS, LowRankConfig, build, route
from thinrank.trainers.models import PRESETS, build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=sorted(PRESETS))
    parser.add_argument("--method", default="galore", choices=sorted(METHODS))
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=8, choices=[8, 32], help="of Adam's states")
    parser.add_argument("--projections", default="bfloat16", choices=["float32", "bfloat16"], help="and bases")
    parser.add_argument("--in-backward", default="step", choices=["off", "project", "step"])
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--length", type=int, default=256, help="tokens of the one sequence")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    config = replace(METHODS[args.method](), state_bits=args.bits)
    if isinstance(config, LowRankConfig):
        config = replace(config, rank=args.rank, projection_dtype=args.projections)
    if any(f.name == "svd" for f in fields(config)):
        config = replace(config, svd="power")  # pyright: ignore[reportCallIssue]
    model = build_model(PRESETS[args.preset], args.vocabulary, seed=0, meta=True).bfloat16()
    predicted = route(model, config).state_bytes()
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.02, generator=generator) if p.ndim > 1 else p.fill_(1.0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = build(model, config)
    optimizer.in_backward(args.in_backward)
    tokens = torch.randint(args.vocabulary, (1, args.length + 1), generator=generator, device=device)
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    for line in describe(device):
        print(f"- {line}")
    print(
        f"- {args.preset}, {args.method}, rank {args.rank}, projections in {args.projections}, {args.bits}-bit states, "
        f"in_backward={args.in_backward}"
    )
    print(
        f"- weights {weights / 2**30:.2f} GiB, optimizer state {optimizer.state_bytes() / 2**30:.2f} GiB "
        f"(predicted {predicted / 2**30:.2f})"
    )
    if device.type == "cuda":
        print(f"- peak allocated {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print("- seconds of the steps, the first with a renewal: " + ", ".join(f"{t:.2f}" for t in times))


if __name__ == "__main__":
    main()
