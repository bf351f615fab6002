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
    AuONConfig,
    DCTAdamWConfig,
    GaLoreConfig,
    LowRankConfig,
    MatrixConfig,
    MethodConfig,
    MuonConfig,
    SubspaceAdamWConfig,
)
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.optimizers import OPTIMIZERS, AdamW, AuON, DCTAdamW, GaLore, Muon, SubspaceAdamW

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "AdamW",
    "AdamWConfig",
    "AuON",
    "AuONConfig",
    "Axis",
    "DCTAdamW",
    "DCTAdamWConfig",
    "GaLore",
    "GaLoreConfig",
    "LowRankConfig",
    "MatrixConfig",
    "MatrixOptimizer",
    "MatrixView",
    "MethodConfig",
    "Muon",
    "MuonConfig",
    "Role",
    "Routing",
    "SubspaceAdamW",
    "SubspaceAdamWConfig",
    "build",
    "matrix_views",
    "roles",
    "route",
]
