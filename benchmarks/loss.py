"""Peak memory and time of the loss, forward and backward, by each way to compute it.

    python benchmarks/loss.py --out benchmarks/results/loss-cpu.md
    python benchmarks/loss.py --vocabularies 32768 131072 --tokens 8192 --width 4096    # as on a GPU

Each row is a process of its own. Memory is what the passes add to states, weight and labels: on a CPU the largest
resident size above that before them, on CUDA the allocator's peak. Beside it what must be there: for `chunked` the
gradients of states and weight, and a chunk's logits; for `dense` three numbers for each logit, in whose place the
weight's gradient comes later. Time is the processor's on a CPU, of
all threads, since others may be at work there, and the clock's on CUDA.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from machine import page, save

from thinrank.trainers.loss.backends import Job, unfit
from thinrank.trainers.loss.chunked import Form, chunk_for
from thinrank.trainers.loss.linear import linear_cross_entropy


def needed(backend: str, tokens: int, vocabulary: int, width: int, itemsize: int) -> int:
    """Bytes that a backend of ours has to hold at one time, beside what it is given."""
    weight, states = 4 * vocabulary * width, itemsize * tokens * width
    half = itemsize if itemsize < 4 else 0
    if backend == "dense":  # its log-probability, the gradient of that, and its own, before the weight's gradient
        return states + max(12 * tokens * vocabulary, weight)
    return weight + states + chunk_for(tokens, vocabulary, width) * vocabulary * (4 + half)


def measured(backend: str, tokens: int, vocabulary: int, width: int, device: str, repeats: int, threads: int) -> Any:
    """Bytes added and seconds, of the fastest of `repeats`."""
    torch.set_num_threads(threads)
    cuda = device == "cuda"
    draw = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if cuda else torch.float32
    hidden = torch.randn(tokens, width, generator=draw, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, generator=draw, device=device)).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=draw, device=device)
    small = torch.randn(64, 64).requires_grad_()
    (small @ small).sum().backward()  # libraries are loaded
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew, without what importing them took for a while
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    clock = time.perf_counter if cuda else time.process_time
    times, loss = [], 0.0
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = clock()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=cuda):
            found, _ = linear_cross_entropy(hidden, weight, labels, backend=backend, statistics=False)
        found.backward()
        loss = float(found.detach()) / tokens
        times.append(clock() - start)
    after = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return {"bytes": after - before, "seconds": min(times), "loss": loss}


def resident(which: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM), as Linux says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def _child(pipe: Any, *arguments: Any) -> None:
    pipe.send(json.dumps(measured(*arguments)))


def apart(*arguments: Any) -> Any:
    """`measured` in a process that nothing else has made large; None where it was ended, as for want of memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        return json.loads(ours.recv())
    except EOFError:
        return None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    parser.add_argument("--backends", nargs="+", default=["dense", "torch", "chunked", "cce", "liger"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    job = Job(form=Form(lower=torch.bfloat16 if cuda else None), device=args.device)
    there = [name for name in args.backends if unfit(name, job) is None]
    facts = [
        f"{args.tokens:,} tokens of width {args.width:,}, states and products in {'bfloat16' if cuda else 'float32'}, "
        f"weight in float32, sum of nats; fastest of {args.repeats}",
        *(f"left out: {name} {cause}" for name in args.backends if (cause := unfit(name, job))),
    ]
    head = [
        "backend",
        "vocabulary",
        "chunk",
        "added (MiB)",
        "must be there (MiB)",
        "seconds" if cuda else "CPU seconds",
        "nats a token",
    ]
    lines = page("The loss without logits: memory and time", facts, head, device=torch.device(args.device))
    for line in lines:
        print(line)
    for vocabulary in args.vocabularies:
        for name in there:
            sizes = args.tokens, vocabulary, args.width
            found = apart(name, *sizes, args.device, args.repeats, args.threads)
            ours = name in ("dense", "chunked")
            least = f"{needed(name, *sizes, 2 if cuda else 4) / 2**20:,.0f}" if ours else "–"
            chunk = f"{chunk_for(*sizes):,}" if name == "chunked" else "–"
            row = ["out of memory", least, "–", "–"]
            if found is not None:
                row = [f"{found['bytes'] / 2**20:,.0f}", least, f"{found['seconds']:.2f}", f"{found['loss']:.5f}"]
            lines.append("| " + " | ".join([name, f"{vocabulary:,}", chunk, *row]) + " |")
            print(lines[-1], flush=True)
    lines.append("")
    save(lines, args.out)


if __name__ == "__main__":
    main()
