"""Rules of scale for `transformers` models: other sizes of one kind, the factors in their forwards, their classes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinrank.optim.scaling import Scaling, ScalingConfig, scaling_of
from thinrank.trainers.errors import UserError
from thinrank.trainers.models import ModelConfig, transformers_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

_INNER = ("intermediate_size", "ffn_dim", "n_inner")
"""The width inside each MLP, by the names that architectures give it."""


def sizes_at(
    width: int, *, hidden: int, heads: int, key_value_heads: int | None, intermediate: int | None, keep: str
) -> dict[str, int]:
    """The sizes of a model of `width` of the kind that has these at width `hidden`.

    Args:
        keep: what of the heads stays: `size`, so that there are more of them in a wider model, or `count`.

    Returns:
        `hidden_size`, `num_attention_heads` and, where they were given, `num_key_value_heads` and `intermediate_size`,
        the last one rounded. A single key/value head stays single.

    Raises:
        ValueError: where the heads do not come out even.
    """
    ratio = width / hidden
    found = {"hidden_size": width, "num_attention_heads": heads}
    if keep == "size":
        size = hidden // heads
        if width % size:
            raise ValueError(
                f"a width of {width} is no multiple of the head size {size}, which scaling.heads=size keeps: take a "
                f"multiple of {size}, or scaling.heads=count"
            )
        found["num_attention_heads"] = width // size
    elif width % heads:
        raise ValueError(
            f"a width of {width} is no multiple of the {heads} heads, which scaling.heads=count keeps: take a multiple "
            f"of {heads}, or scaling.heads=size"
        )
    if key_value_heads is not None:
        grouped = key_value_heads * found["num_attention_heads"] / heads if key_value_heads > 1 else 1
        if grouped != int(grouped) or grouped < 1:
            raise ValueError(
                f"at a width of {width} there would be {grouped:g} key/value heads in the place of {key_value_heads}: "
                "take a width at which they come out even, or scaling.heads=count"
            )
        found["num_key_value_heads"] = int(grouped)
    if intermediate is not None:
        found["intermediate_size"] = max(1, round(intermediate * ratio))
    return found


def at_width(config: ModelConfig, width: int, *, heads: str = "size", depth: int | None = None) -> ModelConfig:
    """The model of `config`'s kind with another width, and another number of blocks if `depth` is given.

    Raises:
        UserError: where the heads do not come out even.
    """
    try:
        sizes = sizes_at(
            width,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads,
            intermediate=config.intermediate_size,
            keep=heads,
        )
        extra = dict(config.extra)
        if heads == "count" and "head_dim" in extra:
            extra["head_dim"] = round(extra["head_dim"] * width / config.hidden_size)
        layers = config.num_hidden_layers if depth is None else depth
        name = f"{config.name}-w{width}"
        return replace(config, name=name, num_hidden_layers=layers, extra=extra, **sizes)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(str(error)) from error


def resized(config: PreTrainedConfig, width: int, depth: int, *, heads: str) -> PreTrainedConfig:
    """The same for a configuration of `transformers`, which is left as it is.

    Raises:
        ValueError: as `sizes_at`.
    """
    found = copy.deepcopy(config)
    inner = next((name for name in _INNER if getattr(config, name, None) is not None), None)
    sizes = sizes_at(
        width,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=getattr(config, "num_key_value_heads", None),
        intermediate=None if inner is None else getattr(config, inner),
        keep=heads,
    )
    if inner is not None:
        sizes[inner] = sizes.pop("intermediate_size")
    if heads == "count" and getattr(config, "head_dim", None) is not None:
        sizes["head_dim"] = round(config.head_dim * width / config.hidden_size)
    if getattr(config, "word_embed_proj_dim", None) == config.hidden_size:  # OPT
        sizes["word_embed_proj_dim"] = width
    kinds = getattr(config, "layer_types", None)
    if kinds:
        found.layer_types = [kinds[i % len(kinds)] for i in range(depth)]
    for name, value in {**sizes, "num_hidden_layers": depth}.items():
        setattr(found, name, value)
    return found


def with_forward(config: ModelConfig, scaling: ScalingConfig) -> ModelConfig:
    """`config` with the factors of `scaling` in its forward, where its architecture has places for them.

    Granite's settings take them: `logits_scaling` grows as the width, `residual_multiplier` falls as
    depth^(−depth_exp), `attention_multiplier` as (head size)^(−attention_width_exp) where heads grow. What
    `model.extra` says of them holds at the base. `embedding_multiplier` stays as it is.

    Raises:
        UserError: for a rule that needs a factor for which the architecture has no place, and for a readout that shares
            its weights with the embedding in such an architecture, so that it cannot be folded into them.
    """
    if not scaling.active or config.pretrained is not None:
        return config
    hf: Any = transformers_config(config, 1)
    assert scaling.base_width is not None
    width, factors = config.hidden_size / scaling.base_width, {}
    if hasattr(hf, "logits_scaling"):
        factors["logits_scaling"] = width
    else:
        refuse_tied(hf)
    if scaling.heads == "count" and width != 1.0:
        if hasattr(hf, "attention_multiplier"):
            factors["attention_multiplier"] = width**-scaling.attention_width_exp
        elif scaling.attention_width_exp != 0.5:
            raise UserError(
                f"scaling.attention_width_exp={scaling.attention_width_exp:g} asks for attention logits that fall "
                f"faster than the root of a growing head size, and model.architecture={config.architecture} has no "
                "place for a factor: set scaling.heads=size, scaling.attention_width_exp=0.5, or "
                "model.architecture=granite"
            )
    if scaling.depth_exp is not None and scaling.base_depth is not None:
        if not hasattr(hf, "residual_multiplier"):
            raise UserError(
                f"scaling.depth_exp={scaling.depth_exp:g} multiplies the branches of blocks, and "
                f"model.architecture={config.architecture} has no place for a factor: set model.architecture=granite, "
                "or scaling.depth_exp=null"
            )
        factors["residual_multiplier"] = (config.num_hidden_layers / scaling.base_depth) ** -scaling.depth_exp
    changed = {name: getattr(hf, name) * factor for name, factor in factors.items() if factor != 1.0}
    return replace(config, extra={**config.extra, **changed}) if changed else config


def refuse_tied(hf: Any) -> None:
    """Refuses weights that are embedding and readout in one where logits cannot be divided.

    Raises:
        UserError: with the remedy.
    """
    if getattr(hf, "tie_word_embeddings", False):
        raise UserError(
            f"scaling divides the readout by the width, and in {hf.model_type} with tie_word_embeddings it is the "
            "embedding as well, which must stay: set model.architecture=granite, which divides its logits, or "
            "model.tie_word_embeddings=false"
        )


def scaling_for(
    config: ScalingConfig,
    hf: PreTrainedConfig,
    make: Callable[[PreTrainedConfig], nn.Module],
    *,
    some: bool = False,
) -> Scaling:
    """The classes of the model of `hf`, and how far it is from the base.

    Args:
        config: an active rule.
        hf: of the model to train.
        make: the model of another configuration, with everything that is done to the one to train; called on the meta
            device.
        some: overrides need not match, since more will be done to the model.

    Raises:
        UserError: for sizes that do not come out even, and as `classify`.
    """
    sizes: Any = hf
    if not hasattr(hf, "logits_scaling"):
        refuse_tied(hf)
    try:
        if some:
            names = [name for name, _ in make(hf).named_parameters()]
            kept = {p: kind for p, kind in config.overrides.items() if any(re.search(p, name) for name in names)}
            config = replace(config, overrides=kept)
        return scaling_of(
            config,
            lambda width, depth: make(resized(hf, width, depth, heads=config.heads)),
            width=sizes.hidden_size,
            depth=sizes.num_hidden_layers,
            folded=not hasattr(hf, "logits_scaling"),
        )
    except ValueError as error:
        raise UserError(
            f"scaling={config.name}, with models of width {config.base_width} and twice that: {error}"
        ) from error


def refuse_other_classes(checkpoint: Path, classes: Mapping[str, str]) -> None:
    """Refuses a checkpoint in which parameters had other classes, and with them other rates.

    Raises:
        UserError: with the first that differs.
    """
    from thinrank.trainers import checkpoint as ckpt

    before = ckpt.load(checkpoint, mmap=True).get("thinrank", {}).get("classes", {})
    for name in sorted(before.keys() | classes.keys()):
        if before.get(name) != classes.get(name):
            raise UserError(
                f"{checkpoint} was made with {name} as {before.get(name)} and it is {classes.get(name)} now: name its "
                "class in scaling.overrides, or set another run.dir for a new run"
            )
