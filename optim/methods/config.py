"""What the configurations of all methods have in common."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch

from thinrank.optim.inner.adam import Adam
from thinrank.optim.inner.base import Whole
from thinrank.optim.inner.elementwise import ElementwiseAdamW
from thinrank.optim.inner.half import WAYS, HalfWeights
from thinrank.optim.inner.moments import BITS
from thinrank.optim.lowrank.renewals import Renewals
from thinrank.optim.rule import MatrixRule


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not one of `allowed`, naming the nearest."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def number(name: str, value: Any, *, low: float = 0.0, high: float = math.inf, open_low: bool = False) -> None:
    """Refuses what is not a finite number from `low` to `high`."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or value > high or value < low or (open_low and value == low):
        above = f"above {low:g}" if open_low else f"at least {low:g}"
        below = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be a number {above}{below}, got {value!r}")


def decay_rate(name: str, value: Any) -> None:
    """Refuses what is not a number from 0 to below 1."""
    number(name, value)
    if value >= 1.0:
        raise ValueError(f"{name} must be below 1, got {value!r}")


def whole_steps(name: str, value: Any) -> None:
    """Refuses what is not a whole number of at least one step."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be at least 1 step, got {value!r}")


ALLOCATIONS = ("uniform", "weight", "gradient")
"""Whose spectra decide on ranks; `uniform`: nobody's."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Fields of every optimizer; a learning rate for each role, because matrices and embeddings want different ones.

    Defaults, where a method does not say otherwise: lr=0.001, betas=(0.9, 0.999) and eps=1e-08 are the paper's on Adam
    (Kingma & Ba 2015); ours are weight_decay=0.0, one rate for all roles (embedding_lr=None, vector_lr=None),
    state_bits=32 and half_weights=nearest.
    """

    name: str = field(default="", metadata={"help": "method (chosen by `optimizer=…`)"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate of the matrices"})
    embedding_lr: float | None = field(
        default=None, metadata={"help": "learning rate of embeddings and output head; null: as lr"}
    )
    vector_lr: float | None = field(
        default=None, metadata={"help": "learning rate of norms and biases; null: as embedding_lr"}
    )
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"help": "decay rates of Adam's two moments"})
    eps: float = field(default=1e-8, metadata={"help": "added to Adam's denominator"})
    weight_decay: float = field(
        default=0.0,
        metadata={"help": "decoupled weight decay of matrices, embeddings and head; norms and biases have none"},
    )
    state_bits: int = field(
        default=32,
        metadata={
            "help": "bits of each entry of Adam's moments: 32, or 8 (tensors of 4096 entries and more, "
            "projections wider than one)"
        },
    )
    half_weights: str = field(
        default="nearest",
        metadata={
            "help": "16-bit weights and updates below their spacing: nearest (lost), stochastic (kept on average), "
            "master (float32 copy)"
        },
    )

    GROUP: ClassVar[tuple[str, ...]] = ("betas", "eps", "state_bits", "half_weights")
    """Fields that a parameter group carries beside lr and weight_decay."""

    def __post_init__(self) -> None:
        number("lr", self.lr)
        for key in ("embedding_lr", "vector_lr"):
            if getattr(self, key) is not None:
                number(key, getattr(self, key))
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas!r}")
        for beta in self.betas:
            decay_rate("betas", beta)
        number("eps", self.eps)
        number("weight_decay", self.weight_decay)
        if self.state_bits not in BITS:
            raise ValueError(f"state_bits must be 32 or 8, got {self.state_bits!r}")
        choice("half_weights", self.half_weights, WAYS)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Default of every field a parameter group carries."""
        found = {f.name: f.default if f.default is not MISSING else None for f in fields(cls)}
        return {key: found[key] for key in ("lr", "weight_decay", *cls.GROUP)}

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> MethodConfig:
        """The configuration that a parameter group's values amount to; refuses bad ones."""
        values = {key: group[key] for key in ("weight_decay", *cls.GROUP)}
        if isinstance(values["betas"], (tuple, list)):  # whose members a user may give as tensors
            values["betas"] = tuple(float(beta) for beta in values["betas"])
        lr = group["lr"]
        return cls(lr=lr.item() if isinstance(lr, torch.Tensor) else lr, **values)

    def group(self) -> dict[str, Any]:
        """The values that a parameter group of matrices carries."""
        return {key: getattr(self, key) for key in self.GROUP}

    def of_section(self, index: int) -> MethodConfig:
        """What this configuration is for one section of a fused weight; most methods make no difference."""
        return self

    def matrix_rule(self) -> MatrixRule | None:
        """The rule for matrices, or None when they are stepped like everything else."""
        return None

    @property
    def projects(self) -> bool:
        """True when matrices are stepped in fewer directions than they have."""
        return False

    def element_rule(self) -> ElementwiseAdamW:
        """The rule for everything else."""
        return self.adamw()

    def adamw(self, **how: Any) -> ElementwiseAdamW:
        """The elementwise AdamW of these betas, eps, bits and 16-bit weights; `how` are its other fields."""
        half = HalfWeights(self.half_weights)
        return ElementwiseAdamW(betas=self.betas, eps=self.eps, bits=self.state_bits, half=half, **how)

    def adam(self, **how: Any) -> Adam:
        """The inner Adam of these betas, eps and bits; `how` are its other fields."""
        return Adam(betas=self.betas, eps=self.eps, bits=self.state_bits, **how)


@dataclass(frozen=True, kw_only=True)
class MatrixConfig(MethodConfig):
    """Fields of every method with a rule of its own for matrices.

    Defaults, where a method does not say otherwise, are ours: scale=1.0, targets=['all-linear'] and exclude=[].
    """

    scale: float = field(default=1.0, metadata={"help": "multiplies the learning rate of the matrices it steps"})
    targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={
            "help": "its matrices: presets (all-linear, attention, mlp) or regular expressions on parameter names"
        },
    )
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "regular expressions on parameter names that AdamW steps instead"}
    )

    GROUP: ClassVar[tuple[str, ...]] = (*MethodConfig.GROUP, "scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        number("scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class RankedConfig(MatrixConfig):
    """Fields of every method that keeps fewer directions than a matrix has.

    Defaults, where a method does not say otherwise: rank=0.25 is what the GaLore paper's 60M, 350M and 1B models have;
    ours are projection_dtype=float32, rank_allocation=uniform and rank_allocation_every=None.
    """

    rank: int | float | None = field(
        default=0.25,
        metadata={"help": "directions kept: a count, or a fraction of the matrix's short side (0.25, 1.0)"},
    )
    projection_dtype: str = field(
        default="float32",
        metadata={
            "help": "precision of the projections' matrix products, and of bases that are kept: float32, or bfloat16, "
            "often several times faster"
        },
    )

    rank_allocation: str = field(
        default="uniform",
        metadata={
            "help": "how the cost of `rank` is shared out: uniform (all alike), or by the spectra of weight or "
            "gradient (the first step's)"
        },
    )
    rank_allocation_every: int | None = field(
        default=None, metadata={"help": "steps between two allocations; null: the first one stays"}
    )

    GROUP: ClassVar[tuple[str, ...]] = (*MatrixConfig.GROUP, "rank", "projection_dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
            part = isinstance(self.rank, float) and (
                0.0 < self.rank <= 1.0 or (self.rank >= 1.0 and self.rank.is_integer())
            )
            if not (whole or part):
                raise ValueError(
                    f"rank must be at least 1 (directions) or a fraction of the short side in (0, 1], got {self.rank!r}"
                )
        choice("projection_dtype", self.projection_dtype, ("float32", "bfloat16"))
        choice("rank_allocation", self.rank_allocation, ALLOCATIONS)
        if self.rank_allocation_every is not None:
            whole_steps("rank_allocation_every", self.rank_allocation_every)
        if self.rank_allocation == "uniform":
            if self.rank_allocation_every is not None:
                raise ValueError(
                    f"rank_allocation_every={self.rank_allocation_every} has nothing to allocate with "
                    "rank_allocation='uniform': set that to gradient or weight, or leave this out"
                )
        elif self.rank in (None, 1):
            # no directions, the one that every matrix must have, or (1.0) all of them
            raise ValueError(
                f"rank_allocation={self.rank_allocation!r} has nothing to share out with rank={self.rank!r}: set "
                "another rank, or rank_allocation='uniform'"
            )

    @property
    def projects(self) -> bool:
        return self.rank is not None and not isinstance(self.matrix_rule(), Whole)

    @property
    def dtype(self) -> torch.dtype:
        """`projection_dtype` as torch's."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.projection_dtype]


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(RankedConfig):
    """Fields of every method whose subspace is renewed now and then.

    Defaults, where a method does not say otherwise: update_proj_gap=200 is the GaLore paper's, and that all matrices
    renew at once (stagger=False) in a fixed gap (lazy_overlap=None); none is ours.
    """

    update_proj_gap: int = field(default=200, metadata={"help": "steps between two renewals of the subspace"})
    stagger: bool = field(
        default=False,
        metadata={"help": "spread the renewals of the matrices over the gap, so that no step does all of them"},
    )
    lazy_overlap: float | None = field(
        default=None,
        metadata={
            "help": "overlap of old and new subspace (1: the same) from which a matrix doubles its gap; null: gaps stay"
        },
    )

    GROUP: ClassVar[tuple[str, ...]] = (*RankedConfig.GROUP, "update_proj_gap", "stagger", "lazy_overlap")

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_steps("update_proj_gap", self.update_proj_gap)
        if not isinstance(self.stagger, bool):
            raise ValueError(f"stagger must be true or false, got {self.stagger!r}")
        if self.lazy_overlap is not None:
            number("lazy_overlap", self.lazy_overlap, high=1.0, open_low=True)

    @property
    def renewals(self) -> Renewals:
        """When a matrix's subspace is renewed."""
        return Renewals(stagger=self.stagger, lazy=self.lazy_overlap)
