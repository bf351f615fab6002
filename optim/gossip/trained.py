"""What a model trains: its parameters, and where the float32 values of each are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thinrank.optim.exchange.replicas import Group, broadcast
from thinrank.optim.exchange.wire import Count

MASTER = "master"
"""The name in an optimizer's state of a weight's float32 copy."""


class Trained:
    """A model's trained parameters, each with the float32 master whose rounding it is, where somebody keeps one.

    Here these are thinrank's optimizers, in their state (`half_weights="master"`). All values together are one vector
    in float32, in the order of the model.

    Attributes:
        params: by name and once each, however often the model uses them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.params = trained_parameters(model, optimizer)
        self._optimizer = optimizer

    def master(self, param: Tensor) -> Tensor | None:
        return self._optimizer.state.get(param, {}).get(MASTER)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each parameter with its master."""
        for param in self.params.values():
            yield param, self.master(param)

    def read(self, own: Mapping[str, Tensor] | None = None) -> Tensor:
        """All values, of masters before parameters.

        Args:
            own: what to take in the place of parameters, by name, while these show something else.
        """
        wide = (
            master if master is not None else param if own is None else own[name]
            for name, (param, master) in zip(self.params, self.pairs(), strict=True)
        )
        return torch.cat([values.detach().to(torch.float32).reshape(-1) for values in wide])

    def write(self, flat: Tensor) -> None:
        """Gives masters these values, and parameters their rounding."""
        for (param, master), part in zip(self.pairs(), self.split(flat), strict=True):
            param.detach().copy_(part)
            if master is not None:
                master.detach().copy_(part)

    def held(self, flat: Tensor) -> Tensor:
        """What `read` finds after `write`: less, where nobody keeps a master of 16-bit weights."""
        if all(master is not None or param.dtype is torch.float32 for param, master in self.pairs()):
            return flat
        parts = zip(self.split(flat), self.pairs(), strict=True)
        return torch.cat(
            [(part if master is not None else part.to(p.dtype).float()).reshape(-1) for part, (p, master) in parts]
        )

    def split(self, flat: Tensor) -> list[Tensor]:
        """The vector as views in the shapes of the parameters."""
        parts = flat.split([param.numel() for param in self.params.values()])
        return [part.view(param.shape) for part, param in zip(parts, self.params.values(), strict=True)]

    @torch.no_grad()
    def level(self, wire: Count, group: Group | None) -> None:
        """Gives all ranks the weights that the first one's model has now, and masters whose rounding they are: entries
        of a master start again from a weight that somebody has changed, all others keep what is finer."""
        for param, master in self.pairs():
            if master is not None:
                kept = master.to(param.dtype) == param
                master.detach().copy_(torch.where(kept, master, param.to(torch.float32)))
        for param, master in self.pairs():
            broadcast([values.detach() for values in (param, master) if values is not None], wire, group)


def trained_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, stepped: Iterable[Tensor] | None = None
) -> dict[str, nn.Parameter]:
    """What the optimizer trains, by name and once each; a ValueError where the two do not belong together.

    Args:
        stepped: of the model, where the optimizer has other tensors in their place; None: what it has.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel averages gradients over all ranks, which exchange weights instead: give the model "
            "without the wrapper"
        )
    if hasattr(model, "enable_backward_allreduce"):
        raise ValueError(
            "DeepSpeed's engine averages gradients over all ranks, which exchange weights instead: give EngineGossip "
            "the engine of a model without wrappers"
        )
    if getattr(optimizer, "wire", None) is not None:
        raise ValueError(
            "this optimizer exchanges gradients already (replicate, own, or weights in pieces), and ranks exchange "
            "weights instead: build it anew and leave that call out"
        )
    if stepped is None:
        stepped = (param for group in optimizer.param_groups for param in group["params"])
    known = set(stepped)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for name, param in params.items():
        if param not in known and param.numel():
            raise ValueError(
                f"{name} is trained and not in the optimizer, so that nobody would know its update: give it to the "
                "optimizer, or freeze it by requires_grad_(False)"
            )
    if not params:
        raise ValueError("no parameter is trained, so that there is nothing to exchange: set requires_grad")
    return params
