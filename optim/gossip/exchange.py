"""Ranks that train apart and average with neighbours: what a training loop calls after its optimizer's step."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinrank.optim.exchange.replicas import broadcast, gathered, refuse_other_models
from thinrank.optim.exchange.wire import Wire
from thinrank.optim.gossip.compress import Compressor
from thinrank.optim.gossip.parts import codec_of, graph_of, made
from thinrank.optim.gossip.peers import Flight, Peers
from thinrank.optim.gossip.rounds import Mean, Step
from thinrank.optim.gossip.schemes import Place
from thinrank.optim.gossip.trained import Trained


class Gossip:
    """Exchanges weights with neighbours instead of gradients with all.

    Every rank trains on its own data with an optimizer of its own; after `optimizer.step()` comes `step()`:

        exchange = Gossip(model, optimizer, topology="ring", scheme="choco", compressor="uniform4")
        for batch in batches:
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
            exchange.step()
        with exchange.averaged():
            evaluate(model)

    All ranks call it alike, though one whose gradient was not finite may leave out its `optimizer.step()`. Weights are
    made equal to the first rank's at the start. Gradients must be this rank's own: no wrapper such as DDP may average
    them, and clipping is by the norm of this rank's. Any torch optimizer will do; each keeps the state that its own
    gradients lead to. What travels is float32: of 16-bit weights a float32 copy is kept here, and where thinrank's
    optimizer keeps masters (`half_weights="master"`) these are exchanged.

    Args:
        model: whose trained parameters are exchanged, each once however often it is used.
        optimizer: that steps all of them.
        topology: who averages with whom: a name, edges, a matrix of weights, or a `Topology`.
        scheme: how (`SCHEMES`).
        compressor: of messages: a name (`COMPRESSORS`) or a `Compressor`; None: the scheme's usual one.
        interval: steps of the optimizer between two exchanges.
        overlap: messages travel while the next gradient is computed, where the scheme allows it.
        check_every: exchanges between two looks at whether copies of neighbours are right.
        seed: of what is random about compression; the global generators are left alone.
        strict: refuse a compressor that usually errs by more than the scheme's theory allows, instead of a warning.
        group: of the ranks; None: all processes.
        options: of the scheme, such as CHOCO's `gamma`.

    Attributes:
        wire: bytes that have left this rank, `gossip` in its payload and what no step needs in `wire.rare`.
        scheme: this rank's side of the exchange.
        seconds: that `step` has taken so far, waiting for others included.

    Raises:
        RuntimeError: without a process group.
        ValueError: for settings that do not go together or differ between ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        topology: Any = "ring",
        scheme: str = "choco",
        compressor: str | Compressor | None = None,
        interval: int = 1,
        overlap: bool = True,
        check_every: int = 100,
        seed: int = 0,
        strict: bool = False,
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("interval", interval), ("check_every", check_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} must be a whole number of at least 1, got {value!r}: leave it out for the usual"
                )
        self.wire = Wire()
        self.peers = Peers(group, self.wire)
        self.model, self.optimizer = model, optimizer
        self.interval, self.overlap, self.seed = interval, overlap, seed
        self._trained = self._find(model, optimizer)
        self._params = self._trained.params
        refuse_other_models(self._params, self.wire.rare, group)
        graph, codec = graph_of(topology, self.peers.size), codec_of(scheme, compressor)
        settings = {
            "topology": graph.digest(),
            "scheme": scheme,
            "compressor": repr(codec),
            "interval": interval,
            "check_every": check_every,
            "seed": seed,
            "options": sorted(options.items()),
        }
        self._refuse_other_settings(settings)
        self._digest = hashlib.sha256(repr((self.peers.size, settings)).encode()).hexdigest()
        place = Place(rank=self.peers.rank, topology=graph, seed=seed, check_every=check_every, compressor=codec)
        self.scheme = made(scheme, place, codec, [tuple(p.shape) for p in self._params.values()], strict, options)
        trained = {*self._params.values()}
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor not in trained:
                broadcast([tensor.data], self.wire.rare, group)
        self._trained.level(self.wire.rare, group)
        self._calls = 0
        self._own: dict[str, Tensor] | None = None  # while the model shows the average
        self.seconds = 0.0
        self._distance = math.nan  # of the last look
        self._flight: Flight | None = None
        self._begin(self._read())

    # --- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Exchanges, if one is due after this step of the optimizer; to be called by all ranks after each of them.

        Raises:
            PeerLost: a neighbour does not answer.
        """
        self._calls += 1
        if self._calls % self.interval:
            return
        began = time.perf_counter()
        self.finish()
        flight = self.peers.begin(self.scheme.step(self._weights, self._moved()))
        self._flight = flight
        if not self.overlap:
            self.finish()
        assert flight.weights is not None
        self._weights = flight.weights
        self._trained.write(self._weights)
        self.seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Waits for what is under way."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            flight.finish()

    def _begin(self, weights: Tensor) -> None:
        self._weights = weights
        self.scheme.start(weights)

    def _moved(self) -> Tensor:
        """What the optimizer has added to the weights since the last exchange."""
        return self._read().sub_(self._trained.held(self._weights))

    # --- weights ----------------------------------------------------------------------------------------------------

    def _find(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Trained:
        return Trained(model, optimizer)

    def _here(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's own, also while the model shows the average."""
        return tensor.detach() if self._own is None else self._own[name]

    def _read(self) -> Tensor:
        return self._trained.read(self._own)

    @property
    def _between(self) -> bool:
        """True where the optimizer has stepped since the last exchange."""
        return self._calls % self.interval != 0

    def _now(self) -> Tensor:
        """This rank's weights, with what 16 bits cannot show where they are those of the last exchange."""
        return self._read() if self._between else self._weights

    # --- all ranks together -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def average(self) -> dict[str, Tensor]:
        """The mean over all ranks of each parameter, float32, and of each buffer of floating numbers in its own dtype;
        other buffers are the first rank's. By the model's names; all ranks call it. Between two exchanges it is of what
        ranks have come to since the last one."""
        self.finish()
        own = self._now()
        mean = self._mean_of(own)
        self._apart(own, mean)
        found = dict(zip(self._params, self._trained.split(mean), strict=True))
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                found[name] = self._mean_of(buffer.float().reshape(-1)).view(buffer.shape).to(buffer.dtype)
            else:
                found[name] = buffer.clone()
                broadcast([found[name]], self.wire.rare, self.peers.group)
        return found

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Meanwhile the model has the mean of all ranks' weights and buffers; then its own again. All ranks call it."""
        self.show_average()
        try:
            yield
        finally:
            self.show_own()

    @torch.no_grad()
    def show_average(self) -> None:
        """Puts the mean of all ranks' weights and buffers into the model until `show_own`. All ranks call it."""
        if self._own is not None:
            return
        mean = self.average()
        self._own = {name: tensor.detach().clone() for name, tensor in self._named()}
        for name, tensor in self._named():
            tensor.detach().copy_(mean[name])

    @torch.no_grad()
    def show_own(self) -> None:
        """Gives the model this rank's own weights and buffers back."""
        own, self._own = self._own, None
        if own is not None:
            for name, tensor in self._named():
                tensor.detach().copy_(own[name])

    @torch.no_grad()
    def settle(self) -> None:
        """Ends with the mean of all ranks' weights and buffers in the model, and in what is exchanged from here on."""
        self.show_own()
        mean = self.average()
        for name, tensor in self._named():
            tensor.detach().copy_(mean[name])
        self._begin(torch.cat([mean[name].reshape(-1) for name in self._params]))
        self._trained.write(self._weights)

    @torch.no_grad()
    def consensus(self) -> float:
        """How far ranks are apart: √(meanᵢ ‖xᵢ − x̄‖²) / ‖x̄‖. All ranks call it; it costs a mean of the weights."""
        self.finish()
        own = self._now()
        return self._apart(own, self._mean_of(own))

    def _apart(self, own: Tensor, mean: Tensor) -> float:
        squares = self._mean_of((own - mean).double().square().sum().float().view(1))
        self._distance = math.sqrt(float(squares)) / max(float(mean.norm()), 1e-30)
        return self._distance

    def measured(self) -> dict[str, float]:
        """What has happened on this rank so far, without asking others: `seconds` in `step`; messages `lost`, `corrupt`
        and `skipped` by their senders, copies `repaired`, steps of its own left out (`not_finite`); the `error` of the
        compressor, √(mean of ‖C(z) − z‖² / ‖z‖²) over the last some twenty, and the `limit` of the scheme's theory; the
        `consensus` that was last looked at, by `consensus` or with an average."""
        tally = self.scheme.tally
        found = {"seconds": self.seconds, "not_finite": float(tally.skipped)}
        found |= {name: float(tally.counts[name]) for name in ("lost", "corrupt", "skipped", "repaired")}
        limit, _ = type(self.scheme).limit(self.scheme.place.topology)
        known = {"error": tally.error.alpha, "limit": limit, "consensus": self._distance}
        return found | {name: value for name, value in known.items() if math.isfinite(value)}

    def _mean_of(self, values: Tensor) -> Tensor:
        def mean() -> Step:
            return (yield Mean(values=values))

        return Peers(self.peers.group, self.wire.rare, "average").run(mean())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._params.items()
        yield from self.model.named_buffers()

    # --- memory -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on to the bit, its own weights and buffers among it; copies of nothing."""
        self.finish()
        return {
            "digest": self._digest,
            "calls": self._calls,
            "steps": self.scheme.steps,
            "weights": self._weights,
            "moved": self._read() if self._between else None,
            "buffers": {name: self._here(name, buffer) for name, buffer in self.model.named_buffers()},
            "scheme": self.scheme.state(),
        }

    def suits(self, state: Mapping[str, Any]) -> bool:
        """Whether a state is of an exchange with these ranks and settings."""
        return state["digest"] == self._digest

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, on the same rank of the same graph with the same settings; to be called
        after the optimizer's state has been loaded.

        Raises:
            ValueError: if settings or ranks were others: `restart` from the average instead.
        """
        if not self.suits(state):
            raise ValueError(
                "this state is of another exchange (number of ranks, topology, scheme, compressor, interval or seed): "
                "load the average of the weights and call restart()"
            )
        self.finish()
        self._calls = state["calls"]
        device = self._weights.device
        self._weights = state["weights"].to(device)
        self.scheme.load({name: value.to(device) for name, value in state["scheme"].items()}, state["steps"])
        self._trained.write(self._weights if state["moved"] is None else state["moved"].to(device))
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state["buffers"][name])

    @torch.no_grad()
    def restart(self) -> None:
        """Begins anew from the weights that the model has now, the first rank's on all."""
        self.finish()
        self._trained.level(self.wire.rare, self.peers.group)
        self._begin(self._read())

    # --- refusals ---------------------------------------------------------------------------------------------------

    def _refuse_other_settings(self, mine: Mapping[str, Any]) -> None:
        device = next(iter(self._params.values())).device
        for rank, theirs in enumerate(gathered(dict(mine), "start", device, self.wire.rare, self.peers.group)):
            for name in mine:
                if mine[name] != theirs.get(name):
                    raise ValueError(
                        f"ranks must exchange alike, and {name} is {theirs.get(name)!r} on rank {rank} and "
                        f"{mine[name]!r} on rank {self.peers.rank}: give every rank the same settings"
                    )
