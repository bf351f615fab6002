"""From a model of dense layers to one of factors, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from thinrank.optim.grouping import PRESETS, Role, roles, targeted
from thinrank.optim.layers.base import Layer, NotMergeable, ReparamConfig
from thinrank.optim.layers.dense import Dense, is_linear
from thinrank.optim.methods.config import MatrixConfig
from thinrank.optim.rule import key_of, seed_of


@dataclass(frozen=True, slots=True)
class Converted:
    """One line of what was converted.

    Attributes:
        name: of the layer.
        kind: of the new layer.
        shape: (out, in).
        rank: inner size; None where there is none.
        dense: entries of the weight that was replaced.
        held: entries of the new layer's parameters, bias left out.
        trained: of these, those that are trained.
        flops: of a forward for one token.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    dense: int
    held: int
    trained: int
    flops: int


@dataclass
class Conversion:
    """What `convert` has done.

    Attributes:
        rows: the layers that were replaced, in the model's order.
        kept: names of matrices that presets would have chosen, and that are no linear layer's.
        parameters: of the model before and after.
        trained: of those, the trained ones, before and after.
        weights: bytes of all of them, before and after.
        training: bytes of these with a gradient and two moments of everything trained, in the weights' dtype.
    """

    rows: list[Converted] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    trained: tuple[int, int] = (0, 0)
    weights: tuple[int, int] = (0, 0)
    training: tuple[int, int] = (0, 0)

    def flops(self) -> tuple[int, int]:
        """Of the converted layers' forwards for one token, before and after."""
        return sum(2 * row.dense for row in self.rows), sum(row.flops for row in self.rows)

    def summary(self) -> Mapping[str, int]:
        """The figures for a report, in entries and FLOPs a token."""
        flops = self.flops()
        return {
            "layers": len(self.rows),
            "parameters_before": self.parameters[0],
            "parameters_after": self.parameters[1],
            "trained_before": self.trained[0],
            "trained_after": self.trained[1],
            "flops_before": flops[0],
            "flops_after": flops[1],
            "weights_bytes_before": self.weights[0],
            "weights_bytes_after": self.weights[1],
            "training_bytes_before": self.training[0],
            "training_bytes_after": self.training[1],
        }

    def table(self) -> str:
        """One line for each kind, shape and rank, and the whole model."""
        lines = [
            f"{'layer':<22} {'out × in':>14} {'rank':>6} {'layers':>6} {'dense':>13} {'held':>13} {'trained':>13} "
            f"{'FLOPs':>6}"
        ]
        seen: dict[tuple[str, tuple[int, int], int | None], list[Converted]] = {}
        for row in self.rows:
            seen.setdefault((row.kind, row.shape, row.rank), []).append(row)
        for (kind, shape, rank), rows in seen.items():
            dense, held, trained = (sum(getattr(r, key) for r in rows) for key in ("dense", "held", "trained"))
            size, ratio = " × ".join(map(str, shape)), sum(r.flops for r in rows) / (2 * dense)
            lines.append(
                f"{kind:<22} {size:>14} {rank or '':>6} {len(rows):>6} {dense:>13,} {held:>13,} {trained:>13,} "
                f"{ratio:>6.2f}"
            )
        before, after = self.flops()
        lines.append(
            f"{'model':<22} {'':>14} {'':>6} {len(self.rows):>6} {self.parameters[0]:>13,} {self.parameters[1]:>13,} "
            f"{self.trained[1]:>13,} {after / max(before, 1):>6.2f}"
        )
        (w0, w1), (t0, t1) = ([size / 2**20 for size in pair] for pair in (self.weights, self.training))
        lines.append(
            f"weights: {w0:,.1f} → {w1:,.1f} MiB; with gradients and two moments of what is trained: "
            f"{t0:,.1f} → {t1:,.1f} MiB"
        )
        if self.kept:
            lines.append(f"left as they are, being no linear layer's: {len(self.kept)} matrices ({self.kept[0]}, …)")
        return "\n".join(lines)


def convert(
    model: nn.Module, config: ReparamConfig, *, targets: Iterable[str] | None = None, seed: int = 0
) -> Conversion:
    """Replaces the chosen linear layers of `model`, in place, by layers made of factors.

    Every rank must call it, with the same weights. What is drawn depends on `seed` and the layer's name alone; what is
    computed, each rank computes by itself, so have the first one's weights sent to all before training, as DDP and
    thinrank's strategies do. Methods for fine-tuning freeze everything else (`freeze`).

    Args:
        model: on any device; on the meta device the new layers have shapes and no values.
        config: what by, such as `SST(rank=64)`.
        targets: in the place of `config.targets`: `all-linear`, `attention`, `mlp`, or regular expressions on names.
        seed: of everything that is drawn.

    Returns:
        what was converted, for `print(….table())`.

    Raises:
        ValueError: when a target or an exclusion matches nothing, for an embedding, an output head and what is no
            linear layer, for layers that are converted already, for a weight that two layers share, for one that is in
            pieces or not finite, and for a rank above a layer's shorter side; the model is as it was then.
    """
    if targets is not None:
        config = replace(config, targets=list(targets))
    chosen, kept = _chosen(model, config)
    before = _counts(model)
    for dense in chosen:
        config.check(dense)
    planned = config.plan(chosen, model)
    made: dict[str, Layer] = {}
    for dense in chosen:
        generator = torch.Generator().manual_seed(seed_of(seed, key_of(dense.name), 0))
        try:
            layer = planned.layer(dense, generator)
        except ValueError as error:
            raise ValueError(f"{dense.name} {error}") from error
        if layer is not None:
            layer.config = config
            made[dense.name] = layer.train(dense.module.training)
    for name, layer in made.items():
        set_module(model, name, layer)
    planned.settle(model, made)
    rows = [
        Converted(
            name=name,
            kind=config.name,
            shape=(layer.out_features, layer.in_features),
            rank=getattr(layer, "rank", None),
            dense=layer.out_features * layer.in_features,
            held=sum(p.numel() for key, p in layer.named_parameters() if key != "bias"),
            trained=sum(p.numel() for key, p in layer.named_parameters() if key != "bias" and p.requires_grad),
            flops=layer.flops(),
        )
        for name, layer in made.items()
    ]
    after = _counts(model)
    return Conversion(rows, kept, *zip(before, after, strict=True))


def _counts(model: nn.Module) -> tuple[int, int, int, int]:
    """Entries, trained ones; bytes, and those of training."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    more = sum(3 * p.numel() * p.element_size() for p in trained)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained), weights, weights + more


def _chosen(model: nn.Module, config: ReparamConfig) -> tuple[list[Dense], list[str]]:
    converted = next((name for name, module in model.named_modules() if isinstance(module, Layer)), None)
    if converted is not None:
        raise ValueError(
            f"the model is converted already ({converted} is a {type(model.get_submodule(converted)).__name__}): merge "
            "it first, or convert the model that it was made of"
        )
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    role = roles(model)
    found = targeted(names, role, shapes, MatrixConfig(targets=list(config.targets), exclude=list(config.exclude)))
    own = [t for t in config.targets if t not in PRESETS]
    by_hand = set(targeted(names, role, shapes, MatrixConfig(targets=own))) & found if own else set()
    modules = dict(model.named_modules())
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            sharing.setdefault(id(module.weight), []).append(name)
    chosen: list[Dense] = []
    kept: list[str] = []
    for name in names:
        if name not in found:
            continue
        where, _, last = name.rpartition(".")
        if role[name] in (Role.EMBEDDING, Role.HEAD):
            raise ValueError(
                f"targets: {name} is the {role[name].value}'s weight, which stays dense: leave it out of targets"
            )
        if last != "weight" or not is_linear(modules[where]):
            if name in by_hand:
                raise ValueError(f"targets: {name} is no linear layer's weight: leave it out of targets")
            kept.append(name)
            continue
        if not where:
            raise ValueError("the model is one linear layer itself, which cannot be replaced in it: wrap it")
        if len(sharing[id(modules[where].weight)]) > 1:
            raise ValueError(f"{' and '.join(sharing[id(modules[where].weight)])} share one weight: exclude them")
        if type(modules[where].weight.data) is not torch.Tensor:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"{name} is in pieces already: convert the model before a framework shards it")
        chosen.append(Dense.of(modules[where], where))
    if not chosen:
        raise ValueError(f"targets: {config.targets} choose no linear layer of the model")
    return chosen, kept


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the one called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def layers(model: nn.Module) -> dict[str, Layer]:
    """The converted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def merge(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Puts dense layers, of the classes that were there, in the place of all converted ones, in place.

    Args:
        model: whole on this process.
        optimizer: one that steps `model`, if there is any: it is refused, since it would go on stepping the factors.

    Returns:
        `model`, in which nothing of this library is left.

    Raises:
        ValueError: for an optimizer, a model that has no converted layer, and one in pieces.
        NotMergeable: where a non-linearity stands between factors, with a bound on the error of the nearest matrix;
            the model is as it was.
    """
    found = layers(model)
    if not found:
        raise ValueError("the model has no converted layer: there is nothing to merge")
    refuse_held(found, optimizer)
    dense = {name: _merged(name, layer) for name, layer in found.items()}
    for name, module in dense.items():
        set_module(model, name, module)
    return model


def refuse_held(found: Mapping[str, Layer], optimizer: torch.optim.Optimizer | None) -> None:
    """Refuses layers that an optimizer steps, or that are in pieces, for who puts others in their places."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
    for name, layer in found.items():
        if any(id(p) in held for p in layer.parameters()):
            raise ValueError(
                f"an optimizer steps the factors of {name}, and would go on doing so: drop it, merge, and build "
                "another for the merged model"
            )
        if any(type(p.data) is not torch.Tensor for p in layer.parameters()):
            raise ValueError(f"{name} is in pieces: gather the whole weights, or merge on export")


def _merged(name: str, layer: Layer) -> nn.Module:
    try:
        return layer.merged()
    except NotMergeable as error:
        raise NotMergeable(f"{name} cannot be merged: {error}") from error


def warmth(model: nn.Module) -> Callable[[int], float] | None:
    """The factor on the learning rate in the step after so many, from 0 to 1, by all converted layers; None: always 1.

    `LambdaLR(optimizer, lambda step: schedule(step) * factor(step))`: layers that put other vectors in the place of
    those that were trained want the optimizer to begin slowly with them.
    """
    kinds = {type(layer): layer for layer in layers(model).values() if type(layer).warmth is not Layer.warmth}
    return (lambda step: min(layer.warmth(step) for layer in kinds.values())) if kinds else None


def penalty(model: nn.Module) -> torch.Tensor | None:
    """What the converted layers add to the loss (scalar), or None where they add nothing."""
    found = [value for layer in layers(model).values() if (value := layer.penalty()) is not None]
    return torch.stack(found).sum() if found else None
