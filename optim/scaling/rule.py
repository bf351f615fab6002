"""One table: class of parameter, width and depth → what its rate, decay, initial weights, forward and eps become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from thinrank.optim.grouping import Multipliers
from thinrank.optim.scaling.classes import Member, ParameterClass, classify
from thinrank.optim.scaling.config import ScalingConfig


def multipliers(
    kind: ParameterClass,
    config: ScalingConfig,
    width: float,
    depth: float = 1.0,
    *,
    in_block: bool = False,
    folded: bool = False,
) -> Multipliers:
    """What the values that are good at the base are multiplied by, for one class of parameters.

    With m = `width`, L = `depth`, a = `lr_width_exp`, e = `wd_width_exp`, α = `depth_exp`, v = `vector_decay`:

    ====================  =========  =====  =======  =========
    class                 lr         decay  init     forward
    ====================  =========  =====  =======  =========
    input, vector         1          v      1        1
    hidden                m^−a       m^e    m^(−½)   1
    readout               1          v      1        1/m
    readout, folded       1/m        v·m    1/m      1
    factor_in             m^−a       v      m^(−½)   1
    factor_out            1          v      1        1
    fixed                 1          1      1        1
    ====================  =========  =====  =======  =========

    In blocks lr is multiplied by L^(α−1) as well. eps is multiplied by m^−`eps_width_exp` · L^−α for all classes, and
    for a folded readout by m.

    **Folding** serves architectures that cannot divide their logits. Put W′ = W / m in the place of W with the factor
    1/m: gradients of W′ are m times those of W, and Adam's direction, but for eps, is the same. So W′ moves as W/m does
    if it begins at 1/m, has 1/m of the rate, m times the decay (the shrinkage 1 − lr·decay stays) and m times the eps.
    Then both forms train alike up to rounding. Clipping by the norm of all gradients sees another norm, though.

    Decay is that of torch's AdamW, 1 − lr·decay a step, as all methods of thinrank have it. Of a fully decoupled
    decay, 1 − (lr/lr_max)·decay, the exponent is `wd_width_exp − lr_width_exp` (`independent_decay`).

    Theirs: rates, init, forward and classes of µP (Yang et al. 2022, arXiv:2203.03466); depth and eps of CompleteP (Dey
    et al. 2025, arXiv:2505.01618); `wd_width_exp` by preset. Ours: the classes of factors, folding.

    Args:
        kind: the class.
        config: the rule; one that is not `active` changes nothing.
        width: m_d, above 0.
        depth: m_L, above 0; without effect where the rule has no `depth_exp`.
        in_block: whether it lies in one of the blocks.
        folded: whether the model has no place for the readout's factor.

    Raises:
        ValueError: for a width or a depth that is not above 0.
    """
    if not width > 0 or not depth > 0:
        raise ValueError(f"width and depth must be ratios above 0, got {width!r} and {depth!r}: divide by the base's")
    if not config.active:
        return Multipliers(kind=kind.value)
    alpha = config.depth_exp
    lr = init = forward = 1.0
    eps = width**-config.eps_width_exp
    decay = 1.0 if kind is ParameterClass.FIXED else config.vector_decay
    if kind is ParameterClass.HIDDEN:
        decay = width**config.wd_width_exp
    if kind in (ParameterClass.HIDDEN, ParameterClass.FACTOR_IN):
        lr, init = width**-config.lr_width_exp, width**-0.5
    if kind is ParameterClass.READOUT and folded:
        lr, init, decay, eps = 1 / width, 1 / width, decay * width, eps * width
    elif kind is ParameterClass.READOUT:
        forward = 1 / width
    if alpha is not None:
        eps *= depth**-alpha
        if in_block:
            lr *= depth ** (alpha - 1)
    label = f"{kind.value}-block" if in_block and alpha is not None else kind.value
    return Multipliers(kind=label, lr=lr, weight_decay=decay, init=init, forward=forward, eps=eps)


@dataclass(frozen=True)
class Scaling:
    """A rule with the model that it is for.

    Attributes:
        config: the rule.
        members: class of every parameter, by name.
        width: m_d, the model's width over the base's.
        depth: m_L, the same of its blocks.
        folded: whether the readout's factor is in its weights.
    """

    config: ScalingConfig
    members: Mapping[str, Member]
    width: float
    depth: float = 1.0
    folded: bool = False

    def multipliers(self) -> dict[str, Multipliers]:
        """Of every parameter, by name."""
        return {
            name: multipliers(
                member.kind, self.config, self.width, self.depth, in_block=member.in_block, folded=self.folded
            )
            for name, member in self.members.items()
        }

    def classes(self) -> dict[str, str]:
        """Name of a parameter → its class, as plain text: what a checkpoint keeps."""
        return {
            name: f"{member.kind.value}-block" if member.in_block else member.kind.value
            for name, member in self.members.items()
        }

    def table(self) -> str:
        """The rule's factors, one line for each class that the model has."""
        of = self.multipliers()
        counts = Counter(of.values())
        depth = "" if self.config.depth_exp is None else f", depth × {self.depth:g} (base {self.config.base_depth})"
        readout = ", the readout's factor folded into its weights" if self.folded else ""
        lines = [
            f"scaling {self.config.name}: width × {self.width:g} (base {self.config.base_width}){depth}{readout}",
            f"{'class':<18} {'tensors':>7} {'lr ×':>9} {'decay ×':>9} {'init ×':>9} {'forward ×':>9} {'eps ×':>9}",
        ]
        for each, count in counts.items():
            factors = (each.lr, each.weight_decay, each.init, each.forward, each.eps)
            lines.append(f"{each.kind:<18} {count:>7} " + " ".join(f"{factor:>9.4g}" for factor in factors))
        return "\n".join(lines)


def scaling_of(
    config: ScalingConfig,
    make: Callable[[int, int], nn.Module],
    *,
    width: int,
    depth: int = 1,
    folded: bool = False,
) -> Scaling:
    """The scaling of a model of one's own, for `build(model, method, scaling=…)`.

    Args:
        config: the rule, with its `base_width`.
        make: width and depth → the model, with the names that the one to train has; called on the meta device.
        width: of the model to train.
        depth: its number of blocks.
        folded: whether logits are not divided by width / base_width in the model's forward.

    Raises:
        ValueError: for a rule without a base, and as `classify` does.
    """
    if config.base_width is None:
        raise ValueError("base_width must be given: set it to the width of the model that was tuned")
    with torch.device("meta"):
        narrow, wide = make(config.base_width, depth), make(2 * config.base_width, depth)
        deep = None if config.depth_exp is None else make(config.base_width, 2 * depth)
    return Scaling(
        config=config,
        members=classify(narrow, wide, deep=deep, overrides=config.overrides),
        width=width / config.base_width,
        depth=1.0 if config.base_depth is None or config.depth_exp is None else depth / config.base_depth,
        folded=folded,
    )


@torch.no_grad()
def scale_init(model: nn.Module, scaling: Scaling) -> None:
    """Multiplies the initial weights of `model`, drawn as at the base's width, by their factors, in place.

    Nothing is drawn, so that the weights depend on what the model's own depend on; at the base nothing is touched.

    Raises:
        ValueError: for a parameter that has no class.
    """
    factors = scaling.multipliers()
    for name, parameter in model.named_parameters():
        if name not in factors:
            raise ValueError(f"scaling knows no class of {name}: classify the model that is to be trained")
        if factors[name].init != 1.0:
            parameter.mul_(factors[name].init)
