"""A tiny trained model in a folder, and fine-tuning runs of a second that go on from it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from tiny_pretrain import write_corpus

from thinrank.optim import AdamWConfig, MethodConfig
from thinrank.optim.layers import ReparamConfig
from thinrank.trainers.adapters import AdapterConfig
from thinrank.trainers.data import FilesConfig
from thinrank.trainers.data.tokenizer import load_tokenizer
from thinrank.trainers.export import export
from thinrank.trainers.finetune import FinetuneConfig, ModelFolderConfig
from thinrank.trainers.models import ModelConfig, build_model
from thinrank.trainers.pretrain import TrainerConfig
from thinrank.trainers.run import RunConfig

VOCAB = 257
IDS = torch.arange(12)[None] * 7 % VOCAB


def write_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **model: Any) -> Path:
    """A model of a few thousand weights with a tokenizer of bytes."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    extra = {"attention_dropout": 0.1}  # so that the random state matters
    config = ModelConfig(**cast("dict[str, Any]", {**sizes, "extra": extra, **model}))
    built = cast("Any", build_model(config, VOCAB, seed=seed)).to(dtype)
    tokenizer = load_tokenizer(cast("Any", SimpleNamespace(tokenizer="bytes")), cast("Any", None), cast("Any", None))
    return export(built, tokenizer, folder)


def write_all(base: Path) -> Path:
    """A corpus and a model in `base`."""
    (base / "corpus").mkdir()
    write_corpus(base / "corpus")
    write_model(base / "model")
    return base


def config(
    base: Path,
    name: str,
    *,
    optimizer: MethodConfig | None = None,
    adapter: AdapterConfig | None = None,
    model: dict[str, Any] | None = None,
    reparam: ReparamConfig | None = None,
    **trainer: Any,
) -> FinetuneConfig:
    """A run in `base/name` on `base/model` and `base/corpus`; further arguments are the trainer's."""
    folder = ModelFolderConfig(**{"path": str(base / "model"), **(model or {})})
    return FinetuneConfig(
        run=RunConfig(name=name, dir=str(base / name)),
        model=folder,
        adapter=adapter if adapter is not None else AdapterConfig(),
        reparam=reparam if reparam is not None else ReparamConfig(),
        data=FilesConfig(
            train=[str(base / "corpus" / "*.txt")],
            validation_fraction=0.3,
            tokenizer=folder.path,
            sequence_length=16,
            validation_tokens=256,
            final_validation_tokens=512,
            cache_dir=str(base / "cache"),
        ),
        optimizer=optimizer if optimizer is not None else AdamWConfig(lr=0.01),
        trainer=TrainerConfig(
            **{
                "max_steps": 3,
                "batch_size": 4,
                "precision": "32-true",
                "accelerator": "cpu",
                "validate_every": 2,
                "checkpoint_every": 2,
                "log_every": 1,
                "sample_tokens": 2,
                "tensorboard": False,
                **trainer,
            }
        ),
    )
