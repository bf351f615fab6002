"""How runs of several processes train, by what these tell each other of gradients.

    python benchmarks/messages.py                                              # Fira, and signs of a residual
    python benchmarks/messages.py --ranks 4 --methods fira --seeds 1 2 --out benchmarks/results/messages-2m-4.md
    python benchmarks/messages.py --methods dion ldadam_8bit --messages full auto     # ranks that remember apart

Every run is `torchrun launch/pretrain.py strategy=thinrank_ddp`, the job of a study's file with the best setting that
this study found for one process. `full` sends gradients, as DDP does, so that a residual's signs are those of the mean;
`signs` sends coordinates and signs, so that they are a mean of signs; with `majority` the sign that most processes have
comes back. With `auto` the ranks of Dion and LDAdam keep a momentum, or an error, of their own and send small factors.
A step that chooses a subspace always sends gradients. Bytes are what leaves a process for a step, all kinds together;
bits per byte are of held-out text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from machine import page, save
from study_file import load_study

from thinrank.optim.messages import COARSE, ONE_WAY

HERE = Path(__file__).resolve().parent
FIRA = ["optimizer=fira", "optimizer.update_proj_gap=50", "optimizer.embedding_lr=0.02", "optimizer.lr=0.005"]
SETTINGS = {
    "fira": FIRA,
    **{f"fira-feedback-{how}": [*FIRA, f"optimizer.sign_feedback={how}"] for how in ("full", "8bit")},
    "subspace_adamw-signs": [
        "optimizer=subspace_adamw",
        "optimizer.residual=sign",
        "optimizer.update_proj_gap=50",
        "optimizer.embedding_lr=0.02",
        "optimizer.lr=0.0035",
    ],
    "dion": ["optimizer=dion", "optimizer.embedding_lr=0.04", "optimizer.lr=0.02"],
    "ldadam_8bit": ["optimizer=ldadam_8bit", "optimizer.embedding_lr=0.04", "optimizer.lr=0.008"],
}
"""By method; of subspace_adamw the gap is Fira's, so that few steps send gradients."""


def trained(name: str, messages: str, seed: int, ranks: int, base: list[str], folder: Path) -> dict:
    """The report of one run, which is not made again where it is finished, and goes on where it was interrupted."""
    place = folder / f"{name}-{messages}-{seed}-{ranks}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(HERE.parent / "launch" / "pretrain.py"), *base, *SETTINGS[name], "optimizer.rank=0.25"]
    command += ["strategy=thinrank_ddp", f"strategy.messages={messages}", f"run.dir={place}"]
    command += [f"{key}={seed}" for key in ("trainer.seed", "data.seed", "trainer.projection_seed")]
    report = place / "report.json"
    if not report.exists() or json.loads(report.read_text())["run"]["state"] != "finished":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder / f"{place.name}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return json.loads(report.read_text())


def leaving(sent: dict[str, float], ranks: int) -> float:
    """Bytes that leave a process for a step, from those of its tensors by kind."""
    once = sum(sent.get(kind, 0.0) for kind in ONE_WAY)  # the rest are sums that all get
    return (2 * (sent["payload"] - once) + once) * (ranks - 1) / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE / "studies" / "pysource-2m.yaml", help="whose job it is")
    parser.add_argument("--methods", nargs="+", default=["fira", "subspace_adamw-signs"], choices=list(SETTINGS))
    parser.add_argument("--messages", nargs="+", default=["full", *COARSE], choices=["full", "auto", *COARSE])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/messages"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    study = load_study(args.study)
    base = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in study.base.items()]
    args.runs.mkdir(parents=True, exist_ok=True)
    head = ("method", "messages", *(f"seed {seed}" for seed in args.seeds), "mean", "÷ full", "MiB a step", "÷ full")
    facts = [f"{args.ranks} processes; {study.about}", f"`{' '.join(base)}`"]
    lines = page("What replicas tell each other, and how runs train", facts, head, names=2)
    print("\n".join(lines), flush=True)
    for name in args.methods:
        whole: tuple[float, float] | None = None
        for messages in args.messages:
            reports = [trained(name, messages, seed, args.ranks, base, args.runs) for seed in args.seeds]
            losses = [report["metrics"]["test/bits_per_byte"] for report in reports]
            sent = [leaving(report["training"]["communication"], args.ranks) / 2**20 for report in reports]
            found = statistics.mean(losses), statistics.mean(sent)
            whole = found if messages == "full" else whole
            ratios = [
                "–" if whole is None else f"{mine / other:.4f}"
                for mine, other in zip(found, whole or found, strict=True)
            ]
            cells = [name, messages, *(f"{loss:.4f}" for loss in losses), f"**{found[0]:.4f}**", ratios[0]]
            lines.append("| " + " | ".join([*cells, f"{found[1]:.3f}", ratios[1]]) + " |")
            print(lines[-1], flush=True)
    save([*lines, ""], args.out)


if __name__ == "__main__":
    main()
