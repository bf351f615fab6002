"""The trainings of `alarms.py`: healthy ones and ones that are made to diverge, with every signal that may tell."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinrank.optim import AdamWConfig, GaLorePlusConfig, MethodConfig, MuonConfig, SubspaceAdamWConfig, build
from thinrank.optim.guards import Detector, Reading, ZClip, ZScore
from thinrank.optim.spectra import Spectra
from thinrank.trainers import PySourceConfig, TextData
from thinrank.trainers.files import write_text
from thinrank.trainers.gradients import total_norm
from thinrank.trainers.models import ModelConfig, build_model
from thinrank.trainers.module import token_nats

METRICS = ("sign_diversity", "sigma", "sigma_gap", "weight_rms", "input_max")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train.

    Attributes:
        broken: it is meant to diverge.
        begin: the step from which it differs from a healthy run; 0: from the start.
        lr: multiplies the healthy learning rate.
        clip: largest gradient norm, or None.
        method: of thinrank, by its learning rate; None is AdamW.
        half_states: AdamW's moments are rounded to bfloat16 after every step.
        qk_norm: queries and keys are normalised.
        init: multiplies the initial weights' standard deviation.
        scaled: one layer's weight (the second block's `o_proj`) is multiplied by this, once.
        noise: share of the tokens that a corrupted shard has replaced by chance, in every batch.
        repeated: the corrupted shard repeats one token instead.
        warmup: steps.
    """

    name: str
    broken: bool
    begin: int = 0
    lr: float = 1.0
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.1
    method: str = "adamw"
    half_states: bool = False
    qk_norm: bool = False
    init: float = 1.0
    scaled: float = 1.0
    noise: float = 0.0
    repeated: bool = False
    warmup: int = 40


LATER = 200
"""When what begins later begins: after the baselines are known."""

HEALTHY = (
    Case(name="plain", broken=False),
    Case(name="lr ÷ 2", broken=False, lr=0.5),
    Case(name="lr × 2", broken=False, lr=2.0),
    Case(name="no decay", broken=False, decay=0.0),
    Case(name="decay × 3", broken=False, decay=0.3),
    Case(name="no clipping", broken=False, clip=None),
    Case(name="β2 0.99", broken=False, betas=(0.9, 0.99)),
    Case(name="qk-norm", broken=False, qk_norm=True),
    Case(name="no warm-up", broken=False, warmup=1),
    Case(name="Muon", broken=False, method="muon"),
    Case(name="GaLore+", broken=False, method="galore_plus"),
    Case(name="SubspaceAdamW", broken=False, method="subspace_adamw"),
)

BROKEN = (
    Case(name="lr × 16", broken=True, begin=LATER, lr=16.0, clip=None),
    Case(name="lr × 32", broken=True, begin=LATER, lr=32.0, clip=None),
    Case(name="lr × 64", broken=True, begin=LATER, lr=64.0, clip=None),
    Case(name="lr × 32, clipped", broken=True, begin=LATER, lr=32.0),
    Case(name="lr × 128, clipped", broken=True, begin=LATER, lr=128.0),
    Case(name="lr × 32, no decay", broken=True, begin=LATER, lr=32.0, decay=0.0, clip=None),
    Case(name="lr × 128 with qk-norm", broken=True, begin=LATER, lr=128.0, qk_norm=True, clip=None),
    Case(name="bfloat16 states, lr × 32", broken=True, begin=LATER, lr=32.0, half_states=True, clip=None),
    Case(name="β2 0.999, lr × 32", broken=True, begin=LATER, lr=32.0, betas=(0.9, 0.999), clip=None),
    Case(name="β1 0.99, lr × 32", broken=True, begin=LATER, lr=32.0, betas=(0.99, 0.95), clip=None),
    Case(name="ε 1e-16, lr × 32", broken=True, begin=LATER, lr=32.0, eps=1e-16, clip=None),
    Case(name="noisy shard, lr × 4", broken=True, begin=LATER, lr=4.0, noise=1.0, clip=None),
    Case(name="shard of one token, lr × 8", broken=True, begin=LATER, lr=8.0, repeated=True, clip=None),
    Case(name="layer × 100, lr × 4", broken=True, begin=LATER, lr=4.0, scaled=100.0, clip=None),
    Case(name="lr × 64 from the start, no warm-up", broken=True, lr=64.0, warmup=1, clip=None),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What all runs of one part of the comparison share; `alarms.py` documents the fields as arguments."""

    width: int
    layers: int
    seed: int
    steps: int = 600
    rows: int = 8
    length: int = 128
    vocabulary: int = 1024
    lr: float = 4e-3
    embedding_lr: float = 2e-2
    every: int = 5
    text: str | None = None

    def model(self, case: Case) -> ModelConfig:
        return ModelConfig(
            name=f"w{self.width}",
            architecture="qwen3" if case.qk_norm else "llama",
            hidden_size=self.width,
            intermediate_size=8 * self.width // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=max(2, self.width // 32),
            max_position_embeddings=self.length,
            initializer_range=0.02 * case.init,
        )


@dataclass(kw_only=True)
class Run:
    """What a training left.

    Attributes:
        losses: nats per token of every step's batch.
        norms: gradient norm of every step, before clipping.
        steps: of the readings.
        layers: by metric a list of layers' values for each reading.
        logits: an upper bound of the largest attention logit at each reading, from the norms of queries and keys.
        guard: one of `GUARDS`, or none.
        skipped: steps that it has left out.
    """

    case: Case
    size: Size
    guard: str = ""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    layers: dict[str, list[list[float]]] = field(default_factory=dict)
    logits: list[float] = field(default_factory=list)
    skipped: int = 0

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Run:
        found = json.loads(path.read_text())
        case = {**found.pop("case")}
        case["betas"] = tuple(case["betas"])
        return cls(case=Case(**case), size=Size(**found.pop("size")), **found)


@functools.cache
def _data(vocabulary: int, length: int, rows: int, seed: int, text: str | None) -> TextData:
    data = TextData(
        PySourceConfig(vocab_size=vocabulary, sequence_length=length, seed=seed, folder=text), batch_size=rows
    )
    data.setup("fit")
    return data


def _batches(case: Case, size: Size) -> Iterator[Mapping[str, Any]]:
    """Batches; from `case.begin` on those of a corrupted shard."""
    generator = torch.Generator().manual_seed(size.seed)
    data = _data(size.vocabulary, size.length, size.rows, size.seed, size.text)
    for step, batch in enumerate(data.train_dataloader(), 1):
        if step > case.begin and (case.noise or case.repeated):
            tokens, labels = batch["input_ids"].clone(), batch["labels"].clone()
            if case.repeated:
                tokens[:], labels[:] = tokens[0, 0], (tokens[0, 0] + step) % data.vocab_size
            else:
                longer = (tokens.shape[0], tokens.shape[1] + 1)  # labels are the tokens after
                chance = torch.randint(data.vocab_size, longer, generator=generator)
                there = torch.rand(longer, generator=generator) < case.noise
                tokens = torch.where(there[:, :-1], chance[:, :-1], tokens)
                labels = torch.where(there[:, 1:], chance[:, 1:], labels)
            batch = {**batch, "input_ids": tokens, "labels": labels}
        yield batch


def _config(case: Case, size: Size) -> MethodConfig:
    common: dict[str, Any] = {"weight_decay": case.decay, "betas": case.betas, "eps": case.eps}
    rates: dict[str, Any] = {"lr": size.lr, "embedding_lr": size.embedding_lr}
    if case.method == "muon":
        return MuonConfig(**common, lr=0.02, embedding_lr=size.embedding_lr)
    if case.method == "galore_plus":
        return GaLorePlusConfig(**common, **rates, update_proj_gap=50)
    if case.method == "subspace_adamw":
        return SubspaceAdamWConfig(**common, **rates)
    return AdamWConfig(**common, **rates)


class _Heads:
    """The largest norms of queries and keys, per head, in one forward."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._model = model

    def begin(self) -> None:
        self._found.clear()
        modules = dict(self._model.named_modules())
        for name, module in modules.items():
            if not name.endswith("self_attn"):
                continue
            size = int(module.head_dim)  # pyright: ignore[reportArgumentType]
            for kind in ("q", "k"):
                source = getattr(module, f"{kind}_norm", None) or getattr(module, f"{kind}_proj")
                self._hooks.append(source.register_forward_hook(self._hook(f"{name}.{kind}", size)))

    def _hook(self, name: str, size: int) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            heads = output.detach().unflatten(-1, (-1, size)) if output.shape[-1] != size else output.detach()
            self._found[name] = heads.norm(dim=-1).flatten(0, -2).amax(0).amax() / math.sqrt(math.sqrt(size))

        return look

    def end(self) -> float:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        names = [name[:-2] for name in self._found if name.endswith(".q")]
        return max(float(self._found[f"{name}.q"] * self._found[f"{name}.k"]) for name in names)


GUARDS: dict[str, Callable[[], Detector]] = {"zscore": ZScore, "zclip": ZClip}
"""Detectors as they come: OLMo's leaves out steps, ZClip limits the gradient norm."""


def train(case: Case, size: Size, guard: str = "") -> Run:
    """Trains until the end or, without a guard, until the loss is no number; the same seeds give the same run."""
    detector = GUARDS[guard]() if guard else None
    data = _data(size.vocabulary, size.length, size.rows, size.seed, size.text)
    model = build_model(size.model(case), data.vocab_size, seed=size.seed)
    optimizer = build(model, _config(case, size), seed=size.seed)
    spectra, heads = Spectra(model, optimizer, metrics=METRICS), _Heads(model)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    run, batches = Run(case=case, size=size, guard=guard), _batches(case, size)
    for step in range(1, size.steps + 1):
        batch = next(batches)
        if step == case.begin + 1 and case.scaled != 1:
            with torch.no_grad():
                model.get_submodule("model.layers.1.self_attn.o_proj").get_parameter("weight").mul_(case.scaled)
        # a rate that is too high is reached over as many steps as a warm-up has, once it begins
        ramp = min(1.0, max(0, step - case.begin) / max(1, case.warmup))
        much = case.lr**ramp if case.begin else case.lr
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * much * min(1.0, step / case.warmup)
        reads = step % size.every == 0
        if reads:
            spectra.begin()
            heads.begin()
        optimizer.zero_grad()
        nats, count = token_nats(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"])
        loss = nats / count
        loss.backward()
        norm = total_norm(model.parameters())
        run.losses.append(float(loss.detach()))
        run.norms.append(float(norm))
        if reads:
            layers, names = spectra.end(), list(spectra.layers)
            run.steps.append(step)
            run.logits.append(heads.end())
            for metric in METRICS:
                row = [layers[name].values.get(metric, math.nan) for name in names]
                run.layers.setdefault(metric, []).append(row)
        if not (math.isfinite(run.losses[-1]) and math.isfinite(run.norms[-1])):
            if detector is None:
                break
            run.skipped += 1
            continue
        limits = [1.0 if step <= case.begin else case.clip]
        if detector is not None:
            reading = Reading(loss=run.losses[-1], norm=run.norms[-1])
            verdict = detector.judge(reading)
            detector.learn(reading, verdict)
            if guard == "zscore" and verdict.spike:
                run.skipped += 1
                continue
            limits.append(verdict.limit)
        clip = min((limit for limit in limits if limit is not None), default=None)
        if clip is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
        optimizer.step()
        if case.half_states and step > case.begin:
            for state in optimizer.state.values():
                for key, value in state.items():
                    if key in ("exp_avg", "exp_avg_sq"):
                        value.copy_(value.bfloat16())
    return run
