"""What a run says and leaves: how the model does before and after, a sample, the export, the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from thinrank.trainers import curves, report
from thinrank.trainers.callbacks.metrics import sent
from thinrank.trainers.callbacks.sample import sample_text
from thinrank.trainers.checkpoint import newest, step_of
from thinrank.trainers.errors import GuardStop, PreflightError, RankLost, UserError
from thinrank.trainers.parts import Parts
from thinrank.trainers.plan.footprint import footprint
from thinrank.trainers.plan.precision import as_trained
from thinrank.trainers.plan.strategies import is_planned
from thinrank.trainers.run import RunFolder, config_hash
from thinrank.trainers.strategies import World
from thinrank.trainers.strategies.one_file import OneFile
from thinrank.trainers.strategies.world import from_rank_zero, gathered

FINISHED, FAILED, BAD_CONFIG, UNFIT, PREEMPTED, STOPPED, LOST = 0, 1, 2, 3, 75, 76, RankLost.EXIT_CODE
"""Exit codes of a run, as far as launchers let them through; ``status.json`` has them always."""


def say(world: World, text: str) -> None:
    """Prints on rank 0."""
    if world.main:
        print(text, flush=True)


def optimizer_state(parts: Parts) -> dict[str, int]:
    """Bytes of optimizer state on this rank: as predicted, as they are, and as AdamW on all weights would have them.

    Where ranks hold parts of it, of all of them together, and the smallest and the largest part.
    """
    optimizer = parts.trainer.optimizers[0]
    here = int(optimizer.state_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    found = {
        "predicted_bytes": parts.routing.state_bytes(),
        "measured_bytes": here,
        "adamw_bytes": parts.job.adamw_bytes(parts.model),
    }
    ranks: int = optimizer.state_ranks  # pyright: ignore[reportAttributeAccessIssue]
    if ranks > 1:
        held = gathered(here)
        found["measured_bytes"] = sum(held) * ranks // len(held)
        found |= {"least_on_a_rank_bytes": min(held), "most_on_a_rank_bytes": max(held)}
    return found


def communication(parts: Parts) -> dict[str, float]:
    """What this rank has sent for the optimizer, in payload bytes a step since this start: all, by kind, and what whole
    gradients would have been; and, in all, beside steps. {} where DDP or nobody sends. Ranks that hold pieces send
    unlike much: their mean."""
    optimizer, steps = parts.trainer.optimizers[0], parts.trainer.global_step - parts.start
    found = sent(parts.trainer)
    if not found or not steps:
        return {}
    if optimizer.state_ranks > 1:  # pyright: ignore[reportAttributeAccessIssue]
        ranks = gathered(dict(found))
        kinds = sorted({kind for each in ranks for kind in each})
        found = {kind: sum(each.get(kind, 0) for each in ranks) / len(ranks) for kind in kinds}
    messages, rare = found.pop("messages"), found.pop("rare")
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    return {
        "payload": sum(found.values()) / steps,
        **{kind: size / steps for kind, size in found.items()},
        "whole gradients": float(sum(param.numel() * param.element_size() for param in params)),
        "messages": messages / steps,
        "beside steps, in all": float(rare),
    }


def measured_on_all(parts: Parts) -> dict[str, float | None]:
    """What a plan says of a process, as it was: bytes of the one that has most of it, and bytes sent for a step in the
    mean over all; None where nothing was measured. All ranks call it."""
    optimizer, steps = parts.trainer.optimizers[0], parts.trainer.global_step - parts.start
    found = sent(parts.trainer)
    here = {
        "weights_bytes": parts.held.weights,
        "gradients_bytes": parts.held.gradients if parts.held.weights else 0,
        "state_bytes": int(optimizer.state_bytes()),  # pyright: ignore[reportAttributeAccessIssue]
        "resident_bytes": parts.resident.peak() or 0,
    }
    payload = found.total() - found["messages"] - found["rare"] if found else None
    each = gathered((here, payload))
    most: dict[str, float | None] = {key: max(own[key] for own, _ in each) or None for key in here}
    if parts.config.trainer.in_backward == "step" and most["weights_bytes"]:
        most["gradients_bytes"] = max(own["gradients_bytes"] for own, _ in each)  # none is left, which is measured
    sums = [size for _, size in each if size is not None]
    return most | {"sent_bytes": sum(sums) / len(each) / steps if sums and steps else None}


def planned_and_measured(parts: Parts, measured: Mapping[str, float | None], peak_mib: float | None) -> dict[str, Any]:
    """What was to be expected of memory and wire beside what was found, in bytes of a process; {} without a plan.

    Args:
        measured: of `measured_on_all`.
        peak_mib: of the CUDA allocator of this rank; None without a GPU, where resident memory takes its place.
    """
    config, start, steps = parts.config, parts.start, parts.trainer.global_step
    if not is_planned(config.strategy):
        return {}
    model, found = parts.model, dict(measured)
    peak = found.pop("resident_bytes", None)
    name, peak = ("resident_bytes", peak) if peak_mib is None else ("peak_bytes", peak_mib * 2**20)
    if peak is not None:
        model = as_trained(parts.job.build(parts.data.vocab_size, meta=True), config.trainer.precision)
    plan = footprint(config, model, parts.routing, parts.world, trace=peak is not None, ranks=parts.ranks)
    planned = plan.plain()
    planned[name] = planned.pop("peak_bytes", None)
    return {
        "planned": {**planned, "sent_bytes": plan.sent(start, steps)},
        "measured": {**found, name: peak},
    }


def start_metrics(parts: Parts) -> dict[str, float]:
    """Loss, perplexity and bits per byte on the whole held-out text before the first step, as ``before/…``.

    Measured once and kept in the run's history, since a resumed run begins with other weights.
    """

    def found() -> dict[str, float] | None:
        lines = [line for line in parts.folder.history() if line["event"] == "measured"]
        return lines[-1]["metrics"] if lines and parts.resume is not None else None

    kept = from_rank_zero(parts.world, lambda: found() if parts.world.main else None)
    if kept is None:
        # the model is as it was built: a checkpoint is loaded by `fit`, later
        kept = {f"before/{key.removeprefix('test/')}": value for key, value in final_validation(parts).items()}
        if parts.world.main:
            parts.folder.log("measured", step=0, metrics=kept)
    return dict(kept)


def final_validation(parts: Parts) -> dict[str, float]:
    """Loss, perplexity and bits per byte on the whole held-out text."""
    parts.trainer.test(parts.module, datamodule=parts.data, verbose=False)
    return {key: float(value) for key, value in parts.trainer.callback_metrics.items() if key.startswith("test/")}


def whole_weights(parts: Parts) -> dict[str, Any] | None:
    """On rank 0, by name, the weights of a model that lies in pieces; None of one that does not. All ranks call it."""
    strategy, choice = parts.trainer.strategy, parts.config.trainer
    if not isinstance(strategy, OneFile) or not strategy.in_pieces or not (choice.sample_tokens or choice.export):
        return None
    return {name.removeprefix("model."): value for name, value in strategy.whole_weights().items()}


def sample_and_export(parts: Parts, weights: dict[str, Any] | None) -> tuple[dict[str, str], dict[str, str]]:
    """On rank 0, with the model back on its device, from which Lightning has taken it, or made anew of `weights`."""
    if not parts.world.main:
        return {}, {}
    choice, folder = parts.config.trainer, parts.folder
    model: Any = parts.model
    tokenizer = parts.data.tokenizer
    if weights is not None:
        model = parts.trainer.precision_plugin.convert_module(parts.job.build(parts.data.vocab_size))
        model.load_state_dict(weights)
    model = model.to(parts.trainer.strategy.root_device)
    sample, artifacts = {}, {"configuration": "config.yaml", "checkpoints": "checkpoints", "report": "report.md"}
    artifacts["curves"] = folder.curves.name
    if choice.tensorboard:
        artifacts["events"] = "tensorboard"
    if folder.pictures.is_dir():
        artifacts["pictures of the layers"] = folder.pictures.name
    if choice.sample_tokens:
        text = sample_text(model, tokenizer, choice.sample_prompt, choice.sample_tokens, choice.seed)
        sample = {"prompt": choice.sample_prompt, "text": text.removeprefix(choice.sample_prompt)}
        for logger in parts.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", f"```\n{text}\n```", parts.trainer.global_step)
    if choice.export:
        artifacts |= parts.job.export(model, tokenizer, folder)
    return sample, {what: str(folder.path / where) for what, where in artifacts.items()}


def conclude(
    parts: Parts,
    facts: dict[str, Any],
    state: dict[str, int],
    sent_a_step: dict[str, float],
    measured: dict[str, float | None],
    metrics: dict[str, float],
    sample: dict[str, str],
    artifacts: dict[str, str],
) -> dict[str, Any]:
    """Report, status and history, and the last words on the terminal."""
    config, folder, step = parts.config, parts.folder, parts.trainer.global_step
    seconds, tokens = parts.checkpointing.seconds, parts.module.consumed_tokens
    folder.log("end", step=step, state=facts["state"], stopped_by=facts["stopped_by"])
    collected = report.collect(
        run=facts,
        config=parts.tree,
        config_hash=config_hash(parts.tree),
        seeds={
            "initial weights": config.trainer.seed,
            "data order": config.data.seed,
            "projection": config.trainer.projection_seed,
        },
        # without the hash of every file, which the manifest's own hash stands for
        data={
            "manifest_hash": parts.data.manifest_hash,
            **{key: value for key, value in parts.data.manifest.items() if key != "files"},
        },
        model={
            "parameters": parts.parameters,
            "trained_parameters": parts.routing.elements(),
            "origin": dict(parts.origin),
            **({} if parts.job.conversion is None else {"reparam": parts.job.conversion.summary()}),
        },
        conversion_table="" if parts.job.conversion is None else parts.job.conversion.table(),
        routing=[dataclasses.asdict(row) for row in parts.routing.rows],
        routing_table=parts.routing.table(),
        optimizer_state=state,
        plan=planned_and_measured(parts, measured, report.memory().get("peak_cuda_mib")),
        training={
            "steps": step,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            **parts.guard.facts(),
            "world": parts.world.size,
            "accumulate": parts.plan.accumulate,
            "communication": sent_a_step,
            **({} if parts.layerwise is None else {"layerwise": parts.layerwise.summary()}),
        },
        metrics=metrics,
        curves=curves.read(folder.path),
        history=folder.history(),
        artifacts=artifacts,
        sample=sample,
    )
    report.write(collected, folder.path)
    folder.write_status(facts["state"], step=step, steps=parts.plan.steps, exit_code=facts["exit_code"])
    say(parts.world, _last_words(facts, metrics, sample, folder))
    return collected


def _last_words(
    facts: Mapping[str, Any], metrics: Mapping[str, float], sample: Mapping[str, str], folder: RunFolder
) -> str:
    if facts["state"] == "preempted":
        return f"preempted by {facts['stopped_by']} after a checkpoint; start again with run.resume=auto to go on"
    lines = [
        f"{label:<18}{metrics[key]:.4f}{_before(metrics, key)}"
        for key, label in (
            ("test/loss", "validation loss"),
            ("test/perplexity", "perplexity"),
            ("test/bits_per_byte", "bits per byte"),
        )
        if key in metrics
    ]
    if sample:
        lines += ["sample:", sample["prompt"] + sample["text"]]
    return "\n".join([*lines, f"everything lies in {folder.path}; start with report.md"])


def _before(metrics: Mapping[str, float], key: str) -> str:
    value = metrics.get(key.replace("test/", "before/"))
    return "" if value is None else f"  (before the first step {value:.4f})"


def record_failure(folder: RunFolder, error: BaseException) -> None:
    """Status and history of a run that ended with an error: exit code, and the step that is saved."""
    codes = {GuardStop: STOPPED, PreflightError: UNFIT, RankLost: LOST, UserError: BAD_CONFIG}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED)
    # Lightning turns Ctrl-C into SystemExit
    interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
    sentence = "interrupted" if interrupted else f"{type(error).__name__}: {error}"
    saved = newest(folder.checkpoints)
    folder.write_status("failed", step=step_of(saved) if saved else 0, exit_code=code, error=sentence)
    folder.log("end", state="failed", error=sentence)
