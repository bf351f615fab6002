"""Islands: sharded models, each on ranks that are near to each other, which exchange what a step needs from afar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.exchange import local
from thinrank.optim.exchange.dtensors import DTensorShards
from thinrank.optim.exchange.replicas import BUCKET_BYTES, Group, Letter, Part, batches, broadcast, difference
from thinrank.optim.exchange.wire import Count
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.methods.config import choice, whole_steps
from thinrank.optim.replicated import MESSAGES, refuse_signs
from thinrank.optim.sharded import Sharded


@dataclass(frozen=True, slots=True)
class _Replicas:
    """The ranks that hold the same pieces, and how they are written to."""

    group: Group
    dtype: torch.dtype | None
    bucket_bytes: int

    def mean(self, parts: Sequence[Part], wire: Count) -> list[Tensor]:
        """The means of `parts` over the ranks, in letters of at least `bucket_bytes`, all on their way at once."""
        some = batches(parts, lambda part: part.value.numel() * part.value.element_size(), self.bucket_bytes)
        letters = [Letter(each, self.group, self.dtype, wire) for each in some]
        for letter in letters:
            letter.turn()
        return [value for letter in letters for value in letter.open()]


class Islands(Sharded):
    """What an optimizer of sharded weights does where other groups of ranks hold the same pieces and other data."""

    _replicas: _Replicas | None = None
    _met = False

    def replicate(
        self,
        group: Group | None = None,
        *,
        messages: str = "auto",
        dtype: torch.dtype | None = None,
        check_every: int | None = 100,
        bucket_bytes: int = BUCKET_BYTES,
        **others: Any,
    ) -> None:
        """As `Replicated.replicate`. Of a model that went through `fully_shard`, `group` are the ranks that hold the
        same pieces and other data: one of each of several groups of ranks over which the model is sharded.

        What travels between those is what a step needs of the gradients' pieces: coordinates of matrices that are
        stepped by rows, gradients of everything else. It leaves when gradients are asked for, after backward.
        """
        if self._shards is None:
            super().replicate(
                group,
                messages=messages,
                dtype=dtype,
                check_every=check_every,
                bucket_bytes=bucket_bytes,
                **others,
            )
            return
        if others or not isinstance(self._shards, DTensorShards) or group is None:
            raise ValueError(
                "replicas of a model that went through fully_shard need the group of ranks that hold the same pieces, "
                "and no more than messages, dtype, check_every and bucket_bytes: give mesh['replicate'].get_group(), "
                "where it is sharded over mesh['shard']"
            )
        choice("messages", messages, MESSAGES)
        refuse_signs(messages, "replicas of sharded models")
        if check_every is not None:
            whole_steps("check_every", check_every)
        self._whole_messages = messages == "full"
        self._check_every, self._steps = check_every, 0
        self._replicas = _Replicas(group, dtype, bucket_bytes)
        broadcast((self._shards.weight(param) for _, param in self._named()), self._wire.rare, group)

    @torch.no_grad()
    def _meet(self) -> None:
        if self._shards is None or self._replicas is None:
            super()._meet()
            return
        if self._met:
            return
        self._met = True
        parts: list[Part] = []
        takers: list[tuple[Tensor, list[Part]]] = []
        for _, param in self._named():
            grad = self._shards.gradient(param)
            if grad is not None:
                takers.append((param, self._parts_of(param, grad)))
                parts += takers[-1][1]
        means = iter(self._replicas.mean(parts, self._wire))
        for param, own in takers:
            for part in own:
                if part.place:
                    self._images.add(param, part.place[0], {part.place[1]: next(means)})
                else:
                    part.value.copy_(next(means))

    def _parts_of(self, param: Tensor, grad: Tensor) -> list[Part]:
        """What replicas are sent of a piece of a gradient: its rows' coordinates where these are enough."""
        if self._cut[param].way != "rows":
            return [Part("dense" if self._cut[param].way == "piece" else "gradients", grad)]
        ((group, bucket, i),) = self._homes[param]
        rule, _ = self.rules(group, bucket.section, bucket.rank)
        step, state = bucket.step([i], group), bucket.state([i])
        if not isinstance(rule, LowRank) or not self._sends_coordinates(rule):
            return [Part("gradients", grad)]
        if rule.chooses(state, step):
            return [Part("renewals", grad)]
        with fast_products(grad.device):
            image = rule.image(local.bring([grad.view(bucket.view.stored)], bucket.view), state, step, first=False)
        return [Part("coordinates", value, (bucket.prefix, key)) for key, value in image.items()]

    def _stepped(self) -> None:
        if self._shards is None or self._replicas is None:
            super()._stepped()
            return
        self._met = False
        self._steps += 1
        if self._check_every is not None and self._steps % self._check_every == 0:
            self.check_replicas()

    def check_replicas(self) -> None:
        """As `Replicated.check_replicas`; of what is sharded, the pieces and the state that lie here."""
        if self._shards is None or self._replicas is None:
            super().check_replicas()
            return
        held: dict[str, Tensor] = {}
        for name, param in self._named():
            held[name] = self._shards.weight(param)
            held |= {f"{key} of {name}": value for key, value in self.state[param].items()}
        held = {name: value for name, value in held.items() if value.numel()}
        self._refuse_drift(difference(held, self._wire.rare, self._replicas.group))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._met = False

    def _take_image(self, param: Tensor) -> None:
        if self._shards is None or param not in self._images:  # of a piece, replicas have left an image of the whole
            super()._take_image(param)

    def _once(self) -> list[Tensor]:
        if self._shards is None or not self._images:
            return super()._once()
        grads = [self._shards.gradient(param) for _, param in self._named() if param not in self._images]
        return [grad for grad in grads if grad is not None]
