"""One room for each method: its configuration, its five choices, and where they come from."""

from __future__ import annotations

from thinrank.optim.methods.adamw import AdamWConfig
from thinrank.optim.methods.auon import AuONConfig
from thinrank.optim.methods.config import LowRankConfig, MatrixConfig, MethodConfig
from thinrank.optim.methods.dct_adamw import DCTAdamWConfig
from thinrank.optim.methods.galore import GaLoreConfig
from thinrank.optim.methods.muon import MuonConfig
from thinrank.optim.methods.subspace_adamw import SubspaceAdamWConfig

METHODS: dict[str, type[MethodConfig]] = {
    "adamw": AdamWConfig,
    "galore": GaLoreConfig,
    "dct_adamw": DCTAdamWConfig,
    "subspace_adamw": SubspaceAdamWConfig,
    "muon": MuonConfig,
    "auon": AuONConfig,
}
"""Every method by the name a configuration file uses; the tests' battery runs over it."""

__all__ = [
    "METHODS",
    "AdamWConfig",
    "AuONConfig",
    "DCTAdamWConfig",
    "GaLoreConfig",
    "LowRankConfig",
    "MatrixConfig",
    "MethodConfig",
    "MuonConfig",
    "SubspaceAdamWConfig",
]
