"""One rank of `wan.py`, in a namespace of its slow network: trains with each method and writes what it saw."""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from slow_network_switch import Counters, read_counters
from wan_methods import METHODS, ROUTES, Batch, Training, loss

from thinrank.trainers import PySourceConfig, TextData
from thinrank.trainers.models import PRESETS, build_model

WARMUP = 3  # DDP lays its buckets out anew after the first step, and PowerSGD compresses from the third one on
LEAST = 3  # steps that are timed however long they take


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks do; `wan.py` documents the fields as arguments."""

    methods: list[str]
    rates: dict[str, float]  # learning rate of each method
    preset: str
    vocabulary: int
    length: int
    rows: int  # of each rank
    steps: int
    budget: float
    seconds: float
    held_out: int
    text: str | None
    seed: int
    folder: str
    counters: str

    def data(self) -> PySourceConfig:
        return PySourceConfig(
            vocab_size=self.vocabulary,
            sequence_length=self.length,
            seed=self.seed,
            folder=self.text,
            validation_tokens=self.held_out,
        )


@dataclass(kw_only=True)
class Seen:
    """What a rank saw of a method.

    Attributes:
        durations: seconds of each timed step.
        sent: bytes that this rank put on the wire in them, as the switch counts.
        payload: bytes that it had summed over the ranks in them, as the method counts; None if it does not.
        egress: bytes that left it in them, as the method counts; None if it does not.
        own: seconds in them of its own side of exchanges, without waiting.
        late: milliseconds by which the switch was late with a frame, on average, from all to all.
        dropped: frames that were lost on the way, from all to all.
        curve: (seconds since the first step began, loss of this rank's batch) after each step of a training by time.
        held_out: loss of the held-out text at the end of it, in nats per token; None if every rank has its own model.
    """

    durations: list[float] = field(default_factory=list)
    sent: int = 0
    payload: int | None = None
    egress: float | None = None
    own: float = 0.0
    late: float = 0.0
    dropped: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    held_out: float | None = None


def total(job: Job, world: int) -> Counters:
    """The counters of all ports together."""
    ports = [read_counters(Path(job.counters), port) for port in range(world)]
    return Counters(*(sum(column) for column in zip(*ports, strict=True)))


def timed(job: Job, training: Training, batches: Iterator[Batch], rank: int, world: int, interval: int = 1) -> Seen:
    """Step times: as many steps as fit the budget, the same number on every rank, and whole intervals of exchanges."""
    seen = Seen()

    def one() -> None:
        start = time.perf_counter()
        training.step(next(batches))
        seen.durations.append(time.perf_counter() - start)

    for _ in range(WARMUP):
        training.step(next(batches))
    training.finish()
    # After a barrier every rank has all that was sent to it, so nothing of another step is counted.
    dist.barrier()
    own, everyone = read_counters(Path(job.counters), rank), total(job, world)
    payload = training.payload() if training.payload else 0
    egress, spent = training.egress() if training.egress else 0.0, training.own()
    one()
    fitting = torch.tensor([max(LEAST, min(job.steps, int(job.budget / seen.durations[0])))])
    fitting = -(-fitting // interval) * interval
    dist.broadcast(fitting, 0)
    for _ in range(int(fitting) - 1):
        one()
    training.finish()
    dist.barrier()
    after = total(job, world)
    seen.sent = read_counters(Path(job.counters), rank).sent_bytes - own.sent_bytes
    seen.payload = training.payload() - payload if training.payload else None
    seen.egress = training.egress() - egress if training.egress else None
    seen.own = training.own() - spent
    seen.dropped = after.dropped_frames - everyone.dropped_frames
    frames = after.received_frames - everyone.received_frames
    seen.late = (after.late_microseconds - everyone.late_microseconds) / 1e3 / max(1, frames)
    return seen


def by_time(job: Job, training: Training, batches: Iterator[Batch], rank: int, end: Path) -> Seen:
    """A training of so many seconds on the first rank's clock, which tells the others of its end by a file.

    No rank can end a step that the first one has not begun, so all of them find the last step's number before they
    would begin another: nothing has to travel for it.
    """
    seen = Seen()
    last: int | None = None
    dist.barrier()
    start = time.perf_counter()
    while last is None or len(seen.curve) < last:
        value = training.step(next(batches)).item()
        seen.curve.append((time.perf_counter() - start, value))
        if last is None and rank == 0 and seen.curve[-1][0] >= job.seconds:
            last = len(seen.curve) + 1
            whole = end.with_suffix(".part")
            whole.write_text(str(last))
            whole.rename(end)
        elif last is None and end.exists():
            last = int(end.read_text())
    training.settle()
    dist.barrier()
    return seen


def held_out(model: torch.nn.Module, data: TextData) -> float:
    """Nats per token of the held-out text, of which every rank reads its share."""
    model.eval()
    found = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in data.val_dataloader():
            tokens = int((batch["labels"] >= 0).sum())
            if tokens:
                found += torch.tensor([tokens * loss(model, batch).item(), tokens], dtype=torch.float64)
    dist.all_reduce(found)
    return float(found[0] / found[1])


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(f"{job.folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(minutes=30))
    group = dist.group.WORLD
    assert group is not None
    data = TextData(job.data(), batch_size=job.rows * world, rank=rank, world=world)
    data.setup("fit")
    for name in job.methods:
        model = build_model(PRESETS[job.preset], data.vocab_size, seed=job.seed)
        training = METHODS[name](model, group, job.rates[name])
        batches = iter(data.train_dataloader())
        if job.seconds:
            seen = by_time(job, training, batches, rank, Path(job.folder, f"{name}.end"))
            seen.held_out = held_out(model, data) if training.together else None
        else:
            route = ROUTES.get(name)
            seen = timed(job, training, batches, rank, world, route.interval if route else 1)
        Path(job.folder, f"{name}-{rank}.json").write_text(json.dumps(asdict(seen)))
        if rank == 0:
            print(f"{name}: {len(seen.durations) or len(seen.curve)} steps", file=sys.stderr, flush=True)
        dist.barrier()
        del training, model
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
