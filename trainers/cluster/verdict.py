"""How a job has ended, by what the run folder says: torchrun turns every exit code of a rank but 0 into 1.

A job script asks twice::

    before=$(python -m thinrank.trainers.cluster.verdict RUN)
    torchrun …
    python -m thinrank.trainers.cluster.verdict RUN --since "$before" --code $?

The first call prints how the folder stands. The second says in a sentence what has happened since, and ends with the
exit code of the run: 0 finished, 75 go on, 2, 3, 76, 77 or 1 stay away.

Only what changed counts. A run that never began, because a rank found a mistake, leaves the marker of an earlier
preemption where it is; a script that looks for the marker alone would queue such a job for ever.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINISHED, FAILED, GO_ON, RANK_LOST = 0, 1, 75, 77


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run folder at one moment."""

    step: int
    """Optimizer steps that are saved."""
    marker: str
    """Digest of the marker that a preemption leaves; empty without one."""
    status: str
    """Digest of ``status.json``; empty without one."""

    def __str__(self) -> str:
        return f"{self.step}:{self.marker}:{self.status}"

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """The reverse of `str`.

        Raises:
            ValueError: `text` was not made by it.
        """
        step, marker, status = text.split(":")
        return cls(step=int(step), marker=marker, status=status)

    @classmethod
    def of(cls, folder: Path) -> tuple[Snapshot, dict[str, Any]]:
        """How `folder` stands, and the content of its status file."""
        marker, status = _read(folder / "preempted"), _read(folder / "status.json")
        facts = json.loads(status) if status else {}
        return cls(step=int(facts.get("step", 0)), marker=_digest(marker), status=_digest(status)), facts


def decide(before: Snapshot, now: Snapshot, facts: dict[str, Any], code: int) -> tuple[int, str]:
    """Exit code and sentence for a job.

    Args:
        before: the run folder before the job started.
        now: the same after its end.
        facts: ``status.json`` after its end.
        code: what torchrun (or srun) ended with.
    """
    state, changed = facts.get("state"), now.status != before.status
    if changed and state == "finished":
        return FINISHED, f"finished at step {now.step}"
    if now.marker and now.marker != before.marker:
        return GO_ON, f"preempted after a save at step {now.step}: start again to go on"
    if changed and facts.get("exit_code") == RANK_LOST and now.step > before.step:
        return GO_ON, f"lost a rank after step {now.step}, {now.step - before.step} further than before: go on"
    if changed and state == "failed":
        return int(facts.get("exit_code") or FAILED), f"failed: {facts.get('error', 'status.json gives no reason')}"
    if changed and now.step > before.step:
        return GO_ON, f"ended without a word after step {now.step}, {now.step - before.step} further than before: go on"
    if changed:
        return code or FAILED, "ended without a word and without progress: see the logs of the ranks"
    if code:
        return code, "the run never began: see the logs of the ranks"
    return FINISHED, "nothing was run"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m thinrank.trainers.cluster.verdict", description=__doc__)
    parser.add_argument("folder", type=Path, help="the run folder")
    parser.add_argument("--since", help="what this command printed before the job; without it, print that")
    parser.add_argument("--code", type=int, default=0, help="exit code of torchrun")
    arguments = parser.parse_args(argv)
    now, facts = Snapshot.of(arguments.folder)
    if arguments.since is None:
        print(now)
        return 0
    try:
        before = Snapshot.parse(arguments.since)
    except ValueError:
        parser.error(f"--since must be what this command printed before the job, got {arguments.since!r}")
    code, sentence = decide(before, now, facts, arguments.code)
    print(f"{arguments.folder}: {sentence}", file=sys.stderr)
    return code


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


if __name__ == "__main__":
    sys.exit(main())
