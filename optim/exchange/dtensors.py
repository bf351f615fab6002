"""Weights that torch's `fully_shard` has cut into rows: FSDP2, and HSDP, whose replicas hold the same rows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor

from thinrank.optim.exchange.replicas import Group
from thinrank.optim.exchange.shards import Span, rows_of
from thinrank.optim.exchange.wire import Wire

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard


def is_sharded(param: Tensor) -> bool:
    """True for a parameter of a model that went through `fully_shard`.

    Where nobody has imported DTensors there are none, and importing them takes a third of a second.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, module.DTensor)


def here(tensor: Tensor) -> Tensor:
    """What lies on this rank of a tensor that may be in pieces."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


class DTensorShards:
    """Reads where the rows of parameters lie off themselves.

    FSDP2 gives each of n ranks ⌈rows/n⌉ rows, and the last ranks what is left: fewer, or none. On a mesh of two
    dimensions, the first replicates and gradients are averaged over both when backward is done.

    Raises:
        ValueError: for parameters of which some are not sharded, that are sharded along another dimension or over
            several dimensions of a mesh, or that lie on different meshes.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        self.wire = Wire()
        self._mesh: DeviceMesh | None = None
        self._dim = 0
        for name, param in named:
            if not isinstance(param, DTensor):
                raise ValueError(
                    f"{name} is not sharded and others are: call fully_shard on the root module as well, without "
                    "ignored_params"
                )
            dims = [i for i, placement in enumerate(param.placements) if isinstance(placement, Shard)]
            others = [place for place in param.placements if not isinstance(place, (Shard, Replicate))]
            if len(dims) != 1 or others or cast("Shard", param.placements[dims[0]]).dim != 0:
                raise ValueError(
                    f"{name} is placed as {param.placements}; rows on one dimension of a mesh are what is supported: "
                    "use fully_shard without shard_placement_fn, on a mesh of one dimension or of replicas × shards"
                )
            if self._mesh is None:
                self._mesh, self._dim = param.device_mesh, dims[0]
            elif (param.device_mesh, dims[0]) != (self._mesh, self._dim):
                raise ValueError(f"{name} lies on another mesh than the parameters before it: use one mesh for all")
        assert self._mesh is not None  # there is a parameter
        self._ranks = self._mesh.size(self._dim)

    @property
    def group(self) -> Group | None:
        assert self._mesh is not None
        return self._mesh.get_group(self._dim)

    @property
    def replicas(self) -> Group | None:
        assert self._mesh is not None
        return self._mesh.get_group(1 - self._dim) if self._mesh.ndim == 2 else None

    def __contains__(self, param: Tensor) -> bool:
        return is_sharded(param)

    def shape(self, param: Tensor) -> tuple[int, ...]:
        return tuple(param.shape)

    def spans(self, param: Tensor) -> Sequence[Span]:
        return rows_of(param.shape, self._ranks)

    def weight(self, param: Tensor) -> Tensor:
        return cast("DTensor", param.detach()).to_local().view(-1)

    def gradient(self, param: Tensor) -> Tensor | None:
        return None if param.grad is None else cast("DTensor", param.grad).to_local().view(-1)

    def set_gradient(self, param: Tensor, piece: Tensor) -> None:
        """Makes `piece`, of this rank's rows, the gradient of `param`."""
        from torch.distributed.tensor import DTensor

        own = cast("DTensor", param)
        rows = piece.view(own.to_local().shape)
        param.grad = DTensor.from_local(
            rows, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
        )
