"""What reading the layers costs a run: steps with a reading beside steps without, in one run.

    python benchmarks/monitoring.py --presets 2m 9m --out benchmarks/results/monitoring-cpu.md

A Lightning run with `SpectralMonitor`, TensorBoard curves and histograms and all; the step times of the same run
without a reading are what it is compared with. Pictures, which are drawn at validations, are timed apart.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from machine import page, save
from torch.utils.data import DataLoader, Dataset

from thinrank.optim import AdamWConfig
from thinrank.trainers import CausalLM
from thinrank.trainers.callbacks.spectra import SpectralMonitor
from thinrank.trainers.models import PRESETS
from thinrank.trainers.monitors import MonitorConfig


class Tokens(Dataset):
    """Batches by chance: what they hold does not matter to the time."""

    def __init__(self, batches: int, rows: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.made = torch.randint(vocabulary, (8, rows, length + 1), generator=generator)
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        one = self.made[index % len(self.made)]
        return {"input_ids": one[:, :-1], "labels": one[:, 1:].contiguous()}


class Clock(pl.Callback):
    """Seconds of each step, callbacks before and after included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.seconds and not self._last:
            self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def measure(preset: str, monitors: MonitorConfig, args: argparse.Namespace) -> tuple[float, float, float]:
    """Median seconds of a step without and with a reading, and seconds of a drawing."""
    module = CausalLM(PRESETS[preset], AdamWConfig(), vocab_size=args.vocabulary, total_steps=args.steps)
    clock, monitor = Clock(), SpectralMonitor(monitors, total_steps=args.steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator=args.device,
            devices=1,
            max_steps=args.steps,
            callbacks=[monitor, clock],  # Lightning calls both in this order, so that a reading is in its own step
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            precision=args.precision,
        )
        data = Tokens(args.steps, args.rows, args.length, args.vocabulary)
        drawing = []
        draw = monitor._draw

        def timed(trainer: pl.Trainer) -> None:
            start = time.perf_counter()
            draw(trainer)
            drawing.append(time.perf_counter() - start)

        monitor._draw = timed
        trainer.fit(module, DataLoader(data, batch_size=None))
    steps = dict(enumerate(clock.seconds, 1))
    del steps[1]
    read = [seconds for step, seconds in steps.items() if step % monitors.every == 0]
    other = [seconds for step, seconds in steps.items() if step % monitors.every]
    return statistics.median(other), statistics.median(read), max(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["2m", "9m"])
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between readings here, to have enough of them")
    parser.add_argument(
        "--interval", type=int, default=50, help="steps between readings that the share is reckoned for"
    )
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    full = MonitorConfig(every=args.every, metrics=_all(), alarm="warn")
    kinds = {"layers (default)": MonitorConfig(every=args.every), "full": full}
    facts = [
        f"batches of {args.rows} × {args.length} tokens, AdamW, {args.precision}, vocabulary {args.vocabulary:,}",
        f"{args.steps} steps, a reading in every {args.every}th; medians; the share is for readings every "
        f"{args.interval} steps",
    ]
    head = ("preset", "monitors", "step, ms", "with a reading, ms", "reading, ms", "share, %", "pictures, ms")
    lines = page("What reading the layers costs", facts, head, 2, device=torch.device(args.device))
    for preset in args.presets:
        for name, config in kinds.items():
            plain, read, drawn = measure(preset, config, args)
            share = 100 * (read - plain) / (args.interval * plain)
            figures = (1e3 * plain, 1e3 * read, 1e3 * (read - plain))
            cells = [f"{value:,.1f}" for value in figures] + [f"{share:.2f}", f"{1e3 * drawn:,.0f}"]
            lines.append(f"| {preset} | {name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    save([*lines, ""], args.out)


def _all() -> list[str]:
    from thinrank.optim.spectra import METRICS

    return list(METRICS)


if __name__ == "__main__":
    main()
