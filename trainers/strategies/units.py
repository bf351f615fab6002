"""Which modules of a model are sharded as one: its blocks, and what is left at the root."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from thinrank.trainers.errors import UserError


def network(module: nn.Module) -> nn.Module:
    """What of a LightningModule is called to go forward: its one child with parameters, or itself where it has several.

    Hooks that gather weights belong there: a module around a single network is never called itself.
    """
    with_weights = [child for child in module.children() if next(child.parameters(), None) is not None]
    alone = len(with_weights) == 1 and not list(module.parameters(recurse=False))
    return with_weights[0] if alone and type(with_weights[0]).forward is not nn.Module.forward else module


def blocks(root: nn.Module) -> list[nn.Module]:
    """The modules below `root` that are gathered one after the other, inner ones first.

    Those that a transformers model asks not to split (`_no_split_modules`), else the members of the `nn.ModuleList`
    with most parameters; [] where there is neither, and the model is gathered at once.
    """
    names = {name for module in root.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = [module for module in root.modules() if type(module).__name__ in names]
    if not found:
        lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
        found = list(max(lists, key=_size, default=()))
    callable_ = [m for m in found if type(m).forward is not nn.Module.forward and m is not root and _size(m)]
    order = {module: place for place, module in enumerate(root.modules())}
    return sorted(callable_, key=lambda module: -order[module])


def refuse(root: nn.Module, units: Sequence[nn.Module]) -> None:
    """Refuses what `fully_shard` cannot cut, or would stumble over in the middle of a step.

    Raises:
        UserError: no trainable parameter, one of no dimension, without values, cut already, or shared by two units.
    """
    if not any(param.requires_grad for param in root.parameters()):
        raise UserError("thinrank_fsdp2 shards what is trained, and the model has no trainable parameter: unfreeze one")
    prefixes = {f"{name}.": unit for name, unit in root.named_modules() if unit in set(units)}
    home: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    for name, param in root.named_parameters(remove_duplicate=False):
        if isinstance(param, DTensor):
            raise UserError(
                f"{name} is sharded already, in another way than thinrank_fsdp2 would: leave fully_shard to the "
                "strategy, or use Lightning's ModelParallelStrategy, under which thinrank's optimizers work as well"
            )
        if param.is_meta:
            raise UserError(
                f"{name} has no values, for the model was made on the meta device: make it on the CPU, from where "
                "thinrank_fsdp2 takes it block by block"
            )
        if param.ndim == 0:
            raise UserError(f"{name} has no dimension that could be cut: give it the shape (1,)")
        inside = [prefix for prefix in prefixes if name.startswith(prefix)]
        unit = prefixes[max(inside, key=len)] if inside else root
        other, first = home.setdefault(param, (name, unit))
        if first is not unit:
            raise UserError(
                f"{other} and {name} are one parameter in two blocks, and thinrank_fsdp2 gathers a block at a time: "
                "untie them, or use strategy=thinrank_ddp"
            )


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
