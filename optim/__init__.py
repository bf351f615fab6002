"""Optimizers whose state and messages are low-rank. Imports torch alone."""

if __name__ != "thinrank.optim":
    raise ImportError("write `import thinrank.optim`, not `import optim`: a second copy of every class would be made")

from thinrank.optim.axis import Axis
from thinrank.optim.build import build, route
from thinrank.optim.grouping import Role, Routing, roles
from thinrank.optim.matrix import MatrixView, matrix_views
from thinrank.optim.methods import (
    METHODS,
    AdamWConfig,
    DCTAdamWConfig,
    Dion2Config,
    DionConfig,
    GaLoreConfig,
    LowRankConfig,
    MatrixConfig,
    MethodConfig,
    RankedConfig,
    SubspaceAdamWConfig,
    TrionConfig,
)
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.optimizers import OPTIMIZERS, AdamW, DCTAdamW, Dion, Dion2, GaLore, SubspaceAdamW, Trion

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "AdamW",
    "AdamWConfig",
    "Axis",
    "DCTAdamW",
    "DCTAdamWConfig",
    "Dion",
    "Dion2",
    "Dion2Config",
    "DionConfig",
    "GaLore",
    "GaLoreConfig",
    "LowRankConfig",
    "MatrixConfig",
    "MatrixOptimizer",
    "MatrixView",
    "MethodConfig",
    "RankedConfig",
    "Role",
    "Routing",
    "SubspaceAdamW",
    "SubspaceAdamWConfig",
    "Trion",
    "TrionConfig",
    "build",
    "matrix_views",
    "roles",
    "route",
]
