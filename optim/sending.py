"""What replicas send of one gradient, and what becomes of what comes back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.backward import InBackward
from thinrank.optim.bucket import Bucket, Turn
from thinrank.optim.exchange import local
from thinrank.optim.exchange.replicas import Meeting, Part, rows_anywhere
from thinrank.optim.linalg.norms import SKETCH, signed_sums
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.lowrank.remainder import apart, leaves_remainder, remembers_untold, together, with_untold
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.messages import KINDS, NORMS, REST, ROWS, sketch_bytes, whole_messages_because
from thinrank.optim.rule import MatrixRule, State, seed_of

Untold = tuple[LowRank, Bucket, int, Tensor]
"""A matrix, by its place in a bucket, and what will be left to tell of it after this step."""


class Sending(InBackward):
    """What an optimizer of matrices tells other replicas of a parameter's gradient, and takes of their means.

    By parameter: coordinates (`image`), or coordinates and signs of the rest, or the gradient, whole, rounded, or the
    rows that were touched; and, where norms are asked for, a sketch of what does not travel whole. When all of it
    travels is `Replicated`'s.
    """

    _meeting: Meeting | None = None
    _whole_messages = False
    _tally: str | None = None
    _norms_travel = True
    _by_touched_rows: Collection[Tensor] = frozenset()
    _rounded: Collection[Tensor] = frozenset()

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        self._sketches: dict[Tensor, Tensor] = {}
        self._untold: dict[Tensor, list[Untold]] = {}
        self._to_remember: list[Untold] = []
        self._touched: dict[Tensor, Tensor] = {}

    def _sends_coordinates(self, rule: MatrixRule | None) -> bool:
        linear = isinstance(rule, LowRank) and rule.linear
        return linear and not self._whole_messages and whole_messages_because(rule) is None

    def _sends_rest(self, rule: MatrixRule | None) -> bool:
        """True where what a subspace misses of a gradient travels in signs beside its coordinates."""
        return self._tally is not None and leaves_remainder(rule)

    def _met_homes(self, param: Tensor) -> list[tuple[LowRank, dict[str, Any], Bucket, int]]:
        """Where the matrices of a parameter that sends coordinates, alone or with signs of the rest, are stepped; []
        for one that sends gradients."""
        found = []
        for group, bucket, i in self._homes.get(param, []):
            rule, _ = self.rules(group, bucket.section, bucket.rank)
            if not self._sends_coordinates(rule) and not self._sends_rest(rule):
                return []
            assert isinstance(rule, LowRank)
            found.append((rule, group, bucket, i))
        return found

    def _pack(self, param: torch.nn.Parameter) -> list[Part]:
        assert param.grad is not None
        self._refuse_sparse_one(param)
        homes = self._met_homes(param)
        if homes:
            return self._parts(param, homes, param.grad)
        if param in self._homes:
            return [Part("gradients", param.grad)]
        grad = param.grad.bfloat16() if param in self._rounded else param.grad
        if param in self._by_touched_rows:
            assert self._meeting is not None
            rows = rows_anywhere(param.grad, self._meeting.wire, self._meeting.group)
            self._touched[param] = rows
            return [Part("rows", grad[rows], ROWS)]
        return [Part("dense", grad)]

    def _parts(
        self, param: Tensor, homes: Sequence[tuple[LowRank, dict[str, Any], Bucket, int]], grad: Tensor
    ) -> list[Part]:
        """What is sent of the gradient `grad` of matrices that send coordinates: all of it in steps that choose."""
        parts, untold = [], []
        with fast_products(grad.device):
            for rule, group, bucket, i in homes:
                step, state = bucket.step([i], group), bucket.state([i])
                owed = self._sends_rest(rule) and remembers_untold(rule)
                if rule.chooses(state, step):
                    if owed:  # all that has not been told
                        owing = rule.recall(state, bucket.view.shape[1])
                        bucket.view.of(grad).add_(owing)
                        self._untold[param] = [(rule, bucket, i, torch.zeros_like(owing))]
                    return [Part("renewals", grad)]
                matrix = local.bring([grad], bucket.view)
                if self._sends_rest(rule):
                    low, rest = apart(matrix, rule.subspace, state)
                    if owed:
                        rest, left = with_untold(rest, rule.recall(state, rest.shape[-1]))
                        untold.append((rule, bucket, i, left))
                    parts += [Part(KINDS["low"], low, REST), Part("", rest, REST, tally=self._tally)]
                else:
                    image = rule.image(matrix, state, step, first=False)
                    parts += [Part(KINDS[key], value, (bucket.prefix, key)) for key, value in image.items()]
        self._untold[param] = untold
        if parts[0].place == REST or not self._norms_travel:
            return parts
        return [*parts, self._sketch(grad, *homes[0][1:])]

    def _sketch(self, grad: Tensor, group: Mapping[str, Any], bucket: Bucket, i: int, width: int = SKETCH) -> Part:
        seed = seed_of(group["seed"], bucket.keys[i * bucket.view.blocks], int(bucket.counts[i]))
        return Part("norms", signed_sums(grad, width, seed), NORMS)

    def _is_sketched(self, param: Tensor) -> bool:
        """Whether only a sketch could tell the norm of what others find of the gradient."""
        homes = self._met_homes(param)
        return bool(homes) and not self._sends_rest(homes[0][0])

    @staticmethod
    def _refuse_sparse_one(param: torch.nn.Parameter) -> None:
        if param.grad is not None and param.grad.is_sparse:
            raise RuntimeError("replicas exchange dense gradients, and an embedding has a sparse one: use sparse=False")

    def _put_together(self, param: torch.nn.Parameter, parts: list[Part]) -> None:
        grad = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        pairs = zip(self._met_homes(param), parts[::2], parts[1::2], strict=True)
        with fast_products(grad.device):
            for (rule, _, bucket, i), low, rest in pairs:
                found = together(low.value, rest.value, rule.subspace, bucket.state([i]))
                bucket.view.of(grad).copy_(found)
        param.grad = grad

    def _unpack(self, param: torch.nn.Parameter, parts: list[Part]) -> None:
        self._to_remember += self._untold.pop(param, [])  # of a parameter of which somebody has a gradient
        if parts[0].place == ROWS:
            param.grad = torch.zeros_like(param)
            param.grad[self._touched.pop(param)] = parts[0].value.to(param.dtype)
            return
        if not parts[0].place:
            param.grad = parts[0].value.to(param.dtype)
            if parts[0].kind == "renewals" and all(rule.linear for rule, *_ in self._met_homes(param)):
                self._sketches[param] = torch.linalg.vector_norm(param.grad, dtype=torch.float32).view(1)
                self._take_image(param)
            return
        if parts[0].place == REST:
            self._put_together(param, parts)
            return
        self._keep_images(param, parts)

    def _keep_images(self, param: Tensor, parts: Sequence[Part]) -> None:
        images: dict[str, dict[str, Tensor]] = {}
        for part in parts:
            if part.place == NORMS:
                self._sketches[param] = part.value
                continue
            prefix, key = part.place
            images.setdefault(prefix, {})[key] = part.value
        for prefix, image in images.items():
            self._images.add(param, prefix, image)

    def _shares(self, turn: Turn, image: State) -> dict[str, Tensor]:
        """What is known of how much of their gradients images hold: a sketch says it, where a parameter is one matrix
        and this rank has all of its rows."""
        views = {bucket.prefix for param in turn.params for _, bucket, _ in self._homes[param]}
        if len(views) > 1 or not turn.step.axis.whole or any(param not in self._sketches for param in turn.params):
            return {}
        whole = torch.stack([torch.linalg.vector_norm(self._sketches[param]) for param in turn.params])
        blocks = turn.bucket.view.blocks
        kept = torch.linalg.vector_norm(image["low"].unflatten(0, (-1, blocks)).float(), dim=(1, 2, 3))
        share = torch.where(whole > 0, (kept / whole).square(), 0.0).clamp_(0.0, 1.0)
        return {"captured_energy": share.repeat_interleave(blocks)}

    def _usual_bytes(self, param: torch.nn.Parameter) -> int:
        homes = self._met_homes(param)
        if not homes:
            return param.numel() * (2 if param in self._rounded else param.element_size())
        if self._sends_rest(homes[0][0]):
            return param.numel() // 8
        batches = ((rule, (bucket.view.blocks, *bucket.view.shape)) for rule, _, bucket, _ in homes)
        sketch = sketch_bytes(param) if self._norms_travel else 0
        return sketch + sum(4 * _elements(rule.subspace.small(shape)) for rule, shape in batches)

    def _visible_of(self, param: Tensor) -> list[Tensor]:
        return [self._sketches[param]] if param in self._sketches else super()._visible_of(param)

    def _linear(self) -> list[Tensor]:
        return [*super()._linear(), *self._sketches.values()]

    def _sent(self) -> None:
        """Ends a step: what was told has been taken, and what was not is remembered."""
        self._sketches.clear()
        for rule, bucket, i, left in self._to_remember:
            rule.remember(left, bucket.state([i]))  # of one parameter: views
        self._to_remember.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._sketches.clear()
        self._untold.clear()
        self._to_remember.clear()


def _elements(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]
