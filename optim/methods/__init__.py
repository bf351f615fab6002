"""One room for each method: its configuration, its five choices, and where they come from."""

from __future__ import annotations

from thinrank.optim.methods.adamw import AdamWConfig
from thinrank.optim.methods.config import LowRankConfig, MatrixConfig, MethodConfig, RankedConfig
from thinrank.optim.methods.dct_adamw import DCTAdamWConfig
from thinrank.optim.methods.dion import DionConfig
from thinrank.optim.methods.dion2 import Dion2Config
from thinrank.optim.methods.galore import GaLoreConfig
from thinrank.optim.methods.subspace_adamw import SubspaceAdamWConfig
from thinrank.optim.methods.trion import TrionConfig

METHODS: dict[str, type[MethodConfig]] = {
    "adamw": AdamWConfig,
    "galore": GaLoreConfig,
    "dct_adamw": DCTAdamWConfig,
    "subspace_adamw": SubspaceAdamWConfig,
    "dion": DionConfig,
    "trion": TrionConfig,
    "dion2": Dion2Config,
}
"""Every method by the name a configuration file uses; the tests' battery runs over it."""

__all__ = [
    "METHODS",
    "AdamWConfig",
    "DCTAdamWConfig",
    "Dion2Config",
    "DionConfig",
    "GaLoreConfig",
    "LowRankConfig",
    "MatrixConfig",
    "MethodConfig",
    "RankedConfig",
    "SubspaceAdamWConfig",
    "TrionConfig",
]
