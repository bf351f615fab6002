"""Back before a spike: which checkpoint, which data are left out, and the record by which a killed run goes on.

``rollbacks.json`` in the run folder has one entry for each time, and is written before anything else is done about it.
From then on it says what holds: the samples that it names are left out, and a checkpoint after the one that was gone
back to, made when there were fewer entries, is of the way that was given up, and is deleted. So a process may be killed
at any moment in between, and the next one does the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.errors import GuardStop, RollBack
from thinrank.trainers.files import point, write_json
from thinrank.trainers.guards import RollbackConfig
from thinrank.trainers.run import RunFolder

Record = dict[str, Any]
"""`step` (of the spike), `to` (the checkpoint's), `samples` (first and end of what is left out), `reason`, `time`."""


def chosen(steps: Sequence[int], spike: int, back: int) -> int | None:
    """Of checkpoints after `steps`, the newest that is at least `back` steps older than the step of the spike; the
    oldest where none is; None without any before it."""
    before = [step for step in steps if step < spike]
    old = [step for step in before if step <= spike - back]
    return max(old) if old else min(before, default=None)


def left_out(spike: int, consumed: int, batch: int, batches: int) -> tuple[int, int]:
    """First and end of the samples around a spike that are left out.

    Half of the batches come before the one of the spike (a bad step shows in the loss of the next), it and the others
    after. None lies before the checkpoint, whose data have been trained on: then the whole window lies further on, and
    begins there, which is PaLM's (a checkpoint 100 steps before, 200 to 500 batches from there).

    Args:
        spike: samples consumed before the batch of the spike.
        consumed: samples consumed at the checkpoint.
        batch: samples of a step.
        batches: how many.
    """
    first = max(consumed, spike - batches // 2 * batch)
    return first, max(first + batches * batch, spike + batch)


def read(folder: RunFolder) -> list[Record]:
    """The entries of the run folder's record, oldest first; [] where there is none."""
    return json.loads(folder.rollbacks.read_text())["rollbacks"] if folder.rollbacks.exists() else []


def samples(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """What is left out, as `TextData.leave_out` takes it."""
    return [(int(first), int(end)) for first, end in (record["samples"] for record in records)]


def go_back(
    folder: RunFolder, asked: RollBack, choice: RollbackConfig, *, every: int, consumed: int, batch: int
) -> tuple[Path, list[Record]]:
    """Decides where a run goes on after a spike, and puts it down; on rank 0.

    Args:
        asked: the guard's request.
        every: steps between checkpoints, the default of `choice.back`.
        consumed: samples consumed before the batch of the spike.
        batch: samples of a step.

    Returns:
        The checkpoint to go on from, and the record with the new entry.

    Raises:
        GuardStop: there is no intact checkpoint to go back to.
    """
    intact = {ckpt.step_of(path) or 0: path for path in ckpt.listed(folder.checkpoints) if ckpt.defect(path) is None}
    to = chosen([*intact], asked.step, every if choice.back is None else choice.back)
    if to is None:
        raise GuardStop(
            f"training stopped before step {asked.step}: {asked.reason}; {folder.checkpoints} holds no intact "
            "checkpoint to go back to: lower optimizer.lr or lengthen the warm-up, and begin anew"
        )
    at = ckpt.load(intact[to], mmap=True)["TextData"]["consumed"]
    records = read(folder)
    window = left_out(consumed, at, batch, choice.skip)
    entry = {"step": asked.step, "to": to, "samples": list(window), "reason": asked.reason}
    records.append({**entry, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    write_json(folder.rollbacks, {"rollbacks": records})
    return restore(folder, records) or intact[to], records


def restore(folder: RunFolder, records: Sequence[Record]) -> Path | None:
    """Does what is left to do after the last entry of a record, and may be called again: checkpoints of the way that
    was given up go, the links point at what is there, the history has a line for each entry. On rank 0.

    Returns:
        The checkpoint of the last entry, while there is no newer one.
    """
    if not records:
        return None
    last = records[-1]
    for path in ckpt.listed(folder.checkpoints):
        if (ckpt.step_of(path) or 0) <= last["to"]:
            break
        if ckpt.defect(path, full=False) is not None or _made_at(path) < len(records):
            path.unlink()
    left = ckpt.listed(folder.checkpoints)
    for name in ("last.ckpt", "best.ckpt"):
        link = folder.checkpoints / name
        if link.is_symlink() and not link.exists():
            link.unlink()
    if left and not (folder.checkpoints / "last.ckpt").is_symlink():
        point(folder.checkpoints / "last.ckpt", left[0].name)
    told = sum(line.get("event") == "rollback" for line in folder.history())
    for entry in records[told:]:
        facts = {key: value for key, value in entry.items() if key != "time"}
        folder.log("rollback", state=f"to step {entry['to']}", **facts)
    to = folder.checkpoints / ckpt.checkpoint_name(last["to"])
    return to if left and left[0] == to else None


def _made_at(path: Path) -> int:
    """How many entries the record had when a checkpoint was made."""
    return int(ckpt.load(path, mmap=True).get("thinrank", {}).get("rollbacks", 0))


def sentence(entry: Mapping[str, Any], number: int, limit: int) -> str:
    """A rollback on the terminal."""
    first, end = entry["samples"]
    return (
        f"rollback    {number} of at most {limit}: step {entry['step']:,} is a spike ({entry['reason']}); going on "
        f"from step {entry['to']:,} without samples {first:,} to {end - 1:,}"
    )
