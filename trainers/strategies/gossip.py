"""Lightning's strategy for processes that train apart and average weights with neighbours."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from thinrank.optim.gossip.compress import Compressor
from thinrank.optim.gossip.exchange import Gossip
from thinrank.trainers.checkpoint import defect, load, save
from thinrank.trainers.errors import UserError
from thinrank.trainers.strategies.config import GossipConfig
from thinrank.trainers.strategies.one_file import unwrapped
from thinrank.trainers.strategies.unwrapped import UnwrappedStrategy, checked

_log = logging.getLogger(__name__)


class GossipStrategy(UnwrappedStrategy):
    """Every process holds the whole model and trains it on its own data; weights are averaged with neighbours'.

    `Trainer(strategy="thinrank_gossip")` after `import thinrank.trainers`, or an object of this class for other
    settings (`thinrank.optim.gossip.Gossip` says what they mean). Any torch optimizer will do, one of them. The model
    is not wrapped, gradients stay on their process, and what clips them goes by this process's norm. What is logged
    with `sync_dist` is a mean over all processes as ever.

    Validation sees the average of all processes' weights. A checkpoint holds that average, under the model's names, so
    that any process of any strategy can go on from it; beside it every process writes a part of its own,
    `<name>.rank<number>`, with which the same number of processes goes on as if nothing had been. Without all parts, or
    with other settings, all begin anew from the average, with the first process's optimizer state. After training the
    model has the average.

    Args:
        topology: who averages with whom: a name, edges, a matrix, or a `Topology`.
        scheme: how: `choco`, `dcd`, `ecd`, `dpsgd`, …
        compressor: of messages: `auto` (the scheme's usual one), a name, or a `Compressor`.
        interval: steps of the optimizer between two exchanges.
        overlap: messages travel while the next gradient is computed, where the scheme allows it.
        check_every: exchanges between two looks at whether copies of neighbours are right.
        strict: refuse a compressor coarser than the scheme's theory allows, instead of a warning.
        evaluate: `average`, or `local`: validation sees each process's own weights.
        seed: of what is random about compression.
        scheme_options: of the scheme, such as `{"gamma": 0.5}`.
        options: of Lightning's `DDPStrategy`, but for those of DDP's wrapper.

    Raises:
        UserError: for bad values, or a Lightning that has not been tested; in `fit` for optimizers that do not suit.
    """

    NAME = "thinrank_gossip"
    UNSCALED = "leaves each process its own gradients, by which loss scales would part"
    local_gradients = True
    """A process looks at its own gradients, and may leave out a step that others make."""

    def __init__(
        self,
        *,
        topology: Any = "ring",
        scheme: str = "choco",
        compressor: str | Compressor = "auto",
        interval: int = 1,
        overlap: bool = True,
        check_every: int = 100,
        strict: bool = False,
        evaluate: str = "average",
        seed: int = 0,
        scheme_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        common = {"interval": interval, "overlap": overlap, "check_every": check_every, "strict": strict, "seed": seed}
        named = {"compressor": compressor} if isinstance(compressor, str) else {}
        checked(GossipConfig, scheme=scheme, evaluate=evaluate, scheme_options=scheme_options or {}, **named, **common)
        super().__init__(**options)
        self._settings = {
            "topology": topology,
            "scheme": scheme,
            "compressor": None if compressor == "auto" else compressor,
            **common,
            **(scheme_options or {}),
        }
        self.evaluate = evaluate
        self.exchange: Gossip | None = None
        self._resumed: str | os.PathLike | None = None

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise UserError(
                f"thinrank_gossip exchanges after the step of one optimizer, got {len(self.optimizers)}: return one "
                "with several groups of parameters from configure_optimizers"
            )
        assert self.lightning_module is not None
        try:
            self.exchange = Gossip(self.lightning_module, unwrapped(self.optimizers[0]), **self._settings)
        except ValueError as error:
            raise UserError(str(error)) from error

    # --- training ---------------------------------------------------------------------------------------------------

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer's step, and the exchange after it, which a process takes part in whatever its own step was."""
        result = super().optimizer_step(*args, **kwargs)
        assert self.exchange is not None
        self.exchange.step()
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing is sent in backward."""
        yield

    def on_train_end(self) -> None:
        if self.exchange is not None:
            self.exchange.settle()
        super().on_train_end()

    def on_validation_start(self) -> None:
        if self.exchange is not None and self.evaluate == "average":
            self.exchange.show_average()
        super().on_validation_start()

    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self.exchange is not None:
            self.exchange.show_own()

    def metrics(self) -> dict[str, float]:
        """What a log says of the exchange beside its bytes; waits for nobody."""
        return {} if self.exchange is None else {f"gossip/{k}": v for k, v in self.exchange.measured().items()}

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The exchange, whose state is restored with the optimizer's, exists once the strategy is set up."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The average of all processes' weights and buffers."""
        found = super().lightning_module_state_dict()
        if self.exchange is None:
            return found
        assert self.lightning_module is not None
        mean = self.exchange.average()
        first = {param: name for name, param in reversed([*self.lightning_module.named_parameters()])}
        tied = {n: first[param] for n, param in self.lightning_module.named_parameters(remove_duplicate=False)}
        by_name = {name: mean.get(tied.get(name, name)) for name in found}
        return {name: value if (own := by_name[name]) is None else own.to(value.dtype) for name, value in found.items()}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes each process's part, and then, when all are there, the first process's file."""
        if self.exchange is not None:
            own = {
                "optimizer": unwrapped(self.optimizers[0]).state_dict(),
                "exchange": self.exchange.state_dict(),
                "step": checkpoint.get("global_step"),
            }
            path = part_of(filepath, self.global_rank)
            save(own, path)
            self._forget_others(path)
            self.barrier("parts of a checkpoint")
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _forget_others(self, path: Path) -> None:
        """Removes this process's parts of checkpoints that are not there any more."""
        for other in path.parent.glob(f"*.rank{self.global_rank}"):
            if other != path and not other.with_suffix("").exists():
                other.unlink(missing_ok=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._resumed = checkpoint_path
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process's own, where all find theirs; otherwise the first process's, and all begin from the average."""
        assert self.exchange is not None
        own = self._own_part(checkpoint)
        if self.reduce_boolean_decision(own is not None, all=True):
            assert own is not None
            unwrapped(self.optimizers[0]).load_state_dict(own["optimizer"])
            self.exchange.load_state_dict(own["exchange"])
            return
        super().load_optimizer_state_dict(checkpoint)
        self.exchange.restart()
        if self.is_global_zero:
            _log.warning(
                "%s goes on from the average of the weights, because not every process has a part of it that is of "
                "this number of processes and these settings",
                self._resumed,
            )

    def _own_part(self, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
        assert self._resumed is not None
        assert self.exchange is not None
        path = part_of(self._resumed, self.global_rank)
        if defect(path) is not None:
            return None
        own = load(path)
        suits = own["step"] == checkpoint.get("global_step") and self.exchange.suits(own["exchange"])
        return own if suits else None


def part_of(path: str | os.PathLike, rank: int) -> Path:
    """Where a process keeps its part of a checkpoint; links are followed, since parts have none."""
    whole = Path(path).resolve()
    return whole.with_name(f"{whole.name}.rank{rank}")


def build(config: GossipConfig, **options: Any) -> GossipStrategy:
    """The strategy of a configuration."""
    return GossipStrategy(
        topology=config.made_topology(),
        scheme=config.scheme,
        compressor=config.made_compressor(),
        interval=config.interval,
        overlap=config.overlap,
        check_every=config.check_every,
        strict=config.strict,
        evaluate=config.evaluate,
        seed=config.seed,
        scheme_options=config.scheme_options,
        **options,
    )


__all__ = ["GossipStrategy", "build", "part_of"]
