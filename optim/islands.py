"""Islands: sharded models, each on ranks that are near to each other, which exchange what a step needs from afar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinrank.optim.alike import Alike
from thinrank.optim.bucket import Bucket
from thinrank.optim.exchange.dtensors import DTensorShards
from thinrank.optim.exchange.replicas import BUCKET_BYTES, Group, Meeting, Part, anywhere, broadcast
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.messages import MESSAGES, refuse_signs
from thinrank.optim.methods.config import choice


class Islands(Alike):
    """What an optimizer of sharded weights does where other groups of ranks hold the same pieces and other data."""

    _far: Meeting | None = None
    """The exchange with the ranks that hold the same pieces."""

    def replicate(
        self,
        group: Group | None = None,
        *,
        messages: str = "auto",
        dtype: torch.dtype | None = None,
        norms: bool = True,
        check_every: int | None = 100,
        bucket_bytes: int = BUCKET_BYTES,
        **others: Any,
    ) -> None:
        """As `Replicated.replicate`. Of a model that went through `fully_shard`, `group` are the ranks that hold the
        same pieces and other data: one of each of several groups of ranks over which the model is sharded.

        What travels between those is what a step needs of the gradients' pieces: coordinates of matrices that are
        stepped by rows, or lie on one rank whole, gradients of everything else. It leaves when gradients are asked for,
        after backward, and gradients are freed then.
        """
        if self._shards is None:
            super().replicate(
                group,
                messages=messages,
                dtype=dtype,
                norms=norms,
                check_every=check_every,
                bucket_bytes=bucket_bytes,
                **others,
            )
            return
        if others or not isinstance(self._shards, DTensorShards) or self._shards.replicas is not None or group is None:
            raise ValueError(
                "replicas of a model that went through fully_shard need the group of ranks that hold the same pieces, "
                "and no more than messages, dtype, norms, check_every and bucket_bytes: give "
                "mesh['replicate'].get_group(), where it is sharded over mesh['shard']"
            )
        choice("messages", messages, MESSAGES)
        refuse_signs(messages, "replicas of sharded models")
        self.check_every = check_every
        self._whole_messages = messages == "full"
        trained = [param for _, param in self._named() if param.requires_grad][::-1]
        broadcast(map(self._shards.weight, trained), self._wire.rare, group)
        self._steps = 0
        self._leave_norms_out(not norms, trained)
        self._far = Meeting(
            trained,
            [self._usual_bytes(param) for param in trained],
            self._pack_piece,
            self._unpack_piece,
            group=group,
            dtype=dtype,
            overlap=False,
            bucket_bytes=bucket_bytes,
            wire=self._wire,
        )

    @property
    def _same_pieces(self) -> Group | None:
        return super()._same_pieces if self._far is None else self._far.group

    # --- gradients ----------------------------------------------------------------------------------------------------

    @property
    def _under_way(self) -> bool:
        return super()._under_way if self._far is None else self._far.under_way

    @torch.no_grad()
    def _meet(self) -> None:
        if self._far is None:
            super()._meet()
        else:
            self._finish(self._far)

    def _met_homes(self, param: Tensor) -> list[tuple[LowRank, dict[str, Any], Bucket, int]]:
        if self._shards is not None and self._cut[param].way not in ("rows", "here"):
            return []  # who steps it has only a piece of its gradient when replicas meet
        return super()._met_homes(param)

    def _usual_bytes(self, param: torch.nn.Parameter) -> int:
        if self._shards is None or self._met_homes(param):
            return super()._usual_bytes(param)
        return self._shards.weight(param).nbytes

    def _pack_piece(self, param: torch.nn.Parameter) -> list[Part]:
        assert self._shards is not None
        grad, way = self._shards.gradient(param), self._cut[param].way
        assert grad is not None
        homes = self._met_homes(param)
        if homes:
            return self._parts(param, homes, self._shaped(param, grad))
        return [Part("dense" if way == "piece" else "gradients", grad)]

    def _unpack_piece(self, param: torch.nn.Parameter, parts: list[Part]) -> None:
        assert isinstance(self._shards, DTensorShards)
        if parts[0].place:
            self._keep_images(param, parts)
        else:
            self._shards.set_gradient(param, parts[0].value)

    def _agreed(self, here: bool) -> bool:
        found = super()._agreed(here)
        return found if self._far is None else anywhere(found, self._carrier.device, self._wire.rare, self._far.group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._far is not None:
            self._far.begin()

    # --- a step by what has taken a gradient's place ------------------------------------------------------------------

    def _is_given(self, param: Tensor) -> bool:
        return param in self._images or super()._is_given(param)

    def _bring(self, params: Sequence[Tensor]) -> None:
        super()._bring([param for param in params if param not in self._images])

    def _weight(self, param: Tensor) -> Tensor:
        if self._shards is None or param in self._brought or param not in self._images:
            return super()._weight(param)
        return self._shaped(param, self._shards.weight(param))

    def _stepped(self) -> None:
        if self._far is not None:
            self._far.begin()
        super()._stepped()
