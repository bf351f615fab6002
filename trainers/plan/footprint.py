"""One configuration's plan: what each process holds, what it sends, and the room that a step needs for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from thinrank.optim import Routing
from thinrank.trainers.plan.held import Around, Held
from thinrank.trainers.plan.precision import CAST
from thinrank.trainers.plan.strategies import strategy_of
from thinrank.trainers.plan.trace import Work, work
from thinrank.trainers.plan.wire import WHENS, Traffic
from thinrank.trainers.pretrain import Plan, TrainingConfig
from thinrank.trainers.strategies import World


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a run costs each process.

    Attributes:
        world: processes.
        held: bytes from step to step.
        traffic: bytes on the wire of a step.
        gap: steps over which the wire is averaged; 1 where all steps are alike.
        searches: so many first steps send gradients as a renewal does.
        work: bytes for a while; None where nobody asked, or where `untraced` says why not.
        untraced: why the step could not be traced; empty where it was, or nobody asked.
    """

    world: int
    held: Held
    traffic: Traffic
    gap: int
    searches: int
    work: Work | None = None
    untraced: str = ""

    @property
    def peak(self) -> int | None:
        """Most bytes at one time."""
        return None if self.work is None else self.held.peak(self.work)

    def sent(self, start: int, end: int) -> float:
        """Bytes of payload a step, in the mean of the optimizer steps from `start` to before `end`."""
        if end <= start:
            return 0.0
        searching = max(0, min(end, self.searches) - start)
        renewing = sum(1 for step in range(max(start, self.searches), end) if step % self.gap == 0)
        between, renewal, first = (self.traffic.payload(when) for when in ("between", "renewal", "first"))
        return between + ((renewal - between) * renewing + (first - between) * searching) / (end - start)

    def plain(self) -> dict[str, Any]:
        """The same as numbers by name, for JSON."""
        world, traffic = self.world, self.traffic
        found: dict[str, Any] = {f"{key}_bytes": value for key, value in asdict(self.held).items()}
        if self.work is not None:
            found |= {f"{key}_bytes": value for key, value in asdict(self.work).items()} | {"peak_bytes": self.peak}
        if self.untraced:
            found["untraced"] = self.untraced
        found["wire"] = {
            "world": world,
            "gap": self.gap,
            "searches": self.searches,
            "payload": {when: traffic.payload(when) for when in WHENS},
            "leaving": {when: traffic.leaving(when, world) for when in WHENS},
            "fullest": {when: traffic.fullest(when, world) for when in WHENS},
            "kinds": traffic.kinds(),
            "framework": {each.kind: each.leaving("averaged", world) for each in traffic.framework},
        }
        return found


def footprint(
    config: TrainingConfig,
    model: nn.Module,
    routing: Routing,
    world: World,
    *,
    trace: bool,
    known: Work | None = None,
    ranks: Mapping[str, int | float | None] | None = None,
) -> Footprint:
    """The plan of `config` on `world`.

    Args:
        model: with weights of the type they are trained in; on the meta device where the step is to be traced.
        routing: of this model.
        trace: run a step without memory for what it needs for a while; seconds for billions of weights.
        known: what such a trace has found before.
        ranks: of matrices that have their own.

    Raises:
        UserError: a strategy without a plan, or a batch that the processes cannot share.
    """
    rows, choice, sizes = routing.rows, config.trainer, Plan.of(config, world)
    asked = bool(choice.clip_norm) or config.guard.acts
    around = Around(routing=routing, precision=choice.precision, accumulate=sizes.accumulate, clips=asked)
    strategy = strategy_of(config.strategy, world.size, around)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    traffic = strategy.sent(rows, world.size)
    changing = traffic.payload("renewal") != traffic.payload("between")
    turning = [row for row in rows if row.sends_image or (changing and row.gap > 1)]
    searches = max((row.searches for row in turning), default=0)
    searches = max(searches, int(traffic.payload("first") != traffic.payload("renewal")))
    found, why = known, ""
    if trace:
        try:
            found = work(
                model,
                config.optimizer,
                sequences=sizes.micro_batch,
                length=config.data.sequence_length,
                cast=CAST.get(choice.precision),
                accumulate=sizes.accumulate,
                in_backward=choice.in_backward,
                max_norm=choice.clip_norm,
                ranks=ranks,
                cross_entropy=choice.cross_entropy,
            )
        except Exception as error:  # whatever an architecture does that cannot be done without values: told, not hidden
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Footprint(
        world=world.size,
        held=strategy.held(rows, frozen, world.size, choice.in_backward),
        traffic=traffic,
        gap=max((row.gap for row in turning), default=1),
        searches=searches,
        work=found,
        untraced=why,
    )
