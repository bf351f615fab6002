"""Every parameter has one role and one rule, decided once and shown to the user."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from thinrank.optim.allocation import rank_spread
from thinrank.optim.heads import HeadLayout, attention_layouts
from thinrank.optim.linalg.norms import SKETCH
from thinrank.optim.methods.config import MatrixConfig, MethodConfig, RankedConfig

if TYPE_CHECKING:
    from thinrank.optim.optimizer import MatrixOptimizer


class Role(str, Enum):
    """What a parameter is for, which decides its learning rate and whether it may be projected."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    HEAD = "head"
    VECTOR = "vector"
    COEFFICIENT = "coefficient"


ELEMENTWISE = (Role.VECTOR, Role.COEFFICIENT)
"""What no rule for matrices steps, and nothing decays."""

HEAD_NAMES = ("lm_head", "output", "head", "classifier", "score", "embed_out", "output_layer")
ATTENTION = (
    r"(^|\.)(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|query|key|value|c_attn|attn\.c_proj|Wqkv|query_key_value"
    r"|in_proj_weight)(\.|$)"
)
MLP = (
    r"(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|c_fc|mlp\.c_proj|fc_in|fc_out|dense_h_to_4h"
    r"|dense_4h_to_h|w1|w2|w3)(\.|$)"
)
FACTOR = r"(?i)(^|\.)lora_(embedding_)?[ab](\.|$)"
"""Names of LoRA's factors, as peft and others have them."""
PRESETS: dict[str, str] = {"all-linear": ".*", "attention": ATTENTION, "mlp": MLP}


def roles(model: nn.Module, overrides: Mapping[str, str] | None = None) -> dict[str, Role]:
    """The role of every parameter of `model` by name; tied parameters appear once, under their first name.

    By module type: `nn.Embedding` and `nn.EmbeddingBag` weights are embeddings; the model's output layer (what
    `get_output_embeddings()` returns, else a linear layer with a customary name directly under a root module) is the
    head; what a layer of `thinrank.optim.layers` calls its coefficients (singular values, scattered entries) are
    that: stepped element by element at the matrices' rate, without decay; whatever else has fewer than two
    dimensions, or belongs to a module whose class name contains "Norm", is a vector; every other parameter is a matrix.
    A tied embedding and head is an embedding.

    Args:
        overrides: regular expression on the name → role, the first match wins.

    Raises:
        ValueError: when an override matches nothing or names no role.
    """
    owners = {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    head = output_weight(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    found: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        owner = owners[name]
        if name.rpartition(".")[2] in getattr(owner, "COEFFICIENTS", ()):
            found[name] = Role.COEFFICIENT
        elif parameter.ndim < 2 or "Norm" in type(owner).__name__:
            found[name] = Role.VECTOR
        elif id(parameter) in tables:  # under whichever name it comes first
            found[name] = Role.EMBEDDING
        elif head is not None and parameter is head:
            found[name] = Role.HEAD
        else:
            found[name] = Role.MATRIX
    unused = dict(overrides or {})
    for name in found:
        for pattern, role in (overrides or {}).items():
            if re.search(pattern, name):
                unused.pop(pattern, None)
                try:
                    found[name] = Role(role)
                except ValueError:
                    allowed = ", ".join(r.value for r in Role)
                    raise ValueError(f"a role must be one of {allowed}, got {role!r} for {pattern!r}") from None
                break
    if unused:
        raise ValueError(f"the role pattern {next(iter(unused))!r} matches no parameter: correct or remove it")
    return found


def output_weight(model: nn.Module) -> torch.Tensor | None:
    """The weight of the model's output layer, found as `roles` says; None where there is none."""
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if callable(getter) else None
    if layer is None:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in HEAD_NAMES and name.count(".") <= 1 and isinstance(module, nn.Linear):
                layer = module
    return getattr(layer, "weight", None)


@dataclass(frozen=True, slots=True)
class Multipliers:
    """What a rule of scale (`thinrank.optim.scaling`) makes of the values of one parameter, each a factor."""

    kind: str = ""
    """Its class, for labels and tables."""
    lr: float = 1.0
    weight_decay: float = 1.0
    init: float = 1.0
    """On the initial weights, which are the model's own affair."""
    forward: float = 1.0
    """On what it puts out, likewise."""
    eps: float = 1.0

    @property
    def in_groups(self) -> tuple[float, float, float]:
        """Those that a parameter group carries."""
        return self.lr, self.weight_decay, self.eps


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the routing table."""

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    lr: float
    elements: int
    state_bytes: int
    rank: int | None = None
    """Directions kept; None where nothing is projected."""
    itemsize: int = 4
    """Bytes of an entry of the weight, and of its gradient."""
    matrices: int = 0
    """Matrices that it is seen as; 0 where it is stepped element by element."""
    bases_bytes: int = 0
    """Of the state, what says where the subspace is."""
    image: dict[str, int] = field(default_factory=dict)
    """Numbers in what an update between renewals needs of a gradient, by kind; {} where it needs the gradient."""
    sends_image: bool = False
    """Replicas exchange the image between renewals, and not the gradient."""
    gap: int = 1
    """Updates between two renewals."""
    searches: int = 0
    """So many first updates choose by the gradient itself."""
    asked: dict[str, int] = field(default_factory=dict)
    """Numbers of which replicas that remember apart take the mean in a step that is `usual`, or `choosing` a subspace
    by whole gradients; and the `gap` between two that choose, 0 where first updates alone do. {} where replicas
    exchange what the gradient shows."""
    remembered: bool = False
    """These also remember something apart."""
    remainder: dict[str, int] = field(default_factory=dict)
    """Coordinates, and rows of the rest, of a gradient whose rest may travel in signs; {} where it may not."""

    @property
    def sketch(self) -> int:
        """Numbers by which replicas know the norm of a gradient that does not travel."""
        return min(SKETCH, self.elements)


@dataclass
class Routing:
    """Which parameter is stepped by which rule; `groups` are ready for the optimizer's constructor."""

    groups: list[dict[str, Any]]
    frozen: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    stand_in: MatrixOptimizer | None = None
    """The optimizer without memory, for who wants to ask it more."""
    note: str = ""
    """What is not decided yet, as the table's last line."""
    scaling: str = ""
    """The factors of a rule of scale, as lines of the table."""

    def state_bytes(self) -> int:
        """Bytes of optimizer state in all, by the rules' own formulas."""
        return sum(row.state_bytes for row in self.rows)

    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all that is stepped, group by group."""
        entries = (entry for group in self.groups for entry in group["params"])
        return [tuple((entry[1] if isinstance(entry, tuple) else entry).shape) for entry in entries]

    def table(self) -> str:
        """One line for each role and rule: parameters, elements, state bytes, learning rate."""
        titles = f"{'tensors':>7} {'elements':>14} {'state bytes':>14} {'bytes/weight':>12} {'lr':>9}"
        lines = [f"{'role':<10} {'rule':<16} {titles}"]
        seen: dict[tuple[str, str, float], list[Row]] = {}
        for row in self.rows:
            seen.setdefault((row.role, row.rule, row.lr), []).append(row)
        for (role, rule, lr), rows in seen.items():
            elements, state = sum(r.elements for r in rows), sum(r.state_bytes for r in rows)
            ratio = state / max(elements, 1)
            lines.append(f"{role:<10} {rule:<16} {len(rows):>7} {elements:>14,} {state:>14,} {ratio:>12.2f} {lr:>9.2g}")
        elements, state = self.elements(), self.state_bytes()
        lines.append(
            f"{'total':<10} {'':<16} {len(self.rows):>7} {elements:>14,} {state:>14,} {state / max(elements, 1):>12.2f}"
        )
        if self.frozen:
            lines.append(f"frozen, not stepped: {len(self.frozen)} tensors")
        spread = rank_spread([row.rank for row in self.rows])
        if spread is not None and spread[0] != spread[2]:
            least, median, most = spread
            lines.append(f"ranks: {least:,} / {median:,} / {most:,} (least / median / most)")
        lines += [text for text in (self.scaling, self.note) if text]
        return "\n".join(lines)


def targeted(
    names: Iterable[str], role: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]], config: MatrixConfig
) -> set[str]:
    """Names of the parameters that the matrix rule of `config` steps.

    Presets choose among matrices; a regular expression may also name an embedding or a head of two dimensions.

    Raises:
        ValueError: when a target or an exclusion matches nothing.
    """
    names = list(names)
    chosen: set[str] = set()
    for target in config.targets:
        pattern = PRESETS.get(target, target)
        try:
            hits = {
                name
                for name in names
                if re.search(pattern, name)
                and len(shapes[name]) >= 2
                and (role[name] is Role.MATRIX if target in PRESETS else role[name] not in ELEMENTWISE)
            }
        except re.error as error:
            raise ValueError(f"targets: {target!r} is not a regular expression ({error}): correct it") from None
        if not hits:
            raise ValueError(
                f"targets: {target!r} matches no matrix of the model; presets are {', '.join(PRESETS)}, "
                f"and parameters are called like {names[len(names) // 2]!r}"
            )
        chosen |= hits
    for pattern in config.exclude:
        hits = {name for name in names if re.search(pattern, name)}
        if not hits:
            raise ValueError(f"exclude: {pattern!r} matches no parameter of the model: correct or remove it")
        chosen -= hits
    return chosen


def stepped_matrices(
    model: nn.Module, config: MethodConfig, overrides: Mapping[str, str] | None = None
) -> dict[str, nn.Parameter]:
    """The trainable parameters of `model` that the matrix rule of `config` steps, by name, in the model's order.

    Raises:
        ValueError: when nothing is trainable, or a target, an exclusion or a role pattern matches nothing.
    """
    role = roles(model, overrides)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: set requires_grad on some")
    if not isinstance(config, MatrixConfig) or (isinstance(config, RankedConfig) and config.rank is None):
        return {}
    chosen = targeted(trainable, role, {name: tuple(p.shape) for name, p in trainable.items()}, config)
    return {name: p for name, p in trainable.items() if name in chosen}


def refuse_factors(names: Iterable[str], config: MethodConfig) -> None:
    """Refuses to project LoRA's factors, which have few directions already, so that nothing would be saved.

    Args:
        names: of the matrices that `config` projects.

    Raises:
        ValueError: when one of them is such a factor.
    """
    factors = [name for name in names if re.search(FACTOR, name)]
    if factors:
        raise ValueError(
            f"{config.name or type(config).__name__} would project gradients of LoRA's factors, which have few "
            f"directions already ({factors[0]}, {len(factors):,} in all): exclude=['lora_'] has AdamW step them, and "
            "AdamWConfig steps everything so"
        )


def refuse_adapted(names: Iterable[str], trained: Iterable[str], config: MethodConfig) -> None:
    """Refuses to project a weight beside which LoRA's factors are trained: two low-rank updates of one matrix.

    Factors belong to the module that has them, and with it to what is its own (`layer.weight`) or a direct child's,
    which is what a wrapper wraps (`layer.base_layer.weight`). Factors that are frozen disturb nothing.

    Args:
        names: of the matrices that `config` projects.
        trained: names of all trainable parameters.

    Raises:
        ValueError: when one of them is such a weight.
    """
    factors = {name[: found.start()]: name for name in trained if (found := re.search(FACTOR, name))}
    both = {}
    for name in names:
        own = name.rpartition(".")[0]
        for module in (own, own.rpartition(".")[0]):
            if module in factors:
                both[name] = factors[module]
    if both:
        weight, factor = next(iter(both.items()))
        raise ValueError(
            f"{config.name or type(config).__name__} together with LoRA on the same weight: both would move {weight}, "
            f"which has {factor} beside it ({len(both):,} such weights in all): freeze it by requires_grad_(False) and "
            "train the factors alone, or merge them into it"
        )


def unstepped(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the trainable parameters of `model` that are in none of the parameter `groups`, in the model's order.

    Args:
        groups: an optimizer's `param_groups`, or `Routing.groups`.
    """
    held = {id(p[1] if isinstance(p, tuple) else p) for group in groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]


def head_groups(
    model: nn.Module, config: MethodConfig, names: list[str], heads: Mapping[str, HeadLayout] | None
) -> dict[str, dict[str, Any]]:
    """What groups say of the attention weights among `names` whose heads share a basis, by name."""
    shared = getattr(config, "cross_heads", None)
    if heads and not shared:
        none = "has no heads to share" if shared is None else "has cross_heads=[]"
        raise ValueError(f"heads is given, but {config.name} {none}: leave it out")
    if not shared:
        return {}
    layouts = attention_layouts(model, names, roles=shared, given=heads)
    groups = {name: layout.group(name, shared) for name, layout in layouts.items()}
    return {name: group for name, group in groups.items() if group is not None}


def group_parameters(
    model: nn.Module,
    config: MethodConfig,
    overrides: Mapping[str, str] | None = None,
    ranks: Mapping[str, int | float | None] | None = None,
    heads: Mapping[str, HeadLayout] | None = None,
    scaling: Mapping[str, Multipliers] | None = None,
) -> Routing:
    """Parameter groups for `model` under `config`: by role and rule, every trainable parameter in exactly one.

    Methods with `cross_heads` have groups of their own for the attention weights of one layout, and so have parameters
    whose rate, decay or eps a rule of scale multiplies alike. The group's values are the products, which schedules
    multiply further.

    Args:
        ranks: name of a matrix → its own rank, or None where it is to be stepped element by element.
        heads: regular expression on a name → the layout of its heads, where that cannot be found.
        scaling: name of a parameter → its factors.

    Raises:
        ValueError: for a parameter without factors where others have some, for a rank of something that the method does
            not project, for factors of LoRA that it would and
            weights that have such factors, and as in `stepped_matrices`.
    """
    role = roles(model, overrides)
    parameters = dict(model.named_parameters())
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    names = [name for name, p in parameters.items() if p.requires_grad]
    chosen = set(stepped_matrices(model, config, overrides))
    ranks = ranks or {}
    if ranks and not isinstance(config, RankedConfig):
        raise ValueError(f"ranks: {config.name or type(config).__name__} projects nothing: leave them out")
    for name in ranks:
        if name not in chosen:
            raise ValueError(f"ranks: {name!r} is no matrix that {config.name} projects here: remove it or target it")
    projected = [name for name in names if name in chosen and (name not in ranks or ranks[name] is not None)]
    if config.projects:
        refuse_factors(projected, config)
        refuse_adapted(projected, names, config)
    layouts = head_groups(model, config, projected, heads)
    embedding_lr = config.lr if config.embedding_lr is None else config.embedding_lr
    vector_lr = embedding_lr if config.vector_lr is None else config.vector_lr
    rate = dict.fromkeys((Role.MATRIX, Role.COEFFICIENT), config.lr)
    rate |= {Role.EMBEDDING: embedding_lr, Role.HEAD: embedding_lr, Role.VECTOR: vector_lr}
    groups: dict[tuple[Role, bool, str, Multipliers | None], dict[str, Any]] = {}
    for name in names:
        own = name in chosen
        factors = _factors(name, scaling)
        key = (role[name], own, repr(layouts.get(name)), factors)
        if key not in groups:
            group = config.group()
            of = factors or Multipliers()
            kind = f":{of.kind}" if of.kind else ""
            if "rank" in group and not own:
                group["rank"] = None
            group |= {
                "params": [],
                "ranks": [] if own and ranks else None,
                "elementwise": not own,
                "role": key[0].value,
                "label": f"{key[0].value}{kind}/{config.name if own else 'adamw'}",
                "lr": (config.lr if own else rate[key[0]]) * of.lr,
                "weight_decay": 0.0 if key[0] in ELEMENTWISE else config.weight_decay * of.weight_decay,
                "eps": config.eps * of.eps,
                **layouts.get(name, {}),
            }
            groups[key] = group
        groups[key]["params"].append((name, parameters[name]))
        if groups[key]["ranks"] is not None:
            groups[key]["ranks"].append(ranks.get(name, groups[key]["rank"]))
    return Routing(groups=list(groups.values()), frozen=frozen)


def _factors(name: str, scaling: Mapping[str, Multipliers] | None) -> Multipliers | None:
    """The factors of a parameter; None where a group's values stay as they are, so that its groups do as well."""
    if scaling is None:
        return None
    if name not in scaling:
        raise ValueError(f"scaling knows no class of {name}: classify the model that is to be trained")
    found = scaling[name]
    if found.in_groups == (1.0, 1.0, 1.0):
        return None
    return replace(found, init=1.0, forward=1.0)  # of which a group knows nothing
