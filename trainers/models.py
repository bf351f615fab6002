"""Models: `transformers` architectures built from a small config, from scratch or from a local folder.

There is no model code here. A `ModelConfig` names an architecture of `transformers` and its sizes; `build_model` turns
it into a causal language model whose initial weights depend on the seed alone: not on the device, the rank or the
global random state.

The presets from 9M to 7B are the Llama sizes of the pre-training comparison of GaLore (Zhao et al. 2024,
arXiv:2403.03507).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinrank.trainers.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import and a config is read far more often than a model is built
    from transformers import PreTrainedConfig, PreTrainedModel

_ATTENTION = ("sdpa", "eager", "flash_attention_2")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_OPTIONAL = ("num_key_value_heads", "rms_norm_eps", "rope_theta")
# The same setting under the name that older architectures (OPT, GPT-2) give it.
_SYNONYMS = {"intermediate_size": ("ffn_dim", "n_inner"), "initializer_range": ("init_std",)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes of a causal language model; the defaults are the 2M preset.

    `None` leaves a setting to the architecture. A setting that the architecture does not have is refused, never
    dropped; what only it has goes into `extra`, under its own name.
    """

    name: str = field(default="2m", metadata={"help": "a label for this model"})
    architecture: str = field(
        default="llama", metadata={"help": "the model type in transformers: llama, qwen3, gpt2, …"}
    )
    hidden_size: int = field(default=192, metadata={"help": "width of the residual stream"})
    intermediate_size: int | None = field(default=512, metadata={"help": "width inside each MLP"})
    num_hidden_layers: int = field(default=4, metadata={"help": "number of transformer blocks"})
    num_attention_heads: int = field(default=6, metadata={"help": "attention heads per block"})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "key/value heads per block; null: as many as attention heads"}
    )
    max_position_embeddings: int = field(default=1024, metadata={"help": "longest sequence in tokens"})
    tie_word_embeddings: bool = field(default=False, metadata={"help": "share the embedding with the output layer"})
    rms_norm_eps: float | None = field(
        default=None, metadata={"help": "epsilon of RMSNorm; null: the architecture's own (llama 1e-6)"}
    )
    rope_theta: float | None = field(
        default=None, metadata={"help": "base of the rotary positions; null: the architecture's own (llama 10000)"}
    )
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of the initial weights"})
    attention: str = field(default="sdpa", metadata={"help": "attention kernel: sdpa, eager or flash_attention_2"})
    extra: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further settings of the architecture's transformers config"}
    )
    pretrained: str | None = field(
        default=None,
        metadata={"help": "a local folder to load the model from; architecture and sizes then come from there"},
    )

    def __post_init__(self) -> None:
        for name in (*_SIZES, "num_key_value_heads"):
            value = getattr(self, name)
            optional = name in ("intermediate_size", "num_key_value_heads")
            if not (optional and value is None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}: set model.{name} to a size")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}: change one of them"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, got {self.num_key_value_heads} and "
                f"{self.num_attention_heads}: change one of them or leave num_key_value_heads at null"
            )
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value!r}: leave it out to have the usual value")
        if self.attention not in _ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(_ATTENTION)}, got {self.attention!r}: choose one")
        clash = sorted(set(self.extra) & {f.name for f in fields(self)})
        if clash:
            raise ValueError(
                f"extra must not repeat a field of the model, got {clash[0]}: set model.{clash[0]} instead"
            )


def _llama(name: str, hidden: int, intermediate: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


PRESETS: dict[str, ModelConfig] = {
    preset.name: preset
    for preset in (
        ModelConfig(),
        _llama("9m", 128, 352, 4, 4),
        _llama("20m", 256, 688, 4, 4),
        _llama("35m", 384, 1024, 6, 8),
        _llama("60m", 512, 1376, 8, 8),
        _llama("130m", 768, 2048, 12, 12),
        _llama("350m", 1024, 2736, 24, 16),
        _llama("1b", 2048, 5461, 24, 32),
        _llama("7b", 4096, 11008, 32, 32),
    )
}
"""Llama models by name, which counts the parameters with 32,000 tokens, except for 2m, which has 1,024."""


def build_model(config: ModelConfig, vocab_size: int, *, seed: int, meta: bool = False) -> PreTrainedModel:
    """Build the model in float32, on the CPU, with weights that depend on `config`, `vocab_size` and `seed` alone.

    The global random state of every device is left as it was, so that all ranks may call this at any time.

    Args:
        config: architecture and sizes, or a folder to load from.
        vocab_size: number of tokens; a loaded model may have more rows than that, never fewer.
        seed: of the initial weights.
        meta: build on the meta device instead: shapes without storage, for planning.

    Raises:
        UserError: the architecture, one of its settings or the folder does not exist.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}: pass the length of the tokenizer")
    if config.pretrained is not None:
        return load_model(config.pretrained, vocab_size, key="model.pretrained", attention=config.attention, meta=meta)
    hf = transformers_config(config, vocab_size)
    with _attention(config.attention), seeded(seed), torch.device("meta" if meta else "cpu"):
        return AutoModelForCausalLM.from_config(hf, attn_implementation=config.attention, dtype=torch.float32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU from `seed` on; afterwards the global state is what it was."""
    import torch

    state = torch.get_rng_state()
    try:
        # The CPU's generator alone: torch.manual_seed would reseed the accelerators too, and nothing restores those.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)


def transformers_config(config: ModelConfig, vocab_size: int) -> PreTrainedConfig:
    """The `transformers` configuration for a model that is built from scratch.

    Token ids of beginning, end and padding are left unset, since they belong to a tokenizer; `export` fills them in.

    Raises:
        UserError: an architecture without a causal language model, or a setting that it does not have.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if config.architecture not in known:
        near = difflib.get_close_matches(config.architecture, known, n=3) or ["llama"]
        raise UserError(
            f"model.architecture {config.architecture!r} is no causal language model of transformers; "
            f"did you mean {' or '.join(near)}?"
        )
    values = {name: getattr(config, name) for name in (*_SIZES, *_OPTIONAL, "tie_word_embeddings", "initializer_range")}
    values = {name: value for name, value in values.items() if value is not None} | dict(config.extra)
    empty = AutoConfig.for_model(config.architecture)
    values = _spelled_for(config.architecture, empty, values)
    # Some architectures have fixed numbers here (qwen3: 32 heads of 128), which belong to another width.
    implied = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    values = {name: value for name, value in implied.items() if name in vars(empty)} | values
    if "rope_parameters" in vars(empty) and values.get("head_dim", implied["head_dim"]) % 2:
        raise ValueError(
            f"rotary positions need an even number of dimensions per attention head, got hidden_size "
            f"{config.hidden_size} over {config.num_attention_heads} heads: change num_attention_heads"
        )
    try:
        return AutoConfig.for_model(
            config.architecture,
            vocab_size=vocab_size,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            **values,
        )
    except Exception as error:  # transformers raises several classes of its own for values of a wrong type
        reason = " ".join(str(error).split())
        raise UserError(
            f"transformers refuses these values for {config.architecture}: {reason}; change model.*"
        ) from error


def _spelled_for(architecture: str, empty: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values under the architecture's own names, since its config would keep any other key without reading it."""
    known = {f.name for f in fields(empty)} | set(empty.attribute_map)  # pyright: ignore[reportArgumentType]
    if "rope_parameters" in known:
        known.add("rope_theta")  # the spelling of older files, which transformers moves into rope_parameters
    spelled = {}
    for name, value in values.items():
        found = next((key for key in (name, *_SYNONYMS.get(name, ())) if key in known), None)
        if found is None:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
            hint = f"its nearest settings are {', '.join(near)}; " if near else ""
            raise UserError(
                f"the architecture {architecture} has no setting {name}: {hint}set model.{name} to null "
                f"or use model.extra with a name that it has"
            )
        spelled[found] = value
    return spelled


def load_model(
    folder: str,
    vocab_size: int,
    *,
    key: str,
    attention: str = "sdpa",
    dtype: str = "float32",
    meta: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from a folder that `save_pretrained` wrote, onto the CPU, in training mode.

    Args:
        folder: a local one; nothing is fetched.
        vocab_size: number of tokens; the model may have more rows than that, never fewer.
        key: the configuration key that names the folder, for the errors.
        attention: kernel, as in `ModelConfig`.
        dtype: "float32", or "stored": as the folder's weights are.
        meta: build on the meta device instead: shapes without storage, for planning.

    Raises:
        UserError: there is no such folder or no causal language model in it, or it is too small for the tokenizer.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    path = model_folder(folder, key)
    try:
        hf = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key} {folder!r} holds no model that transformers knows: {_first_line(error)}; export it again"
        ) from error
    if hf.vocab_size < vocab_size:
        raise UserError(
            f"the model in {folder} knows {hf.vocab_size} tokens and the tokenizer has {vocab_size}: "
            f"set data.tokenizer to the model's own folder"
        )
    from thinrank.trainers.reparam import has_factors, load_factors

    with _attention(attention):
        if has_factors(path):
            wanted = torch.float32 if dtype == "float32" else None
            return load_factors(path, dtype=wanted, attention=attention, meta=meta)
        if meta:
            stored = getattr(hf, "dtype", None) or torch.float32
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    hf, attn_implementation=attention, dtype=torch.float32 if dtype == "float32" else stored
                )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                config=hf,
                local_files_only=True,
                attn_implementation=attention,
                dtype=torch.float32 if dtype == "float32" else "auto",
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"the model in {key} {folder!r} cannot be loaded: {_first_line(error)}; export it again"
            ) from error
    return model.train()  # transformers loads into evaluation mode, without dropout


def model_folder(folder: str, key: str) -> Path:
    """The path of a folder with a model in it.

    Raises:
        UserError: there is none.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UserError(
            f"{key} must be a folder that save_pretrained wrote, got {folder!r}: download or export the model first"
        )
    return path


@contextmanager
def _attention(kernel: str) -> Iterator[None]:
    """Turns the answer of transformers to an attention kernel that is not installed into a sentence."""
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.attention {kernel!r} cannot be used here: {reason}; set it to sdpa") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
