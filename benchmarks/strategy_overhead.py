"""What a strategy costs where there is nobody to talk to: one rank on one device, beside a process without a strategy.

    python benchmarks/strategy_overhead.py                                   # 130m, GaLore, on a GPU where there is one
    python benchmarks/strategy_overhead.py --preset 2m --device cpu --batch 2 --length 64 --steps 5

Messages go through NCCL on a GPU and gloo on a CPU, from this process to itself, so that a ratio shows copies, hooks
and bookkeeping, and no network. A step is forward, backward and optimizer on one random batch, between renewals of the
subspace. Strategies take turns, each with a model of its own, `--rounds` times; the table shows medians of all steps.
All begin with the same weights, so that the last column, the loss after the last step, must be the same in every row
but for rounding; of fewer tokens than a subspace has dimensions the rest of it is rounding, and losses part. ZeRO needs
DeepSpeed: `pip install 'thinrank[deepspeed]'`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import page, save
from step import NEVER, timed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from thinrank.optim import METHODS, MethodConfig, build, own, replicate
from thinrank.trainers import UserError, zero
from thinrank.trainers.models import PRESETS, ModelConfig, build_model
from thinrank.trainers.strategies.units import blocks

HEAD = ("strategy", "step, ms", "÷ none", "loss at the end")
Step = Callable[[Tensor], Tensor]
"""One optimizer step on tokens (sequences, length + 1); gives the loss before it."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A step, and what is to be done when no more are wanted."""

    step: Step
    end: Callable[[], None] = lambda: None


@dataclass
class Row:
    """What was seen of a strategy: milliseconds of its steps, and the last loss."""

    times: list[float] = field(default_factory=list)
    loss: float = float("nan")


def fresh(config: ModelConfig, vocabulary: int) -> nn.Module:
    return build_model(config, vocabulary, seed=0)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of the next token (scalar)."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Training:
    def step(tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Training(step=step)


def none(model: nn.Module, method: MethodConfig) -> Training:
    return plain(model, build(model, method))


def ddp(model: nn.Module, method: MethodConfig) -> Training:
    optimizer = build(model, method)
    return plain(DistributedDataParallel(model), optimizer)


def thinrank_ddp(model: nn.Module, method: MethodConfig) -> Training:
    optimizer = build(model, method)
    replicate(model, optimizer)
    return plain(model, optimizer)


def thinrank_owned(model: nn.Module, method: MethodConfig) -> Training:
    optimizer = build(model, method)
    own(model, optimizer)
    return plain(model, optimizer)


def thinrank_fsdp2(model: nn.Module, method: MethodConfig) -> Training:
    mesh = init_device_mesh(next(model.parameters()).device.type, (1,))
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh)
    return plain(model, build(model, method))


def of_zero(stage: int) -> Callable[[nn.Module, MethodConfig], Training]:
    def begin(model: nn.Module, method: MethodConfig) -> Training:
        zero.load_deepspeed().utils.logging.logger.setLevel("ERROR")
        settings = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
        run = zero.initialize(model, build(model, method), {**settings, "zero_optimization": {"stage": stage}})

        def step(tokens: Tensor) -> Tensor:
            loss = loss_of(run.engine, tokens)
            with zero.quiet_deepspeed():
                run.engine.backward(loss)
                run.engine.step()
            return loss.detach()

        return Training(step=step, end=run.release)

    return begin


STRATEGIES: dict[str, Callable[[nn.Module, MethodConfig], Training]] = {
    "none": none,
    "ddp": ddp,
    "thinrank_ddp": thinrank_ddp,
    "thinrank_owned": thinrank_owned,
    "thinrank_fsdp2": thinrank_fsdp2,
    **{f"thinrank_zero{stage}": of_zero(stage) for stage in (1, 2, 3)},
}


def measure(
    config: ModelConfig,
    method: MethodConfig,
    strategies: Sequence[str],
    tokens: Tensor,
    *,
    vocabulary: int,
    steps: int,
    rounds: int,
    warmup: int = 3,
) -> dict[str, Row]:
    """A row for each strategy. There must be a process group of one, whose backend suits the device of `tokens`.

    Args:
        tokens: the batch of every step: (sequences, length + 1).
        steps: timed steps of a round, after `warmup` others.
    """
    rows = {name: Row() for name in strategies}
    for _ in range(rounds):
        for name, row in rows.items():
            model = fresh(config, vocabulary).to(tokens.device)
            training = STRATEGIES[name](model, method)
            for _ in range(warmup):
                training.step(tokens)
            row.times += [timed(lambda step=training.step: step(tokens), tokens.device) for _ in range(steps)]
            row.loss = float(training.step(tokens))
            training.end()
            del model, training
            gc.collect()
    return rows


def table(rows: dict[str, Row]) -> list[str]:
    """The lines of the table below its head."""
    base = statistics.median(rows["none"].times)
    lines = []
    for name, row in rows.items():
        step = statistics.median(row.times)
        lines.append(f"| {name} | {step:.2f} | {step / base:.3f} | {row.loss:.5f} |")
    return lines


def configured(name: str) -> MethodConfig:
    """The method with a rank of a quarter of the width, and its cheapest renewal in the first step alone."""
    config = METHODS[name]()
    known = {each.name for each in fields(config)}
    values: dict[str, Any] = {"rank": 0.25, "update_proj_gap": NEVER, "svd": "power"}
    return replace(config, **{key: value for key, value in values.items() if key in known})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="130m", choices=sorted(PRESETS))
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--method", default="galore", choices=sorted(METHODS))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every strategy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="a Markdown file for the table")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    strategies = list(dict.fromkeys(["none", *args.strategies]))
    try:
        if any("zero" in name for name in strategies):
            zero.load_deepspeed()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(args.vocabulary, (args.batch, args.length + 1), generator=generator).to(device)
    sizes: dict[str, Any] = {"vocabulary": args.vocabulary, "steps": args.steps, "rounds": args.rounds}
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device.index or 0)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # the less the products take, the more the rest shows
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        rows = measure(PRESETS[args.preset], configured(args.method), strategies, tokens, **sizes)
        dist.destroy_process_group()
    facts = [
        f"{args.preset}, vocabulary {args.vocabulary:,}, {args.method} of rank width / 4, float32 weights"
        + (", TF32 products" if device.type == "cuda" else ""),
        f"{args.batch} × {args.length} tokens a step; medians of {args.rounds} × {args.steps} steps",
        f"one rank, {backend}",
    ]
    lines = [*page("What a strategy costs one rank", facts, HEAD, device=device), *table(rows), ""]
    print("\n".join(lines))
    save(lines, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
