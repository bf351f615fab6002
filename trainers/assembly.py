"""A run from a configuration to a report: the parts, put together in the order that makes errors cheap.

First what needs no time (the folder, the plan), then data and model, and only when all of them exist the run folder is
changed.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from transformers.utils import logging as transformers_logging

from thinrank.optim import MatrixOptimizer
from thinrank.optim.gossip.parts import expected, graph_of
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.lowrank.remainder import leaves_remainder, remembers_untold
from thinrank.optim.messages import COARSE, UNUSED_FEEDBACK, whole_messages_because
from thinrank.optim.rule import MatrixRule, remembers
from thinrank.trainers import report
from thinrank.trainers.callbacks.checkpointing import Checkpointing
from thinrank.trainers.callbacks.guard import NonFiniteGuard
from thinrank.trainers.callbacks.held import HeldMemory
from thinrank.trainers.callbacks.layers import LayerUpkeep
from thinrank.trainers.callbacks.metrics import TrainingMetrics
from thinrank.trainers.callbacks.preemption import Preemption
from thinrank.trainers.callbacks.progress import Progress
from thinrank.trainers.checkpoint import AtomicCheckpointIO, require_space, step_of
from thinrank.trainers.curves import Curves
from thinrank.trainers.data import TextData
from thinrank.trainers.ending import (
    FINISHED,
    PREEMPTED,
    communication,
    conclude,
    final_validation,
    measured_on_all,
    optimizer_state,
    record_failure,
    sample_and_export,
    say,
    start_metrics,
    whole_weights,
)
from thinrank.trainers.errors import PreflightError, RankLost, UserError
from thinrank.trainers.jobs import Job, resumable
from thinrank.trainers.liveness import heartbeat
from thinrank.trainers.loss.backends import Job as LossJob
from thinrank.trainers.loss.backends import Unable, require
from thinrank.trainers.loss.chunked import Form
from thinrank.trainers.module import CausalLM, frozen_names
from thinrank.trainers.parts import Parts
from thinrank.trainers.plan.precision import CAST, WEIGHTS, as_trained
from thinrank.trainers.preflight.check import check_machines, check_run
from thinrank.trainers.pretrain import Plan, TrainingConfig
from thinrank.trainers.resident import Resident
from thinrank.trainers.rng import seed_all
from thinrank.trainers.run import RunFolder, config_tree, identity_json
from thinrank.trainers.strategies import (
    FSDP2Config,
    GossipConfig,
    ReplicatedConfig,
    World,
    build_strategy,
    process_group,
    together,
)
from thinrank.trainers.strategies.world import from_rank_zero


def run(job: Job, resolved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """See `thinrank.trainers.pretrain.pretrain`."""
    config = job.config
    world = World.from_environment()
    plan = Plan.of(config, world)
    cuda = _wants_cuda(config, world)
    _require_loss(config, cuda=cuda)
    job.check()
    tree = resolved if resolved is not None else config_tree(config)
    folder = RunFolder(config.run.dir)
    with _quiet(), process_group(world, config.strategy, cuda=cuda):
        begun = False

        def record(error: BaseException) -> None:
            recorder = error.recorder if isinstance(error, RankLost) else world.main
            if recorder and (begun or isinstance(error, PreflightError)):
                record_failure(folder, error)

        try:
            with heartbeat(config.strategy.heartbeat_timeout, lost=record):
                resume, origin = from_rank_zero(world, lambda: _open(folder, job, tree))
                if config.run.preflight.enabled:
                    say(world, f"preflight   {check_machines(world, config.run.preflight, folder.path, cuda=cuda)}")
                parts = _assemble(job, origin, tree, world, plan, folder, resume, cuda)
                begun = True
                with parts.preemption, _products(config.trainer.precision, cuda=cuda):
                    return _train(parts)
        except BaseException as error:
            record(error)
            raise
        finally:
            if world.main:
                folder.close() if begun else folder.discard()


def _open(folder: RunFolder, job: Job, tree: Mapping[str, Any]) -> tuple[Path | None, dict[str, str]]:
    folder.open()
    resume, origin = folder.choose(job.config.run, identity_json(tree)), job.origin()
    if resume is not None:
        resumable(resume, origin)
    return resume, origin


def _assemble(
    job: Job,
    origin: Mapping[str, str],
    tree: Mapping[str, Any],
    world: World,
    plan: Plan,
    folder: RunFolder,
    resume: Path | None,
    cuda: bool,
) -> Parts:
    config = job.config
    data = TextData(
        config.data,
        batch_size=config.trainer.batch_size,
        micro_batches=plan.accumulate,
        rank=world.rank,
        world=world.size,
    )
    if world.local_rank == 0:
        say(world, "preparing data")
    # One process on each machine fills the cache; the others then find it.
    together(world, lambda: data.prepare_data() if world.local_rank == 0 else None)
    together(world, lambda: data.setup("fit"))
    resident = Resident()  # after data and tokenizer, which need memory of their own
    model = together(world, lambda: as_trained(job.build(data.vocab_size), config.trainer.precision))
    routing = job.route(model)
    size = _checkpoint_bytes(model, job.keeps_frozen) + routing.state_bytes()
    from_rank_zero(world, lambda: require_space(folder.checkpoints, size))
    if config.run.preflight.enabled:
        gradients = 0 if config.trainer.in_backward != "off" else _gradient_bytes(model)
        needed = (size + gradients) // config.strategy.shards(world.size)
        if not cuda:  # where the model lies already, whole
            needed = max(needed, _checkpoint_bytes(model, True))
        check_run(world, config.run.preflight, data.manifest_hash, needed, cuda=cuda)
    module = CausalLM(
        model,
        config.optimizer,
        schedule=config.trainer.schedule,
        total_steps=plan.steps,
        clip_norm=config.trainer.clip_norm,
        in_backward=config.trainer.in_backward,
        seed=config.trainer.seed,
        projection_seed=config.trainer.projection_seed,
        save_frozen=job.keeps_frozen,
        cross_entropy=config.trainer.cross_entropy,
        z_loss=config.trainer.z_loss,
    )
    guard = NonFiniteGuard(config.trainer.nonfinite_limit)
    checkpointing = Checkpointing(
        folder.checkpoints,
        config.trainer.checkpoint_every,
        header={
            "identity": identity_json(tree),
            "manifest": data.manifest_hash,
            "origin": dict(origin),
            "commit": report.code_version()["commit"],
        },
        saved=lambda path, step: folder.write_status("running", step=step, steps=plan.steps, checkpoint=path.name),
    )
    preemption = Preemption(checkpointing, folder.marker, max_seconds=config.trainer.max_seconds)
    held = HeldMemory()
    upkeep = [LayerUpkeep(config.trainer.seed)] if config.reparam.acts else []
    trainer = _trainer(config, world, plan, folder, resume, cuda, [guard, held, *upkeep, preemption, checkpointing])
    return Parts(
        job=job,
        origin=origin,
        tree=tree,
        world=world,
        plan=plan,
        folder=folder,
        resume=resume,
        data=data,
        module=module,
        routing=routing,
        parameters=sum(p.numel() for p in model.parameters()),
        trainer=trainer,
        checkpointing=checkpointing,
        preemption=preemption,
        guard=guard,
        held=held,
        resident=resident,
    )


def _checkpoint_bytes(model: torch.nn.Module, frozen: bool) -> int:
    """Bytes of the weights in a checkpoint."""
    left_out = set() if frozen else frozen_names(model)
    values = [value for name, value in model.state_dict().items() if name not in left_out]
    return sum(value.numel() * value.element_size() for value in values)


def _gradient_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _trainer(
    config: TrainingConfig,
    world: World,
    plan: Plan,
    folder: RunFolder,
    resume: Path | None,
    cuda: bool,
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    choice = config.trainer
    start = 0 if resume is None else step_of(resume) or 0
    loggers: list[Logger] = [Curves(folder.curves, start)]
    if choice.tensorboard:
        # One folder for all starts of the run. What a killed process logged after its last checkpoint will be logged
        # again, and TensorBoard hides the first version from `purge_step` on.
        purge = None if resume is None else start + 1
        events = TensorBoardLogger(
            folder.path, name="", version="tensorboard", default_hp_metric=False, purge_step=purge
        )
        loggers.insert(0, events)  # the first one: Lightning takes its folder for the run's
    strategy, environment = build_strategy(config.strategy, world)
    return pl.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=world.local_size,
        num_nodes=world.nodes,
        strategy=strategy,
        precision=choice.precision,  # pyright: ignore[reportArgumentType] - one of them, checked by the config
        max_steps=plan.steps,
        accumulate_grad_batches=plan.accumulate,
        val_check_interval=max(1, choice.validate_every) * plan.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=None if choice.validate_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=choice.log_every,
        use_distributed_sampler=False,  # the data module divides the batch itself
        callbacks=[TrainingMetrics(choice.log_every), Progress(choice.log_every), *callbacks],
        plugins=[AtomicCheckpointIO(), environment],
        logger=loggers,
        deterministic=choice.deterministic or None,
        default_root_dir=folder.path,
        enable_model_summary=False,
        enable_autolog_hparams=False,
    )


def _products(precision: str, *, cuda: bool) -> AbstractContextManager[None]:
    """The model's own products are float32 ones only without a mixed precision."""
    return fast_products(torch.device("cpu")) if precision == "32-true" and not cuda else nullcontext()


def _train(parts: Parts) -> dict[str, Any]:
    config, world, trainer, folder = parts.config, parts.world, parts.trainer, parts.folder
    if world.main:
        folder.begin(parts.tree, resumed_from=parts.resume, overwrite=config.run.overwrite)
        folder.log("start", step=parts.start, world=world.size, accumulate=parts.plan.accumulate)
        folder.write_status("running", step=parts.start, steps=parts.plan.steps)
    _introduce(parts)
    before = start_metrics(parts) if parts.job.measures_start else {}
    seed_all(config.trainer.seed, world.rank)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # of this run, whatever the process did before
    trainer.fit(parts.module, datamodule=parts.data, ckpt_path=parts.resume, weights_only=True)
    preempted = parts.preemption.preempted
    facts: dict[str, Any] = {
        "name": config.run.name,
        "dir": str(folder.path),
        "state": "preempted" if preempted else "finished",
        "stopped_by": parts.preemption.stopped_by,
        "exit_code": PREEMPTED if preempted else FINISHED,
        "resumed_from": parts.start if parts.resume is not None else None,
        "started": started,
    }
    # now, because a later stage of Lightning lets go of the optimizer
    optimizer = trainer.optimizers[0]
    if isinstance(optimizer, MatrixOptimizer) and (ranks := optimizer.ranks()):
        parts.routing, parts.ranks = parts.job.route(parts.model, ranks), ranks
    state, sent_a_step, measured = optimizer_state(parts), communication(parts), measured_on_all(parts)
    metrics, sample, artifacts = before, {}, {}
    if not preempted:
        metrics = {**before, **final_validation(parts)}
        weights = whole_weights(parts)
        sample, artifacts = from_rank_zero(world, lambda: sample_and_export(parts, weights))
    if parts.checkpointing.best_step >= 0:
        metrics["val/best_loss"] = parts.checkpointing.best_value
        metrics["val/best_step"] = parts.checkpointing.best_step
    return from_rank_zero(
        world, lambda: conclude(parts, facts, state, sent_a_step, measured, metrics, sample, artifacts)
    )


def _introduce(parts: Parts) -> None:
    """What is about to be done, on the terminal and in TensorBoard."""
    world, plan, routing = parts.world, parts.plan, parts.routing
    if not world.main:
        return
    data = parts.data
    partly = routing.elements() != parts.parameters
    trained = f", of which {routing.elements():,} are trained" if partly else ""
    tokens = (
        f"{data.train_tokens:,} training tokens" if data.train_tokens is not None else "a stream of training tokens"
    )
    say(world, f"run folder  {parts.folder.path}")
    say(world, f"model       {parts.config.model.name}, {parts.parameters:,} parameters{trained}")
    say(world, f"data        {parts.config.data.name}, {tokens}, vocabulary {data.vocab_size:,}")
    say(
        world,
        f"steps       {plan.steps:,} of {plan.tokens_per_step:,} tokens "
        f"({world.size} × {plan.accumulate} × {plan.micro_batch} sequences)",
    )
    if parts.job.conversion is not None:
        say(world, parts.job.conversion.table())
    say(world, routing.table())
    if (exchange := _exchange(parts)) is not None:
        say(world, f"exchange    {exchange}")
    if (
        remembers_untold(parts.config.optimizer.matrix_rule())
        and getattr(parts.config.strategy, "messages", "") not in COARSE
    ):
        say(world, f"feedback    optimizer.sign_feedback {UNUSED_FEEDBACK}")
    if parts.resume is not None:
        done = "; nothing is left to do but the end" if parts.start >= plan.steps else ""
        say(world, f"resuming from step {parts.start:,} ({parts.resume.name}){done}")
    for logger in parts.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("routing", f"```\n{routing.table()}\n```", parts.start)


def _exchange(parts: Parts) -> str | None:
    """What travels between the ranks at every step, in words."""
    strategy, rule = parts.config.strategy, parts.config.optimizer.matrix_rule()
    if isinstance(strategy, GossipConfig):
        graph, shapes = graph_of(strategy.made_topology(), parts.world.size), parts.routing.shapes()
        return expected(graph, strategy.scheme, strategy.made_compressor(), shapes, strategy.scheme_options).sentence
    if isinstance(strategy, FSDP2Config) and (parts.shards > 1 or strategy.messages == "auto"):
        near = f"rows of weights and gradients among {parts.shards} ranks"
        if rule is not None:
            near += "; sums for matrices that are stepped by rows; gradients and updates of those that have an owner"
        return near if strategy.messages == "full" else f"{near}; between {strategy.replicas} replicas {_afar(rule)}"
    if parts.world.size == 1 or not isinstance(strategy, ReplicatedConfig):
        return None
    if rule is None:
        return "whole gradients: this method has no subspace"
    if strategy.messages in COARSE and leaves_remainder(rule):
        return "coordinates and signs of matrices between renewals; gradients at renewals, and of everything else"
    cause = whole_messages_because(rule, apart=strategy.name == "thinrank_ddp")
    cause = "strategy.messages=full asks for it" if strategy.messages == "full" else cause
    if cause is not None:
        return f"whole gradients, because {cause}"
    if remembers(rule):
        return "small factors of updates of matrices, of which each rank remembers its own part; other gradients"
    return "coordinates of matrices between renewals; gradients at renewals, and of everything else"


def _afar(rule: MatrixRule | None) -> str:
    """What replicas of sharded models exchange."""
    cause = "this method has no subspace" if rule is None else whole_messages_because(rule, apart=False)
    if cause is not None:
        return f"whole gradients of pieces, because {cause}"
    return "coordinates of matrices that are stepped by rows; gradients of pieces at renewals, and of everything else"


def _require_loss(config: TrainingConfig, *, cuda: bool) -> None:
    choice = config.trainer
    if choice.cross_entropy == "auto":
        return
    low = (CAST | WEIGHTS).get(choice.precision) if cuda else None
    form = Form(z_loss=choice.z_loss, lower=None if low == torch.float64 else low)
    try:
        require(choice.cross_entropy, LossJob(form=form, device="cuda" if cuda else "cpu"))
    except Unable as error:
        raise UserError(f"trainer.{error}") from error


def _wants_cuda(config: TrainingConfig, world: World) -> bool:
    accelerator = config.trainer.accelerator
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in ("gpu", "cuda") and found == 0:
        raise UserError(f"trainer.accelerator={accelerator} needs a CUDA device, and there is none: set it to cpu")
    cuda = found > 0 and accelerator != "cpu"
    if cuda and world.local_size > found:
        raise UserError(
            f"{world.local_size} processes need as many GPUs, and this machine has {found}: "
            f"start torchrun with --nproc-per-node {found}"
        )
    if not cuda and config.trainer.precision == "16-mixed":
        raise UserError("trainer.precision=16-mixed needs a GPU: use bf16-mixed or 32-true on the CPU")
    return cuda


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps remarks on hardware and products and bars for files of a second off the terminal; warnings stay."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # Lightning 2.6 asks torch 2.13 in a deprecated way whether a batch is nested
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated", category=FutureWarning)
        # of a sharded model's logits, which nothing here writes into
        warnings.filterwarnings(
            "ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning
        )
        # and DeepSpeed 0.19 torch 2.13 for collectives by their old names
        warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
