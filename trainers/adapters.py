"""Adapters: a few trained numbers beside weights that stay as they are. LoRA comes from the `peft` library.

    LoRA (Hu et al. 2022, arXiv 2106.09685):   y = W x + (α / r) B A x ,  A (r × in) random, B (out × r) zero

`peft` is imported where an adapter is built and nowhere else: without one it need not be installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thinrank.trainers.errors import UserError
from thinrank.trainers.models import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """No adapter: every weight is trained."""

    name: str = field(default="none", metadata={"help": "what is trained: none (every weight), or lora"})


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA: two thin factors beside each chosen matrix are trained, and nothing else."""

    name: str = field(default="lora", metadata={"help": "what is trained: none (every weight), or lora"})
    rank: int = field(default=8, metadata={"help": "inner size of the factors"})
    alpha: float = field(default=16.0, metadata={"help": "the factors' product is added with the weight alpha / rank"})
    dropout: float = field(default=0.0, metadata={"help": "share of a factor pair's inputs set to zero in training"})
    targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={
            "help": "matrices that get factors: presets (all-linear, attention, mlp) or regular expressions on names"
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}: use 8 or 16 to begin with")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}: twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}: use 0 for none")
        if not isinstance(self.targets, (list, tuple)) or not self.targets:
            raise ValueError(
                f"targets must be a list of at least one, got {self.targets!r}: write targets=[all-linear]"
            )


def add_adapter(model: PreTrainedModel, config: AdapterConfig, *, seed: int) -> Any:
    """`model` with the adapter built in and all else frozen; the model itself where there is none.

    Args:
        model: a causal language model, on the meta device for planning.
        config: which adapter.
        seed: of the factors' initial values.

    Raises:
        UserError: a target that names nothing, or something that can have no factors; or `peft` is not installed.
    """
    if not isinstance(config, LoraConfig):
        return model
    peft = _peft()
    try:
        modules = lora_modules(model, config.targets)
    except ValueError as error:
        raise UserError(f"adapter.{error}") from error
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        fan_in_fan_out=all(type(model.get_submodule(name)).__name__ == "Conv1D" for name in modules),  # as in GPT-2
    )
    with seeded(seed), _tolerant():
        return peft.get_peft_model(model, settings)


def lora_modules(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Names of the linear layers whose weights `targets` choose, by the rules of `optimizer.targets`.

    Raises:
        ValueError: a target matches no matrix, or one that is no linear layer's weight.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from thinrank.optim import MatrixConfig
    from thinrank.optim.grouping import roles, targeted

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    chosen = targeted(list(shapes), roles(model), shapes, MatrixConfig(targets=list(targets)))
    modules = dict(model.named_modules())
    found = []
    for name in shapes:  # in the model's order
        if name not in chosen:
            continue
        module, _, last = name.rpartition(".")
        if last != "weight" or not isinstance(modules[module], (nn.Linear, Conv1D, nn.Embedding)):
            raise ValueError(f"targets: {name} is no linear layer's weight and can have no factors: leave it out")
        found.append(module)
    return found


def save_adapter(model: Any, folder: Any) -> None:
    """Writes the factors and their configuration in peft's layout, and proves that the factors load back equal.

    Raises:
        RuntimeError: they do not.
    """
    from pathlib import Path

    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    with _tolerant():
        model.save_pretrained(folder)
        mine = get_peft_model_state_dict(model)
    (Path(folder) / "README.md").unlink(missing_ok=True)  # a form of peft's for the user to fill in, all of it empty
    theirs = load_file(Path(folder) / "adapter_model.safetensors")
    if mine.keys() != theirs.keys() or not all(torch.equal(mine[key].cpu(), theirs[key]) for key in mine):
        raise RuntimeError("the saved adapter differs from the trained one: it did not load back equal")


def merge_adapter(model: Any) -> PreTrainedModel:
    """The plain model with each factor pair added into its weight; `model` is used up.

    Raises:
        RuntimeError: its logits on a fixed input are not those of `model` up to rounding.
    """
    import torch

    ids = torch.arange(16, device=next(model.parameters()).device)[None] % model.config.vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad(), _tolerant():
        before = model(input_ids=ids, use_cache=False).logits.float()
        merged = model.merge_and_unload()
        after = merged(input_ids=ids, use_cache=False).logits.float()
    merged.train(was_training)
    # Rounding W + BA to a weight moves it by at most eps / 2 of itself, and each layer adds its share; a wrong merge is
    # off by far more than this.
    allowed = min(1e3 * torch.finfo(merged.dtype).eps, 0.1) * float(before.abs().max())
    worst = float((before - after).abs().max())
    if not worst <= allowed:
        raise RuntimeError(f"the merged model differs from the trained one: its logits are off by up to {worst:.3g}")
    return merged


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"adapter=lora needs the peft library ({error}): pip install -e '.[finetune]', or use adapter=none"
        ) from error
    return peft


@contextmanager
def _tolerant() -> Iterator[None]:
    """peft 0.21 asks transformers 5 for a property under its old name; nothing of ours can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
