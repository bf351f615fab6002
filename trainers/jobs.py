"""What the kinds of runs do differently: where the model comes from, what a resume must find again, what is exported.

Everything else is one and the same run (`thinrank.trainers.assembly`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from thinrank import optim
from thinrank.optim.layers import Conversion, layers
from thinrank.optim.scaling import Scaling, scale_init
from thinrank.trainers.adapters import LoraConfig, add_adapter, merge_adapter, save_adapter
from thinrank.trainers.data.cache import file_digest, fingerprint
from thinrank.trainers.errors import UserError
from thinrank.trainers.export import export, replacing_folder
from thinrank.trainers.finetune import FinetuneConfig
from thinrank.trainers.models import build_model, load_model, model_folder
from thinrank.trainers.pretrain import PretrainConfig, TrainingConfig
from thinrank.trainers.reparam import converted, export_merged, on_meta
from thinrank.trainers.run import RunFolder
from thinrank.trainers.scaling import scaling_for, with_forward


class Job:
    """One kind of run, for one configuration."""

    measures_start = False
    """Whether the held-out text is measured before the first step."""
    conversion: Conversion | None = None
    """What was converted in the model that was built last."""
    _shapes: Any = None
    """That model without its values: some layers' shapes come from the values that were there."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config: Any = config
        self._scaling: Scaling | None = None

    @property
    def begins_anew(self) -> bool:
        """Whether the first weights are drawn, and so a rule of scale's to multiply."""
        return False

    @property
    def keeps_frozen(self) -> bool:
        """Whether checkpoints hold the weights that are not trained."""
        return True

    def check(self) -> None:
        """Refuses what can be seen to be wrong before any work is done.

        Raises:
            UserError: a circumstance that the user can change.
        """

    def build(self, vocab_size: int, *, meta: bool = False) -> Any:
        """The model to train, on the CPU or, for planning, on the meta device; what is frozen needs no gradient."""
        if meta and self._shapes is not None:
            return copy.deepcopy(self._shapes)
        model = self.dense(vocab_size, meta=meta)
        if self.config.scaling.active and self.begins_anew and not meta:
            scale_init(model, scaling_for(self.config.scaling, model.config, self.sized, some=True))
        self.conversion = converted(model, self.config.reparam, seed=self.config.trainer.seed)
        if self.conversion is not None and not meta:
            self._shapes = on_meta(model)
        return model

    def dense(self, vocab_size: int, *, meta: bool = False) -> Any:
        """The same before any layer is converted."""
        raise NotImplementedError

    def sized(self, hf: Any) -> Any:
        """On the meta device, the dense model of another configuration of `transformers`."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(hf), attn_implementation="eager", dtype=torch.float32)

    def scaling(self, model: Any) -> Scaling | None:
        """What the rule of scale makes of the model that `build` gave; None where there is no rule.

        Raises:
            UserError: as `scaling_for`.
        """

        def make(hf: Any) -> Any:
            found = self.sized(hf)
            converted(found, self.config.reparam, seed=self.config.trainer.seed)
            return found

        if self.config.scaling.active and self._scaling is None:
            self._scaling = scaling_for(self.config.scaling, model.config, make)
        return self._scaling

    def callbacks(self) -> list[pl.Callback]:
        """What the Trainer is given beside its own."""
        return []

    def route(self, model: Any, ranks: Mapping[str, int | float | None] | None = None) -> optim.Routing:
        """Which rule steps which parameter, with the ranks that an optimizer has come to (`MatrixOptimizer.ranks`).

        Raises:
            UserError: the optimizer's patterns do not fit the model.
        """
        scaling = self.scaling(model)
        try:
            return optim.route(model, self.config.optimizer, ranks=ranks, scaling=scaling)
        except ValueError as error:
            raise UserError(f"optimizer.{error}") from error

    def adamw_bytes(self, model: Any) -> int:
        """Optimizer state that AdamW on all weights of the dense model would have."""
        if self.conversion is not None:
            model = self.dense(model.config.vocab_size, meta=True)
        return optim.route(model, optim.AdamWConfig()).state_bytes()

    def origin(self) -> dict[str, str]:
        """What the run starts from, for its report, and for its checkpoints, which belong to it."""
        return {}

    def export(self, model: Any, tokenizer: Any, folder: RunFolder) -> dict[str, str]:
        """Writes the trained model; returns the names of what was written, below the run folder."""
        (export_merged if layers(model) else export)(model, tokenizer, folder.export)
        return {"export": "export"}


class Pretraining(Job):
    """A model from scratch (or from ``model.pretrained``)."""

    config: PretrainConfig

    @property
    def begins_anew(self) -> bool:
        return self.config.model.pretrained is None

    def dense(self, vocab_size: int, *, meta: bool = False) -> Any:
        model = with_forward(self.config.model, self.config.scaling)
        return build_model(model, vocab_size, seed=self.config.trainer.seed, meta=meta)


class Finetuning(Job):
    """A trained model from a folder, whole or with an adapter."""

    config: FinetuneConfig
    measures_start = True

    @property
    def keeps_frozen(self) -> bool:
        adapter = self.config.adapter
        moved = isinstance(adapter, LoraConfig) and adapter.changes_base
        # else they are in the folder, and `origin` says whether it is the same
        return self.conversion is not None or moved

    def check(self) -> None:
        path = self.config.model.path
        folder = model_folder(path, "model.path")
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise UserError(
                f"model.path {path} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): save the model's own "
                "there with tokenizer.save_pretrained"
            )

    def dense(self, vocab_size: int, *, meta: bool = False) -> Any:
        model = self._base(vocab_size, meta=meta)
        longest, length = getattr(model.config, "max_position_embeddings", None), self.config.data.sequence_length
        if longest is not None and length > longest:
            raise UserError(
                f"data.sequence_length must be at most the {longest} tokens that the model in "
                f"{self.config.model.path} takes, got {length}: lower it"
            )
        return add_adapter(model, self.config.adapter, seed=self.config.trainer.seed)

    def _base(self, vocab_size: int, *, meta: bool) -> Any:
        choice = self.config.model
        return load_model(
            choice.path, vocab_size, key="model.path", attention=choice.attention, dtype=choice.dtype, meta=meta
        )

    def sized(self, hf: Any) -> Any:
        return add_adapter(super().sized(hf), self.config.adapter, seed=self.config.trainer.seed)

    def adamw_bytes(self, model: Any) -> int:
        return super().adamw_bytes(self._base(1, meta=True))

    def origin(self) -> dict[str, str]:
        folder = model_folder(self.config.model.path, "model.path")
        files = sorted(path for path in folder.iterdir() if path.name == "config.json" or path.suffix in _WEIGHTS)
        return {"model": fingerprint([[path.name, file_digest(path)] for path in files])}

    def export(self, model: Any, tokenizer: Any, folder: RunFolder) -> dict[str, str]:
        if not isinstance(self.config.adapter, LoraConfig):
            return super().export(model, tokenizer, folder)
        with replacing_folder(folder.adapter, "adapter_config.json") as temporary:
            save_adapter(model, temporary, lambda: self._base(1, meta=False))
        return {"adapter": "adapter", **super().export(merge_adapter(model), tokenizer, folder)}


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_WEIGHTS = (".safetensors", ".bin")


def resumable(checkpoint: Path, origin: dict[str, str]) -> None:
    """Refuses a checkpoint of a run that started from something else.

    Raises:
        UserError: with what differs.
    """
    from thinrank.trainers import checkpoint as ckpt

    before = ckpt.load(checkpoint, mmap=True).get("thinrank", {}).get("origin", {})
    for what, digest in origin.items():
        if before.get(what) != digest:
            raise UserError(
                f"{checkpoint} was made from another {what} (digest {str(before.get(what))[:12]}, now {digest[:12]}): "
                f"restore the one in {what}.path, or set another run.dir for a new run"
            )
