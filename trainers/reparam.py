"""Models of factors in a run: made, merged, and exported where no dense weights equal them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from thinrank.optim.layers import REPARAMS, Conversion, NotMergeable, ReparamConfig, convert, layers, merge
from thinrank.optim.layers.dense import is_linear
from thinrank.trainers.errors import UserError
from thinrank.trainers.export import adopt_token_ids, export, replacing_folder, same_ids
from thinrank.trainers.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTORS, LAYOUT = "factors.safetensors", "reparam.json"
"""Files of an export whose layers stay factors."""


def converted(model: Any, config: ReparamConfig, *, seed: int) -> Conversion | None:
    """Replaces layers of `model` as `config` says, in place; None where it replaces nothing.

    Raises:
        UserError: with what does not fit.
    """
    if type(config) is ReparamConfig:
        return None
    try:
        return convert(model, cast("Any", config), seed=seed)
    except ValueError as error:
        raise UserError(f"reparam.{error}") from error


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device: what it has come to be, ranks found from weights included."""
    known: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    known |= {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, known)


def export_merged(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> Path:
    """Exports `model` with dense layers in the place of its factors or, where none do the same, with the factors.

    Either is proved by loading it back. Dense layers must give the logits of the factors up to rounding. An export of
    factors has the files of any other but for the weights, which are in ``factors.safetensors``, with ``reparam.json``
    beside: `load_factors` reads it, and so do ``model.pretrained`` and ``model.path``. `transformers` by itself finds
    no weights there, and says so.

    Args:
        model: trained, whole on one device; it stays as it is.
        tokenizer: as in `export`.
        folder: where to.

    Raises:
        UserError, RuntimeError: as `export` does.
    """
    plain = copy.deepcopy(model)
    try:
        merge(plain)
    except NotMergeable:
        return export_factors(model, tokenizer, folder)
    _require_same_logits(model, plain)
    return export(plain, tokenizer, folder)


def export_factors(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> Path:
    """Exports `model` as it is, with a description of its layers by which `load_factors` builds it again.

    Raises:
        UserError, RuntimeError: as `export` does.
    """
    from safetensors.torch import save_file

    target = Path(folder)
    with replacing_folder(target, "config.json") as temporary:
        if tokenizer is not None:
            adopt_token_ids(model, tokenizer)
        model.config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        save_file(_state(model), temporary / FACTORS, metadata={"format": "pt"})
        write_json(temporary / LAYOUT, _layout(model))
        loaded: Any = load_factors(temporary)
        loaded.to(model.device)
        mine, theirs = model.state_dict(), loaded.state_dict()
        wrong = [name for name in mine if name not in theirs or not torch.equal(mine[name], theirs[name])]
        if wrong or len(mine) != len(theirs):
            raise RuntimeError(
                f"the exported factors differ from the trained ones: {wrong[:1]} did not load back equal"
            )
        _require_same_logits(model, loaded, exactly=model.device.type == "cpu")
        if tokenizer is not None:
            same_ids(tokenizer, temporary)
    return target


def load_factors(
    folder: str | Path, *, dtype: torch.dtype | None = None, attention: str = "sdpa", meta: bool = False
) -> PreTrainedModel:
    """The model that `export_factors` wrote, on the CPU, in training mode.

    Args:
        folder: of an export with factors.
        dtype: of the weights; None: as they were saved.
        attention: kernel, as in `ModelConfig`.
        meta: on the meta device instead: shapes without storage, for planning.

    Raises:
        UserError: for a folder that holds no such export, or one of another layout.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(folder)
    if not has_factors(path):
        raise UserError(
            f"{folder} holds no factors ({LAYOUT} and {FACTORS}): give the folder of an export with factors"
        )
    layout = json.loads((path / LAYOUT).read_text(encoding="utf-8"))
    kind = REPARAMS.get(layout.get("name", ""))
    if kind is None:
        raise UserError(f"{path / LAYOUT} is of layers that this version does not know, {layout.get('name')!r}: update")
    weights = load_file(path / FACTORS)
    hf = AutoConfig.from_pretrained(path, local_files_only=True)
    stored = next(value.dtype for value in weights.values() if value.is_floating_point())
    with torch.device("meta" if meta else "cpu"):
        model = AutoModelForCausalLM.from_config(hf, attn_implementation=attention, dtype=stored)
    for module in model.modules():  # what will be replaced needs no values, and no SVD of them
        if is_linear(module):
            module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"))  # pyright: ignore[reportArgumentType]
    try:
        convert(model, cast("Any", kind(**layout["config"])))
        if meta:
            return (model if dtype is None else model.to(dtype)).train()
        model.load_state_dict(weights, strict=False, assign=True)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[:2][-1].strip()  # torch lists every tensor after a line of its own
        raise UserError(f"{path / LAYOUT} does not fit the factors beside it: {reason}") from error
    model.tie_weights()
    left = [name for name, value in model.state_dict().items() if value.is_meta]
    if left:
        raise UserError(f"{path / FACTORS} lacks {left[0]} ({len(left)} in all): export the model again")
    return (model if dtype is None else model.to(dtype)).train()


def has_factors(folder: Path) -> bool:
    """Whether a folder is an export with factors."""
    return (folder / LAYOUT).is_file() and (folder / FACTORS).is_file()


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is to be saved, tied weights under their first name alone."""
    seen: set[int] = set()
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach().contiguous()
    return found


def _layout(model: nn.Module) -> Mapping[str, Any]:
    config = next(iter(layers(model).values())).config
    assert config is not None  # convert has set it
    return {"name": config.name, "config": {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}}


@torch.no_grad()
def _require_same_logits(model: Any, other: Any, *, exactly: bool = False) -> None:
    """Raises RuntimeError unless both give the same logits for a fixed input, but for rounding."""
    ids = torch.arange(16, device=model.device)[None] % model.config.vocab_size
    found = []
    for each in (model, other):
        training = each.training
        each.eval()
        found.append(each(input_ids=ids, use_cache=False).logits.float())
        each.train(training)
    worst = float((found[0] - found[1]).abs().max())
    # Each layer's weight is rounded to its dtype once more; a wrong merge is off by far more than this.
    allowed = 0.0 if exactly else min(1e3 * torch.finfo(other.dtype).eps, 0.1) * float(found[0].abs().max())
    if not worst <= allowed:
        raise RuntimeError(f"the exported model differs from the trained one: its logits are off by up to {worst:.3g}")
