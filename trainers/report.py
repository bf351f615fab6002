"""What happened in a run and what is needed to repeat it: facts as a dict, written as JSON and as one readable page."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import thinrank
from thinrank.optim.allocation import rank_spread
from thinrank.trainers.curves import summary
from thinrank.trainers.files import write_json, write_text

_PACKAGES = ("torch", "lightning", "transformers", "peft", "tokenizers", "datasets", "numpy", "omegaconf")


def collect(
    *,
    run: Mapping[str, Any],
    config: Mapping[str, Any],
    config_hash: str,
    seeds: Mapping[str, int],
    data: Mapping[str, Any],
    routing: Sequence[Mapping[str, Any]],
    optimizer_state: Mapping[str, Any],
    training: Mapping[str, Any],
    metrics: Mapping[str, float],
    plan: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    curves: Sequence[Mapping[str, Any]] = (),
    history: Sequence[Mapping[str, Any]] = (),
    artifacts: Mapping[str, str] | None = None,
    sample: Mapping[str, str] | None = None,
    routing_table: str = "",
    conversion_table: str = "",
) -> dict[str, Any]:
    """Puts a report together from the facts of a run and those of the machine.

    Args:
        run: name, dir, state ("finished" or "preempted"), stopped_by, exit_code, resumed_from (step or None).
        config: the resolved configuration.
        config_hash: the name of the configuration without what a resumed run may change.
        seeds: by what they seed.
        data: manifest_hash, source and counts.
        model: parameters, trained_parameters, origin, the digests of what training started from, and reparam, the
            sizes of a model of factors.
        routing: one row for each parameter: name, shape, role, rule, lr, elements, state_bytes, rank.
        optimizer_state: predicted_bytes and measured_bytes of this rank, and adamw_bytes for comparison; where ranks
            hold parts of it, measured_bytes of all together, least_on_a_rank_bytes and most_on_a_rank_bytes.
        training: steps, tokens, seconds, tokens_per_second, skipped_steps (and, of a guard against spikes, spikes,
            clipped_steps or rollbacks), world, accumulate, communication (payload
            bytes a step by kind).
        metrics: final values.
        plan: `planned` and `measured` bytes of memory and wire, under the same names.
        curves: lines of the run's curves; their summary (`thinrank.trainers.curves.summary`) joins `training` and
            `metrics`.
        history: lines of the run's history; the number of starts gives the restarts.
        artifacts: what lies where.
        sample: prompt and text.
        routing_table: the routing as text, for the page.
        conversion_table: which layers were replaced by factors, the same; empty where none were.

    Returns:
        A dict of plain values.
    """
    starts = sum(1 for line in history if line.get("event") == "start")
    read = summary(curves)
    return {
        "run": {**run, "restarts": max(0, starts - 1)},
        "metrics": {**metrics, **read["metrics"]},
        "training": {**training, **read["training"]},
        "optimizer_state": dict(optimizer_state),
        "memory": memory(),
        "plan": dict(plan or {}),
        "model": dict(model or {}),
        "data": dict(data),
        "seeds": dict(seeds),
        "config_hash": config_hash,
        "config": dict(config),
        "code": code_version(),
        "versions": versions(),
        "machine": machine(),
        "routing": [dict(row) for row in routing],
        "routing_table": routing_table,
        "conversion_table": conversion_table,
        "history": [dict(line) for line in history],
        "sample": dict(sample or {}),
        "artifacts": dict(artifacts or {}),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, of this library and of what it stands on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "thinrank": thinrank.__version__}
    installed = {name.lower() for distribution in metadata.distributions() if (name := distribution.metadata["Name"])}
    found.update({name: metadata.version(name) if name in installed else None for name in _PACKAGES})
    found["cuda"] = torch.version.cuda
    found["nccl"] = None
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        from torch.cuda import nccl

        found["nccl"] = ".".join(str(part) for part in nccl.version())
    return found


def machine() -> dict[str, Any]:
    """Processor, accelerators and threads of this process's machine."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.release()}",
    }


def memory() -> dict[str, float]:
    """Peak memory of this process in MiB: `peak_rss_mib`, and on CUDA `peak_cuda_mib` (allocated)."""
    import resource

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    peak = {"peak_rss_mib": rss / (2**20 if sys.platform == "darwin" else 2**10)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


def code_version(file: str | os.PathLike = thinrank.__file__) -> dict[str, Any]:
    """The git commit of the checkout that `file` belongs to, and whether tracked files there differ from it.

    Both are None for an installed package. A virtual environment inside somebody's repository is no checkout of this
    code, so `file` has to be tracked there.
    """
    folder = Path(file).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", Path(file).name) is None:
        return {"commit": None, "dirty": None}
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def write(report: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Writes ``report.json`` and ``report.md`` into `folder`, each atomically."""
    write_json(Path(folder) / "report.json", report)
    write_text(Path(folder) / "report.md", page(report))


def page(report: Mapping[str, Any]) -> str:
    """The report as one page of Markdown."""
    run, training, state = report["run"], report["training"], report["optimizer_state"]
    stopped = f" by {run['stopped_by']}" if run.get("stopped_by") else ""
    parts = [f"# Run {run.get('name', '')}: {run.get('state', '')}{stopped}\n"]
    parts.append(_table(("result", "value"), [(key, _shown(value)) for key, value in report["metrics"].items()]))
    parts.append(
        _table(
            ("training", "value"),
            [
                ("steps", _shown(training.get("steps"))),
                ("tokens", _shown(training.get("tokens"))),
                ("time", duration(training.get("seconds"))),
                ("tokens per second", _shown(training.get("tokens_per_second"))),
                ("step, median of the readings, ms", _ms(training.get("step_seconds_median"))),
                ("step, mean with renewals, ms", _ms(training.get("step_seconds_mean"))),
                ("parameters", _shown(report["model"].get("parameters"))),
                ("trained parameters", _shown(report["model"].get("trained_parameters"))),
                ("ranks of subspaces, least / median / most", _ranks(report["routing"])),
                ("multipliers by layer, least / mean / most", _multipliers(training.get("layerwise"))),
                ("skipped steps", _shown(training.get("skipped_steps"))),
                *(
                    (key.replace("_", " "), _shown(training[key]))
                    for key in ("spikes", "clipped_steps", "rollbacks")
                    if key in training
                ),
                ("restarts", _shown(run.get("restarts"))),
                ("processes × micro-batches", f"{training.get('world')} × {training.get('accumulate')}"),
                ("strategy", _shown(report["config"].get("strategy", {}).get("name"))),
                *((key.replace("_", " "), _shown(value)) for key, value in report["memory"].items()),
            ],
        )
    )
    communication = training.get("communication") or {}
    if communication:
        sizes = [(key, _mib(value)) for key, value in communication.items() if key != "messages"]
        parts.append(
            _table(
                ("sent for a step by each rank, in the mean", "MiB"),
                [*sizes, ("in so many messages", f"{communication['messages']:.1f}")],
            )
        )
    parts.append(
        _table(
            ("optimizer state", "MiB"),
            [
                (key.removesuffix("_bytes").replace("_", " "), _mib(value))
                for key, value in state.items()
                if key.endswith("_bytes")
            ],
        )
    )
    if report.get("plan"):
        parts.append(_table(("each process, MiB", "planned", "measured"), _planned(report["plan"])))
    sample = report.get("sample") or {}
    if sample:
        fence = "````"
        parts.append(f"## Sample\n\n{fence}text\n{sample.get('prompt', '')}{sample.get('text', '')}\n{fence}\n")
    parts.append("## To repeat it\n")
    repeat = [
        ("configuration", report["config_hash"]),
        ("commit", _commit(report["code"])),
        ("data manifest", report["data"].get("manifest_hash")),
        *((f"starting {what}", digest) for what, digest in report["model"].get("origin", {}).items()),
        *((f"seed of {key}", value) for key, value in report["seeds"].items()),
        *((key, value) for key, value in report["versions"].items() if value is not None),
        *((key, value) for key, value in report["machine"].items() if value),
    ]
    parts.append(_table(("what", "value"), [(key, _shown(value)) for key, value in repeat]))
    if report.get("conversion_table"):
        parts.append(f"## Which layers are made of factors\n\n```text\n{report['conversion_table'].rstrip()}\n```\n")
    if report.get("routing_table"):
        parts.append(f"## Which rule steps which parameter\n\n```text\n{report['routing_table'].rstrip()}\n```\n")
    if report["history"]:
        parts.append("## History\n")
        rows = [
            (line.get("time", ""), line.get("event", ""), _shown(line.get("step")), str(line.get("state", "")))
            for line in report["history"]
        ]
        parts.append(_table(("time", "event", "step", "state"), rows))
    if report["artifacts"]:
        parts.append("## Files\n")
        parts.append(_table(("what", "where"), [(key, f"`{value}`") for key, value in report["artifacts"].items()]))
    return "\n".join(parts)


def duration(seconds: float | None) -> str:
    """Seconds as h:mm:ss."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def _ranks(routing: Sequence[Mapping[str, Any]]) -> str:
    spread = rank_spread(row.get("rank") for row in routing)
    return "–" if spread is None else " / ".join(f"{rank:,}" for rank in spread)


def _multipliers(layerwise: Mapping[str, Any] | None) -> str:
    found = (layerwise or {}).get("spread")
    return "–" if not found else " / ".join(f"{value:.2f}" for value in found)


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:,.1f}"


def _planned(plan: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    planned, measured = plan["planned"], plan["measured"]
    labels = {
        "weights_bytes": "weights",
        "gradients_bytes": "gradients, as the step finds them",
        "state_bytes": "optimizer state",
        "peak_bytes": "peak of the GPU's allocator (planned: an estimate)",
        "resident_bytes": "peak of resident memory above that before the model (planned: of tensors, an estimate)",
        "sent_bytes": "payload of a step, in the mean",
    }
    rows = [(label, planned.get(key), measured.get(key)) for key, label in labels.items()]
    return [(label, _mib(one), _mib(other)) for label, one, other in rows if one is not None or other is not None]


def _mib(value: Any) -> str:
    return "–" if value is None else f"{value / 2**20:.2f}"


def _commit(code: Mapping[str, Any]) -> str:
    if code.get("commit") is None:
        return "not a checkout"
    return f"{code['commit']}{' with local changes' if code.get('dirty') else ''}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform's own word is all there is
    return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command, or None where there is no git, no checkout, or git refuses."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
