"""Text as batches of tokens: sources, tokenizers, packing, a position to resume from, and a manifest.

Names are imported when they are used first: whoever reads a configuration does not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinrank.trainers.data.batches import Batch, EvalBatch, EvalBatches, Layout, TrainBatches
    from thinrank.trainers.data.config import DataConfig, FilesConfig, HeadersConfig, HuggingFaceConfig, PySourceConfig
    from thinrank.trainers.data.textdata import TextData, open_source

__all__ = [
    "Batch",
    "DataConfig",
    "EvalBatch",
    "EvalBatches",
    "FilesConfig",
    "HeadersConfig",
    "HuggingFaceConfig",
    "Layout",
    "PySourceConfig",
    "TextData",
    "TrainBatches",
    "open_source",
]

_HOMES = {
    "batches": ("Batch", "EvalBatch", "EvalBatches", "Layout", "TrainBatches"),
    "config": ("DataConfig", "FilesConfig", "HeadersConfig", "HuggingFaceConfig", "PySourceConfig"),
    "textdata": ("TextData", "open_source"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
