"""Gradients that are taken the moment backward has finished them, so that few are ever alive together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from thinrank.optim.allocation import Allocation
from thinrank.optim.bucket import Bucket, Layout
from thinrank.optim.exchange import local
from thinrank.optim.inner.elementwise import ElementwiseAdamW
from thinrank.optim.linalg.products import fast_products
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.methods.config import choice, number
from thinrank.optim.multipliers import Multiplied
from thinrank.optim.rule import MatrixRule, Probe, Step

MODES = ("off", "project", "step")


def whole_because(rule: MatrixRule | None) -> str | None:
    """Why the updates of `rule` need whole gradients, in words; None where coordinates are enough, or no rule is."""
    if isinstance(rule, LowRank):
        return rule.whole_because
    return None if rule is None else "its step reads the gradient itself and not its coordinates in a basis that stays"


class Images:
    """Gradients kept as what their updates need of them: coordinates in the subspace instead of whole matrices."""

    def __init__(self) -> None:
        self._parts: dict[Tensor, dict[str, dict[str, Tensor]]] = {}

    def __contains__(self, param: Tensor) -> bool:
        return param in self._parts

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, param: Tensor, prefix: str, image: dict[str, Tensor]) -> None:
        """Adds the image of one more part of the gradient of (the view `prefix` of) `param`."""
        mine = self._parts.setdefault(param, {})
        if prefix not in mine:
            mine[prefix] = image
        else:
            for key, value in image.items():
                mine[prefix][key].add_(value)

    def stacked(self, params: Iterable[Tensor], prefix: str) -> dict[str, Tensor]:
        """The images of equal matrices as one batch."""
        images = [self.of(param, prefix) for param in params]
        return {key: torch.cat([image[key] for image in images]) for key in images[0]}

    def of(self, param: Tensor, prefix: str) -> dict[str, Tensor]:
        """The image of (the view `prefix` of) `param`."""
        return self._parts[param][prefix]

    def params(self) -> list[Tensor]:
        return list(self._parts)

    def tensors(self) -> list[Tensor]:
        """Everything that is linear in the gradients, for scaling: all of it."""
        return [value for parts in self._parts.values() for image in parts.values() for value in image.values()]

    def clear(self) -> None:
        self._parts.clear()


class Hooks:
    """Calls `take(param)` whenever backward has finished the gradient of one of `params`, until removed."""

    def __init__(self, params: Iterable[Tensor], take: Callable[[Tensor], None]) -> None:
        self._handles = [p.register_post_accumulate_grad_hook(take) for p in params if p.requires_grad]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class InBackward(Multiplied):
    """What an optimizer of matrices does with gradients before `step`: nothing, unless it is told to (`in_backward`).

    Attributes:
        accumulating: set it while gradients are to add up in full and not to be stepped in backward.
        dropped_gradients: how many gradients that were not finite were dropped in backward.
        steps_in_backward: whether weights are stepped there (`in_backward("step")`).
    """

    _allocation: Allocation | None = None

    def _forget_gradients(self) -> None:
        self._images = Images()
        self._hooks: Hooks | None = None
        self.steps_in_backward = False
        self._max_norm: float | None = None
        self._moved()
        self.accumulating = False
        self.dropped_gradients = 0

    def _moved(self) -> None:
        """To be called when the layouts are new."""
        self._places: dict[Tensor, list[tuple[dict[str, Any], Bucket, int]]] = {}
        self._alone: dict[Tensor, tuple[dict[str, Any], int]] = {}

    @abstractmethod
    def rules(
        self, group: Mapping[str, Any], section: int = 0, rank: int | float | None = None
    ) -> tuple[MatrixRule | None, ElementwiseAdamW]: ...

    @abstractmethod
    def _assembled(self) -> list[Layout]: ...

    @abstractmethod
    def _hear(self, bucket: Bucket, active: list[int], step: Step) -> None: ...

    @abstractmethod
    def _step_bucket(
        self, bucket: Bucket, active: list[int], rule: MatrixRule, group: dict[str, Any], probe: Probe | None
    ) -> None: ...

    @abstractmethod
    def _step_rest(
        self,
        rest: list[tuple[torch.nn.Parameter, int]],
        rule: ElementwiseAdamW,
        group: dict[str, Any],
        probe: Probe | None,
    ) -> None: ...

    def in_backward(self, mode: str, *, max_norm: float | None = None) -> None:
        """Takes every gradient the moment backward has finished it, so that few are ever alive together.

        `project`: what is kept of a matrix's gradient are its coordinates in the subspace (and, for GaLore+, its
        entries in S). They add up over backward passes as gradients do, until `step` or `zero_grad`, so that
        accumulation and clipping work; training loops stay as they are. The update is that of `off`, with one
        difference: a renewal, and GaLore+'s search for entries, sees the gradient of the first backward pass before it
        is clipped, and not the sum; what they chose stays chosen when `zero_grad` throws that gradient away. Only for
        methods whose update needs nothing else of a gradient. Other parameters keep their gradients.

        `step`: every parameter is stepped inside of backward and its gradient freed, for any method. `step()` then has
        nothing left to do. The gradient of each parameter is scaled to a norm of at most `max_norm` by itself,
        since the norm of all is not known then; one that is not finite is dropped and counted in `dropped_gradients`.
        While `accumulating` is True, gradients are left to add up.

        `off`: as torch does (the default).

        It needs gradients that are complete after backward: one process. DDP averages them later, and `replicate` frees
        them by itself.

        Raises:
            ValueError: for another mode, a method that `project` does not suit, `max_norm` without `step`, replicas
                (`replicate`), and ranks that are shared out by gradients (`allocate_ranks`), which are not there when
                they would be looked at.
        """
        choice("mode", mode, MODES)
        if max_norm is not None:
            number("max_norm", max_norm, open_low=True)
            if mode != "step":
                raise ValueError(f"max_norm={max_norm:g} is for mode 'step', got {mode!r}: use clip_grad_norm_ instead")
        if mode != "off" and self._allocation is not None and self._allocation.spectra == "gradient":
            raise ValueError(
                f"ranks are shared out by whole gradients, which mode {mode!r} does not keep until step: use "
                "rank_allocation='weight', or mode 'off'"
            )
        if mode == "project":
            for group in self.param_groups:
                cause = whole_because(self.rules(group)[0])
                if cause is not None:
                    raise ValueError(
                        f"{type(self).__name__} needs whole gradients, with the settings of group {group['label']}, "
                        f"because {cause}; mode 'project' keeps coordinates alone: use mode 'step'"
                    )
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self._images.clear()
        self._max_norm = max_norm
        self.steps_in_backward = mode == "step"
        if mode != "off":
            params = [p for group in self.param_groups for p in group["params"]]
            self._hooks = Hooks(params, self._take_image if mode == "project" else self._step_now)

    @torch.no_grad()
    def _take_image(self, param: Tensor) -> None:
        whole = self._gradient(param)
        if whole is None or param not in self._homes:
            return
        first = param not in self._images
        for group, bucket, i in self._homes[param]:
            rule, _ = self.rules(group, bucket.section, bucket.rank)
            assert isinstance(rule, LowRank)  # in_backward has looked
            state = bucket.state([i])
            grad = local.bring([whole], bucket.view)
            step = bucket.step([i], group)
            with fast_products(param.device):
                image = rule.image(grad, state, step, first=first)
            self._images.add(param, bucket.prefix, image)
            self._hear(bucket, [i], step)
        self._let_go(param)

    def _gradient(self, param: Tensor) -> Tensor | None:
        """The gradient by which `param` is stepped here and now."""
        return param.grad

    def _let_go(self, param: Tensor) -> None:
        """Frees a gradient of which what is needed has been kept."""
        param.grad = None

    @torch.no_grad()
    def _step_now(self, param: Tensor) -> None:
        if self.accumulating or param.grad is None:
            return
        norm = torch.linalg.vector_norm(param.grad)
        if not bool(torch.isfinite(norm)):  # the host waits: afterwards nobody could undo the step
            self.dropped_gradients += 1
            param.grad = None
            return
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_([param], self._max_norm, norm)
        for group, bucket, i in self._homes.get(param, []):
            rule, _ = self.rules(group, bucket.section, bucket.rank)
            assert rule is not None  # buckets are made for groups with a matrix rule only
            self._step_bucket(bucket, [i], rule, group, None)
        if param in self._alone:
            group, key = self._alone[param]
            self._step_rest([(cast("torch.nn.Parameter", param), key)], self.rules(group)[1], group, None)
        param.grad = None

    @property
    def _homes(self) -> dict[Tensor, list[tuple[dict[str, Any], Bucket, int]]]:
        """Where the matrices of a parameter are stepped."""
        layouts = self._assembled()
        if not (self._places or self._alone):
            for group, layout in zip(self.param_groups, layouts, strict=True):
                self._alone |= {param: (group, key) for param, key in layout.rest}
                for bucket in layout.buckets:
                    for i, param in enumerate(bucket.params):
                        self._places.setdefault(param, []).append((group, bucket, i))
        return self._places

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; forgets what backward has left as coordinates, too."""
        super().zero_grad(set_to_none)
        self._images.clear()

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that are held: whole ones or pieces, and coordinates (and entries) in the place of
        others."""
        return sum(each.numel() * each.element_size() for each in (*self._lying_here(), *self._images.tensors()))

    def _lying_here(self) -> list[Tensor]:
        """Gradients in the memory of this rank; a framework may have more of its own."""
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Norm of all gradients of this optimizer's parameters (scalar); of what is left of them where that is less.

        That is, with `in_backward("project")`, a matrix's projection and, of the rest, the entries that GaLore+ steps
        by themselves: `sqrt(‖P‖² + ‖(G − P)_S‖²)`, P being what the coordinates stand for. Both parts are orthogonal,
        so nothing is counted twice, the norm is never above the gradient's, and with all entries it is the gradient's.
        """
        return self._norm_left()

    @property
    def knows_norm(self) -> bool:
        """Whether `gradient_norm` can be asked: False where replicas exchange coordinates and no norms."""
        return True

    @torch.no_grad()
    def gradients_are_finite(self) -> Tensor:
        """Whether all that `step` would use of gradients are finite numbers (bool scalar), on every rank alike.

        Where `gradient_norm` can be asked, whether that is finite. A gradient with an entry that is none has
        coordinates that are none, but where a basis leaves the entry's column out, and the step with it.
        """
        return torch.isfinite(self._norm_left())

    def _norm_left(self) -> Tensor:
        return torch.nn.utils.get_total_norm([*self._once(), *self._visible()])

    def _once(self) -> list[Tensor]:
        """Whole gradients, each as the one rank has it that counts it in the norm of all."""
        return self._gradients()

    def _linear(self) -> list[Tensor]:
        """All that scales with the gradients."""
        return [*self._gradients(), *self._images.tensors()]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _visible(self) -> list[Tensor]:
        return [tensor for param in self._images.params() for tensor in self._visible_of(param)]

    def _visible_of(self, param: Tensor) -> list[Tensor]:
        """What counts in the norm of all in the place of a gradient of which an image is left."""
        found: list[Tensor] = []
        for group, bucket, i in self._homes[param]:
            rule, _ = self.rules(group, bucket.section)
            assert isinstance(rule, LowRank)  # no other rule lets gradients become images
            image, step = self._images.of(param, bucket.prefix), bucket.step([i], group)
            with fast_products(param.device):
                found += rule.visible(image, bucket.view.shape[1], bucket.state([i]), step)
        return found

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm: Tensor | None = None) -> Tensor:
        """Scales all gradients down together to a norm of at most `max_norm`; returns the norm before.

        With `in_backward("project")` a matrix counts with the norm of what is left of its gradient (`gradient_norm`).

        Args:
            norm: what `gradient_norm` gave since the last backward, where somebody has asked; None: it is asked now.
        """
        norm = self.gradient_norm() if norm is None else norm  # where replicas have to meet, here
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for tensor in self._linear():
            tensor.mul_(factor.to(tensor.device))
        return norm
