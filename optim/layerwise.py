"""Learning rates, or weight decays, by layer that follow the tails of the weights' spectra while a model trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from thinrank.optim.grouping import Role, roles
from thinrank.optim.layers.base import Layer
from thinrank.optim.layers.loro import LOROLinear
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.optim.methods.config import choice, number, whole_steps
from thinrank.optim.monitors.farms import farms_alpha
from thinrank.optim.monitors.layerwise import (
    ENDS,
    MAPS,
    eligible,
    limited,
    multipliers,
    product_evals,
    ramped,
    spread,
    with_geometric_mean_one,
)
from thinrank.optim.monitors.tail import hill_alpha
from thinrank.optim.optimizer import MatrixOptimizer

PRODUCTS = (LowRankLinear, LOROLinear)
"""Layers whose weight is the product of two factors and nothing else; those of other kinds take no part."""


@dataclass(frozen=True, kw_only=True)
class LayerwiseConfig:
    """Learning rates and weight decays of layers are those of their groups; `Tails` has them follow spectra."""

    name: str = field(default="none", metadata={"help": "schedule by layer (chosen by `layerwise=…`)"})

    @property
    def acts(self) -> bool:
        """Whether anything is changed at all."""
        return False


@dataclass(frozen=True, kw_only=True)
class Tails(LayerwiseConfig):
    """What schedules by the exponent α of the weights' spectra have in common (`monitors.layerwise`)."""

    s1: float = field(default=0.5, metadata={"help": "multiplier of the layer with the heaviest tail"})
    s2: float = field(default=1.5, metadata={"help": "multiplier of the layer with the lightest tail"})
    map: str = field(default="linear", metadata={"help": f"from tails to multipliers: {', '.join(MAPS)}"})
    every: int = field(default=500, metadata={"help": "steps between two looks at the spectra"})
    ramp: int = field(default=0, metadata={"help": "steps in which a new multiplier is reached on a straight line"})
    min_evals: int = field(
        default=50, metadata={"help": "layers whose shorter side (or rank of factors) is less take no part"}
    )
    ends: str = field(default="drop", metadata={"help": "first and last matrix: drop (they take no part), keep"})
    normalise: bool = field(
        default=True, metadata={"help": "divide by the geometric mean, so that the model's rate stays what was given"}
    )
    most: float | None = field(
        default=1.25, metadata={"help": "largest factor by which a look changes a multiplier; null: no limit"}
    )
    window: int = field(default=128, metadata={"help": "rows and columns of the windows whose spectra are pooled"})
    per_side: int = field(default=5, metadata={"help": "windows along each side of a matrix, at least 2"})

    SCALES: ClassVar[str] = "lr"
    """What is multiplied: `lr` or `decay`."""
    HEAD: ClassVar[bool] = True
    """Whether an output layer of its own is among the matrices."""

    def __post_init__(self) -> None:
        for key in ("s1", "s2"):
            number(key, getattr(self, key), open_low=True)
        choice("map", self.map, MAPS)
        choice("ends", self.ends, ENDS)
        whole_steps("every", self.every)
        for key, least in (("ramp", 0), ("min_evals", 2), ("window", 2), ("per_side", 2)):
            _at_least(key, getattr(self, key), least)
        if self.ramp > self.every:
            raise ValueError(
                f"ramp must be at most every ({self.every} steps), got {self.ramp}: a multiplier would be replaced "
                "before it is reached, so lower the one or raise the other"
            )
        if self.most is not None:
            number("most", self.most, low=1.0, open_low=True)

    @property
    def acts(self) -> bool:
        return True


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class TempBalance(Tails):
    """TempBalance (Zhou et al. 2023, arXiv 2312.00359): learning rates, larger where the tail is light.

    Defaults: the authors' are s1=0.5, s2=1.5, map=linear, ends=drop and min_evals=5; ours are every=500, since they
    look once an epoch, per_side=5 and window=128 (FARMS in the place of the whole spectrum), normalise=True, most=1.25
    and ramp=0.
    """

    name: str = field(default="tempbalance", metadata={"help": "schedule by layer (chosen by `layerwise=…`)"})
    min_evals: int = field(
        default=5, metadata={"help": "layers whose shorter side (or rank of factors) is less take no part"}
    )


@dataclass(frozen=True, kw_only=True)
class AlphaDecay(Tails):
    """AlphaDecay (He et al. 2025, arXiv 2506.14562): weight decays, larger where the tail is light.

    Defaults: the authors' are s1=0.667 and s2=3.0 (their command for 130M), map=linear, every=500, ends=drop and
    min_evals=50; ours are per_side=5 and window=128 (FARMS in the place of the whole spectrum), normalise=True,
    most=1.25 and ramp=0.
    """

    name: str = field(default="alphadecay", metadata={"help": "schedule by layer (chosen by `layerwise=…`)"})
    s1: float = field(default=0.667, metadata={"help": "multiplier of the layer with the heaviest tail"})
    s2: float = field(default=3.0, metadata={"help": "multiplier of the layer with the lightest tail"})

    SCALES = "decay"


@dataclass(frozen=True, kw_only=True)
class LLR(Tails):
    """LLR (arXiv 2605.22297): learning rates of a transformer's linear layers, larger where the tail is light.

    Defaults: the authors' are s1=1.0, s2=5.0, map=linear, every=100, ramp=50 and ends=keep; ours are min_evals=50,
    per_side=5 and window=128 (FARMS in the place of the whole spectrum), normalise=True and most=1.25. As published,
    where the rate that is given is that of the heaviest tail: normalise=False, most=None.
    """

    name: str = field(default="llr", metadata={"help": "schedule by layer (chosen by `layerwise=…`)"})
    s1: float = field(default=1.0, metadata={"help": "multiplier of the layer with the heaviest tail"})
    s2: float = field(default=5.0, metadata={"help": "multiplier of the layer with the lightest tail"})
    every: int = field(default=100, metadata={"help": "steps between two looks at the spectra"})
    ramp: int = field(default=50, metadata={"help": "steps in which a new multiplier is reached on a straight line"})
    ends: str = field(default="keep", metadata={"help": "first and last matrix: drop (they take no part), keep"})

    HEAD = False


LAYERWISE: dict[str, type[LayerwiseConfig]] = {
    "none": LayerwiseConfig, "tempbalance": TempBalance, "alphadecay": AlphaDecay, "llr": LLR,
}  # fmt: skip
"""By name; `none` changes nothing."""


def refuse_without_decay(config: LayerwiseConfig, decays: Iterable[float]) -> None:
    """Refuses to multiply weight decays that are all 0.

    Raises:
        ValueError: with the remedy.
    """
    if isinstance(config, Tails) and config.SCALES == "decay" and not any(decays):
        raise ValueError(
            f"layerwise={config.name} multiplies weight decay, which is 0: give optimizer.weight_decay a value such as "
            "0.1, or use layerwise=llr"
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A weight of which there might be a tail to tell.

    Attributes:
        params: by name: the matrix, or the two factors (out, r) and (r, in) of which it is the product.
        evals: eigenvalues that are not zero by construction.
    """

    name: str
    params: dict[str, Tensor]
    evals: int


class TailSchedule:
    """Multiplies learning rates, or weight decays, of matrices by what the tails of their spectra say.

        schedule = TailSchedule("alphadecay", every=500)
        for step in range(steps):
            schedule.update(model, optimizer, step)
            loss(model).backward()
            optimizer.step()

    Every `every` steps, and not before the first, it estimates the exponent α of each matrix that takes part, by FARMS
    on windows of it, and sets multipliers (`MatrixOptimizer.set_multipliers`), which act beside the groups' rates and
    whatever schedule moves these. The larger α, the larger the multiplier. Factors whose product is a layer's weight
    (`LowRank`, `LORO`) have α of that product's own spectrum and share its multiplier (ours). Embeddings, vectors and
    layers of other kinds of factors take no part.

    Weights in pieces (FSDP2, ZeRO) are looked at where they lie: each rank takes windows of its own whole rows, and α
    is the mean over the ranks by rows, which is near what one process finds and not the same.

    What it can see: that one layer's spectrum differs from another's. What it cannot: why, and whether the layer with
    the lighter tail would gain from a larger step; that is what the papers report of their models.

    Args:
        method: `tempbalance`, `alphadecay`, `llr`, or the configuration of one.
        settings: its fields, where `method` is a name.

    Attributes:
        alphas: of the last look, by name of the matrix.
        multipliers: as they are now, by name.

    Raises:
        ValueError: for another method, or a bad value.
    """

    def __init__(self, method: str | Tails = "tempbalance", **settings: Any) -> None:
        if isinstance(method, Tails):
            if settings:
                raise ValueError(f"settings are given beside a configuration ({next(iter(settings))}): leave them out")
            self.config = method
        else:
            choice("method", method, tuple(name for name in LAYERWISE if name != "none"))
            config = LAYERWISE[method](**settings)
            assert isinstance(config, Tails)
            self.config = config
        self.alphas: dict[str, float] = {}
        self.multipliers: dict[str, float] = {}
        self._before: dict[str, float] = {}  # where the way to `_target` began
        self._target: dict[str, float] = {}
        self._members: dict[str, list[str]] = {}  # of a matrix: itself, or its factors
        self._looked = 0  # the step of the last look
        self._step = -1  # the last that was asked about

    def update(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        summed: Callable[[Tensor], Tensor] | None = None,
    ) -> bool:
        """To be called before each step, with the gradients of it there or not.

        Args:
            step: optimizer steps that are done.
            rank, ranks: where weights are whole, share the work: every rank looks at each `ranks`-th matrix. All ranks
                must call it then, with `summed`.
            summed: from a tensor of float64 on the weights' device to its sum over all ranks, the same on each; None:
                over those that `optimizer` knows of (`sum_over_ranks`).

        Returns:
            whether it has looked at the spectra.

        Raises:
            ValueError: for an optimizer that is not of thinrank, or where nothing takes part (`candidates`).
        """
        if step == self._step:
            return False
        own, first = _own(optimizer), self._step < 0
        self._step = step
        looks = step > 0 and step % self.config.every == 0 and step != self._looked
        found = self.candidates(model, own) if first or looks else []
        if looks:
            self._look(found, own, rank, ranks, summed or own.sum_over_ranks)
            self._looked = step
        done = step - self._looked
        if looks or (self._target and self.multipliers != self._target):
            now = {
                name: ramped(self._before.get(name, 1.0), target, done, self.config.ramp)
                for name, target in self._target.items()
            }
            self._set(own, now)
        return looks

    def candidates(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Candidate]:
        """The matrices that take part, in the model's order.

        Raises:
            ValueError: for an optimizer that is not of thinrank, where there are fewer than two of them, where weight
                decays that are to be multiplied are 0, where no rank has enough rows of one, or factors lie in pieces.
        """
        own = _own(optimizer)
        refuse_without_decay(self.config, [float(group["weight_decay"]) for group in own.param_groups])
        listed = self._listed(model, own)
        takes = eligible([each.evals for each in listed], min_evals=self.config.min_evals, ends=self.config.ends)
        found = [each for each, part in zip(listed, takes, strict=True) if part]
        if len(found) < 2:
            raise ValueError(
                f"layerwise={self.config.name} compares matrices, and {len(found)} of {len(listed)} take part: lower "
                f"layerwise.min_evals ({self.config.min_evals}), or leave layerwise out"
            )
        if own.shards is not None:
            for each in found:
                self._refuse_pieces(each, own)
        return found

    def _refuse_pieces(self, candidate: Candidate, optimizer: MatrixOptimizer) -> None:
        if len(candidate.params) > 1:
            raise ValueError(
                f"the product of the factors of {candidate.name} cannot be told from pieces of them: use a strategy "
                "with whole weights, or leave layerwise out"
            )
        rows = max(stop - first for first, stop in optimizer.rows_on_ranks(candidate.params[candidate.name]))
        if rows < self.config.min_evals:
            raise ValueError(
                f"of {candidate.name} no rank has more than {rows} whole rows, and a tail is told from "
                f"layerwise.min_evals={self.config.min_evals} at least: lower it, use fewer ranks for a model, or a "
                "strategy with whole weights"
            )

    def _listed(self, model: nn.Module, optimizer: MatrixOptimizer) -> list[Candidate]:
        """Matrices of linear layers as they come in the model, and products of factors."""
        kinds = roles(model)
        stepped: dict[int, tuple[str, str]] = {}
        for index, group in enumerate(optimizer.param_groups):
            for name, param in zip(optimizer.names(index), group["params"], strict=True):
                stepped[id(param)] = name, group["role"]
        shapes = {id(p): tuple(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
        wanted = {Role.MATRIX.value, *({Role.HEAD.value} if self.config.HEAD else ())}
        factors = {id(p): layer for layer in model.modules() if isinstance(layer, Layer) for p in layer.parameters()}
        found: list[Candidate] = []
        for name, param in model.named_parameters():
            if id(param) not in stepped or len(shapes[id(param)]) < 2:
                continue
            own, role = stepped[id(param)]
            if (role or kinds[name].value) not in wanted:
                continue
            layer = factors.get(id(param))
            if layer is None:
                rows, columns = shapes[id(param)][0], math.prod(shapes[id(param)][1:])
                found.append(Candidate(own, {own: param}, min(rows, columns)))
            elif _is_product(layer) and param is layer.B and id(layer.A) in stepped:
                found.append(Candidate(own, {own: layer.B, stepped[id(layer.A)][0]: layer.A}, layer.rank))
        return found

    @torch.no_grad()
    def _look(
        self,
        found: list[Candidate],
        optimizer: MatrixOptimizer,
        rank: int,
        ranks: int,
        summed: Callable[[Tensor], Tensor],
    ) -> None:
        device = next(iter(found[0].params.values())).device
        sums = torch.zeros(len(found), 2, dtype=torch.float64, device=device)  # α times its weight, and the weight
        for i, each in enumerate(found):
            if optimizer.shards is None and i % ranks != rank:
                continue
            alpha, weight = self._alpha(each, optimizer)
            if alpha is not None:
                sums[i] = torch.stack([alpha.double() * weight, torch.full_like(alpha, weight).double()])
        totals = summed(sums)
        alphas = (totals[:, 0] / totals[:, 1]).cpu()
        fine = [i for i, alpha in enumerate(alphas.tolist()) if math.isfinite(alpha)]
        self.alphas = {found[i].name: float(alphas[i]) for i in fine}
        before = torch.tensor([self.multipliers.get(found[i].name, 1.0) for i in fine], dtype=torch.float64)
        factors = multipliers(alphas[fine], self.config.map, s1=self.config.s1, s2=self.config.s2)
        if self.config.normalise:
            factors = with_geometric_mean_one(factors)
        factors = limited(factors, before, self.config.most)
        self._members |= {found[i].name: list(found[i].params) for i in fine}
        self._before = dict(self.multipliers)
        self._target |= {found[i].name: factor for i, factor in zip(fine, factors.tolist(), strict=True)}

    def _alpha(self, candidate: Candidate, optimizer: MatrixOptimizer) -> tuple[Tensor | None, float]:
        """α of what lies here of a matrix, and how much it counts; None where too little does."""
        params = list(candidate.params.values())
        if len(params) > 1:
            return hill_alpha(product_evals(params[0], params[1])), 1.0
        piece = optimizer.piece_of(params[0])
        if min(piece.shape) < self.config.min_evals:
            return None, 0.0
        alpha = farms_alpha(piece, rows=self.config.window, per_side=self.config.per_side)
        return alpha, float(piece.shape[0])

    def _set(self, optimizer: MatrixOptimizer, now: dict[str, float]) -> None:
        held = optimizer.multipliers()
        wanted: dict[str, tuple[float, float]] = {}
        for name, factor in now.items():
            for member in self._members.get(name, [name]):
                lr, decay = held.get(member, (1.0, 1.0))
                wanted[member] = (factor, decay) if self.config.SCALES == "lr" else (lr, factor)
        optimizer.set_multipliers(wanted)
        self.multipliers = now

    def measured(self) -> dict[str, float]:
        """α of the last look as `layerwise/alpha/<name>`, and the multipliers of now as `layerwise/lr/<name>`, or
        `layerwise/decay/<name>`."""
        return {
            **{f"layerwise/alpha/{name}": value for name, value in self.alphas.items()},
            **{f"layerwise/{self.config.SCALES}/{name}": value for name, value in self.multipliers.items()},
        }

    def summary(self) -> dict[str, Any]:
        """For a report: the method, the step of the last look, and what was found and set, by name."""
        return {
            "method": self.config.name,
            "scales": self.config.SCALES,
            "looked_at_step": self._looked,
            "spread": spread(list(self.multipliers.values())),
            "alphas": dict(self.alphas),
            "multipliers": dict(self.multipliers),
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers and names alone. The multipliers themselves are in the optimizer's groups as well."""
        kept = ("alphas", "multipliers", "_before", "_target", "_members", "_looked")
        return {key.lstrip("_"): copy.deepcopy(getattr(self, key)) for key in kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What `state_dict` gave; the next `update` goes on from there."""
        for key in ("alphas", "multipliers", "_before", "_target", "_members", "_looked"):
            setattr(self, key, copy.deepcopy(state_dict[key.lstrip("_")]))
        self._step = -1


def _own(optimizer: torch.optim.Optimizer) -> MatrixOptimizer:
    if not isinstance(optimizer, MatrixOptimizer):
        raise ValueError(
            f"rates by layer need an optimizer of thinrank, which has multipliers, got {type(optimizer).__name__}: use "
            "thinrank.optim.build, with AdamWConfig for AdamW"
        )
    return optimizer


def _is_product(layer: Layer) -> TypeGuard[LowRankLinear]:
    """True where the weight of `layer` is B A and nothing else."""
    return type(layer) in PRODUCTS and isinstance(layer, LowRankLinear) and layer.act == "identity"
