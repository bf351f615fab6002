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
    ApolloConfig,
    ApolloMiniConfig,
    DCTAdamWConfig,
    FiraConfig,
    GaLoreConfig,
    LowRankConfig,
    MatrixConfig,
    MethodConfig,
    SubspaceAdamWConfig,
)
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.optimizers import OPTIMIZERS, AdamW, Apollo, ApolloMini, DCTAdamW, Fira, GaLore, SubspaceAdamW

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "AdamW",
    "AdamWConfig",
    "Apollo",
    "ApolloConfig",
    "ApolloMini",
    "ApolloMiniConfig",
    "Axis",
    "DCTAdamW",
    "DCTAdamWConfig",
    "Fira",
    "FiraConfig",
    "GaLore",
    "GaLoreConfig",
    "LowRankConfig",
    "MatrixConfig",
    "MatrixOptimizer",
    "MatrixView",
    "MethodConfig",
    "Role",
    "Routing",
    "SubspaceAdamW",
    "SubspaceAdamWConfig",
    "build",
    "matrix_views",
    "roles",
    "route",
]
