"""Adapters: a few trained numbers beside weights that stay as they are. LoRA comes from the `peft` library.

    LoRA (Hu et al. 2022, arXiv 2106.09685):    y = W x + (α / r) B A x ,  A (r × in) random, B (out × r) zero
    PiSSA (Meng et al. 2024, arXiv 2404.02948): y = R x + (α / r) B A x ,  (α / r) B₀ A₀ = U_r diag(s_r) V_rᵀ of W

PiSSA trains the leading singular triples of W, and leaves R = W − (α / r) B₀ A₀ as it is. So that its adapter can be
put beside W itself, what is saved is the difference, (α / r) (B A − B₀ A₀), as factors of twice the rank.

`peft` is imported where an adapter is built and nowhere else: without one it need not be installed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinrank.trainers.errors import UserError
from thinrank.trainers.models import seeded

if TYPE_CHECKING:
    from torch import Tensor, dtype
    from transformers import PreTrainedModel

_FACTORS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """No adapter: every weight is trained."""

    name: str = field(default="none", metadata={"help": "what is trained: none (every weight), or lora"})


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA: two thin factors beside each chosen matrix are trained, and nothing else.

    Defaults: peft's is rank=8; ours are alpha=16.0, dropout=0.0, targets=[all-linear] and init=lora.
    """

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
    init: str = field(
        default="lora",
        metadata={
            "help": "first factors: lora (no change), pissa (singular triples, taken out of the weights), "
            "pissa_niter_4, … (by randomised SVD)"
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
        if not re.fullmatch(r"lora|pissa(_niter_[1-9]\d*)?", str(self.init)):
            raise ValueError(f"init must be lora, pissa, or pissa_niter_4 and the like, got {self.init!r}: choose one")
        if self.changes_base and self.dropout:
            raise ValueError(
                f"dropout must be 0 with init={self.init}, got {self.dropout}: it would drop what was taken out of the "
                "weights themselves"
            )

    @property
    def changes_base(self) -> bool:
        """Whether something of the weights is moved into the factors."""
        return self.init != "lora"


def add_adapter(model: PreTrainedModel, config: AdapterConfig, *, seed: int) -> Any:
    """`model` with the adapter built in and all else frozen; the model itself where there is none.

    Args:
        model: a causal language model, on the meta device for planning.
        config: which adapter.
        seed: of the factors' initial values.

    Raises:
        UserError: a target that names nothing, or something that can have no factors; with PiSSA, one whose weight
            has fewer sides than the rank, is not finite, or is not its own; or `peft` is not installed.
    """
    if not isinstance(config, LoraConfig):
        return model
    peft = _peft()
    try:
        modules = lora_modules(model, config.targets)
        if config.changes_base:
            _check_weights(model, modules, config)
    except ValueError as error:
        raise UserError(f"adapter.{error}") from error
    moved = config.changes_base and model.device.type != "meta"  # where there are shapes alone, nothing can be moved
    settings = peft.LoraConfig(
        init_lora_weights=config.init if moved else True,
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        fan_in_fan_out=all(type(model.get_submodule(name)).__name__ == "Conv1D" for name in modules),  # as in GPT-2
    )
    with seeded(seed), _tolerant():
        adapted: Any = peft.get_peft_model(model, settings)
    if moved:
        factors = peft.get_peft_model_state_dict(adapted)
        adapted.first_factors = {name: value.detach().clone() for name, value in factors.items()}
    return adapted


def _check_weights(model: PreTrainedModel, modules: list[str], config: LoraConfig) -> None:
    """Refuses weights of which nothing can be taken.

    Raises:
        ValueError: with the name and the remedy.
    """
    import torch
    from torch import nn

    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in modules:
        module: Any = model.get_submodule(name)
        shared = owners[id(module.weight)]
        if isinstance(module, nn.Embedding) or len(shared) > 1:
            raise ValueError(
                f"targets: init={config.init} takes something out of {shared[0]}, which is an embedding's or shared: "
                "leave it out, or use init=lora"
            )
        if config.rank > min(module.weight.shape):
            raise ValueError(
                f"rank: {config.rank} is above the shorter side of {name}.weight, {tuple(module.weight.shape)}, and "
                f"init={config.init} needs as many singular values: lower it"
            )
        if not module.weight.is_meta and not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"targets: {name}.weight has entries that are not finite: mend or leave out that weight")


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


def save_adapter(model: Any, folder: Any, base: Callable[[], PreTrainedModel] | None = None) -> None:
    """Writes the factors and their configuration in peft's layout, and proves that the factors load back equal.

    PiSSA's are written as plain LoRA for the weights that there were, of twice the rank and alpha.

    Args:
        model: with an adapter, as `add_adapter` or a checkpoint loaded into that has left it.
        folder: where to.
        base: gives the model without an adapter, to prove that the written one fits it; for PiSSA alone.

    Raises:
        RuntimeError: they do not, or with `base` the adapter gives other logits there than `model`.
    """
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    first: dict[str, torch.Tensor] = getattr(model, "first_factors", {})
    target = Path(folder)
    with _tolerant():
        model.save_pretrained(target)
        mine = get_peft_model_state_dict(model)
    if first:
        mine = {name: _difference(name, value.detach(), first[name]) for name, value in mine.items()}
        save_file({name: value.contiguous() for name, value in mine.items()}, target / _FACTORS, {"format": "pt"})
        settings: Any = PeftLoraConfig.from_pretrained(str(target))
        settings.r, settings.lora_alpha, settings.init_lora_weights = 2 * settings.r, 2 * settings.lora_alpha, True
        settings.save_pretrained(str(target))
    (target / "README.md").unlink(missing_ok=True)  # a form of peft's for the user to fill in, all of it empty
    theirs = load_file(target / _FACTORS)
    if mine.keys() != theirs.keys() or not all(torch.equal(mine[key].cpu(), theirs[key]) for key in mine):
        raise RuntimeError("the saved adapter differs from the trained one: it did not load back equal")
    if first and base is not None:
        with _tolerant():
            again = PeftModel.from_pretrained(base(), target).to(next(model.parameters()).device)
        _require_same(_logits(model), _logits(again), again.dtype, "the saved adapter")


def _difference(name: str, factor: Tensor, first: Tensor) -> Tensor:
    """A and A₀ below each other, or B and −B₀ side by side."""
    import torch

    first = first.to(factor.device)
    return torch.cat([factor, first], 0) if "lora_A" in name else torch.cat([factor, -first], 1)


def merge_adapter(model: Any) -> PreTrainedModel:
    """The plain model with each factor pair added into its weight; `model` is used up.

    Raises:
        RuntimeError: its logits on a fixed input are not those of `model` up to rounding.
    """
    before, was_training = _logits(model), model.training
    with _tolerant():
        merged = model.merge_and_unload()
    merged.train(was_training)
    _require_same(before, _logits(merged), merged.dtype, "the merged model")
    return merged


def _logits(model: Any) -> Tensor:
    """Of a fixed input, in float32."""
    import torch

    ids = torch.arange(16, device=next(model.parameters()).device)[None] % model.config.vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    return found


def _require_same(before: Tensor, after: Tensor, dtype: dtype, what: str) -> None:
    """Raises RuntimeError where logits differ by more than rounding.

    Rounding W + BA to a weight moves it by at most eps / 2 of itself, and each layer adds its share; a wrong merge is
    off by far more than this.
    """
    import torch

    allowed = min(1e3 * torch.finfo(dtype).eps, 0.1) * float(before.abs().max())
    worst = float((before - after).abs().max())
    if not worst <= allowed:
        raise RuntimeError(f"{what} differs from the trained one: its logits are off by up to {worst:.3g}")


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
