"""A run from a configuration to a report: the parts, put together in the order that makes errors cheap.

First what needs no time (the folder, the plan), then data and model, and only when all of them exist the run folder is
changed.
"""

from __future__ import annotations

import gc
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from transformers.utils import logging as transformers_logging

from thinrank.optim import MatrixOptimizer
from thinrank.optim.layerwise import Tails
from thinrank.optim.linalg.products import fast_products
from thinrank.trainers import report, rollback
from thinrank.trainers.callbacks.checkpointing import Checkpointing
from thinrank.trainers.callbacks.held import HeldMemory
from thinrank.trainers.callbacks.layers import LayerUpkeep
from thinrank.trainers.callbacks.layerwise import LayerwiseSchedule
from thinrank.trainers.callbacks.metrics import TrainingMetrics
from thinrank.trainers.callbacks.preemption import Preemption
from thinrank.trainers.callbacks.progress import Progress
from thinrank.trainers.callbacks.spectra import SpectralMonitor
from thinrank.trainers.callbacks.spikes import made_guard
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
from thinrank.trainers.errors import PreflightError, RankLost, RollBack, UserError
from thinrank.trainers.introduction import introduce
from thinrank.trainers.jobs import Job, resumable
from thinrank.trainers.liveness import heartbeat
from thinrank.trainers.loss.backends import Job as LossJob
from thinrank.trainers.loss.backends import Unable, require
from thinrank.trainers.loss.chunked import Form
from thinrank.trainers.module import CausalLM, frozen_names
from thinrank.trainers.parts import Parts
from thinrank.trainers.plan.precision import AUTO, CAST, WEIGHTS, as_trained, fitting
from thinrank.trainers.preflight.check import check_machines, check_run
from thinrank.trainers.pretrain import Plan, TrainingConfig
from thinrank.trainers.resident import Resident
from thinrank.trainers.rng import seed_all
from thinrank.trainers.run import RunFolder, check_identity, config_tree, identity_json, identity_of
from thinrank.trainers.scaling import refuse_other_classes
from thinrank.trainers.strategies import (
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
                resume, precision, origin, taken = from_rank_zero(world, lambda: _open(folder, job, tree, cuda=cuda))
                config, tree = _computing_in(config, tree, precision)
                job.config = config
                together(world, lambda: _require_arithmetic(config, cuda=cuda))
                if config.run.preflight.enabled:
                    say(world, f"preflight   {check_machines(world, config.run.preflight, folder.path, cuda=cuda)}")
                parts = _assemble(job, origin, tree, world, plan, folder, resume, cuda, taken)
                begun = True
                while True:
                    with parts.preemption, _products(config.trainer.precision, cuda=cuda):
                        try:
                            return _train(parts)
                        except RollBack as error:
                            asked = error.with_traceback(None)  # whose frames hold model and optimizer
                        resume, taken = _go_back(parts, asked)
                    received, resumed = parts.preemption.received, parts.origin_step
                    del parts  # all of it is made anew, as in a process that resumes
                    gc.collect()
                    parts = _assemble(job, origin, tree, world, plan, folder, resume, cuda, taken, again=True)
                    parts.preemption.received, parts.origin_step = received, resumed
        except BaseException as error:
            record(error)
            raise
        finally:
            if world.main:
                folder.close() if begun else folder.discard()


def _open(
    folder: RunFolder, job: Job, tree: Mapping[str, Any], *, cuda: bool
) -> tuple[Path | None, str, dict[str, str], list[rollback.Record]]:
    """Where to go on from, in which precision, what the run starts from, and what has been gone back from so far."""
    folder.open()
    if job.config.run.resume != "never":
        rollback.restore(folder, rollback.read(folder))  # what a process that was killed meanwhile has left
    resume, origin, precision = folder.choose(job.config.run), job.origin(), job.config.trainer.precision
    before = None if resume is None else identity_of(resume)
    if precision == AUTO:  # a run that goes on elsewhere goes on as it began
        precision = fitting(cuda=cuda) if before is None else json.loads(before)["trainer.precision"]
    if resume is None or before is None:
        return None, precision, origin, []
    check_identity(resume, before, identity_json(_computing_in(job.config, tree, precision)[1]))
    resumable(resume, origin)
    return resume, precision, origin, rollback.read(folder)


def _computing_in(config: Any, tree: Mapping[str, Any], precision: str) -> tuple[Any, Mapping[str, Any]]:
    """The configuration, and the same as plain values, with the precision that `auto` has come to."""
    try:
        config = config.computing_in(precision)
    except ValueError as error:  # a checkpoint's, which does not go with what the run may change
        raise UserError(f"the checkpoint was trained with trainer.precision={precision}: {error}") from error
    return config, {**tree, "trainer": {**tree["trainer"], "precision": precision}}


def _go_back(parts: Parts, asked: RollBack) -> tuple[Path, list[rollback.Record]]:
    """The checkpoint to go on from, and what has been gone back from so far."""
    choice, limit = parts.config.guard.rollback, parts.config.guard.rollback.limit
    every, batch, consumed = parts.config.trainer.checkpoint_every, parts.config.trainer.batch_size, parts.data.next
    resume, taken = from_rank_zero(
        parts.world,
        lambda: rollback.go_back(parts.folder, asked, choice, every=every, consumed=consumed, batch=batch),
    )
    say(parts.world, rollback.sentence(taken[-1], len(taken), limit))
    return resume, taken


def _assemble(
    job: Job,
    origin: Mapping[str, str],
    tree: Mapping[str, Any],
    world: World,
    plan: Plan,
    folder: RunFolder,
    resume: Path | None,
    cuda: bool,
    taken: Sequence[rollback.Record],
    *,
    again: bool = False,
) -> Parts:
    config = job.config
    data = TextData(
        config.data,
        batch_size=config.trainer.batch_size,
        micro_batches=plan.accumulate,
        rank=world.rank,
        world=world.size,
    )
    data.leave_out(rollback.samples(taken))
    if world.local_rank == 0 and not again:
        say(world, "preparing data")
    # One process on each machine fills the cache; the others then find it.
    together(world, lambda: data.prepare_data() if world.local_rank == 0 else None)
    together(world, lambda: data.setup("fit"))
    resident = Resident()  # after data and tokenizer, which need memory of their own
    model = together(world, lambda: as_trained(job.build(data.vocab_size), config.trainer.precision))
    routing = job.route(model)
    size = _checkpoint_bytes(model, job.keeps_frozen) + routing.state_bytes()
    reach = _reach(config)
    copies = 3 + -(-reach // config.trainer.checkpoint_every)
    from_rank_zero(world, lambda: require_space(folder.checkpoints, size, copies))
    if config.run.preflight.enabled and not again:
        gradients = 0 if config.trainer.in_backward != "off" else _gradient_bytes(model)
        needed = (size + gradients) // config.strategy.shards(world.size)
        if not cuda:  # where the model lies already, whole
            needed = max(needed, _checkpoint_bytes(model, True))
        check_run(world, config.run.preflight, data.manifest_hash, needed, cuda=cuda)
    scaling = job.scaling(model)
    classes = {} if scaling is None else scaling.classes()
    if resume is not None and scaling is not None:
        together(world, lambda: refuse_other_classes(resume, classes))
    module = CausalLM(
        model,
        config.optimizer,
        schedule=config.trainer.schedule,
        total_steps=plan.steps,
        clip_norm=config.trainer.clip_norm,
        in_backward=config.trainer.in_backward,
        seed=config.trainer.seed,
        projection_seed=config.trainer.projection_seed,
        scaling=scaling,
        save_frozen=job.keeps_frozen,
        cross_entropy=config.trainer.cross_entropy,
        z_loss=config.trainer.z_loss,
    )
    checkpointing = Checkpointing(
        folder.checkpoints,
        config.trainer.checkpoint_every,
        reach=reach,
        header={
            "identity": identity_json(tree),
            "manifest": data.manifest_hash,
            "origin": dict(origin),
            "classes": classes,
            "commit": report.code_version()["commit"],
            **({"rollbacks": len(taken)} if taken else {}),
        },
        saved=lambda path, step: folder.write_status("running", step=step, steps=plan.steps, checkpoint=path.name),
    )
    limit = config.trainer.nonfinite_limit
    guard = made_guard(config.guard, limit, checkpointing=checkpointing, rollbacks=len(taken))
    preemption = Preemption(checkpointing, folder.marker, max_seconds=config.trainer.max_seconds)
    held = HeldMemory()
    upkeep = [LayerUpkeep(config.trainer.seed)] if config.reparam.acts else []
    monitor = SpectralMonitor(
        config.monitors,
        warmup=config.trainer.schedule.warmup(plan.steps),
        total_steps=plan.steps,
        folder=folder.pictures,
        told=lambda step, level, reason: folder.log("alarm", step=step, state=level, reason=reason),
    )
    layerwise = LayerwiseSchedule(config.layerwise) if isinstance(config.layerwise, Tails) else None
    acting = [guard, held, *upkeep, *([] if layerwise is None else [layerwise]), preemption, checkpointing]
    trainer = _trainer(config, world, plan, folder, resume, cuda, [*job.callbacks(), monitor, *acting])
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
        layerwise=layerwise,
        resident=resident,
        origin_step=None if resume is None else step_of(resume) or 0,
        again=again,
    )


def _reach(config: TrainingConfig) -> int:
    """Steps from which the run may go back."""
    if config.guard.action != "rollback":
        return 0
    back = config.guard.rollback.back
    return config.trainer.checkpoint_every if back is None else back


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
        if not parts.again:
            folder.log("start", step=parts.start, world=world.size, accumulate=parts.plan.accumulate)
        folder.write_status("running", step=parts.start, steps=parts.plan.steps)
    if not parts.again:
        introduce(parts, cuda=_wants_cuda(config, world))
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
        "resumed_from": parts.origin_step,
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


def _require_arithmetic(config: TrainingConfig, *, cuda: bool) -> None:
    """Refuses a precision or a way to the loss that this machine cannot compute."""
    choice = config.trainer
    if not cuda and choice.precision == "16-mixed":
        raise UserError("trainer.precision=16-mixed needs a GPU: use bf16-mixed or 32-true on the CPU")
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
