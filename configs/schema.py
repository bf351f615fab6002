"""What the launch scripts configure: which dataclass stands behind each group and each name."""

from __future__ import annotations

from pathlib import Path

from thinrank.configs.compose import Schema
from thinrank.optim.layers import REPARAMS
from thinrank.optim.layerwise import LAYERWISE
from thinrank.optim.methods import METHODS
from thinrank.optim.scaling import ScalingConfig
from thinrank.trainers.adapters import AdapterConfig, LoraConfig
from thinrank.trainers.cluster.config import KubernetesJob, SlurmJob, SubmitConfig, TorchrunJob
from thinrank.trainers.data.config import FilesConfig, HeadersConfig, HuggingFaceConfig, PySourceConfig
from thinrank.trainers.finetune import FinetuneConfig
from thinrank.trainers.guards import GuardConfig
from thinrank.trainers.models import ModelConfig
from thinrank.trainers.monitors import MonitorConfig
from thinrank.trainers.pretrain import PretrainConfig, TrainerConfig
from thinrank.trainers.strategies import (
    FSDP2Config,
    GossipConfig,
    OwnedConfig,
    ReplicatedConfig,
    StrategyConfig,
    ZeroConfig,
)

FOLDER = Path(__file__).parent
"""Where the YAML files are."""

DATA = {"pysource": PySourceConfig, "headers": HeadersConfig, "files": FilesConfig, "hf": HuggingFaceConfig}
STRATEGIES = {
    "auto": StrategyConfig,
    "ddp": StrategyConfig,
    "thinrank_ddp": ReplicatedConfig,
    "thinrank_owned": OwnedConfig,
    "thinrank_fsdp2": FSDP2Config,
    "thinrank_gossip": GossipConfig,
    "gossip": GossipConfig,
    "thinrank_zero1": ZeroConfig,
    "thinrank_zero2": ZeroConfig,
    "thinrank_zero3": ZeroConfig,
}

ALIASES = {"model.reparam": "reparam"}
"""Another place where a group may be written: layers are part of what a model is."""

PRETRAIN = Schema(
    root=PretrainConfig,
    groups={
        "model": ModelConfig,
        "data": DATA,
        "optimizer": METHODS,
        "strategy": STRATEGIES,
        "reparam": REPARAMS,
        "scaling": ScalingConfig,
        "trainer": TrainerConfig,
        "monitors": MonitorConfig,
        "layerwise": LAYERWISE,
        "guard": GuardConfig,
    },
    folder=FOLDER,
    base="pretrain",
    aliases=ALIASES,
)
"""The configuration of a pre-training run."""

SUBMIT = Schema(
    root=SubmitConfig,
    groups={**PRETRAIN.groups, "job": {"slurm": SlurmJob, "k8s": KubernetesJob, "torchrun": TorchrunJob}},
    folder=FOLDER,
    base="submit",
    aliases=ALIASES,
)
"""The same with the job that runs it on a cluster."""

FINETUNE = Schema(
    root=FinetuneConfig,
    groups={
        "data": DATA,
        "optimizer": METHODS,
        "adapter": {"none": AdapterConfig, "lora": LoraConfig},
        "strategy": STRATEGIES,
        "reparam": REPARAMS,
        "scaling": ScalingConfig,
        "trainer": TrainerConfig,
        "monitors": MonitorConfig,
        "layerwise": LAYERWISE,
        "guard": GuardConfig,
    },
    folder=FOLDER,
    own=FOLDER / "finetune",
    base="finetune",
    aliases=ALIASES,
)
"""The configuration of a fine-tuning run: other rates, other text, and the tokenizer of the model's folder."""
