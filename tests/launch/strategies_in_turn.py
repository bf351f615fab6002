"""A program for ranks under torchrun: launch/pretrain.py with one strategy after the other, a process for each run.

Imports of other people's packages, most of what a start costs, are made once; every run is a fork that begins with the
script itself, named as Python names it, and ends as Python ends it. The ranks of a run meet in a store of their own,
as those of a job do, and begin when those of the run before have all ended: the store has the same port.
"""

import importlib
import os
import runpy
import sys
import time
from pathlib import Path

from small_run import run_words
from submitting import ROOT

SCRIPT = str(ROOT / "launch" / "pretrain.py")


def run(words):
    """Exit code of the script."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.argv = [SCRIPT, *words]
        runpy.run_path(SCRIPT, run_name="__main__")
        raise AssertionError("the script came back instead of ending")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(base, *strategies):
    for package in ("torch", "lightning.pytorch", "transformers"):
        importlib.import_module(package)
    for name in strategies:
        words = [*run_words(base, name), "optimizer.update_proj_gap=2", "trainer.max_steps=3"]
        code = run([*words, f"strategy={name}", "strategy.timeout=120"])
        if code:
            sys.exit(f"strategy={name} ended with {code} on rank {os.environ['RANK']}")
        ended = [Path(base, f"{name} has ended on {rank}") for rank in range(int(os.environ["WORLD_SIZE"]))]
        ended[int(os.environ["RANK"])].touch()
        while not all(path.exists() for path in ended):  # torchrun ends this process where another one fails
            time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:])
