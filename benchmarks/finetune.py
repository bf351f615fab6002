"""Full fine-tuning, LoRA, GaLore and GaLore+ side by side: runs of launch/finetune.py, and one table of their reports.

    make finetune                                              # on the model that `make pretrain` leaves
    make finetune ARGS="--out table.md model.path=my/model trainer.max_steps=50"

Words ``key=value`` go to all of them. Each run is a process of its own, so that its peak memory is its own, and one
follows the other. A run that is complete in its folder is not repeated, as with the launch script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import command_line, describe, save

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "AdamW, all weights": ("adamw", ["optimizer=adamw"]),
    "LoRA, rank 8": ("lora", ["adapter=lora", "optimizer=adamw", "optimizer.lr=1e-2"]),
    "GaLore, rank 1/4": ("galore", ["optimizer=galore"]),
    "GaLore+, rank 1/4": ("galore_plus", ["optimizer=galore_plus"]),
}
"""For each row: the name of its folder, and what it adds to the command line."""


def command(folder: Path, words: list[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    return [*launcher, str(ROOT / "launch" / "finetune.py"), f"run.dir={folder}", f"run.name={folder.name}", *words]


def peak(memory: dict[str, float]) -> float:
    """MiB: of the CUDA allocator where there is one, else of the process, its libraries included."""
    return memory.get("peak_cuda_mib", memory["peak_rss_mib"])


def table(reports: dict[str, dict[str, Any]]) -> str:
    """One line for each report."""
    lines = [
        "| | trained parameters | optimizer state, MiB | bits per byte before | after | peak memory, MiB | step, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, report in reports.items():
        metrics, step = report["metrics"], 1e3 * report["training"]["step_seconds_median"]
        lines.append(
            f"| {name} | {report['model']['trained_parameters']:,} "
            f"| {report['optimizer_state']['measured_bytes'] / 2**20:.2f} "
            f"| {metrics['before/bits_per_byte']:.3f} | {metrics['test/bits_per_byte']:.3f} "
            f"| {peak(report['memory']):,.0f} | {'–' if step is None else f'{step:,.0f}'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/finetune"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=None, help="write the table to this file too")
    args, words = parser.parse_known_args()
    reports = {}
    for name, (folder, own) in RUNS.items():
        line = command(args.dir / folder, [*own, *words])
        print(f"== {name}", flush=True)
        done = subprocess.run(line, check=False)
        if done.returncode:
            print(f"error: the run {name!r} ended with an error, see above", file=sys.stderr)
            return done.returncode
        reports[name] = json.loads((args.dir / folder / "report.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = next(iter(reports.values()))["training"]
    text = ["# Fine-tuning", "", command_line(), ""]
    text += [f"- {line}" for line in describe(device)]
    text += [f"- {first['steps']:,} steps, {first['tokens']:,} tokens", "", table(reports), ""]
    print("\n".join(text))
    save(text, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
