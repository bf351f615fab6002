"""What a figure has to be read with: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import thinrank


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
