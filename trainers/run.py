"""The run folder: who may write in it, which configuration it belongs to, where to go on, and what happened so far.

Layout::

    config.yaml          the resolved configuration
    checkpoints/         step-00000200.ckpt, last.ckpt and best.ckpt (links)
    tensorboard/         events
    adapter/             what was trained of an adapter, in peft's layout
    export/              the model for `transformers.AutoModelForCausalLM.from_pretrained`
    curves.jsonl         losses, step times and other readings of training, by step
    history.jsonl        one line for each start, each end and each way back before a spike
    rollbacks.json       only after a spike with guard.action=rollback: where, and what data is left out
    status.json          running | finished | preempted | failed, the step, the exit code
    preempted            only after a preemption: what a batch script looks for before it queues the job again
    report.json/.md      the report of the run
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from thinrank.trainers.errors import UserError
from thinrank.trainers.files import append_json_line, read_json_lines, remove_temporary, write_json, write_text
from thinrank.trainers.preflight.config import PreflightConfig

FREE_KEYS = (
    "run",
    "guard",
    "strategy",
    "monitors",
    "data.cache_dir",
    "data.num_workers",
    "data.validation_tokens",
    "data.final_validation_tokens",
    "data.final_validation_unseen",
    "trainer.accelerator",
    "trainer.checkpoint_every",
    "trainer.cross_entropy",
    "trainer.devices",
    "trainer.export",
    "trainer.log_every",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.max_tokens",
    "trainer.micro_batch_size",
    "trainer.nonfinite_limit",
    "trainer.num_nodes",
    "trainer.sample_prompt",
    "trainer.sample_tokens",
    "trainer.tensorboard",
    "trainer.validate_every",
)
"""Keys, or whole groups, that a resumed run may change: how long, how often, and on what machine."""

NOTHING = {"layerwise.name": "none", "trainer.z_loss": 0.0}
"""Choices of nothing, which are left out: a run from before there was such a choice goes on."""

_OWNED = (
    "tensorboard",
    "adapter",
    "export",
    "curves.jsonl",
    "monitors",
    "rollbacks.json",
    "report.json",
    "report.md",
    "status.json",
    "preempted",
    "config.yaml",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lies and what it does with what it finds there."""

    name: str = field(default="pretrain", metadata={"help": "the run's name in reports"})
    dir: str = field(default="runs/pretrain", metadata={"help": "the run folder, made if missing"})
    resume: str = field(
        default="auto",
        metadata={"help": "auto (newest complete checkpoint, else a fresh start), never, or a checkpoint's path"},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "with resume=never: delete what an earlier run left in the folder"}
    )
    preflight: PreflightConfig = field(
        default_factory=PreflightConfig, metadata={"help": "a look at all machines before the first step"}
    )

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty: leave it out for the default")
        if not self.dir:
            raise ValueError("dir must name a folder, got '': leave it out for the default")
        if not self.resume:
            raise ValueError("resume must be auto, never or the path of a checkpoint, got ''")
        if self.overwrite and self.resume != "never":
            raise ValueError(f"overwrite needs resume=never, got resume={self.resume}: a resumed run deletes nothing")


def config_tree(config: Any) -> dict[str, Any]:
    """A dataclass of dataclasses as plain dicts, lists and scalars."""
    return _plain(dataclasses.asdict(config))


def config_hash(tree: Mapping[str, Any]) -> str:
    """Sixteen hex digits that name a configuration, free keys (`FREE_KEYS`) left out."""
    text = json.dumps(_identity(tree), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity_json(tree: Mapping[str, Any]) -> str:
    """The keys that make the configuration what it is, as JSON: kept in every checkpoint for `differences`."""
    return json.dumps(_identity(tree), sort_keys=True)


def differences(before: str, now: str) -> list[str]:
    """How two configurations (texts of `identity_json`) differ.

    Returns:
        One text for each differing key, such as ``optimizer.rank (32 → 64)``, in alphabetic order.
    """
    old, new = json.loads(before), json.loads(now)
    absent = object()
    rows = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, absent), new.get(key, absent)
        if a != b and not _free(key):  # a key may have become free after the checkpoint was made
            rows.append(f"{key} ({'absent' if a is absent else a} → {'absent' if b is absent else b})")
    return rows


class RunFolder:
    """A run's folder and its files. Rank 0 calls `open` and all that writes; other ranks only use the paths."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path).expanduser().absolute()
        self._lock: IO[str] | None = None
        self._made: list[Path] = []  # folders above it that `open` had to make, the innermost first

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def pictures(self) -> Path:
        return self.path / "monitors"

    @property
    def curves(self) -> Path:
        return self.path / "curves.jsonl"

    @property
    def rollbacks(self) -> Path:
        return self.path / "rollbacks.json"

    @property
    def marker(self) -> Path:
        return self.path / "preempted"

    def open(self) -> None:
        """Makes the folder, checks that it can be written and locks it until `close` or the end of the process.

        Raises:
            UserError: it cannot be made or written, or another process has it.
        """
        self._made = [parent for parent in self.path.parents if not parent.exists()]
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - held open as long as the run lasts
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written ({error.strerror or error}): "
                "set run.dir to a folder that can"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise UserError(
                f"the run folder {self.path} is in use by {owner}: wait for its end or set another run.dir"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock
        remove_temporary(self.path)
        remove_temporary(self.checkpoints)

    def close(self) -> None:
        """Lets go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def choose(self, config: RunConfig) -> Path | None:
        """Decides where to start; changes nothing. Whether the checkpoint belongs to the configuration is
        `check_identity`'s to say.

        Args:
            config: how to resume.

        Returns:
            The checkpoint to resume from, or None for a fresh start.

        Raises:
            UserError: the folder holds a run that `resume=never` would destroy, or the checkpoint that was asked for
                cannot be used.
        """
        from thinrank.trainers import checkpoint

        found = checkpoint.listed(self.checkpoints)
        if config.resume == "never":
            if found and not config.overwrite:
                raise UserError(
                    f"{self.path} already holds checkpoints: set another run.dir, or run.resume=auto to go on from "
                    "them, or run.overwrite=true to delete them"
                )
            return None
        if config.resume == "auto":
            return checkpoint.newest(self.checkpoints)
        return self._asked_for(config.resume, found)

    def begin(self, tree: Mapping[str, Any], *, resumed_from: Path | None, overwrite: bool = False) -> None:
        """Makes the folder ready for training: the resolved configuration is written, and a fresh start does not mix
        with what an earlier attempt left.

        Args:
            tree: the resolved configuration.
            resumed_from: what `choose` returned.
            overwrite: a fresh start also deletes the checkpoints of the earlier run, and its history.
        """
        from thinrank.trainers import checkpoint

        self.marker.unlink(missing_ok=True)
        if resumed_from is None:
            if overwrite:
                for path in [*checkpoint.listed(self.checkpoints), self.path / "history.jsonl"]:
                    path.unlink(missing_ok=True)
            for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", *_OWNED):
                path = self.path / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True))

    def discard(self) -> None:
        """Undoes `open` where nothing was begun: an error before the start leaves no empty folder behind."""
        if self._lock is None:
            return  # the folder is somebody else's, or is none
        if any(path.name not in (".lock", "checkpoints") for path in self.path.iterdir()) or any(
            self.checkpoints.iterdir()
        ):
            self.close()
            return
        (self.path / ".lock").unlink()
        self.close()
        self.checkpoints.rmdir()
        self.path.rmdir()
        for parent in self._made:
            if any(parent.iterdir()):
                break
            parent.rmdir()

    def _asked_for(self, asked: str, found: list[Path]) -> Path:
        from thinrank.trainers import checkpoint

        path = Path(asked).expanduser().absolute()
        if path.is_dir():
            raise UserError(f"run.resume={asked} is a folder: name a checkpoint file in it, such as last.ckpt")
        problem = checkpoint.defect(path)
        if problem:
            raise UserError(
                f"the checkpoint run.resume={asked} {problem}: name another one, or let run.resume=auto choose"
            )
        path = path.resolve()
        step = checkpoint.step_of(path)
        later = [other for other in found if step is not None and (checkpoint.step_of(other) or 0) > step]
        if later:
            raise UserError(
                f"{self.path} holds {later[0].name}, which is later than run.resume={asked}: "
                "set another run.dir for the new branch, or delete the later checkpoints"
            )
        return path

    def write_status(self, state: str, **facts: Any) -> None:
        """Replaces ``status.json``, which says in one look how the run stands where exit codes are lost."""
        write_json(self.path / "status.json", {"state": state, "time": _now(), **facts})

    def log(self, event: str, **facts: Any) -> None:
        """Adds a line to ``history.jsonl``."""
        append_json_line(self.path / "history.jsonl", {"event": event, "time": _now(), **facts})

    def history(self) -> list[dict]:
        """All lines of ``history.jsonl``."""
        return read_json_lines(self.path / "history.jsonl")


def identity_of(path: Path) -> str:
    """The text of `identity_json` in the checkpoint `path`.

    Raises:
        UserError: there is none.
    """
    from thinrank.trainers import checkpoint

    found = checkpoint.load(path, mmap=True).get("thinrank", {}).get("identity")
    if not found:
        raise UserError(f"{path} holds no configuration, so it is not a checkpoint of a run: name another one")
    return found


def check_identity(path: Path, before: str, now: str) -> None:
    """Raises a `UserError` naming the differing keys where the checkpoint `path` is of another configuration.

    Args:
        before: `identity_of` the checkpoint.
        now: `identity_json` of the configuration.
    """
    rows = differences(before, now)
    if rows:
        shown = ", ".join(rows[:6]) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")
        raise UserError(
            f"{path} is of another configuration: {shown}; set them back, or set another run.dir for a new run, "
            "or run.resume=never run.overwrite=true to replace the old one"
        )


def _identity(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat = _flatten(_plain(tree))
    if flat.get("scaling.name") == "none":  # without effect, and absent in older checkpoints
        flat = {key: value for key, value in flat.items() if not key.startswith("scaling.")}
    return {key: value for key, value in flat.items() if not _free(key) and NOTHING.get(key) != value}


def _free(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{free}." for free in FREE_KEYS))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
