"""Updates in few numbers, for rules that make them of two factors or of some columns of a fixed basis."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from thinrank.optim.lowrank.subspace import FixedColumns, factor_dtype
from thinrank.optim.rule import Form, State, Step
from thinrank.optim.update import Update

Shape3 = tuple[int, int, int]


class ToldFactors:
    """Both factors of the update are what is told: r · (long + short) numbers."""

    __slots__ = ()

    @abstractmethod
    def factors(self, shape: Shape3) -> tuple[int, torch.dtype]:
        """How many columns each of them has, and their dtype."""
        ...

    def shared(self, shape: Shape3) -> tuple[str, ...]:
        return ()

    def told(self, shape: Shape3, step: Step) -> dict[str, Form] | None:
        (batch, long, short), (r, dtype) = shape, self.factors(shape)
        return {"direction": ((batch, long, r), dtype), "basis": ((batch, short, r), dtype)}

    def tell(self, update: Update, state: State) -> State:
        assert update.direction is not None
        assert isinstance(update.basis, Tensor)
        return {"direction": update.direction, "basis": update.basis}

    def hear(self, told: State, state: State, short: int) -> Update:
        return Update(told["direction"], told["basis"])


class ToldColumns:
    """What is told are the columns' numbers and what is in them: r · (long + 1) numbers."""

    __slots__ = ()
    subspace: FixedColumns

    @property
    def by_rows(self) -> bool:
        return True

    def shared(self, shape: Shape3) -> tuple[str, ...]:
        return ()

    def told(self, shape: Shape3, step: Step) -> dict[str, Form] | None:
        small = self.subspace.small(shape)
        return {
            "direction": (small, factor_dtype(self.subspace)),
            "columns": ((small[0], small[2]), torch.int32),
        }

    def tell(self, update: Update, state: State) -> State:
        assert update.direction is not None
        return {"direction": update.direction, "columns": state["columns"]}

    def hear(self, told: State, state: State, short: int) -> Update:
        return self.subspace.up(told["direction"], told, short)
