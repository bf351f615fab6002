"""Ranks that an optimizer's matrices have each for themselves: given, shared out by spectra, and changed on the way."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from thinrank.optim.allocation import Allocation, Matrix, rank_spread, share_out
from thinrank.optim.bucket import Layout
from thinrank.optim.matrix import MatrixView
from thinrank.optim.methods.config import ALLOCATIONS, MethodConfig, choice, whole_steps
from thinrank.optim.remembering import Remembering
from thinrank.optim.resize import resized
from thinrank.optim.rule import State

_log = logging.getLogger(__name__)


class OwnRanks(Remembering):
    """What an optimizer of matrices does about ranks: they lie in a group's `ranks`, one for each of its parameters."""

    Config: ClassVar[type[MethodConfig]]
    _layouts: list[Layout] | None

    @abstractmethod
    def _views(self, param: Tensor, group: Mapping[str, Any], rank: int | float | None) -> tuple[MatrixView, ...]: ...

    @abstractmethod
    def _like(self, param: Tensor) -> Tensor: ...

    @abstractmethod
    def _own_state(self, name: str, param: Tensor, group: dict[str, Any], rank: int | float | None) -> State: ...

    @abstractmethod
    def _initial_state(self, name: str, param: Tensor, group: Mapping[str, Any], rank: int | float | None) -> State: ...

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_allocation": self._allocation}

    def ranks(self) -> dict[str, int | float | None]:
        """The ranks of one's own that matrices have, by name; {} where every one has its group's.

        With them `route` shows what is here, and `reallocate` gives it to another optimizer.
        """
        found: dict[str, int | float | None] = {}
        for index, group in enumerate(self.param_groups):
            matrices = zip(self.names(index), group["params"], group["ranks"] or (), strict=group["ranks"] is not None)
            found |= {name: rank for name, param, rank in matrices if param.ndim >= 2}
        return found

    def directions(self) -> dict[str, int]:
        """How many directions every projected matrix has, by name (of several in one weight: the most)."""
        return {matrix.name: matrix.directions(matrix.held) for matrix in self._matrices()}

    def allocate_ranks(self, spectra: str, *, every: int | None = None) -> None:
        """Shares out, within what each group's `rank` for all its matrices would cost, a rank for each matrix.

        One threshold on the singular values of all matrices together decides (`thinrank.optim.allocation.share_out`;
        WeLore, Jaiswal et al. 2024, arXiv 2407.11239, for weights; the budget, and gradients, are ours). The groups
        stay as they are and say the result as `ranks`, which a checkpoint therefore holds, and `load_state_dict`
        restores. Nothing is shared out again then before the next turn of `every`.

        Every process decides for itself: under DDP, where gradients are averaged and weights equal before `step`, all
        decide alike, as they must for their bases, too.

        Args:
            spectra: `gradient`: at the beginning of the next `step`, of the gradients that it is given; matrices
                without a gradient that is finite and not zero keep their rank. `weight`: now. `uniform`: not any more.
            every: allocate anew after so many updates (a multiple of `update_proj_gap` has new directions chosen at
                once). Ranks that would change by a quarter or less then stay as they are, within the budget.

        Raises:
            ValueError: for bad values, a method without a rank, weights on the meta device, and `gradient` with
                `in_backward`.
        """
        choice("spectra", spectra, ALLOCATIONS)
        if every is not None:
            whole_steps("every", every)
        if spectra == "uniform":
            self._allocation = None
            return
        if not self._ranked:
            raise ValueError(f"{type(self).__name__} has no rank to share out: leave allocate_ranks out")
        if spectra == "gradient" and (self._hooks is not None or self._meeting is not None):
            raise ValueError(
                "ranks are shared out by whole gradients, which in_backward and replicate do not keep until step: use "
                "spectra='weight', or in_backward('off') first"
            )
        if spectra == "weight":
            self._share_out(spectra, steady=False)
        self._allocation = Allocation(spectra, every)

    def _allocate_if_due(self, spectra: str) -> None:
        """Whether it is time is read off groups and step counts, so that a resumed run needs no state for it."""
        if self._allocation is None or self._allocation.spectra != spectra:
            return
        layouts = list(zip(self.param_groups, self._assembled(), strict=True))
        if any(group["ranks"] is None and layout.buckets for group, layout in layouts):
            self._share_out(spectra, steady=False)
        elif self._allocation.every is not None:
            count = max((int(b.counts.max()) for _, layout in layouts for b in layout.buckets), default=0)
            if count > 0 and count % self._allocation.every == 0:
                self._share_out(spectra, steady=True)

    @torch.no_grad()
    def _share_out(self, spectra: str, *, steady: bool) -> None:
        matrices = list(self._matrices(spectra))
        for matrix in matrices:
            if matrix.source is not None and matrix.source.is_meta:
                raise ValueError(
                    f"ranks are shared out by weights, and {matrix.name} is on the meta device: give it values before"
                )
        ranks = share_out(matrices, steady=steady)
        if not ranks:
            return
        self.reallocate(ranks)
        spread = rank_spread(self.directions().values())
        _log.info("ranks by the spectra of the %ss: least, median and most are %s", spectra, spread)

    def _matrices(self, spectra: str = "") -> Iterator[Matrix]:
        """Every projected matrix with its rank, and the `weight` or `gradient` whose spectrum is asked for."""
        for index, group in enumerate(self.param_groups if self._ranked else ()):
            for name, param, rank in zip(self.names(index), group["params"], ranks_of(group), strict=True):
                views = self._views(self._like(param), group, rank)
                if views and rank is not None:
                    yield Matrix(
                        name=name,
                        views=views,
                        source={"weight": param, "gradient": param.grad}.get(spectra),
                        rank=rank if group["rank"] is None else group["rank"],
                        held=rank,
                        seed=group["seed"],
                    )

    @torch.no_grad()
    def reallocate(self, ranks: Mapping[str, int | float | None]) -> None:
        """Goes on with other ranks, in place: groups, learning rates, schedulers and hooks stay.

        A smaller rank keeps the first directions with their moments; a larger one adds directions with moments of zero,
        which take up to (1−β1)/sqrt(1−β2) learning rates at first, since a matrix has one step count. (A random
        projection, APOLLO's, is another one at another rank: moments are kept as at its renewals.) What else a
        matrix remembers is kept; one that changes between projected and element by element starts anew.

        Args:
            ranks: rank of matrices by name (as in `ranks()`, or in `names`), None: stepped element by element; the
                others keep theirs.

        Raises:
            ValueError: for a name that is no matrix here, or a bad rank; nothing is changed then.
            RuntimeError: between a backward that has left coordinates (`in_backward`) and `step`.
        """
        if not self._ranked:
            raise ValueError(f"{type(self).__name__} has no rank: leave reallocate out")
        if self._images:
            raise RuntimeError("backward has left coordinates in the old subspaces: reallocate after step or zero_grad")
        unknown = dict(ranks)
        changes: list[tuple[dict[str, Any], list[Any]]] = []
        states: dict[Tensor, State] = {}
        for index, group in enumerate(self.param_groups):
            before = ranks_of(group)
            own = [
                not group["elementwise"] and name in ranks and param.ndim >= 2
                for name, param in zip(self.names(index), group["params"], strict=True)
            ]
            if not any(own):
                continue
            named = zip(self.names(index), own, before, strict=True)
            after = [ranks[name] if given else rank for name, given, rank in named]
            trial = {**group, "ranks": after}
            self._refuse_ranks(trial)
            changes.append((group, after))
            for i, name in enumerate(self.names(index)):
                if own[i]:
                    unknown.pop(name, None)
                if own[i] and after[i] != before[i]:
                    param = group["params"][i]
                    states[param] = resized(self.state[param], self._own_state(name, param, trial, after[i]))
        if unknown:
            raise ValueError(
                f"ranks: {next(iter(unknown))!r} is no matrix that {type(self).__name__} projects here: remove it"
            )
        for group, after in changes:
            group["ranks"] = after
        self.state.update(states)
        self._layouts = None

    def _refuse_ranks(self, group: Mapping[str, Any]) -> None:
        ranks, name = group["ranks"], type(self).__name__
        if ranks is None:
            return
        if not self._ranked:
            raise ValueError(f"{name} has no rank: leave ranks out of the parameter group")
        if not isinstance(ranks, (list, tuple)) or len(ranks) != len(group["params"]):
            raise ValueError(
                f"{name}: ranks must be a list of one rank for each of the {len(group['params'])} parameters of the "
                f"group, got {ranks!r}"
            )
        try:
            for rank in dict.fromkeys(ranks):
                self.Config.of_group({**group, "rank": rank})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None

    @property
    def _ranked(self) -> bool:
        """True when the method has a rank."""
        return "rank" in self.Config.GROUP


def ranks_of(group: Mapping[str, Any]) -> list[int | float | None]:
    """The rank of every parameter of a group; None where it has none."""
    own = group["ranks"]
    return list(own) if own is not None else [group.get("rank")] * len(group["params"])
