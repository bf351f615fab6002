"""What enters the subspace, and what is remembered of the part that did not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thinrank.optim.linalg.quantise import (
    BLOCK,
    BLOCK4,
    block_shape,
    dequantise4,
    dequantise8,
    packed_shape,
    quantise4,
    quantise8,
)
from thinrank.optim.rule import State


class Feedback(Protocol):
    def init(self, shape: tuple[int, int, int], device: torch.device) -> State: ...

    def enter(self, grad: Tensor, state: State) -> Tensor:
        """What the subspace sees in place of `grad` (batch, long, short)."""
        ...

    def error(self, state: State, short: int) -> Tensor:
        """What is remembered, float32 (batch, long, short)."""
        ...

    @property
    def listens(self) -> bool:
        """True when `sent` wants to know the image; computing it costs a product."""
        ...

    def sent(self, entered: Tensor, image: Tensor, state: State) -> None:
        """`image` is the part of `entered` that the subspace held."""
        ...


@dataclass(frozen=True, slots=True)
class NoFeedback:
    """The gradient as it is; what does not fit is forgotten."""

    listens: bool = False

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {}

    def enter(self, grad: Tensor, state: State) -> Tensor:
        return grad

    def error(self, state: State, short: int) -> Tensor:
        raise LookupError("nothing is remembered without error feedback")

    def sent(self, entered: Tensor, image: Tensor, state: State) -> None:
        pass


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """Classic error feedback in full precision: what was not sent is added to the next gradient.

    The error stays on the rank that made it, also when gradients arrive local: projections are linear, so the mean of
    the errors is the error of the mean.
    """

    listens: bool = True

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return {"error": torch.zeros(shape, dtype=torch.float32, device=device)}

    def enter(self, grad: Tensor, state: State) -> Tensor:
        return state["error"] + grad

    def error(self, state: State, short: int) -> Tensor:
        return state["error"]

    def sent(self, entered: Tensor, image: Tensor, state: State) -> None:
        torch.sub(entered, image, out=state["error"])


@dataclass(frozen=True, slots=True)
class QuantisedFeedback:
    """Error feedback remembered in 8 or 4 bits, absmax blocks along the rows, so that zeros stay zero.

    A quarter, or a seventh, of full precision's memory. What rounding loses is not fed back: of an error that stays
    below half a level of its block, a part is forgotten. The DCT-AdamW authors' 8-bit code uses 16 of its 256 levels
    and their 4-bit code returns neighbours in another order; here all levels are used, and order is kept.
    """

    bits: int
    listens: bool = True

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        eight = self.bits == 8
        return {
            "error_codes": torch.zeros(
                shape if eight else packed_shape(shape), dtype=torch.int8 if eight else torch.uint8, device=device
            ),
            "error_scale": torch.zeros(
                block_shape(shape, BLOCK if eight else BLOCK4), dtype=torch.float32, device=device
            ),
        }

    def enter(self, grad: Tensor, state: State) -> Tensor:
        return self.error(state, grad.shape[-1]).add_(grad)

    def error(self, state: State, short: int) -> Tensor:
        codes, scale = state["error_codes"], state["error_scale"]
        return dequantise8(codes, scale) if self.bits == 8 else dequantise4(codes, scale, short)

    def sent(self, entered: Tensor, image: Tensor, state: State) -> None:
        codes, scale = (quantise8 if self.bits == 8 else quantise4)(entered - image)
        state["error_codes"].copy_(codes)
        state["error_scale"].copy_(scale)


@dataclass(frozen=True, slots=True)
class Unsent(NoFeedback):
    """What a replica has not told the others of its gradients (`messages="signs"`), to be added to what it tells next.

    What enters is the gradient as it is, and in one process, which has nobody to tell, nothing is ever remembered.
    """

    store: Feedback = ErrorFeedback()

    def init(self, shape: tuple[int, int, int], device: torch.device) -> State:
        return self.store.init(shape, device)

    def error(self, state: State, short: int) -> Tensor:
        return self.store.error(state, short)

    def sent(self, entered: Tensor, image: Tensor, state: State) -> None:
        self.store.sent(entered, image, state)


class KeepsErrors:
    """The memory (`Remembers`) of a rule that has `feedback`."""

    __slots__ = ()
    feedback: Feedback

    @property
    def memory(self) -> tuple[str, ...]:
        return tuple(self.feedback.init((1, 1, 1), torch.device("meta")))

    def recall(self, state: State, short: int) -> Tensor:
        return self.feedback.error(state, short)

    def remember(self, value: Tensor, state: State) -> None:
        self.feedback.sent(value, torch.zeros_like(value), state)


def unsent_named(name: str) -> NoFeedback:
    """`off`, or how what signs did not tell is remembered: `full`, `8bit`, `4bit`."""
    return NoFeedback() if name == "off" else Unsent(store=FEEDBACKS[name])


FEEDBACKS: dict[str, Feedback] = {
    "off": NoFeedback(),
    "full": ErrorFeedback(),
    "8bit": QuantisedFeedback(8),
    "4bit": QuantisedFeedback(4),
}
