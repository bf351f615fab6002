"""What is measured in each run of a transfer: top singular values along the way, gains at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from thinrank.optim.scaling import matrix_kind, measure_gains, top_sigma
from thinrank.trainers.files import write_json
from thinrank.trainers.jobs import Pretraining

FILE = "probe.json"


class Probe(pl.Callback):
    """Reads singular values a few times in a run, and gains on the first batch of the held-out text after it.

    It writes nothing into the model and draws no random numbers. What it has read is kept in checkpoints. For one
    process, whose weights are whole.

    Args:
        folder: of the run; `FILE` is written there.
        steps: of the whole run.
        count: readings beside that of the first weights, more of them early than late, since wide models are younger
            at the same step under most rules; the last one after the last step.
    """

    def __init__(self, folder: Path, steps: int, count: int) -> None:
        self.folder = folder
        self.at = {max(1, round(steps * ((i + 1) / count) ** 2)) for i in range(count)}
        self.rows: list[dict[str, Any]] = []
        self.clock: dict[str, float] = {}
        self.peak: dict[str, tuple[float, float]] = {}
        self.gains: dict[str, dict[str, float]] = {}
        self._pending: dict[str, float] = {}
        self._seen = 0
        self._of: dict[str, int] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network: Any = pl_module.model
        places = {id(p): i for i, group in enumerate(trainer.optimizers[0].param_groups) for p in group["params"]}
        self._of = {}
        for name, module in network.named_modules():
            group = next((places[id(p)] for p in module.parameters() if id(p) in places), None)
            if matrix_kind(name) is not None and group is not None:
                self._of[name] = group
        self._seen = trainer.global_step
        if not self._seen:
            self._read(network)

    def _read(self, network: Any) -> None:
        tops = {name: float(value) for name, value in top_sigma(network).items() if name in self._of}
        self.rows.append({"step": self._seen, "sigma": tops, "clock": dict(self.clock)})

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        groups = optimizer.param_groups
        self._pending = {n: float(groups[i]["lr"]) * float(groups[i]["weight_decay"]) for n, i in self._of.items()}
        for name, index in self._of.items():
            self.peak[name] = (
                float(groups[index].get("initial_lr", groups[index]["lr"])),
                float(groups[index]["weight_decay"]),
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        for name, passed in self._pending.items():
            self.clock[name] = self.clock.get(name, 0.0) + passed
        if self._seen in self.at:
            self._read(pl_module.model)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or self.gains:
            return
        network: Any = pl_module.model
        found = measure_gains(network, lambda: pl_module(batch["input_ids"]))
        self.gains = {
            "linear": {name: float(value) for name, value in found.linear.items()},
            "residual": {name: float(value) for name, value in found.residual.items()},
        }

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        write_json(self.folder / FILE, {"rows": self.rows, "peak": self.peak, "gains": self.gains})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "clock": self.clock, "peak": self.peak}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.clock, self.peak = state_dict["rows"], state_dict["clock"], state_dict["peak"]


class Probed(Pretraining):
    """A run that is measured."""

    def __init__(self, config: Any, *, steps: int, probes: int) -> None:
        super().__init__(config)
        self.steps, self.probes = steps, probes

    def callbacks(self) -> list[pl.Callback]:
        return [Probe(Path(self.config.run.dir).expanduser().absolute(), self.steps, self.probes)]
