"""Cross entropy of a linear layer's outputs by one of several ways to compute it, chosen or asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from thinrank.trainers.loss import backends
from thinrank.trainers.loss.backends import BACKENDS, Job
from thinrank.trainers.loss.chunked import Form, accumulator, chunk_for, chunked

REDUCTIONS = ("sum", "mean", "none")
_SAMPLE = 512  # tokens that log Z is measured at where a backend keeps it to itself


class LogZ(NamedTuple):
    """Of the logarithm of the softmax's denominator, over the tokens that have a label: float32 scalars on the device.

    Logits that drift, before anything is seen of it in the loss, show here. It says nothing of how well they predict.

    Attributes:
        mean: 0 where no token has a label.
        max: −∞ where no token has a label.
        square: mean of the squares: the z-loss is ζ times it.
    """

    mean: Tensor
    max: Tensor
    square: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "sum",
    backend: str = "auto",
    chunk: int | None = None,
    count: int | Tensor | None = None,
    statistics: bool = True,
    lower: torch.dtype | None = None,
) -> tuple[Tensor, LogZ | None]:
    """Cross entropy of `scale · (W h + b)` with labels, in nats; but for `dense`, without all logits at one time.

    Products are of the type that autocast asks for, or the states', and summed up in float32, in which the rest is
    computed as well (float64 for float64). On a CPU they are float32 products, and autocast lowers nothing: many CPUs
    are slower with 16 bits. `dense` does what a model and `torch.nn.functional.cross_entropy` do together.

    Args:
        hidden: (…, d) last hidden states.
        weight: (V, d) of the output layer; whole, no DTensor.
        labels: (…) int64, in the order of `hidden`; `ignore_index` where there is none.
        bias: (V,).
        scale: of the logits, as Granite (1 / logits_scaling) and Cohere (logit_scale) have it.
        softcap: c of `c · tanh(z / c)`, as Gemma 2 has it; None: none.
        z_loss: ζ, which adds `ζ · log² Z` to each token's loss (PaLM: 1e-4).
        reduction: `sum` and `mean` over the tokens with a label, or `none`: (…), 0 where there is no label.
        backend: `dense`, `chunked`, `torch` (2.13's own), `cce` (Cut Cross-Entropy), `liger`, or `auto`: on CUDA the
            first of cce, liger, torch and chunked that is there and can do what is asked for, elsewhere chunked.
        chunk: tokens at a time, for `chunked` and `torch`; None: `chunk_for`.
        count: what `mean` divides by, such as the labels of all ranks over the number of ranks; None: the labels here,
            and 1 where there is none, so that the loss is 0 then.
        statistics: also measure log Z. `dense` and `chunked` know it; for the others a product for 512 tokens is added,
            and it is those tokens' alone.
        lower: a 16-bit type of the products instead of autocast's.

    Returns:
        The loss, float32 (float64 for float64 states), and log Z or None.

    Raises:
        ValueError: for bad values.
        Unable: a backend that was asked for is not there, or cannot do this.
    """
    _check(hidden, weight, labels, bias, reduction, backend, chunk, count, softcap, z_loss)
    flat, target = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    low = _lower(hidden) if lower is None else lower
    size = chunk_for(len(flat), *weight.shape) if chunk is None else chunk
    form = Form(ignore_index=ignore_index, scale=scale, softcap=softcap, z_loss=z_loss, chunk=size, lower=low)
    job = Job(form=form, device=hidden.device.type, each=reduction == "none", bias=bias is not None)
    chosen = backends.choose(job) if backend == "auto" else backends.require(backend, job)
    log_z: Tensor | None = None
    if chosen == "dense":
        loss, log_z = _dense(flat, weight, bias, target, form, each=job.each, statistics=statistics)
    elif chosen == "chunked":
        loss, log_z = chunked(flat, weight, bias, target, form, each=job.each)
    else:
        dtype = low or accumulator(hidden.dtype)
        given = (flat.to(dtype) * scale if scale != 1.0 else flat.to(dtype), weight.to(dtype))
        loss = backends.CALLS[chosen](*given, None if bias is None else bias.to(dtype) * scale, target, job, chunk)
    found: LogZ | None = None
    if statistics and log_z is not None:
        found = log_z_of(log_z, target, ignore_index)
    elif statistics:
        found = _sampled(flat, weight, bias, target, form)
    if reduction == "mean":
        loss = loss / ((target != ignore_index).sum().clamp(min=1) if count is None else count)
    return (loss.view(labels.shape) if job.each else loss), found


def z_term(log_z: Tensor, labels: Tensor, ignore_index: int, z_loss: float) -> Tensor:
    """`ζ · log² Z` of every token that has a label, and 0 of the others."""
    return torch.where(labels != ignore_index, z_loss * log_z.square(), 0.0)


def _dense(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: Form, *, each: bool, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(hidden, weight, bias)
    if form.scale != 1.0:
        logits = logits * form.scale
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return of_logits(logits, labels, form.ignore_index, form.z_loss, each=each, statistics=statistics)


def of_logits(
    logits: Tensor, labels: Tensor, ignore_index: int, z_loss: float, *, each: bool = False, statistics: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The loss with its z-loss, summed up or of `each` token, and log Z (N,) or None, of logits (N, V)."""
    high = logits.to(accumulator(logits.dtype))
    loss = F.cross_entropy(high, labels, ignore_index=ignore_index, reduction="none" if each else "sum")
    if not (z_loss or statistics):
        return loss, None
    with torch.set_grad_enabled(z_loss > 0 and torch.is_grad_enabled()):
        log_z = high.logsumexp(-1)
    if z_loss:
        term = z_term(log_z, labels, ignore_index, z_loss)
        loss = loss + (term if each else term.sum())
    return loss, log_z.detach()


def log_z_of(log_z: Tensor, labels: Tensor, ignore_index: int) -> LogZ:
    """Mean, largest and mean square of log Z (N,) over the tokens that have a label."""
    real = labels != ignore_index
    count, value = real.sum().clamp(min=1), log_z.detach().float()
    mean, square = (torch.where(real, each, 0.0).sum() / count for each in (value, value.square()))
    top = torch.where(real, value, -torch.inf)
    return LogZ(mean, top.max() if len(top) else top.new_full((), -torch.inf), square)


@torch.no_grad()
def _sampled(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: Form) -> LogZ:
    every = max(1, -(-len(hidden) // _SAMPLE))
    part = labels[::every]
    _, log_z = chunked(hidden[::every].detach(), weight.detach(), bias, part, form, each=True)
    return log_z_of(log_z, part, form.ignore_index)


def _lower(hidden: Tensor) -> torch.dtype | None:
    """The 16-bit type of the products, where there is one."""
    device = hidden.device.type
    if device not in ("cuda", "meta"):  # what has no shape of it that gives float32; a plan on meta is of a GPU
        return None
    dtype = hidden.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    reduction: str,
    backend: str,
    chunk: int | None,
    count: object,
    softcap: float | None,
    z_loss: float,
) -> None:
    if any(isinstance(each, DTensor) for each in (hidden, weight, bias)):
        raise ValueError("the output layer lies in pieces (DTensor): gather it first, with full_tensor()")
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[-1:] or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden (…, d), weight (V, d) and labels (…) must go together, got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}: flatten or transpose the one that differs"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}: one number for each of the tokens")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}: use labels.long()")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}: choose one of them")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}: choose one of them")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}: leave it out for the size by the rule")
    if count is not None and reduction != "mean":
        raise ValueError(f"count is what reduction='mean' divides by, got reduction={reduction!r}: leave count out")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}: use None for none")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}: PaLM's is 1e-4")
