"""Where the heads of an attention lie in its weights: by names, by the model's configuration, or as a user says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ROLES = ("q", "k", "v", "o")

SEPARATE: dict[str, str] = {
    **{f"{role}_proj": role for role in ROLES}, "out_proj": "o", "query": "q", "key": "k", "value": "v",
    **{f"{role}_proj_weight": role for role in "qkv"},  # nn.MultiheadAttention with other sizes of keys and values
}  # fmt: skip
"""Weights of one role, by the name of their layer."""

FUSED = ("qkv", "qkv_proj", "Wqkv", "wqkv", "W_pack", "c_attn", "query_key_value", "in_proj_weight")
"""Layers that hold q, k and v in one weight. How is not to be seen from its shape: it is known by model, or refused."""

PACKED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("phi3", "phi4_multimodal"),
    "Wqkv": ("mpt", "modernbert", "dbrx"),
    "c_attn": ("gpt2", "imagegpt", "openai-gpt", "decision_transformer"),
}
"""Models (`config.model_type`) whose layer of this name holds all of q, then all of k, then all of v."""

INTERLEAVED = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")
"""Models whose `query_key_value` holds q, k and v of the first head, then those of the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """How attention heads lie in a weight.

    Attributes:
        heads: how many, one number for each section where there are sections; 1 stands for "as a whole".
        side: the compressed side: `right`, the heads are blocks of rows (q, k, v of an `nn.Linear`); `left`, the heads
            are blocks of columns (o).
        sections: sizes of the parts of a fused weight, along the side where the heads are.
        roles: which of q, k, v and o each section holds, several letters where they are interleaved; empty when their
            heads are to share a basis whichever roles `cross_heads` names.
    """

    heads: int | tuple[int, ...]
    side: str
    sections: tuple[int, ...] | None = None
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise ValueError(f"side must be right (heads are rows) or left (heads are columns), got {self.side!r}")
        parts = len(self.sections or (0,))
        if any(not isinstance(count, int) or count < 1 for count in self.counts):
            raise ValueError(f"heads must be at least 1, got {self.heads!r}")
        if len(self.counts) != parts:
            raise ValueError(f"heads must be one number for each of the {parts} sections, got {self.heads!r}")
        if self.roles and (len(self.roles) != parts or not set("".join(self.roles)) <= set(ROLES)):
            raise ValueError(
                f"roles must be letters of q, k, v, o for each of the {parts} sections, got {self.roles!r}"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of heads of every section."""
        if isinstance(self.heads, int):
            return (self.heads,) * len(self.sections or (0,))
        return tuple(self.heads)

    def group(self, name: str, cross_heads: Collection[str]) -> dict[str, Any] | None:
        """What a parameter group of such weights says, or None when none of their heads is to share a basis.

        Raises:
            ValueError: when a section holds a role that is to be shared together with one that is not.
        """
        counts = []
        for index, count in enumerate(self.counts):
            role = set(self.roles[index]) if self.roles else set()
            if 0 < len(role & set(cross_heads)) < len(role):
                raise ValueError(
                    f"{name} holds {', '.join(self.roles[index])} of a head together, and cross_heads names some of "
                    f"them: name all of them, or {REMEDY}"
                )
            counts.append(count if role <= set(cross_heads) else 1)
        if set(counts) == {1}:
            return None
        return {
            "proj_type": self.side,
            "heads": counts[0] if self.sections is None else tuple(counts),
            "sections": self.sections,
            "sections_along": "rows" if self.side == "right" else "columns",
        }


REMEDY = "pass heads={pattern: HeadLayout(...)} to build, exclude these weights, or set cross_heads=[]"


def attention_layouts(
    model: nn.Module,
    names: Iterable[str] | None = None,
    *,
    roles: Collection[str] = ROLES,
    given: Mapping[str, HeadLayout] | None = None,
) -> dict[str, HeadLayout]:
    """The layout of every attention weight of `model`, by parameter name.

    Names of layers say what a weight is; the attention module's own `num_heads` and `head_dim`, else the nearest
    `config` above it, say how many heads it has.

    Args:
        names: parameters to look at; all by default.
        roles: weights that hold none of these are not looked at, and so not refused.
        given: regular expression on the name → layout; the first match wins over what would be found.

    Raises:
        ValueError: for an attention weight whose heads cannot be told apart, and when a given pattern matches nothing.
    """
    modules = dict(model.named_modules())
    unused = dict(given or {})
    found: dict[str, HeadLayout] = {}
    parameters = dict(model.named_parameters())
    for name in parameters if names is None else names:
        hit = next((pattern for pattern in given or {} if re.search(pattern, name)), None)
        if hit is not None and given is not None:
            unused.pop(hit, None)
            found[name] = given[hit]
            continue
        if parameters[name].ndim == 2:
            layout = _Weight(name, parameters[name], modules).layout(roles)
            if layout is not None:
                found[name] = layout
    if unused:
        raise ValueError(f"the heads pattern {next(iter(unused))!r} matches no projected matrix: correct or remove it")
    return found


class _Weight:
    """A weight and what its surroundings say of it."""

    def __init__(self, name: str, weight: Tensor, modules: Mapping[str, nn.Module]) -> None:
        self.name = name
        path, _, last = name.rpartition(".")
        owner = modules[path]
        if last == "weight":  # of a layer in an attention
            path, _, last = path.rpartition(".")
        self.layer, self.attention = last, modules[path]
        self.stored_transposed = type(owner).__name__ == "Conv1D"  # GPT-2's linear layer
        out, into = weight.shape[::-1] if self.stored_transposed else weight.shape
        self.out, self.into = int(out), int(into)
        above = [path.rsplit(".", i)[0] for i in range(path.count(".") + 1)] + [""]
        configs = [getattr(modules[p], "config", None) for p in above if p in modules]
        self.config = next((c for c in configs if isinstance(getattr(c, "num_attention_heads", None), int)), None)
        self.model_type = getattr(self.config, "model_type", None)

    def refusal(self, why: str) -> ValueError:
        return ValueError(f"{self.name} looks like an attention weight, but {why}: {REMEDY}")

    def number(self, *keys: str) -> int | None:
        for source in (self.attention, self.config):
            for key in keys:
                value = getattr(source, key, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    def counts(self) -> tuple[int, int, int]:
        """Heads of q and o, heads of k and v, and the size of a head."""
        heads = self.number("num_heads", "num_attention_heads")
        if heads is None:
            raise self.refusal("neither its module nor model.config says num_attention_heads")
        size = self.number("head_dim", "attention_head_size")
        if size is None:
            size = (self.number("hidden_size") or (self.into if self.layer not in SEPARATE else self.out)) // heads
        return heads, self.number("num_key_value_heads") or heads, size

    def layout(self, roles: Collection[str]) -> HeadLayout | None:
        if self.layer in SEPARATE:
            role = SEPARATE[self.layer]
            attends = isinstance(self.attention, nn.MultiheadAttention) or any(
                hasattr(self.attention, other) for other in (*FUSED, "q_proj", "query")
            )
            return self._separate(role) if role in roles and attends else None
        if self.layer == "c_proj" and hasattr(self.attention, "c_attn"):
            return self._separate("o") if "o" in roles else None
        return self._fused() if self.layer in FUSED and set(roles) & set("qkv") else None

    def side(self, heads_are_outputs: bool) -> str:
        return "right" if heads_are_outputs != self.stored_transposed else "left"

    def _separate(self, role: str) -> HeadLayout:
        heads, kv, size = self.counts()
        count = kv if role in "kv" else heads
        outputs = role != "o"
        have = self.out if outputs else self.into
        if have != count * size:
            raise self.refusal(f"its {have} {'outputs' if outputs else 'inputs'} are not {count} heads of {size}")
        return HeadLayout(heads=count, side=self.side(outputs), roles=(role,))

    def _fused(self) -> HeadLayout:
        packed = self.model_type in PACKED.get(self.layer, ()) or isinstance(self.attention, nn.MultiheadAttention)
        if self.model_type == "falcon":
            return self._falcon()
        if not packed and not (self.layer == "query_key_value" and self.model_type in INTERLEAVED):
            kind = f"a model of type {self.model_type!r}" if self.model_type else "this model"
            raise self.refusal(f"how {kind} packs q, k and v into one is not known here")
        heads, kv, size = self.counts()
        return self._packed(heads, kv, size) if packed else self._interleaved(heads, 3 * size)

    def _packed(self, heads: int, kv: int, size: int) -> HeadLayout:
        sections = (heads * size, kv * size, kv * size)
        if self.out != sum(sections):
            raise self.refusal(f"its {self.out} outputs are not {heads}+{kv}+{kv} heads of {size}")
        return HeadLayout(heads=(heads, kv, kv), side=self.side(True), sections=sections, roles=("q", "k", "v"))

    def _interleaved(self, blocks: int, rows: int) -> HeadLayout:
        if self.out != blocks * rows:
            raise self.refusal(f"its {self.out} outputs are not {blocks} blocks of {rows}")
        return HeadLayout(heads=blocks, side=self.side(True), roles=("qkv",))

    def _falcon(self) -> HeadLayout:
        heads, _, size = self.counts()
        if getattr(self.config, "new_decoder_architecture", False):  # some q, their k, their v, and the next
            groups = self.number("num_kv_heads") or heads
            return self._interleaved(groups, (heads // groups + 2) * size)
        if getattr(self.config, "multi_query", False):
            return self._packed(heads, 1, size)
        return self._interleaved(heads, 3 * size)
