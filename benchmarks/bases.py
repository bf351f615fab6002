"""How much of a gradient other bases hold at the same rank, at once and some steps later.

    python benchmarks/bases.py
    python benchmarks/bases.py --preset 9m --rank 0.125

A Llama learns the bytes of Python's standard library with AdamW. Every `gap` steps each matrix's gradient chooses its
directions anew: the first right singular vectors, or the columns of largest norm of a fixed orthogonal basis. `shuffled
dct` is the DCT after a permutation of the features, the same all the time: if they had an order along which gradients
are smooth, it would hold less than `dct`. Energy is the share of the squared gradient that lies in the directions, in
the step that chose them and in later ones; the mean over matrices and choices.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from machine import page, save
from renewal import energy, source
from torch import Tensor, nn

from thinrank.optim import AdamWConfig, build
from thinrank.optim.linalg.fixed import BASES, basis_matrix, column_norms, select_columns
from thinrank.trainers.models import PRESETS, build_model

LATER = (0, 1, 10)
"""Steps after a choice at which it is looked at, besides the last before the next."""


@lru_cache
def choosers(n: int, rank: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What chooses directions (n, rank) for a gradient (long, n), by the name of the basis."""

    def columns(atoms: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: atoms[select_columns(column_norms(x @ atoms.mT, "l2")[None], None, rank)[0][0]].mT

    fixed = {name: basis_matrix(name, n, dtype=torch.float32, device="cpu") for name in BASES}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    fixed["shuffled dct"] = fixed["dct"][:, order]
    singular = {"singular vectors": lambda x: torch.linalg.svd(x, full_matrices=False)[2][:rank].mT}
    return singular | {name: columns(atoms) for name, atoms in fixed.items()}


def measure(args: argparse.Namespace) -> Mapping[str, Mapping[int, Mapping[str, list[float]]]]:
    """Energies by basis, steps since the choice, and kind of matrix."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(PRESETS[args.preset], 256, seed=0)
    optimizer = build(model, AdamWConfig(lr=1.5e-3, embedding_lr=1e-2))
    tokens = source(2**23)
    found: dict[str, dict[int, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    held: dict[tuple[str, str], Tensor] = {}
    for step in range(args.first - 1 + args.gap * args.choices):
        places = torch.randint(len(tokens) - args.length - 1, (args.tokens // args.length,), generator=generator)
        batch = torch.stack([tokens[i : i + args.length + 1] for i in places])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        age = (step - args.first + 1) % args.gap
        if step >= args.first - 1 and (age in LATER or age == args.gap - 1):
            print(f"step {step + 1}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
            for name, p in model.named_parameters():
                if ".layers." not in name or p.ndim != 2 or p.grad is None:
                    continue
                x = p.grad.float() if p.shape[0] >= p.shape[1] else p.grad.float().mT
                for basis, choose in choosers(x.shape[1], max(1, round(args.rank * x.shape[1]))).items():
                    if age == 0:
                        held[name, basis] = choose(x)
                    found[basis][age][name.split(".")[-2]].append(energy(x, held[name, basis]))
        optimizer.step()
        optimizer.zero_grad()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="2m", choices=sorted(PRESETS), help="sizes of the model in training")
    parser.add_argument("--rank", type=float, default=0.25, help="directions, as a part of a matrix's short side")
    parser.add_argument("--first", type=int, default=50, help="the step of the first choice")
    parser.add_argument("--gap", type=int, default=50, help="steps between two choices")
    parser.add_argument("--choices", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, default=None, help="write the page to this file too")
    args = parser.parse_args()
    found = measure(args)
    ages = sorted({age for by_age in found.values() for age in by_age})
    kinds = list(next(iter(found.values()))[0])
    last = args.first + args.gap * (args.choices - 1)
    text = page(
        "Energy that bases hold",
        [
            f"{args.preset} on bytes of Python's standard library, {args.tokens:,} tokens a step",
            f"directions: {args.rank:g} of the short side, chosen {args.choices} times in steps {args.first} to {last}",
        ],
        [
            "basis",
            *(f"{age} {'step' if age == 1 else 'steps'} later" if age else "when chosen" for age in ages),
            *(f"{k}, chosen" for k in kinds),
        ],
    )
    for basis, by_age in found.items():
        means = [statistics.fmean(v for values in by_age[age].values() for v in values) for age in ages]
        own = [statistics.fmean(by_age[0][kind]) for kind in kinds]
        text.append("| " + " | ".join([basis, *(f"{value:.3f}" for value in (*means, *own))]) + " |")
    text.append("")
    print("\n".join(text), flush=True)
    save(text, args.out)


if __name__ == "__main__":
    main()
