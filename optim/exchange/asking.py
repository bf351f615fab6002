"""Computations that ask other replicas for means, side by side, so that what they ask for travels together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from thinrank.optim.axis import Asking
from thinrank.optim.exchange.replicas import Letter

T = TypeVar("T")


def answered(askings: Sequence[Asking[T]], send: Callable[[list[Tensor]], Letter], bucket_bytes: int) -> list[T]:
    """Goes through all of `askings` to their ends; what comes of each, in their order.

    As many messages follow each other as one of them asks for, however many there are: the questions of all, in letters
    of at least `bucket_bytes`, then the next questions of all. An answer goes on as soon as it is there, while later
    letters are on their way. Every rank must have the same number of them, with questions of the same shapes.

    Args:
        send: puts tensors on their way to their mean over the replicas.
    """
    found: dict[int, T] = {}
    under_way: deque[tuple[list[int], Letter]] = deque()
    asked: list[tuple[int, Tensor]] = []

    def go_on(i: int, mean: Tensor | None) -> None:
        try:
            asked.append((i, next(askings[i]) if mean is None else askings[i].send(mean)))
        except StopIteration as end:
            found[i] = end.value
            return
        if sum(x.numel() * x.element_size() for _, x in asked) >= bucket_bytes:
            leave()

    def leave() -> None:
        if asked:
            under_way.append(([i for i, _ in asked], send([x for _, x in asked])))
            asked.clear()

    for i in range(len(askings)):
        go_on(i, None)
    leave()
    while under_way:
        for _, letter in under_way:
            letter.turn()
        which, letter = under_way.popleft()
        for i, mean in zip(which, letter.open(), strict=True):
            go_on(i, mean)
        if not under_way:
            leave()
    return [found[i] for i in range(len(askings))]
