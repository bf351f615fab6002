"""Does decentralised exchange pay: how it trains, what it sends, and the seconds of a step on many networks.

    python benchmarks/gossip.py --out benchmarks/results/gossip-2m.md                  # all methods on 4 and on 8 ranks
    python benchmarks/gossip.py --ranks 4 --methods allreduce allreduce-8 dpsgd dcd-8  # what the paper compares
    python benchmarks/gossip.py --ranks 4 --steps 10 --every 5 --held-out 4096         # a look in minutes

The ranks are in one process, each with a model, an optimizer and a side of the exchange of its own, and share out each
batch of the main job among themselves, so that all methods see the same tokens. Losses are of the mean of all ranks'
weights. What they send each other does not depend on the network: one training of each method is replayed on all of
them, by clocks that begin at the measured seconds of computation. A mean over all ranks goes around a ring; where the
paper's claim is judged, by halving and doubling if that is faster. Means of gradients run behind two thirds of a step's
computation, exchanges of weights that a scheme knows early behind the next step. Seconds of computation and of a
scheme's own work are processor seconds of this process, medians, so that others on the machine disturb less.

A finished training is kept in `--work` and not made again: the same command after a kill goes on with the others. On
one core that nothing else uses a training of 150 steps takes some 3 minutes, all of `--ranks 4 8` together 80.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from gossip_methods import METHODS, sizes_of
from gossip_report import FAR, WARMUP, Link, Results, plot, section
from gossip_train import Found, Job, all_found, load
from machine import command_line, describe, save

from thinrank.trainers.models import PRESETS


def jobs(args: argparse.Namespace) -> list[Job]:
    """One for each number of ranks."""
    return [
        Job(
            ranks=ranks,
            preset=args.preset,
            vocabulary=args.vocabulary,
            length=args.length,
            rows=args.rows,
            steps=args.steps,
            every=args.every,
            held_out=args.held_out,
            seed=args.seed,
            lr=args.lr,
            embedding_lr=args.embedding_lr,
            text=args.text,
        )
        for ranks in args.ranks
    ]


def heading(args: argparse.Namespace, job: Job, names: Sequence[str], numbers: int, load_average: float) -> list[str]:
    """What the tables have to be read with."""
    return [
        "# Decentralised exchange: losses at equal tokens, and seconds on many networks",
        "",
        command_line(),
        "",
        *(f"- {line}" for line in describe(torch.device("cpu"))),
        f"- load average {load_average:.2f} at the end; seconds of computation are processor seconds",
        f"- {args.preset} with {numbers:,} parameters on Python's standard library; {job.steps} steps of {job.rows} "
        f"rows of {job.length} tokens, shared out over the ranks; seed {job.seed}; the loss is of the first "
        f"{job.held_out:,} held-out tokens, in nats per token",
        f"- AdamW, rates {job.lr:g} (matrices) and {job.embedding_lr:g} (the rest), the study's best for one process, "
        "not tuned for any exchange; gradients are clipped to a norm of 1, each rank's own where weights are exchanged",
        "- bytes are what leaves a rank for a step, headers and checks included; the formula has neither",
        f"- times of steps are of clocks, after {WARMUP} steps; a ! marks what the cost model misses by more than "
        f"{100 * FAR:.0f} %. Both are of latency and bandwidth alone: what clocks have more are the checks of copies, "
        "first steps and schedules of a real run. `wan.py` measures sockets",
        "",
        *(f"- `{name}`: {METHODS[name].about}" for name in names),
        "",
    ]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="(default all)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8], help="how many train together (default 4 8)")
    parser.add_argument("--steps", type=int, default=150, help="of each training (default 150)")
    parser.add_argument("--every", type=int, default=15, metavar="STEPS", help="between two losses (default 15)")
    parser.add_argument("--held-out", type=int, default=16_384, metavar="TOKENS", help="of a loss (default 16384)")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[1000, 100, 50, 20, 10, 5], metavar="MBIT", help="Mbit/s"
    )
    parser.add_argument(
        "--delays", nargs="+", type=float, default=[0, 1, 5, 10, 20, 50], metavar="MS", help="ms one way"
    )
    parser.add_argument("--compute", type=float, metavar="S", help="seconds of a step's computation (default measured)")
    parser.add_argument("--preset", default="2m", choices=sorted(PRESETS), help="the model's sizes (default 2m)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens (default 1024)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row (default 256)")
    parser.add_argument("--rows", type=int, default=16, help="of a batch of all ranks (default 16)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of matrices (default 1.5e-3)")
    parser.add_argument("--embedding-lr", type=float, default=4e-2, help="of the rest (default 4e-2)")
    parser.add_argument("--text", metavar="FOLDER", help="of Python files (default: the standard library's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, text and compression (default 0)")
    parser.add_argument("--work", type=Path, default=Path("runs/gossip"), help="where trainings are kept")
    parser.add_argument("--report", action="store_true", help="train nothing: the page of what there is")
    parser.add_argument("--out", type=Path, help="a Markdown file; a plot is put into --work")
    return parser.parse_args(argv)


def chosen(links: Sequence[Link]) -> list[Link]:
    """On which networks losses are shown by the seconds: the best, the middle one in both respects, and the worst."""
    rates = sorted({link.rate for link in links}, reverse=True)
    delays = sorted({link.delay for link in links})
    places = (0, len(rates) // 2, -1), (0, len(delays) // 2, -1)
    return list(dict.fromkeys(Link(rates[i], delays[j]) for i, j in zip(*places, strict=True)))


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)
    try:
        todo = jobs(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    links = [Link(*pair) for pair in itertools.product(args.rates, args.delays)]
    sizes = sizes_of(todo[0].recipe(todo[0].data().vocab_size))
    everything: list[Results] = []
    missing: list[str] = []
    for job in todo:
        found: dict[str, Found] = {}
        if args.report:
            read = {name: load(name, job, args.work) for name in args.methods}
            found = {name: each for name, each in read.items() if each is not None}
            missing += [f"{name} on {job.ranks} ranks" for name, each in read.items() if each is None]
        else:
            found = dict(all_found(args.methods, job, args.work))
        if found:
            everything.append(Results(found, job.ranks, sizes, args.compute))
    lines = heading(args, todo[0], args.methods, sizes.numbers, os.getloadavg()[0])
    if missing:
        lines += [f"Not trained yet: {', '.join(missing)}.", ""]
    for results in everything:
        lines += section(results, links, chosen(links))
    if everything:
        problem = plot(everything, chosen(links), args.work / "gossip.png")
        print(problem or f"plot: {args.work / 'gossip.png'}", flush=True)
    print("\n".join(lines), flush=True)
    save(lines, args.out)


if __name__ == "__main__":
    main()
