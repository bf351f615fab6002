"""Data parallelism over slow networks: seconds of a step, bytes on the wire, and loss against time, for each method.

    python benchmarks/wan.py --out benchmarks/results/wan-cpu-9m.md             # every rate and delay, every method
    python benchmarks/wan.py --rates 100 --delays 20 --methods ddp powersgd-2 --steps 5          # a look in minutes
    python benchmarks/wan.py --rates 100 --delays 20 --train 120 --out table.md                 # loss against time

The exchanges of weights beside what they compete with, on the networks of their paper (some 4 hours), and two of them:

    python benchmarks/wan.py --rates 1000 100 50 20 10 5 --delays 0 1 5 10 20 50 --preset 2m --vocabulary 1024 \\
        --methods ddp ddp-bf16 powersgd-4 thinrank-bf16 allreduce-8 dpsgd dcd-8 ecd-8 choco-4 powergossip-4 diloco \\
        --out benchmarks/results/wan-gossip-cpu-2m.md
    python benchmarks/wan.py --rates 100 10 --delays 20 --preset 2m --vocabulary 1024 --train 120 \\
        --methods ddp ddp-bf16 allreduce-8 dpsgd dcd-8 ecd-8 choco-4 powergossip-4 diloco --out table.md

Ranks of one thread each train a Llama on Python's standard library, each in a network namespace of its own; frames
between them take their time (docs/slow-network.md; root only). Batches are small, so that the network and not the
processor decides; `noop` exchanges nothing, and is what a step takes at least. A slow step is measured three times, a
fast one as often as fits `--budget`. Bytes are those that the switch saw a rank send, headers and acknowledgements
included. What the cost model of `thinrank.optim.gossip.cost` predicts, from the bytes that a method
counts and the step of `noop`, stands beside each time, with a ! where it is off by more than 20 %. Keep the machine to
itself: four ranks share its cores with the switch, which says how late it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from machine import command_line, describe, save
from slow_network import Link, SlowNetwork, exit_on_sigterm
from wan_methods import ABOUT, METHODS, NOOP, ROUTES
from wan_rank import WARMUP, Job, Seen

from thinrank.optim.gossip.cost import Network, all_reduce_bytes
from thinrank.trainers import TextData
from thinrank.trainers.models import PRESETS, build_model

RANK = Path(__file__).resolve().parent / "wan_rank.py"
FAR = 0.2  # a prediction that is worse is marked
PAYLOAD = 0.956  # of a link's rate that is left to it by the headers of full frames (docs/slow-network.md)


def measure(job: Job, link: Link, ranks: int, timeout: float) -> tuple[dict[str, list[Seen]], bool]:
    """What each rank saw of each method on one network, and whether its switch came before all other processes.

    Raises:
        OSError: there can be no slow network here, or a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="thinrank-wan-") as folder, SlowNetwork([link] * ranks) as network:
        own = replace(job, folder=folder, counters=str(network.file))
        file = Path(folder, "job.json")
        file.write_text(json.dumps(asdict(own)))
        # One thread from the start, also for what a library sets up while it is imported
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        codes = network.run([[sys.executable, str(RANK), str(file)]] * ranks, environment=environment, timeout=timeout)
        if any(codes):
            raise OSError(f"the ranks ended with {codes}: see what they wrote above")
        seen = {
            name: [Seen(**json.loads(Path(folder, f"{name}-{rank}.json").read_text())) for rank in range(ranks)]
            for name in job.methods
        }
        return seen, network.prompt


def step_time(ranks: Sequence[Seen], name: str = "") -> float:
    """Median seconds of a step, over steps and ranks; the mean where not every step of the method has an exchange."""
    durations = [duration for rank in ranks for duration in rank.durations]
    every = name not in ROUTES or ROUTES[name].interval == 1
    return statistics.median(durations) if every else statistics.fmean(durations)


def ideal_bytes(ranks: Sequence[Seen]) -> float | None:
    """That leave a rank in a step with no headers: of a ring, or of the messages of methods that count these."""
    steps, size = len(ranks[0].durations), len(ranks)
    left = [rank.egress for rank in ranks if rank.egress is not None]
    if left:
        return statistics.fmean(left) / steps
    payloads = [rank.payload for rank in ranks if rank.payload is not None]
    return all_reduce_bytes(size, statistics.fmean(payloads)) / steps if payloads else None


def predicted_time(name: str, ranks: Sequence[Seen], alone: float, link: Link) -> float | None:
    """Seconds of a step by the cost model, from those of one that exchanges nothing; None where it cannot tell."""
    sent = ideal_bytes(ranks)
    if name not in ROUTES or sent is None or link.rate is None:
        return None
    own = statistics.fmean(rank.own for rank in ranks) / len(ranks[0].durations)
    network = Network(latency=link.delay / 1e3, bandwidth=PAYLOAD * link.rate * 125e3)
    return ROUTES[name].seconds(len(ranks), sent, network, compute=alone, own=own)


def times_table(seen: Mapping[str, Sequence[Seen]], link: Link) -> str:
    """One row for each method."""
    lines = [
        "| method | steps | step, s | ÷ ddp | sent by a rank in a step, bytes | of an ideal ring or of messages "
        "| sent ÷ ideal | ideal ÷ rate, s | switch late, ms | dropped | own work, s | predicted, s | ÷ predicted |",
        "| --- |" + " ---: |" * 12,
    ]
    for name, ranks in seen.items():
        steps, own = len(ranks[0].durations), statistics.fmean(rank.own for rank in ranks)
        sent = statistics.fmean(rank.sent for rank in ranks) / steps
        step = step_time(ranks, name)
        ratio = f"{step / step_time(seen['ddp']):.2f}" if "ddp" in seen else ""
        ring = ideal_bytes(ranks)
        ideal, share, least = "", "", ""
        if ring is not None:
            ideal = f"{ring:,.0f}"
            share = f"{sent / ring:.3f}" if ring else ""
            least = f"{ring * 8e-6 / link.rate:.2f}" if link.rate else ""
        expected = predicted_time(name, ranks, step_time(seen[NOOP]), link) if NOOP in seen else None
        mark = "" if expected is None or abs(step / expected - 1) <= FAR else " !"
        model = ["", ""] if expected is None else [f"{expected:.3f}", f"{step / expected:.2f}{mark}"]
        lines.append(
            f"| {name} | {steps} | {step:.3f} | {ratio} | {sent:,.0f} | {ideal} | {share} | {least} "
            f"| {ranks[0].late:.2f} | {ranks[0].dropped} | {own / steps:.3f} | {model[0]} | {model[1]} |"
        )
    return "\n".join(lines)


def losses_table(seen: Mapping[str, Sequence[Seen]], seconds: float, readings: int = 10) -> str:
    """A row for each tenth of the time: the mean loss of the batches in it, over its steps and the ranks."""
    lines = ["| seconds | " + " | ".join(seen) + " |", "| ---: |" + " ---: |" * len(seen)]
    for k in range(readings):
        begin, end = seconds * k / readings, seconds * (k + 1) / readings
        cells = []
        for ranks in seen.values():
            values = [value for rank in ranks for when, value in rank.curve if begin < when <= end]
            cells.append(f"{statistics.fmean(values):.3f}" if values else "no step ended")
        lines.append(f"| {end:g} | " + " | ".join(cells) + " |")
    steps = [str(sum(when <= seconds for when, _ in ranks[0].curve)) for ranks in seen.values()]
    held = ["" if ranks[0].held_out is None else f"{ranks[0].held_out:.3f}" for ranks in seen.values()]
    lines += ["| steps | " + " | ".join(steps) + " |", "| held-out text, at the end | " + " | ".join(held) + " |"]
    return "\n".join(lines)


def missing_networks(text: Sequence[str], wanted: int) -> list[str]:
    """What a page says of networks that are not in it, which its command names."""
    done = sum(line.startswith("## ") for line in text)
    return (
        [] if done == wanted else [f"{done} of {wanted} networks; the others had not been measured when it ended.", ""]
    )


def learning_rates(methods: Sequence[str], words: Sequence[str]) -> dict[str, float]:
    """`3e-3 ddp=1e-3` to the rate of each method; a bare number is everybody else's.

    Raises:
        ValueError: a word that is neither, or names no method of this run.
    """
    rates = dict.fromkeys(methods, 3e-3)
    named: dict[str, float] = {}
    for word in words:
        name, _, value = word.rpartition("=")
        if name and name not in rates:
            raise ValueError(
                f"--lr names methods of this run ({', '.join(methods)}), got {name!r}: add it to --methods"
            )
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"--lr takes numbers and NAME=NUMBER, got {word!r}") from None
        if name:
            named[name] = number
        else:
            rates = dict.fromkeys(methods, number)
    return rates | named


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[1000, 100, 10], metavar="MBIT", help="Mbit/s")
    parser.add_argument("--delays", nargs="+", type=float, default=[0, 20, 50], metavar="MS", help="ms one way")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="(default all)")
    parser.add_argument("--ranks", type=int, default=4, help="how many train together (default 4)")
    parser.add_argument("--preset", default="9m", choices=sorted(PRESETS), help="the model's sizes (default 9m)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens; 1024 is a model of 1M (default 8192)")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row (default 64)")
    parser.add_argument("--rows", type=int, default=2, help="rows of each rank's batch (default 2)")
    parser.add_argument("--steps", type=int, default=20, help="most timed steps of a method on a network (default 20)")
    parser.add_argument("--budget", type=float, default=30, metavar="S", help="seconds for them (default 30)")
    parser.add_argument("--train", type=float, default=0, metavar="S", help="train so long; losses instead of times")
    parser.add_argument(
        "--held-out", type=int, default=65536, metavar="TOKENS", help="of the last loss (default 65536)"
    )
    parser.add_argument(
        "--lr", nargs="+", default=[], metavar="LR", help="3e-3 (default), or also NAME=LR for a method"
    )
    parser.add_argument("--text", metavar="FOLDER", help="of Python files (default: the standard library's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and the order of the text (default 0)")
    parser.add_argument("--timeout", type=float, default=7200, metavar="S", help="for all methods on one network")
    parser.add_argument("--out", type=Path, default=None, help="write the tables to this file too")
    return parser.parse_args()


def heading(args: argparse.Namespace, job: Job, vocabulary: int, prompt: bool, load: float) -> list[str]:
    """What the tables have to be read with."""
    model = build_model(PRESETS[args.preset], vocabulary, seed=0, meta=True)
    algorithm = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    rates = ", ".join(f"{name} {job.rates[name]:g}" for name in job.methods)
    explained = [] if args.train else [f"- after {WARMUP} steps: medians of times, means of bytes, over the ranks"]
    return [
        "# Data parallelism over slow networks"
        + (": the training loss, in nats, by the seconds" if args.train else ""),
        "",
        command_line(),
        "",
        *(f"- {line}" for line in describe(torch.device("cpu"))),
        f"- {args.ranks} gloo ranks of one thread each, load average {load:.2f} before; TCP's {algorithm}; the switch "
        f"ran {'before all other processes' if prompt else 'among the other processes'}",
        f"- {args.preset} with {vocabulary:,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{args.rows} rows of {args.length} tokens on each rank; AdamW, learning rates: {rates}",
        *explained,
        "",
        *(f"- `{name}`: {ABOUT[name]}" for name in job.methods),
        "",
    ]


def main() -> None:
    args = arguments()
    exit_on_sigterm()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    # The bound belongs to every table of times; its losses are those of models that drift apart.
    methods = args.methods if args.train or NOOP in args.methods else [NOOP, *args.methods]
    try:
        job = Job(
            methods=methods,
            rates=learning_rates(methods, args.lr),
            preset=args.preset,
            vocabulary=args.vocabulary,
            length=args.length,
            rows=args.rows,
            steps=args.steps,
            budget=args.budget,
            seconds=args.train,
            held_out=args.held_out,
            text=args.text,
            seed=args.seed,
            folder="",
            counters="",
        )
        data = TextData(job.data(), batch_size=args.rows * args.ranks)
        data.prepare_data()  # once, before the ranks look for it at the same time
        text: list[str] = []
        for rate in args.rates:
            for delay in args.delays:
                link = Link(rate=rate, delay=delay)
                seen, prompt = measure(job, link, args.ranks, args.timeout)
                table = losses_table(seen, args.train) if args.train else times_table(seen, link)
                found = [f"## {rate:g} Mbit/s, {delay:g} ms one way", "", table, ""]
                found = found if text else [*heading(args, job, data.vocab_size, prompt, load), *found]
                text += found
                print("\n".join(found), flush=True)
                missing = missing_networks(text, len(args.rates) * len(args.delays))
                save([*text, *missing], args.out)  # after each network: the last one may be an hour away
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
