"""``--dry-run``: what a configuration would train, told without data, a run folder or the memory of a weight."""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import torch

from thinrank.configs.arguments import Arguments
from thinrank.configs.load import Loaded
from thinrank.optim.grouping import Routing
from thinrank.trainers.data.config import DataConfig
from thinrank.trainers.finetune import FinetuneConfig
from thinrank.trainers.jobs import Finetuning, Job, Pretraining
from thinrank.trainers.plan.footprint import Footprint, footprint
from thinrank.trainers.plan.page import page
from thinrank.trainers.plan.precision import AUTO, as_trained, fitting
from thinrank.trainers.plan.strategies import is_planned
from thinrank.trainers.plan.trace import Work
from thinrank.trainers.pretrain import Plan, TrainingConfig
from thinrank.trainers.strategies.world import World


def dry_run(loaded: Loaded, arguments: Arguments, *, script: str) -> str:
    """The routing table, parameters, optimizer-state bytes (and AdamW's), tokens, what each process will hold and send,
    and the command that runs it.

    The model is laid out on the meta device: a configuration of any size is planned in seconds.

    Args:
        script: the path by which the launch line names the script.

    Raises:
        UserError: a target that fits no parameter of the model, a model or a tokenizer that is not there, or a batch
            that the processes cannot share.
    """
    config: TrainingConfig = loaded.config
    if config.trainer.precision == AUTO:
        cuda = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
        config = config.computing_in(fitting(cuda=cuda))
    found = laid_out(config, planned_world(config))
    world, sizes, model, routing, vocab = found.world, found.sizes, found.model, found.routing, found.vocab
    dense, choice, conversion = found.job.adamw_bytes(model), config.strategy, found.job.conversion
    unplanned = f"there is no plan of memory and messages for strategy={choice.name} yet"
    name, state = loaded.names["optimizer"], routing.state_bytes()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    parts = config.strategy.shards(world.size)
    apart = f"; about {mebibytes(state // parts)} on each of {parts} ranks" if parts > 1 else ""
    trained = f", of which {routing.elements():,} are trained" if routing.elements() != total else ""
    lines = [
        f"model {config.model.name} ({model.config.model_type}), vocabulary {vocab:,}: "
        f"{total:,} parameters{trained}, {mebibytes(weights)} of weights",
        *_by_role(routing),
        *(["", f"layers of factors, reparam={config.reparam.name}", conversion.table()] if conversion else []),
        "",
        f"optimizer {name}",
        routing.table(),
        f"optimizer state: {mebibytes(state)}, {state / max(dense, 1):.1%} of AdamW's {mebibytes(dense)}{apart}",
        "",
        f"a step: {config.trainer.batch_size:,} sequences of {config.data.sequence_length:,} tokens are "
        f"{sizes.tokens_per_step:,} tokens ({counted(world.size, 'process', 'es')} × "
        f"{counted(sizes.accumulate, 'micro-batch', 'es')} × {counted(sizes.micro_batch, 'sequence')})",
        f"the run: {sizes.steps:,} steps, {sizes.steps * sizes.tokens_per_step:,} tokens",
        "",
        page(found.plan()) if is_planned(choice) else unplanned,
        "",
        "nothing was written; to run it:",
        f"  {launch_line(world, arguments, script)}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class LaidOut:
    """A run without weights: shapes on the meta device, and what steps which of them."""

    config: TrainingConfig
    world: World
    sizes: Plan
    job: Job
    vocab: int
    model: Any
    routing: Routing

    def plan(self, known: Work | None = None) -> Footprint:
        """What it will hold and send; `known` is the work of the same step, if it has been traced before.

        Raises:
            UserError: a strategy without a plan.
        """
        return footprint(self.config, self.model, self.routing, self.world, trace=known is None, known=known)


def laid_out(config: TrainingConfig, world: World) -> LaidOut:
    """The run of `config` on `world`, on the meta device.

    Raises:
        UserError: as `dry_run`.
    """
    job = (Finetuning if isinstance(config, FinetuneConfig) else Pretraining)(config)
    sizes = Plan.of(config, world)
    job.check()
    vocab = vocabulary(config.data)
    model = as_trained(job.build(vocab, meta=True), config.trainer.precision)
    return LaidOut(config=config, world=world, sizes=sizes, job=job, vocab=vocab, model=model, routing=job.route(model))


def vocabulary(data: DataConfig) -> int:
    """Rows of the embedding; an upper bound for a BPE, which finds fewer merges than asked for in a small corpus."""
    if data.tokenizer == "bpe":
        return data.vocab_size
    from thinrank.trainers.data.tokenizer import load_tokenizer, vocab_size

    # Only a BPE is trained on a corpus and kept in a cache.
    return vocab_size(load_tokenizer(data, cast("Any", None), cast("Any", None)))


def planned_world(config: TrainingConfig) -> World:
    """The processes of the launcher, else those that the configuration asks for, else one for each GPU."""
    world = World.from_environment()
    if world.size > 1:
        return world
    ranks, nodes = config.trainer.devices, config.trainer.num_nodes
    if not isinstance(ranks, int):
        ranks = 1 if config.trainer.accelerator == "cpu" else max(torch.cuda.device_count(), 1)
    return World(size=ranks * (nodes if isinstance(nodes, int) else 1), local_size=ranks)


def launch_line(world: World, arguments: Arguments, script: str) -> str:
    """The command that starts all processes of a machine."""
    words = [f"--config={file}" for file in arguments.files]
    words += [f"--config-dir={folder}" for folder in arguments.folders]
    words += [f"{key}={value}" for key, value in arguments.words]
    command = shlex.join([script, *words])
    if world.nodes > 1:
        meet = f"--nnodes {world.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
        return f"torchrun {meet} --nproc-per-node {world.local_size} {command}"
    if world.size > 1:
        return f"torchrun --standalone --nproc-per-node {world.size} {command}"
    return f"python {command}"


def counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _by_role(routing: Routing) -> list[str]:
    roles: dict[str, list[int]] = defaultdict(list)
    for row in routing.rows:
        roles[row.role].append(row.elements)
    return [f"  {role:<10} {len(sizes):>4} tensors {sum(sizes):>14,} parameters" for role, sizes in roles.items()]
