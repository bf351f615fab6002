"""A torch optimizer that steps matrices by a low-rank rule and everything else by AdamW."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thinrank.optim.axis import Axis
from thinrank.optim.bucket import Bucket, Layout
from thinrank.optim.exchange.shards import Span
from thinrank.optim.inner.elementwise import ElementwiseAdamW
from thinrank.optim.inner.half import HalfWeights
from thinrank.optim.lowrank.subspace import width
from thinrank.optim.matrix import MatrixView, matrix_views
from thinrank.optim.methods.config import MethodConfig
from thinrank.optim.multipliers import KEYS
from thinrank.optim.own_ranks import ranks_of
from thinrank.optim.rule import MatrixRule, State, key_of
from thinrank.optim.stepping import Stepping

BATCH_BYTES = 64 * 2**20
"""Largest float32 gradient batch that is stacked; the copy is transient memory, so it has a bound."""

CPU_BATCH_BYTES = 2 * 2**20
"""The same on a CPU, where a batch pays only while it stays in the cache. On the 130M preset's shapes (2.4 MB and more
each, so one by one, without a copy) a step is a fifth to a third faster than with 64 MiB, on two cores."""


def batch_size(elements: int, device: torch.device) -> int:
    """How many parameters of so many elements are stepped together."""
    limit = CPU_BATCH_BYTES if device.type == "cpu" else BATCH_BYTES
    return max(1, limit // (4 * elements))


GROUP_EXTRAS: dict[str, Any] = {
    "elementwise": False, "role": "", "label": "", "ranks": None, "lr_multipliers": None, "decay_multipliers": None,
    "sections": None, "sections_along": "rows", "blocks": 1, "seed": 0,
}  # fmt: skip

POSITIONAL = ("lr", "betas", "eps", "weight_decay")
"""Arguments that may be given by position, in the order of torch's AdamW."""

ABSENT = ("maximize", "amsgrad", "capturable", "differentiable")
"""Switches of torch's optimizers that change what a step does and that a step here does not know."""


class MatrixOptimizer(Stepping):
    """Base of all optimizers of the suite; the subclass says which method's rooms its groups are built from.

    A parameter group is stepped by the method's rule for matrices wherever a parameter has at least two dimensions,
    unless the group says `elementwise=True` (or, where the method has a rank, `rank=None`); everything else is stepped
    by AdamW. All tunable values live in the group, all state is named tensors that exist with their final shapes from
    construction on.

    Group keys beside the method's own: `elementwise`, `ranks` (a rank for each parameter in the place of the group's
    `rank`; None: stepped by AdamW), `lr_multipliers` and `decay_multipliers` (a number for each parameter, by which its
    learning rate and its weight decay are multiplied; None: ones; `set_multipliers`), `sections` (row counts of a fused
    weight whose parts are their own matrices; column counts with `sections_along="columns"`), `blocks` (equal parts of
    each section, such as heads), `seed` (of every random choice), `role` and `label` (for reports).

    Args:
        params: parameters, pairs of name and parameter, or groups, as in torch.
        settings: the fields of `Config` that a group carries (`inspect.signature` lists them with their defaults; their
            meaning is in the configuration). `lr`, `betas`, `eps` and `weight_decay` may be given by position.
        seed: of every random choice of the method.

    Attributes:
        measure: set it to have the next step fill `measured`; it makes the host wait for the device, so leave it off
            otherwise.
        measured: by parameter name `captured_energy`, `subspace_overlap` (the share of the old subspace that is in the
            new one, of the last renewal since the step that measured before) and, where groups have `ranks`, `rank`;
            by group label `update_rms` and `effective_lr`.
        skipped_renewals: how often since construction or loading a parameter kept its old subspace because its gradient
            was not finite or its factorisation did not converge, by name; the first of each kind is logged. Methods
            that renew at every step leave their counts on the device: on a GPU they are logged in a step with
            `measure`, or when this is read, and the host then waits.
    """

    Config: ClassVar[type[MethodConfig]]
    OWN_DEFAULTS: ClassVar[dict[str, Any]] = {}
    """Where the class's defaults differ from the configuration's."""
    ALIASES: ClassVar[dict[str, str]] = {}
    """Other names for keys of a parameter group, as the authors' package has them."""

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            cls.__signature__ = _signature({**cls.Config.defaults(), **cls.OWN_DEFAULTS})

    def __init__(self, params: Iterable[Any], *settings: Any, seed: int = 0, **named: Any) -> None:
        try:
            bound = self.__signature__.bind(params, *settings, seed=seed, **named)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        bound.apply_defaults()
        given = {key: value for key, value in bound.arguments.items() if key != "params"}
        self._forget()
        super().__init__(params, {**GROUP_EXTRAS, **given})
        self._shard_if_cut()

    def _forget(self) -> None:
        """Drops what can be recomputed."""
        super()._forget()
        self._forget_gradients()
        self._layouts: list[Layout] | None = None
        self._seen: dict[Tensor, State] = {}
        self._rules: dict[tuple[Any, ...], tuple[MatrixRule | None, ElementwiseAdamW]] = {}
        self._clamped = False
        self._numbers = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for key, value in {**self.Config.defaults(), **GROUP_EXTRAS}.items():
                group.setdefault(key, value)

    # --- construction -----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch, and creates its state; refuses bad values before anything is changed."""
        for other, key in self.ALIASES.items():
            if other in param_group:
                if key in param_group:
                    raise ValueError(f"{type(self).__name__}: {other} is another name for {key}: give one of the two")
                param_group = {(key if name == other else name): value for name, value in param_group.items()}
        if self._apart:
            raise ValueError(
                f"{type(self).__name__} has already decided which rank steps what: give it all groups at construction"
            )
        for key in ABSENT:
            if param_group.get(key):
                raise ValueError(f"{type(self).__name__} has no {key}: leave it out of the parameter group")
        trial = {**self.defaults, **param_group}
        try:
            self.Config.of_group(trial)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        index = len(self.param_groups) - 1
        if not group["label"]:
            group["label"] = f"group{index}"
        try:
            self._refuse_ranks(group)
            self._refuse_multipliers(group, self.names(index))
            for name, param, rank in zip(self.names(index), group["params"], ranks_of(group), strict=True):
                self._refuse(name, param)
                self.state[param] = self._initial_state(name, self._like(param), group, rank)
        except Exception:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise
        self._layouts = None

    def names(self, index: int) -> list[str]:
        """Names of the parameters of group `index`: the model's where they were given, else by position."""
        group = self.param_groups[index]
        given = group.get("param_names")
        return list(given) if given else [f"{index}.{i}" for i in range(len(group["params"]))]

    def _refuse(self, name: str, param: Tensor) -> None:
        if param.is_complex():
            raise NotImplementedError(
                f"{type(self).__name__} steps real parameters; {name} is complex: use its view_as_real"
            )
        if not param.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} steps floating-point parameters; {name} is {param.dtype}: freeze it"
            )

    def rules(
        self, group: Mapping[str, Any], section: int = 0, rank: int | float | None = None
    ) -> tuple[MatrixRule | None, ElementwiseAdamW]:
        """The rule for matrices (None: like everything else) and the one for everything else, by `group`'s values.

        Args:
            section: of a fused weight, where the method treats its sections differently.
            rank: of the matrices in question; None: the group's own or, where it has none, the first of its `ranks`.
        """
        if rank is None and self._ranked:
            rank = next((r for r in (group["rank"], *(group["ranks"] or ())) if r is not None), None)
        own = {"rank": rank} if self._ranked else {}
        values = (group["elementwise"], section, *(repr(own.get(key, group[key])) for key in self.Config.GROUP))
        if values not in self._rules:
            kinds = (len(g["sections"] or (0,)) * (1 + len(set(g["ranks"] or ()))) for g in self.param_groups)
            if len(self._rules) > sum(kinds):
                self._rules.clear()  # a schedule that moves betas asks for a new rule at every step
            config = self.Config.of_group({**group, **own, "lr": 0.0, "weight_decay": 0.0}).of_section(section)
            self._rules[values] = (None if group["elementwise"] else config.matrix_rule(), config.element_rule())
        return self._rules[values]

    def _views(self, param: Tensor, group: Mapping[str, Any], rank: int | float | None) -> tuple[MatrixView, ...]:
        """The matrices that a parameter of `group` with this rank is seen as; () where it is none."""
        if param.ndim < 2 or param.numel() == 0 or (rank is None and group["ranks"] is not None):
            return ()
        if self.rules(group, rank=rank)[0] is None:
            return ()
        return matrix_views(
            tuple(param.shape),
            group.get("proj_type", "std"),
            sections=group["sections"],
            blocks=group["blocks"],
            along=group["sections_along"],
        )

    def _initial_state(self, name: str, param: Tensor, group: Mapping[str, Any], rank: int | float | None) -> State:
        views = self._views(param, group, rank)
        if not views:
            return self.rules(group)[1].init(param)
        self._warn_if_clamped(name, views, rank)
        state: State = {"step": torch.zeros((), dtype=torch.float32, device="meta" if param.is_meta else "cpu")}
        for i, view in enumerate(views):
            rule, _ = self.rules(group, i, rank)
            assert rule is not None  # the sections of a group have rules of one kind
            for key, value in rule.init((view.blocks, *view.shape), param.device).items():
                state[_prefix(views, i) + key] = value if view.blocks > 1 else value[0]
        return state | HalfWeights(group["half_weights"]).init(param)

    def _warn_if_clamped(self, name: str, views: tuple[MatrixView, ...], rank: int | float | None) -> None:
        for view in views:
            shape = (view.blocks, *view.shape)
            if not self._clamped and rank is not None and rank >= 1 and width(rank, shape) < int(rank):
                if isinstance(rank, float) and rank == 1.0:
                    continue
                self._clamped = True
                warnings.warn(
                    f"rank {rank} is above the {width(rank, shape)} directions that {name} has; "
                    "it and others like it are stepped with all of them",
                    stacklevel=6,
                )

    # --- equal matrices together --------------------------------------------------------------------------------------

    def _assembled(self) -> list[Layout]:
        """The layout of every group, stacked anew where somebody has replaced states since the last step."""
        if self._layouts is None or not self._untouched():
            self._layouts = [self._assemble(index) for index in range(len(self.param_groups))]
            stepped = [p for layout in self._layouts for bucket in layout.buckets for p in bucket.params]
            self._moved()
            self._seen = {p: dict(self.state[p]) for p in stepped}
        return self._layouts

    def _untouched(self) -> bool:
        # frameworks that move states to a device put new tensors, or new dictionaries, in the place of our views
        return all(
            len(self.state[p]) == len(own) and all(self.state[p].get(key) is value for key, value in own.items())
            for p, own in self._seen.items()
        )

    def _assemble(self, index: int) -> Layout:
        group = self.param_groups[index]
        members: dict[
            tuple[MatrixView, int, str, Any, Any, Any, bool, tuple[Span, ...], Axis | None],
            list[tuple[torch.nn.Parameter, str]],
        ] = {}
        rest: list[tuple[torch.nn.Parameter, int]] = []
        for name, param, rank in zip(self.names(index), group["params"], ranks_of(group), strict=True):
            if not self._has_place(param):
                continue
            like = self._like(param)
            views = self._views(like, group, rank)
            if not views:
                rest.append((param, key_of(name)))
            for i, view in enumerate(views):
                kind = (
                    view,
                    i,
                    _prefix(views, i),
                    rank,
                    like.dtype,
                    param.device,
                    self._mine(param),
                    self._cut_at(param),
                    self._axis(param),
                )
                members.setdefault(kind, []).append((param, name))
        buckets = []
        for (view, section, prefix, rank, *_, axis), found in members.items():
            most = batch_size(view.blocks * view.shape[0] * view.shape[1], found[0][0].device)
            starts = range(0, len(found), most)
            for start in starts:
                part = found[start : start + most]
                states = [self.state[param] for param, _ in part]
                here = view if axis is None else self._rows_here(part[0][0], view)
                buckets.append(Bucket.of(part, states, here, prefix, section, rank, axis))
        return Layout(buckets, rest)

    # --- state ------------------------------------------------------------------------------------------------------

    def matrices(self, index: int) -> list[list[tuple[MatrixRule, tuple[int, int, int]]]]:
        """For each parameter of group `index` the rule and the shape (blocks, long, short) of each matrix that it is
        seen as; [] for one that is stepped element by element."""
        group = self.param_groups[index]
        found = []
        for param, rank in zip(group["params"], ranks_of(group), strict=True):
            shown: list[tuple[MatrixRule, tuple[int, int, int]]] = []
            for section, view in enumerate(self._views(param, group, rank)):
                rule, _ = self.rules(group, section, rank)
                assert rule is not None  # there are views for matrix rules only
                shown.append((rule, (view.blocks, *view.shape)))
            found.append(shown)
        return found

    @torch.no_grad()
    def forget(self, params: Iterable[Tensor]) -> None:
        """The state of `params` becomes, in place, what it was before the first step, for who has put others there.

        In several processes all call it.

        Raises:
            ValueError: for a parameter that is not stepped here; nothing is changed then.
        """
        wanted = list(params)
        members = {param: (name, group, rank) for name, param, group, rank in self._members()}
        for param in wanted:
            if param not in members:
                raise ValueError(f"{type(self).__name__} does not step the {tuple(param.shape)} that it is to forget")
        for param in wanted:
            name, group, rank = members[param]
            for key, value in self._own_state(name, param, group, rank).items():
                self.state[param][key].copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` gave: checked whole first, then copied into the existing tensors, dtypes kept.

        Matrices that had ranks of their own (`ranks`) have them again afterwards, in new tensors.

        Raises:
            ValueError: when groups, state names or shapes differ; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        saved = state_dict["param_groups"]
        remedy = "build the optimizer with the configuration that it was saved with"
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(
                f"the saved optimizer state has other parameter groups than {type(self).__name__} here: {remedy}"
            )
        places: list[tuple[str, Tensor, State, State, Mapping[str, Any], dict[str, Any], int | float | None]] = []
        for index, (old, new) in enumerate(zip(saved, self.param_groups, strict=True)):
            ranked = {**new, "ranks": old.get("ranks")}
            try:
                self._refuse_ranks(ranked)
                self._refuse_multipliers({**new, **{key: old.get(key) for key in KEYS}}, self.names(index))
            except ValueError as error:
                raise ValueError(f"the saved optimizer state does not fit ({error}): {remedy}") from None
            keys = zip(self.names(index), old["params"], new["params"], ranks_of(ranked), ranks_of(new), strict=True)
            for name, key, param, rank, held in keys:
                mine = self.state[param] if rank == held else self._own_state(name, param, ranked, rank)
                whole = self._initial_state(name, self._like(param).to("meta"), ranked, rank) if self._apart else mine
                places.append((name, param, mine, whole, state_dict["state"].get(key, {}), ranked, rank))
        for name, _, _, whole, state, *_ in places:
            mine = {key: tuple(value.shape) for key, value in whole.items()}
            theirs = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
            if mine != theirs:
                raise ValueError(f"the saved optimizer state of {name} is {theirs}, not {mine}: {remedy}")
        for _, param, own, _, state, ranked, rank in places:
            self._load(param, state, own, ranked, rank)
            self.state[param] = own
        groups = []
        for old, new in zip(saved, self.param_groups, strict=True):
            values = copy.deepcopy({key: value for key, value in old.items() if key != "params"})
            groups.append({**new, "ranks": None, **dict.fromkeys(KEYS), **values, "params": new["params"]})
        hooks, stepping = self._hooks, self.steps_in_backward
        self.__setstate__({"state": self.state, "param_groups": groups})
        self._hooks, self.steps_in_backward = hooks, stepping
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _prefix(views: tuple[MatrixView, ...], index: int) -> str:
    return f"{index}." if len(views) > 1 else ""


def _signature(defaults: Mapping[str, Any]) -> inspect.Signature:
    kinds = inspect.Parameter
    first = [name for name in POSITIONAL if name in defaults]
    rest = {**{name: value for name, value in defaults.items() if name not in first}, "seed": 0}
    return inspect.Signature(
        [
            kinds("params", kinds.POSITIONAL_OR_KEYWORD),
            *(kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=defaults[name]) for name in first),
            *(kinds(name, kinds.KEYWORD_ONLY, default=value) for name, value in rest.items()),
        ]
    )
