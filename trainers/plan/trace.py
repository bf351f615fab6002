"""What a training step allocates for a while: the step itself, run without memory, with every tensor counted.

Model and optimizer lie on the meta device, where torch computes shapes and nothing else, and `Live` counts. So there is
no formula to be kept in step with the code. The path taken is a GPU's. Not seen: what libraries allocate within an
operator (workspaces of products and factorisations) and what an allocator loses by rounding and in gaps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from thinrank.optim import MatrixOptimizer, MethodConfig, build
from thinrank.trainers.loss.head import Head, Unfit, head_loss, head_of
from thinrank.trainers.plan.live import Live

_PRODUCTS = (F.linear, torch.addmm, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__)
_PRECISE = (F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Bytes that are alive for a while, beside weights and optimizer state.

    Attributes:
        activations: what the forward pass leaves for the backward pass.
        passes: most in the forward and the backward pass, gradients included.
        between: of the optimizer's step, beside gradients, between renewals.
        renewal: the same where every subspace is renewed.
        logged: the same where the update is measured for the curves, in the first step and between renewals.
    """

    activations: int
    passes: int
    between: int
    renewal: int
    logged: int

    @property
    def step(self) -> int:
        """The most of a step."""
        return max(self.between, self.renewal, self.logged)


def work(
    model: nn.Module,
    config: MethodConfig,
    *,
    sequences: int,
    length: int,
    cast: torch.dtype | None = None,
    accumulate: int = 1,
    in_backward: str = "off",
    max_norm: float | None = None,
    ranks: Mapping[str, int | float | None] | None = None,
    cross_entropy: str = "dense",
) -> Work:
    """Traces steps that renew and steps that do not, with and without a look at their updates.

    Args:
        model: on the meta device, with weights of the type they are trained in; its gradients are gone afterwards.
        config: the method.
        sequences: of a micro-batch.
        length: of a sequence, in tokens.
        cast: type of the products under autocast; None: none.
        accumulate: micro-batches of a step.
        in_backward: as `MatrixOptimizer.in_backward`; what a step allocates is then part of `passes`.
        max_norm: for `in_backward="step"`.
        ranks: of matrices that have their own.
        cross_entropy: as of `CausalLM`; all but `dense` are traced as our chunks, of which kernels need less.

    Raises:
        Unfit: the model's logits cannot be left out, and `auto` is not what was asked for.
    """
    head = _head(model, cross_entropy)
    every = getattr(config, "update_proj_gap", 1)
    searching = max(getattr(config, "warmup", 0), 1)
    # between renewals, whatever the method's search needs is over
    steady = (searching // every + 1) * every + 1 if every > 1 else searching + 1
    optimizer = build(model, _plain(config), ranks=ranks)
    optimizer.in_backward(in_backward, max_norm=max_norm if in_backward == "step" else None)
    batch = torch.zeros(sequences, length, dtype=torch.int64, device="meta")
    steps = []
    for number, measure in ((0.0, True), (0.0, False), (float(steady), False), (float(steady), True)):
        passes = in_backward != "off" or not steps  # otherwise the passes of all steps are alike
        steps.append(_step(model, optimizer, batch, cast, accumulate, number, head, measure=measure, passes=passes))
    if in_backward != "off":
        optimizer.in_backward("off")
    return Work(
        activations=max(each.activations for each in steps),
        passes=max(each.passes for each in steps),
        between=steps[2].between,
        renewal=steps[1].between,
        logged=max(steps[0].between, steps[3].between),
    )


def _step(
    model: nn.Module,
    optimizer: MatrixOptimizer,
    batch: Tensor,
    cast: torch.dtype | None,
    accumulate: int,
    number: float,
    head: Head | None,
    *,
    measure: bool,
    passes: bool,
) -> Work:
    state = [value for own in optimizer.state.values() for value in own.values()]
    given = [] if passes else [torch.empty_like(p) for p in model.parameters() if p.requires_grad]
    live = Live([*model.parameters(), *model.buffers(), *state, *given], number=number)
    held, activations = live.now, 0
    del state
    for own in optimizer.state.values():
        if not own["step"].is_meta:  # counts that have come to the host at an earlier step
            own["step"].fill_(number)
    if not passes:
        for param, grad in zip((p for p in model.parameters() if p.requires_grad), given, strict=True):
            param.grad = grad
        given.clear()
    with live:
        for part in range(min(accumulate, 2) if passes else 0):  # further ones are like the second: there are gradients
            optimizer.accumulating = part + 1 < min(accumulate, 2)
            before = live.now
            loss = _forward(model, batch, cast, head)
            activations = live.now - before
            loss.backward()
            del loss
        most = live.peak - held
        live.restart()
        before = live.now
        optimizer.measure = measure
        optimizer.step()
        transient = live.peak - before
    optimizer.zero_grad()
    return Work(activations=activations, passes=most, between=transient, renewal=transient, logged=transient)


def _head(model: nn.Module, cross_entropy: str) -> Head | None:
    if cross_entropy == "dense":
        return None
    try:
        return head_of(model)
    except Unfit:
        if cross_entropy != "auto":
            raise
        return None


def _forward(model: nn.Module, batch: Tensor, cast: torch.dtype | None, head: Head | None) -> Tensor:
    """The loss, as `CausalLM` computes it."""
    with _Arithmetic(cast):
        if head is not None:
            loss, _ = head_loss(model, head, batch, batch, backend="chunked", lower=cast, statistics=False)
            return loss / batch.numel()
        logits = model(input_ids=batch, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, -2), batch.flatten(), reduction="sum") / batch.numel()


def _plain(config: MethodConfig) -> MethodConfig:
    """The method with all renewals in one step, as the first one has them, and without looking at spectra."""
    known = {field.name for field in dataclasses.fields(config)}
    plain = {"stagger": False, "lazy_overlap": None, "rank_allocation": "uniform", "rank_allocation_every": None}
    return dataclasses.replace(config, **{key: value for key, value in plain.items() if key in known})


class _Arithmetic(TorchFunctionMode):
    """Autocast, which torch has not for the meta device, and an attention that keeps no scores, as its kernels do.

    Products of what has a gradient are computed in `cast`, from copies of the weights that live until the backward pass
    has used them, and norms, softmax and the loss in float32.
    """

    def __init__(self, cast: torch.dtype | None) -> None:
        super().__init__()
        self._cast = cast
        self._copies: dict[Tensor, Tensor] = {}

    @override
    def __exit__(self, *how: Any) -> None:
        self._copies.clear()
        super().__exit__(*how)

    @override
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._low(each) for each in (*args, *map(given.get, _QKV[len(args) :]))[:3])
            return _Attention.apply(query, key, value)
        if self._cast is not None and any(isinstance(each, Tensor) and each.requires_grad for each in args):
            if func in _PRODUCTS:
                args = tuple(self._low(each) for each in args)
            elif func in _PRECISE:
                args = tuple(each.float() if isinstance(each, Tensor) and _half(each) else each for each in args)
        return func(*args, **given)

    def _low(self, value: Any) -> Any:
        if self._cast is None or not isinstance(value, Tensor) or value.dtype is not torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self._cast)
        if value not in self._copies:
            self._copies[value] = value.to(self._cast)
        return self._copies[value]


_QKV = ("query", "key", "value")


def _half(value: Tensor) -> bool:
    return value.dtype in (torch.bfloat16, torch.float16)


class _Attention(torch.autograd.Function):
    """What a fused attention keeps: what it was given, what it gave, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, heads, length, _ = query.shape
        out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)  # as kernels lay it out
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])
