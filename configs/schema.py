"""What `launch/pretrain.py` configures: which dataclass stands behind each group and each name."""

from __future__ import annotations

from pathlib import Path

from thinrank.configs.compose import Schema
from thinrank.optim.methods import METHODS
from thinrank.trainers.data.config import FilesConfig, HuggingFaceConfig, PySourceConfig
from thinrank.trainers.models import ModelConfig
from thinrank.trainers.pretrain import PretrainConfig, StrategyConfig, TrainerConfig

FOLDER = Path(__file__).parent
"""Where the YAML files are."""

PRETRAIN = Schema(
    root=PretrainConfig,
    groups={
        "model": ModelConfig,
        "data": {"pysource": PySourceConfig, "files": FilesConfig, "hf": HuggingFaceConfig},
        "optimizer": METHODS,
        "strategy": {"auto": StrategyConfig, "ddp": StrategyConfig},
        "trainer": TrainerConfig,
    },
    folder=FOLDER,
    base="pretrain",
)
"""The configuration of a pre-training run."""
