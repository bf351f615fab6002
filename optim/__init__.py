"""Optimizers whose state and messages are low-rank. Imports torch alone."""

if __name__ != "thinrank.optim":
    raise ImportError("write `import thinrank.optim`, not `import optim`: a second copy of every class would be made")

from thinrank.optim.axis import Axis
from thinrank.optim.build import build, route
from thinrank.optim.grouping import Role, Routing, roles
from thinrank.optim.heads import HeadLayout, attention_layouts
from thinrank.optim.matrix import MatrixView, matrix_views
from thinrank.optim.methods import (
    METHODS,
    AdamWConfig,
    DCTAdamWConfig,
    GaLoreConfig,
    GaLorePlusConfig,
    LowRankConfig,
    MatrixConfig,
    MethodConfig,
    SubspaceAdamWConfig,
)
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.optimizers import OPTIMIZERS, AdamW, DCTAdamW, GaLore, GaLorePlus, SubspaceAdamW

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "AdamW",
    "AdamWConfig",
    "Axis",
    "DCTAdamW",
    "DCTAdamWConfig",
    "GaLore",
    "GaLoreConfig",
    "GaLorePlus",
    "GaLorePlusConfig",
    "HeadLayout",
    "LowRankConfig",
    "MatrixConfig",
    "MatrixOptimizer",
    "MatrixView",
    "MethodConfig",
    "Role",
    "Routing",
    "SubspaceAdamW",
    "SubspaceAdamWConfig",
    "attention_layouts",
    "build",
    "matrix_views",
    "roles",
    "route",
]
