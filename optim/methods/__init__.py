"""One room for each method: its configuration, its five choices, and where they come from."""

from __future__ import annotations

from thinrank.optim.methods.adamw import AdamWConfig
from thinrank.optim.methods.apollo import ApolloConfig, ApolloMiniConfig
from thinrank.optim.methods.auon import AuONConfig
from thinrank.optim.methods.config import LowRankConfig, MatrixConfig, MethodConfig, RankedConfig
from thinrank.optim.methods.dct_adamw import DCTAdamWConfig
from thinrank.optim.methods.dion import DionConfig
from thinrank.optim.methods.dion2 import Dion2Config
from thinrank.optim.methods.fira import FiraConfig
from thinrank.optim.methods.galore import GaLoreConfig
from thinrank.optim.methods.galore_plus import GaLorePlusConfig
from thinrank.optim.methods.ldadam import LDAdamConfig
from thinrank.optim.methods.mfac import MFACConfig
from thinrank.optim.methods.muon import MuonConfig
from thinrank.optim.methods.subspace_adamw import SubspaceAdamWConfig
from thinrank.optim.methods.trion import TrionConfig

METHODS: dict[str, type[MethodConfig]] = {
    "adamw": AdamWConfig,
    "galore": GaLoreConfig,
    "dct_adamw": DCTAdamWConfig,
    "ldadam": LDAdamConfig,
    "mfac": MFACConfig,
    "subspace_adamw": SubspaceAdamWConfig,
    "fira": FiraConfig,
    "apollo": ApolloConfig,
    "apollo_mini": ApolloMiniConfig,
    "galore_plus": GaLorePlusConfig,
    "muon": MuonConfig,
    "auon": AuONConfig,
    "dion": DionConfig,
    "trion": TrionConfig,
    "dion2": Dion2Config,
}
"""Every method by the name a configuration file uses; the tests' battery runs over it."""

__all__ = [
    "METHODS",
    "AdamWConfig",
    "ApolloConfig",
    "ApolloMiniConfig",
    "AuONConfig",
    "DCTAdamWConfig",
    "Dion2Config",
    "DionConfig",
    "FiraConfig",
    "GaLoreConfig",
    "GaLorePlusConfig",
    "LDAdamConfig",
    "LowRankConfig",
    "MFACConfig",
    "MatrixConfig",
    "MethodConfig",
    "MuonConfig",
    "RankedConfig",
    "SubspaceAdamWConfig",
    "TrionConfig",
]
