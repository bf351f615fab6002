"""What a figure has to be read with: the machine, the versions, the commit, the command; and its page."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import thinrank

_CPU = torch.device("cpu")


def describe(device: torch.device) -> list[str]:
    """One line for each fact."""
    lines = [f"processor: {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"]
    if device.type == "cuda":
        lines.append(f"GPU: {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    lines.append(f"python {platform.python_version()}, torch {torch.__version__}, thinrank {thinrank.__version__}")
    commit = _commit()
    if commit:
        lines.append(f"commit {commit}")
    return lines


def command_line() -> str:
    """The command line of this process, as one types it in the project's folder."""
    return f"`python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"


def page(
    title: str, facts: Sequence[str], head: Sequence[str], names: int = 1, *, device: torch.device = _CPU
) -> list[str]:
    """The lines of a page as far as its table's head: its command, its machine, and `facts`.

    Args:
        names: so many columns, from the first, are text; the others are figures.
        device: where they were measured.
    """
    return [
        f"# {title}\n",
        command_line() + "\n",
        *(f"- {line}" for line in (*describe(device), *facts)),
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * names + " ---: |" * (len(head) - names),
    ]


def save(lines: Sequence[str], out: Path | None) -> None:
    """Writes a page to the file `out`, if there is one, in a folder that need not exist yet."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: platform knows
    return platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return run.stdout.strip()
