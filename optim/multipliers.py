"""Learning rates and weight decays that parameters of one group have each for themselves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from thinrank.optim.methods.config import number
from thinrank.optim.rule import MatrixRule
from thinrank.optim.update import Factor

P = TypeVar("P", bound=Tensor)

KEYS = ("lr_multipliers", "decay_multipliers")
"""Of a parameter group: a number for each of its parameters, or None for ones."""


class Multiplied(torch.optim.Optimizer):
    """What an optimizer of matrices does about multipliers: they lie in a group's `lr_multipliers` and
    `decay_multipliers`, one for each of its parameters, and act beside whatever moves `lr` and `weight_decay`.

    A parameter with the multipliers m and k is stepped as in a group of its own with the learning rate lr·m and the
    weight decay weight_decay·k, so that its weights shrink by 1 − lr·m·weight_decay·k. Nothing else looks at them: no
    subspace, no moment and no message changes. None, and ones, are the step without multipliers, to the bit.
    """

    _numbers: dict[Tensor, int]
    """The places of parameters in their groups."""

    @abstractmethod
    def names(self, index: int) -> list[str]: ...

    def multipliers(self) -> dict[str, tuple[float, float]]:
        """The multipliers of learning rate and weight decay of every parameter that has others than ones, by name."""
        found: dict[str, tuple[float, float]] = {}
        for index, group in enumerate(self.param_groups):
            found |= dict(zip(self.names(index), zip(*_both(group), strict=True), strict=True))
        return {name: pair for name, pair in found.items() if pair != (1.0, 1.0)}

    def set_multipliers(self, multipliers: Mapping[str, tuple[float, float]]) -> None:
        """From the next step on, multiplies the learning rate and the weight decay of single parameters.

        They are kept in the parameter groups, with which `state_dict` saves and `load_state_dict` restores them. In
        several processes every rank must give the same ones; `check_replicas` finds where they are not.

        Args:
            multipliers: name of a parameter (as in `names`) → (of its learning rate, of its weight decay), each at
                least 0; the other parameters keep theirs.

        Raises:
            ValueError: for a name that is not stepped here, or a number below 0 or that is none; nothing is changed
                then.
        """
        unknown, changes = dict(multipliers), []
        for index, group in enumerate(self.param_groups):
            names, (rates, decays) = self.names(index), _both(group)
            for i, name in enumerate(names):
                if name in multipliers:
                    unknown.pop(name, None)
                    rates[i], decays[i] = multipliers[name]
            trial = {**group, "lr_multipliers": rates, "decay_multipliers": decays}
            self._refuse_multipliers(trial, names)
            changes.append((group, rates, decays))
        if unknown:
            raise ValueError(
                f"multipliers: {next(iter(unknown))!r} is no parameter that {type(self).__name__} steps: give names as "
                "in optimizer.names(index)"
            )
        for group, rates, decays in changes:
            for key, values in zip(KEYS, (rates, decays), strict=True):
                group[key] = [float(v) for v in values] if any(v != 1.0 for v in values) else None

    def _refuse_multipliers(self, group: Mapping[str, Any], names: Sequence[str]) -> None:
        for key in KEYS:
            values = group[key]
            if values is None:
                continue
            if not isinstance(values, (list, tuple)) or len(values) != len(group["params"]):
                raise ValueError(
                    f"{type(self).__name__}: {key} must be a list of one number for each of the "
                    f"{len(group['params'])} parameters of the group, or None, got {values!r}"
                )
            for name, value in zip(names, values, strict=True):
                number(f"{key} of {name}", value)

    def _rates(self, group: Mapping[str, Any], param: Tensor) -> tuple[float, float]:
        """Learning rate and weight decay of `param`, which is of `group`."""
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        rates, decays = group["lr_multipliers"], group["decay_multipliers"]
        if rates is None and decays is None:
            return lr, decay
        if param not in self._numbers:
            self._numbers = {p: i for each in self.param_groups for i, p in enumerate(each["params"])}
        place = self._numbers[param]
        return lr if rates is None else lr * rates[place], decay if decays is None else decay * decays[place]

    def _alike_rates(
        self, group: Mapping[str, Any], some: Sequence[tuple[P, int]]
    ) -> dict[tuple[float, float], list[tuple[P, int]]]:
        """Parameters of `group`, with their keys, by learning rate and weight decay."""
        if group["lr_multipliers"] is None and group["decay_multipliers"] is None:
            return {self._rates(group, some[0][0]): list(some)}
        found: dict[tuple[float, float], list[tuple[P, int]]] = {}
        for param, key in some:
            found.setdefault(self._rates(group, param), []).append((param, key))
        return found

    def _factors(
        self, group: Mapping[str, Any], params: Sequence[Tensor], rule: MatrixRule, blocks: int = 1
    ) -> tuple[Factor, Factor]:
        """What a step multiplies the weights of `params` by, and what the updates that it subtracts: one number each
        for all of them, or for each of their `blocks` matrices."""
        alike = group["lr_multipliers"] is None and group["decay_multipliers"] is None
        found: list[tuple[float, float]] = []
        for param in params[:1] if alike else params:
            lr, decay = self._rates(group, param)
            keep, gain = rule.decay.factors(lr, decay)
            found.append((keep, lr * rule.scale * gain))
        keeps, steps = ([pair[i] for pair in found for _ in range(blocks)] for i in (0, 1))
        return _one(keeps), _one(steps)

    def _said(self) -> dict[str, Tensor]:
        """The multipliers as a tensor, which must be the same on all ranks."""
        values = [_both(group) for group in self.param_groups if any(group[key] is not None for key in KEYS)]
        flat = [value for rates, decays in values for pair in zip(rates, decays, strict=True) for value in pair]
        # a number that is always there: fingerprints are of something
        return {"the multipliers of learning rates and weight decays": torch.tensor([1.0, *flat], dtype=torch.float64)}


def _both(group: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """The multipliers of learning rate and weight decay of all parameters of a group."""
    rates, decays = (group[key] if group[key] is not None else [1.0] * len(group["params"]) for key in KEYS)
    return list(rates), list(decays)


def _one(factors: list[float]) -> Factor:
    """One number where all are the same, for which one pass over a batch is enough."""
    return factors[0] if len(set(factors)) == 1 else factors
