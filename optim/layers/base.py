"""What all layers whose weights are made of other tensors have in common, and what all their configurations have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from thinrank.optim.layers.dense import Dense, filled
from thinrank.optim.linalg.factor import share_of
from thinrank.optim.methods.config import number

if TYPE_CHECKING:
    from thinrank.optim.layers.upkeep import Upkeep


class NotMergeable(ValueError):
    """There is no single matrix that a layer amounts to."""


class Layer(nn.Module):
    """A linear layer `y = W x + b` whose W (out, in) is made of other tensors, or that has something else in its place.

    Its parameters are ordinary ones: matrices for the rule of matrices, and `COEFFICIENTS`, numbers that are stepped
    element by element at the matrices' rate. What is frozen are parameters without a gradient, since buffers would
    neither be sharded nor counted.

    Attributes:
        config: by what it was made; `convert` sets it.
        in_features, out_features: sizes of x and y.
        bias: b, the layer's that this one replaces, or None.
    """

    COEFFICIENTS: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that are no matrices, whatever their shape."""

    FAN_IN: ClassVar[Mapping[str, int]] = {}
    """The side of a parameter that meets what comes in, where it is not the last (for rules of scale)."""

    config: Any = None

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.out_features, self.in_features = dense.shape
        self.register_parameter("bias", dense.bias)
        self.bias: nn.Parameter | None
        self._shell = [dense.shell()]  # in a list, so that it is no submodule

    @abstractmethod
    def weight(self) -> Tensor:
        """W (out, in), in the dtype of the factors.

        Raises:
            NotMergeable: with a bound on the error of the nearest matrix, where there is none.
        """

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(out, r) and (r, in) whose product W is; None where it is more than a product, or no thin one.

        Raises:
            NotMergeable: as `weight` does.
        """
        return None

    def merged(self) -> nn.Module:
        """A layer of the class that was replaced, with the weight that this one amounts to.

        Raises:
            NotMergeable: as `weight` does.
        """
        with torch.no_grad():
            weight = self.weight().detach().clone()
        module = filled(self._shell[0], weight, self.bias)  # pyright: ignore[reportArgumentType]
        trained = any(p.requires_grad for name, p in self.named_parameters() if name != "bias")
        module.get_parameter("weight").requires_grad_(trained)
        return module.train(self.training)

    @property
    def short(self) -> int:
        """The shorter of the two sides."""
        return min(self.in_features, self.out_features)

    def flops(self) -> int:
        """Of a forward for one token: two for each product and sum."""
        return 2 * sum(p.numel() for name, p in self.named_parameters() if name != "bias")

    def parameters_trained(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss for this layer (scalar), or None."""
        return None

    def warmth(self, step: int) -> float:
        """What the learning rate is multiplied by in the step after `step` of them, from 0 to 1."""
        return 1.0

    # --- what acts during training ------------------------------------------------------------------------------------

    keeps: ClassVar[bool] = False
    """Whether anything acts between steps, so that an `Upkeep` is needed."""

    def before_step(self, upkeep: Upkeep) -> None:
        """Called before an optimizer's step, with the gradients there."""

    def after_step(self, upkeep: Upkeep) -> None:
        """Called after an optimizer's step."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As torch does, with a remedy where the saved layer is of another rank."""
        own = {**self._parameters, **self._buffers}
        for name, value in own.items():
            saved = state_dict.get(prefix + name)
            if value is not None and saved is not None and saved.shape != value.shape:
                args[-1].append(
                    f"{prefix}{name} is {tuple(saved.shape)} in what is loaded, and {tuple(value.shape)} here: convert "
                    "the model with the rank, and the other settings, that it was saved with"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True, kw_only=True)
class ReparamConfig:
    """What linear layers of a model are replaced by; this one replaces nothing.

    Defaults: ours are targets=[all-linear] and exclude=[].
    """

    name: str = field(default="none", metadata={"help": "kind of layers (chosen by `model.reparam=…`)"})
    targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "weights that are replaced: all-linear, attention, mlp, or regular expressions on names"},
    )
    exclude: list[str] = field(default_factory=list, metadata={"help": "regular expressions on names that are kept"})

    PRETRAINS: ClassVar[bool] = True
    """Whether it makes sense from random weights on."""

    def __post_init__(self) -> None:
        for key in ("targets", "exclude"):
            value = getattr(self, key)
            if not isinstance(value, (list, tuple)) or any(not isinstance(item, str) for item in value):
                raise ValueError(f"{key} must be a list of names or patterns, got {value!r}: write {key}=[all-linear]")
        if not self.targets:
            raise ValueError("targets must name at least one, got []: write targets=[all-linear], or reparam=none")

    @property
    def acts(self) -> bool:
        """Whether its layers do something between steps."""
        return False

    @property
    def penalises(self) -> bool:
        """Whether its layers add something to the loss."""
        return False

    def check(self, dense: Dense) -> None:
        """Refuses a layer for which the values make no sense.

        Raises:
            ValueError: with the name and the remedy.
        """

    def layer(self, dense: Dense, generator: torch.Generator) -> Layer | None:
        """The layer in the place of `dense`, on the meta device where it is there; None where `dense` stays.

        Args:
            generator: on the CPU, for everything that is drawn.

        Raises:
            ValueError: for a weight of which no factors can be made.
        """
        raise ValueError(
            f"stays dense: reparam={self.name} replaces nothing, so choose a kind of layers, such as SST()"
        )

    def plan(self, denses: Iterable[Dense], model: nn.Module | None = None) -> ReparamConfig:
        """The same with what can only be decided by all the layers together.

        Args:
            denses: the layers that are replaced, in the model's order.
            model: whose they are.

        Raises:
            ValueError: where they do not go together.
        """
        return self

    def settle(self, model: nn.Module, made: Mapping[str, Layer]) -> None:
        """Called with the layers in their places, by name, for what concerns the rest of the model."""


@dataclass(frozen=True, kw_only=True)
class FineTuning(ReparamConfig):
    """For weights that have learnt something: few numbers are trained, and the rest of the model stays as it is.

    Defaults: ours is freeze=True.
    """

    freeze: bool = field(
        default=True, metadata={"help": "leave everything else untrained: biases, norms, embeddings, other layers"}
    )

    PRETRAINS = False

    def settle(self, model: nn.Module, made: Mapping[str, Layer]) -> None:
        if self.freeze:
            freeze_others(model, made)


def freeze_others(model: nn.Module, made: Mapping[str, Layer]) -> None:
    """Leaves nothing to be trained but what the layers `made` are made of, their biases excepted."""
    own = {id(p) for layer in made.values() for key, p in layer.named_parameters() if key != "bias"}
    for p in model.parameters():
        if id(p) not in own:
            p.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class RankedReparam(ReparamConfig):
    """A rank for every layer: a number, or a share of the layer's shorter side.

    Defaults: ours is rank=0.25.
    """

    rank: int | float = field(
        default=0.25, metadata={"help": "inner size of the factors: a number, or a share of the shorter side"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, int):
            if isinstance(self.rank, bool) or self.rank < 1:
                raise ValueError(f"rank must be at least 1, or a share above 0, got {self.rank!r}: write 64, or 0.25")
        else:
            number("rank", self.rank, high=1.0, open_low=True)

    def rank_of(self, dense: Dense) -> int:
        return share_of(self.rank, min(dense.shape))

    def check(self, dense: Dense) -> None:
        if self.rank_of(dense) > min(dense.shape):
            raise ValueError(
                f"rank {self.rank} is above the shorter side of {dense.name}, {tuple(dense.shape)}: lower it, give a "
                "share such as 0.25, or exclude that layer"
            )


def like(dense: Dense, *shape: int, trained: bool = True) -> nn.Parameter:
    """A parameter without values, where `dense` is and of its dtype."""
    return nn.Parameter(dense.weight.new_empty(shape), requires_grad=trained)


def normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fills `tensor` with normal numbers that depend on `generator`, on the CPU, alone."""
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """The same with numbers from −bound to bound."""
    tensor.copy_((torch.rand(tensor.shape, generator=generator) * 2 - 1) * bound)


def kaiming_(a: Tensor, generator: torch.Generator) -> None:
    """The usual start of A (r, in) in LoRA and its kin: uniform with bound 1/sqrt(in) (Kaiming with a = sqrt 5)."""
    uniform_(a, a.shape[1] ** -0.5, generator)


def with_targets(config: Any, targets: Iterable[str] | None) -> Any:
    return config if targets is None else replace(config, targets=list(targets))
