"""What a rule of scale consists of, and the rules that have names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thinrank.optim.methods.config import choice, number
from thinrank.optim.scaling.classes import ParameterClass

HEADS = ("size", "count")
"""What of attention heads stays as it is where a model becomes wider."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Exponents by which learning rates, decay and initial weights follow a model's width and depth; `none`: they stay.

    With m_d = width / base_width and m_L = depth / base_depth, what was found good at the base is multiplied, class by
    class, as `thinrank.optim.scaling.multipliers` says. The rates and the decay of `optimizer` are those of the base.

    Defaults: lr_width_exp=1.0 and attention_width_exp=1.0 are those of maximal update parametrisation for Adam (Yang et
    al. 2022, arXiv:2203.03466); wd_width_exp=0.0, vector_decay=1.0, eps_width_exp=0.0, heads=size and no rule of depth
    are ours.
    """

    name: str = field(
        default="none", metadata={"help": "rule (chosen by `scaling=…`): none, const, sqrt_wd, linear_wd, completep"}
    )
    base_width: int | None = field(
        default=None, metadata={"help": "hidden size of the model for which lr and weight_decay were found"}
    )
    base_depth: int | None = field(default=None, metadata={"help": "its number of blocks; null: depth plays no part"})
    lr_width_exp: float = field(
        default=1.0, metadata={"help": "a in lr ∝ width^(-a) of weights that sum over the width: 1 for Adam's updates"}
    )
    wd_width_exp: float = field(
        default=0.0, metadata={"help": "e in weight decay ∝ width^e of weights both of whose sides grow"}
    )
    vector_decay: float = field(
        default=1.0,
        metadata={"help": "factor on the decay of weights one of whose sides grows; 0: none of them decays"},
    )
    depth_exp: float | None = field(
        default=None, metadata={"help": "α in branches ∝ depth^(-α), from 0.5 to 1; null: no rule of depth"}
    )
    eps_width_exp: float = field(
        default=0.0, metadata={"help": "e in Adam's eps ∝ width^(-e) (and depth^(-depth_exp))"}
    )
    attention_width_exp: float = field(
        default=1.0, metadata={"help": "power of the head size that divides attention logits; 0.5: as usual"}
    )
    heads: str = field(
        default="size", metadata={"help": "what stays where the model grows: size (more heads), or count (larger ones)"}
    )
    overrides: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "regular expression on parameter names → class, where that found by shapes is wrong"},
    )

    def __post_init__(self) -> None:
        for key in ("base_width", "base_depth"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{key} must be a number of at least 1, got {value!r}: give that of the tuned model")
        for key in ("lr_width_exp", "wd_width_exp", "eps_width_exp", "attention_width_exp"):
            number(key, getattr(self, key), low=-4.0, high=4.0)
        number("vector_decay", self.vector_decay)
        if self.depth_exp is not None:
            number("depth_exp", self.depth_exp, low=0.5, high=1.0)
        choice("heads", self.heads, HEADS)
        if self.active and self.base_width is None:
            raise ValueError(
                f"base_width must be given with scaling={self.name}, since it says what width the rates are for: set "
                "scaling.base_width to the hidden size of the model that was tuned, or scaling=none"
            )
        if self.active and self.depth_exp is not None and self.base_depth is None:
            raise ValueError(
                f"base_depth must be given with depth_exp={self.depth_exp:g}: set scaling.base_depth to the blocks of "
                "the model that was tuned, or scaling.depth_exp=null"
            )
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides must map patterns to classes, got {self.overrides!r}: write {{gate: vector}}")
        for pattern, kind in self.overrides.items():
            choice(f"overrides[{pattern!r}]", kind, tuple(each.value for each in ParameterClass))
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"overrides: {pattern!r} is not a regular expression ({error}): correct it") from None

    @property
    def active(self) -> bool:
        """Whether there is a rule at all."""
        return self.name != "none"


PRESETS: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "const": {"name": "const"},
    "sqrt_wd": {"name": "sqrt_wd", "wd_width_exp": 0.5, "vector_decay": 0.0},
    "linear_wd": {"name": "linear_wd", "wd_width_exp": 1.0},
    "completep": {"name": "completep", "wd_width_exp": 1.0, "depth_exp": 1.0, "eps_width_exp": 1.0},
}
"""The rules by name, as arguments: `ScalingConfig(**PRESETS["sqrt_wd"], base_width=256)`.

`const` is µP (arXiv:2203.03466) with the decay as it is; `sqrt_wd` is Fan et al. 2025 (arXiv:2510.15262), decay of
matrices ∝ √width and none of vectors and embeddings; `linear_wd` keeps lr times decay as it is, as mup's MuAdamW does,
and as Wang & Aitchison 2024 (arXiv:2405.13698) and Kosson et al. 2025 (arXiv:2510.19093) ask for; `completep` adds the
depth rule and the eps of Dey et al. 2025 (arXiv:2505.01618).
"""
