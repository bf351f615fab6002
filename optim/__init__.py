"""Optimizers whose state and messages are low-rank. Imports torch alone."""

if __name__ != "thinrank.optim":
    raise ImportError("write `import thinrank.optim`, not `import optim`: a second copy of every class would be made")

import torch

from thinrank import versions

if versions.is_older("torch", torch.__version__):  # before the imports that would stumble over what it has not
    raise versions.UnsupportedVersion(versions.untested("torch", torch.__version__))

from thinrank.optim.axis import Axis
from thinrank.optim.build import build, route
from thinrank.optim.grouping import Role, Routing, roles
from thinrank.optim.heads import HeadLayout, attention_layouts
from thinrank.optim.matrix import MatrixView, matrix_views
from thinrank.optim.methods import (
    METHODS,
    AdamWConfig,
    ApolloConfig,
    ApolloMiniConfig,
    AuONConfig,
    DCTAdamWConfig,
    Dion2Config,
    DionConfig,
    FiraConfig,
    GaLoreConfig,
    GaLorePlusConfig,
    LDAdamConfig,
    LowRankConfig,
    MatrixConfig,
    MethodConfig,
    MFACConfig,
    MuonConfig,
    RankedConfig,
    SubspaceAdamWConfig,
    TrionConfig,
)
from thinrank.optim.optimizer import MatrixOptimizer
from thinrank.optim.optimizers import (
    MFAC,
    OPTIMIZERS,
    AdamW,
    Apollo,
    ApolloMini,
    AuON,
    DCTAdamW,
    Dion,
    Dion2,
    Fira,
    GaLore,
    GaLorePlus,
    LDAdam,
    Muon,
    SubspaceAdamW,
    Trion,
)
from thinrank.optim.owned import own
from thinrank.optim.ranks import allocated_ranks
from thinrank.optim.replicated import ReplicaDrift, replicate

__all__ = [
    "METHODS",
    "MFAC",
    "OPTIMIZERS",
    "AdamW",
    "AdamWConfig",
    "Apollo",
    "ApolloConfig",
    "ApolloMini",
    "ApolloMiniConfig",
    "AuON",
    "AuONConfig",
    "Axis",
    "DCTAdamW",
    "DCTAdamWConfig",
    "Dion",
    "Dion2",
    "Dion2Config",
    "DionConfig",
    "Fira",
    "FiraConfig",
    "GaLore",
    "GaLoreConfig",
    "GaLorePlus",
    "GaLorePlusConfig",
    "HeadLayout",
    "LDAdam",
    "LDAdamConfig",
    "LowRankConfig",
    "MFACConfig",
    "MatrixConfig",
    "MatrixOptimizer",
    "MatrixView",
    "MethodConfig",
    "Muon",
    "MuonConfig",
    "RankedConfig",
    "ReplicaDrift",
    "Role",
    "Routing",
    "SubspaceAdamW",
    "SubspaceAdamWConfig",
    "Trion",
    "TrionConfig",
    "allocated_ranks",
    "attention_layouts",
    "build",
    "matrix_views",
    "own",
    "replicate",
    "roles",
    "route",
]
