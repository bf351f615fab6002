"""What the configurations of methods that step matrices along their momentum have in common.

Named before `RankedConfig` where a method has both as bases: defaults are the first base's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from thinrank.optim.linalg.orthogonal import DTYPES, SETS, SHAPE_SCALES
from thinrank.optim.methods.config import MatrixConfig, choice, decay_rate


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(MatrixConfig):
    """Fields of every method whose matrices move along their momentum, and all else by AdamW.

    Defaults, where a method does not say otherwise: momentum=0.95 and betas=(0.9, 0.95) are those of Muon's author;
    ours are embedding_lr=0.003 (his: 3e-4) and state_bits=32.
    """

    embedding_lr: float | None = field(
        default=3e-3,
        # An entry of an orthonormal update of rank r is about sqrt(r/(m n)), one of AdamW's step about 1: the matrices'
        # rate would be far too much. This lies between the 3e-4 of Jordan's auxiliary Adam and the 5e-3 that was best
        # for AdamW in the default run.
        metadata={"help": "learning rate of embeddings and output head, which AdamW steps; null: as lr"},
    )
    betas: tuple[float, float] = field(
        default=(0.9, 0.95), metadata={"help": "decay rates of Adam's two moments, for all but matrices"}
    )
    state_bits: int = field(
        default=32,
        metadata={
            "help": "bits of each entry of the momentum (rows wider than one) and of Adam's moments (from 4096 entries "
            "on): 32, or 8"
        },
    )
    momentum: float = field(default=0.95, metadata={"help": "decay rate of the matrices' running mean"})

    GROUP: ClassVar[tuple[str, ...]] = (*MatrixConfig.GROUP, "momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        decay_rate("momentum", self.momentum)


@dataclass(frozen=True, kw_only=True)
class NewtonSchulzConfig(MomentumConfig):
    """Fields of every method that lets the precision of Newton-Schulz be chosen.

    Defaults: ns_dtype=auto is Muon's author's bfloat16 on a GPU; that it is float32 elsewhere is ours.
    """

    ns_dtype: str = field(
        default="auto",
        metadata={"help": "precision of Newton-Schulz: auto (bfloat16 on a GPU, else float32), float32, bfloat16"},
    )

    GROUP: ClassVar[tuple[str, ...]] = (*MomentumConfig.GROUP, "ns_dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("ns_dtype", self.ns_dtype, tuple(DTYPES))

    @property
    def products(self) -> torch.dtype | None:
        """`ns_dtype` as torch's; None: by the device."""
        return DTYPES[self.ns_dtype]


@dataclass(frozen=True, kw_only=True)
class OrthonormalConfig(MomentumConfig):
    """Fields of every method whose updates are orthonormal and scaled for the weight's shape.

    Defaults, where a method does not say otherwise: orthogonalizer=jordan and adjust_lr=original are those of Muon's
    author; none is ours.
    """

    orthogonalizer: str = field(
        default="jordan",
        metadata={"help": "coefficients of Newton-Schulz: jordan, you (closer to one), polar_express (small values)"},
    )
    adjust_lr: str = field(
        default="original", metadata={"help": "scale for the shape: original, spectral, match_rms_adamw, none"}
    )

    GROUP: ClassVar[tuple[str, ...]] = (*MomentumConfig.GROUP, "orthogonalizer", "adjust_lr")
    ORTHOGONALIZERS: ClassVar[tuple[str, ...]] = tuple(SETS)
    """What `orthogonalizer` may be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("orthogonalizer", self.orthogonalizer, self.ORTHOGONALIZERS)
        choice("adjust_lr", self.adjust_lr, SHAPE_SCALES)
