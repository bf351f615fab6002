"""Fine-tuning: a trained model from a folder goes on learning, whole or by an adapter.

`finetune` does it with the machinery of `thinrank.trainers.pretrain`. The dataclasses here import neither Lightning nor
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from thinrank.optim import AdamWConfig, MethodConfig
from thinrank.trainers.adapters import AdapterConfig, LoraConfig
from thinrank.trainers.data.config import DataConfig, HeadersConfig
from thinrank.trainers.pretrain import TrainingConfig
from thinrank.trainers.run import RunConfig
from thinrank.trainers.versions import require_lightning

_DTYPES = ("float32", "stored")
_ATTENTION = ("sdpa", "eager", "flash_attention_2")
_EXPORT = "runs/pretrain/export"


@dataclass(frozen=True, kw_only=True)
class ModelFolderConfig:
    """A trained model and its tokenizer, in the Hugging Face layout."""

    path: str = field(default=_EXPORT, metadata={"help": "the folder that save_pretrained, or a run's export, wrote"})
    dtype: str = field(
        default="float32", metadata={"help": "precision of the weights: float32, or stored (as they are in the folder)"}
    )
    attention: str = field(default="sdpa", metadata={"help": "attention kernel: sdpa, eager or flash_attention_2"})

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(f"path must name a folder, got '': leave it out for {_EXPORT}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}: choose one of them")
        if self.attention not in _ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(_ATTENTION)}, got {self.attention!r}: choose one")

    @property
    def name(self) -> str:
        """What the model is called in a report."""
        return self.path


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Everything that a fine-tuning run can be told."""

    run: RunConfig = field(
        default_factory=lambda: RunConfig(name="finetune", dir="runs/finetune"),
        metadata={"help": "the run folder and how to resume"},
    )
    model: ModelFolderConfig = field(
        default_factory=ModelFolderConfig, metadata={"help": "the model to go on from; its tokenizer is used too"}
    )
    data: DataConfig = field(default_factory=lambda: HeadersConfig(tokenizer=_EXPORT), metadata={"help": "the text"})
    optimizer: MethodConfig = field(default_factory=AdamWConfig, metadata={"help": "the method"})
    adapter: AdapterConfig = field(default_factory=AdapterConfig, metadata={"help": "what is trained"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.tokenizer != self.model.path:
            raise ValueError(
                f"data.tokenizer must be the model's own, {self.model.path}, got {self.data.tokenizer!r}: "
                "set it to the value of model.path"
            )
        if self.adapter.name != "none" and self.reparam.name != "none":
            raise ValueError(
                f"adapter={self.adapter.name} and reparam={self.reparam.name} would both take hold of the same "
                "weights: leave one of them at none"
            )
        if isinstance(self.adapter, LoraConfig) and self.optimizer.projects:
            raise ValueError(
                f"optimizer={self.optimizer.name} would project gradients of LoRA's factors, which have rank "
                f"{self.adapter.rank} already: use optimizer=adamw, or adapter=none"
            )


def finetune(config: FinetuneConfig, *, resolved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Trains the model of a folder further as `config` says, in this process or in all those that torchrun started.

    As `thinrank.trainers.pretrain.pretrain`, and further: the held-out text is measured before the first step too
    (``before/…`` in the report's metrics), and an adapter is exported both by itself and merged into the model.

    Args:
        config: what to do.
        resolved: the same as plain values, for ``config.yaml``; by default made from `config`.

    Returns:
        The report, on every rank.

    Raises:
        UserError: something that the user can change; nothing was begun, or the last checkpoint stands.
        GuardStop: a guard has stopped training.
    """
    require_lightning()  # before the imports that would stumble over another
    from thinrank.trainers.assembly import run
    from thinrank.trainers.jobs import Finetuning

    # cast: to a checker this file is also trainers/finetune.py, with a FinetuneConfig of its own
    return run(Finetuning(cast(Any, config)), resolved)
