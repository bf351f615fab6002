"""Which runs a transfer consists of: widths × rates × decays × rules × seeds, each with a folder of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thinrank.optim.scaling import PRESETS, ScalingConfig
from thinrank.trainers.errors import UserError
from thinrank.trainers.pretrain import PretrainConfig
from thinrank.trainers.run import RunConfig
from thinrank.trainers.scaling import at_width, with_forward

DESIGNS = ("cross", "grid")


def rule_of(name: str) -> dict[str, Any]:
    """The fields of a rule by its name, or by the exponent of its decay, such as ``0.7``.

    Raises:
        ValueError: for neither.
    """
    if name in PRESETS:
        return dict(PRESETS[name])
    try:
        exponent = float(name)
    except ValueError:
        raise ValueError(
            f"rules must be names ({', '.join(PRESETS)}) or exponents of the decay, got {name!r}: write one of them"
        ) from None
    return {"name": f"wd{exponent:g}", "wd_width_exp": exponent}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is tried.

    Attributes:
        widths: hidden sizes of the proxies, at least three.
        rates: of matrices at the base, at least three.
        decays: at the base.
        rules: names of `PRESETS`, or exponents of the decay.
        seeds: of weights and of the order of the data.
        target: the width that is wanted, above all proxies.
        base_width: at which rates and decays are what they are called; None: the smallest proxy.
        design: `cross` (all rates at the middle decay, then all decays at the best rate), or `grid` (all pairs).
        probes: readings of singular values in a run.
    """

    widths: tuple[int, ...]
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    target: int
    rules: tuple[str, ...] = ("const", "sqrt_wd", "linear_wd")
    seeds: tuple[int, ...] = (0,)
    base_width: int | None = None
    design: str = "cross"
    probes: int = 8

    def __post_init__(self) -> None:
        for name in ("widths", "rates", "decays", "rules", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} must not be empty: give at least one")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must differ from each other, got {list(values)}: leave the repeated one out")
        if len(self.widths) < 3:
            raise ValueError(
                f"a fit over widths needs at least 3 of them, got {list(self.widths)}: add another proxy, such as "
                f"{max(self.widths) * 2}"
            )
        if any(width < 1 for width in self.widths):
            raise ValueError(f"widths must be at least 1, got {list(self.widths)}: give hidden sizes")
        if self.target <= max(self.widths):
            raise ValueError(
                f"the target must be wider than all proxies, got {self.target} and proxies up to {max(self.widths)}: "
                "raise the target or leave out wide proxies"
            )
        if len(self.rates) < 3:
            raise ValueError(
                f"rates must be at least 3, or nothing shows where the best one lies, got {list(self.rates)}: give more"
            )
        for name in ("rates", "decays"):
            values = getattr(self, name)
            if any(not math.isfinite(value) or value < 0 or (name == "rates" and not value) for value in values):
                raise ValueError(f"{name} must be finite and above 0, got {list(values)}: correct them")
            if list(values) != sorted(values):
                raise ValueError(f"{name} must rise, got {list(values)}: sort them")
        if self.design not in DESIGNS:
            raise ValueError(f"design must be one of {', '.join(DESIGNS)}, got {self.design!r}: choose one")
        if self.probes < 2:
            raise ValueError(f"probes must be at least 2, got {self.probes}: equal ages are found between readings")
        for name in self.rules:
            rule_of(name)

    @property
    def base(self) -> int:
        return min(self.widths) if self.base_width is None else self.base_width

    @property
    def middle(self) -> int:
        """Index of the decay at which `cross` tries the rates."""
        return len(self.decays) // 2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run: a place on the grid, at one width, under one rule, with one seed."""

    rule: str
    width: int
    rate: int
    """Index into the sweep's rates."""
    decay: int
    """Index into the sweep's decays."""
    seed: int
    folder: Path
    config: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.rule} width {self.width} {self.folder.parent.name} seed {self.seed}"


def trial(
    sweep: Sweep, base: PretrainConfig, root: Path, rule: str, width: int, rate: int, decay: int, seed: int
) -> Trial:
    """The run at one place.

    At the base, rules that multiply nothing there are one and the same run, in a folder called ``base``.

    Raises:
        UserError: for a width at which the heads do not come out even.
    """
    scaling = scaling_at(sweep, base, rule)
    shared = width == sweep.base and (not scaling.active or scaling.vector_decay == 1.0)
    lr, weight_decay = sweep.rates[rate], sweep.decays[decay]
    place = f"lr{lr:g}-wd{weight_decay:g}"
    folder = root / ("base" if shared else rule) / f"w{width}" / place / f"seed{seed}"
    model = at_width(base.model, width, heads=base.scaling.heads)
    trainer = replace(base.trainer, seed=seed, tensorboard=False, export=False, sample_tokens=0)
    data = replace(base.data, seed=seed) if any(f.name == "seed" for f in dataclasses.fields(base.data)) else base.data
    try:
        config = replace(
            base,
            model=model,
            data=data,
            optimizer=replace(base.optimizer, lr=lr, weight_decay=weight_decay),
            scaling=base.scaling if shared else scaling,
            trainer=trainer,
            run=RunConfig(name=f"{rule}-{width}-{place}-{seed}", dir=str(folder)),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return Trial(rule=rule, width=width, rate=rate, decay=decay, seed=seed, folder=folder, config=config)


def scaling_at(sweep: Sweep, base: PretrainConfig, rule: str) -> ScalingConfig:
    """A rule with the base of the sweep; what it leaves open is as the configuration says."""
    if rule == "none":
        return base.scaling
    return replace(base.scaling, base_width=sweep.base, base_depth=base.model.num_hidden_layers, **rule_of(rule))


def check(sweep: Sweep, base: PretrainConfig) -> None:
    """Refuses what no run could be made of.

    Raises:
        UserError: for a base with a rule of its own, sizes that do not come out even at a proxy or at the target, and a
            rule that needs factors in the forward that the architecture has no place for.
    """
    if base.scaling.active:
        raise UserError(
            f"scaling={base.scaling.name} is what the sweep chooses itself: leave it out, and name rules by --rules"
        )
    if base.model.pretrained is not None:
        raise UserError("model.pretrained has one width, and a transfer trains several: leave it out")
    for width in (sweep.base, *sweep.widths, sweep.target):
        at_width(base.model, width, heads=base.scaling.heads)
    try:
        for rule in sweep.rules:
            for width in sweep.widths:
                with_forward(at_width(base.model, width, heads=base.scaling.heads), scaling_at(sweep, base, rule))
    except ValueError as error:
        raise UserError(str(error)) from error


def plain(sweep: Sweep) -> Mapping[str, Any]:
    """The sweep as plain values, for JSON."""
    return {**dataclasses.asdict(sweep), "base": sweep.base}
