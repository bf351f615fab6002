"""One training of `gossip.py`: a method, its losses on held-out text, and what its ranks have sent and computed."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gossip_clocks import Trace
from gossip_methods import METHODS, typical
from gossip_ranks import Recipe, Rows
from torch import Tensor, nn

from thinrank.trainers import PySourceConfig, TextData
from thinrank.trainers.files import write_text
from thinrank.trainers.models import PRESETS, build_model
from thinrank.trainers.module import token_nats


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a training is, but for its method; `gossip.py` documents the fields as arguments."""

    ranks: int
    preset: str = "2m"
    vocabulary: int = 1024
    length: int = 256
    rows: int = 16  # of all ranks
    steps: int = 150
    every: int = 25
    held_out: int = 65_536
    seed: int = 0
    lr: float = 1.5e-3
    embedding_lr: float = 4e-2
    text: str | None = None

    def __post_init__(self) -> None:
        if self.rows % self.ranks or self.rows < self.ranks:
            raise ValueError(
                f"the {self.rows} rows of a batch cannot be shared out over {self.ranks} ranks: give a multiple of them"
            )

    def data(self) -> TextData:
        """The same object for trainings on the same text, which it takes seconds to find; nothing of it is used up."""
        config = PySourceConfig(
            vocab_size=self.vocabulary,
            sequence_length=self.length,
            seed=self.seed,
            folder=self.text,
            validation_tokens=self.held_out,
        )
        return _data(config, self.rows)

    def recipe(self, vocabulary: int) -> Recipe:
        return Recipe(
            model=lambda: build_model(PRESETS[self.preset], vocabulary, seed=self.seed),
            ranks=self.ranks,
            steps=self.steps,
            lr=self.lr,
            embedding_lr=self.embedding_lr,
            seed=self.seed,
        )


@functools.cache
def _data(config: PySourceConfig, rows: int) -> TextData:
    data = TextData(config, batch_size=rows)
    data.setup("fit")
    return data


@dataclass(kw_only=True)
class Found:
    """What a training has found.

    Attributes:
        trace: what its ranks have sent.
        compute: median processor seconds of a rank for its forward, backward and optimizer.
        codec: median processor seconds of a rank for its side of an exchange.
        curve: (steps, nats per token of held-out text), of the mean of all ranks' weights.
        local: the mean of the losses of each rank's own weights at the end; None where all are alike.
        apart: √(mean of ‖xᵢ − x̄‖²) / ‖x̄‖ at the end.
        bits: bits per byte at the end.
    """

    trace: Trace
    compute: float
    codec: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    local: float | None = None
    apart: float = 0.0
    bits: float = math.nan

    @property
    def loss(self) -> float:
        return self.curve[-1][1]


def train(name: str, job: Job, say: Callable[[str], None] = print) -> Found:
    """Trains with a method; ends early where its loss is no number."""
    data = job.data()
    training = METHODS[name].make(job.recipe(data.vocab_size))
    average = build_model(PRESETS[job.preset], data.vocab_size, seed=job.seed)
    batches = iter(data.train_dataloader())
    found = Found(trace=training.trace, compute=0.0, codec=0.0)
    for step in range(1, job.steps + 1):
        training.step(shares(next(batches), job.ranks))
        if step % job.every == 0 or step == job.steps:
            found.apart = show_average(average, training.models())
            found.curve.append((step, held_out(average, data)))
            say(f"{name}, {job.ranks} ranks, step {step}: {found.loss:.4f} nats, ranks {found.apart:.2e} apart")
            if not math.isfinite(found.loss):
                break
    models = training.models()
    found.local = sum(held_out(model, data) for model in models) / len(models) if len(models) > 1 else None
    found.compute, found.codec = typical(training.computed), typical(training.coded)
    found.bits = found.loss / math.log(2) / data.validation_bytes_per_token
    return found


def shares(batch: Rows, ranks: int) -> list[Rows]:
    """What of a batch is whose, as `TextData` has it for ranks in processes."""
    parts: dict[str, Sequence[Tensor]] = {name: batch[name].chunk(ranks) for name in ("input_ids", "labels")}
    return [{name: part[i] for name, part in parts.items()} for i in range(ranks)]


@torch.no_grad()
def show_average(into: nn.Module, models: Sequence[nn.Module]) -> float:
    """Puts the mean of all weights into a model; how far they are apart."""
    distance = size = 0.0
    for own, *all_ranks in zip(into.parameters(), *(model.parameters() for model in models), strict=True):
        stacked = torch.stack([each.detach() for each in all_ranks]).double()
        mean = stacked.mean(0)
        own.copy_(mean)
        distance += float((stacked - mean).square().sum()) / len(models)
        size += float(mean.square().sum())
    return math.sqrt(distance / size) if size else math.nan


@torch.no_grad()
def held_out(model: nn.Module, data: TextData) -> float:
    """Nats per token of the first held-out text."""
    nats = count = 0.0
    for batch in data.val_dataloader():
        found, labels = token_nats(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"])
        nats, count = nats + float(found), count + float(labels)
    return nats / count


# --- what was found already -------------------------------------------------------------------------------------------


def kept(name: str, job: Job, work: Path) -> Path:
    return work / f"{name}-{job.ranks}-{job.seed}.json"


def load(name: str, job: Job, work: Path) -> Found | None:
    """What the same training has found before; None if there was none, or another."""
    file = kept(name, job, work)
    if not file.exists():
        return None
    read: dict[str, Any] = json.loads(file.read_text())
    if read.pop("job") != asdict(job):
        return None
    read["curve"] = [(int(step), float(loss)) for step, loss in read["curve"]]
    return Found(**{**read, "trace": Trace.of_json(read["trace"])})


def keep(name: str, job: Job, work: Path, found: Found) -> None:
    work.mkdir(parents=True, exist_ok=True)
    fields = {key: getattr(found, key) for key in ("compute", "codec", "curve", "local", "apart", "bits")}
    write_text(kept(name, job, work), json.dumps({"job": asdict(job), **fields, "trace": found.trace.as_json()}))


def all_found(names: Sequence[str], job: Job, work: Path) -> Iterator[tuple[str, Found]]:
    """Each method's, trained where it is not known."""
    for name in names:
        found = load(name, job, work)
        if found is None:
            found = train(name, job, say=lambda text: print(text, flush=True))
            keep(name, job, work, found)
        yield name, found
