"""Who computes the loss: our chunks, torch, or a kernel of another library, and what each of them cannot do.

Libraries are looked at where they are asked for on CUDA and nowhere else; what a version can do is read from the
signatures of its functions, since versions of one name differ.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thinrank.trainers.loss.chunked import Form

BACKENDS = ("auto", "dense", "chunked", "torch", "cce", "liger")
_KERNELS = {
    "cce": ("cut_cross_entropy", "linear_cross_entropy", "pip install cut-cross-entropy"),
    "liger": (
        "liger_kernel.transformers.fused_linear_cross_entropy",
        "LigerFusedLinearCrossEntropyLoss",
        "pip install liger-kernel",
    ),
}


class Unable(ValueError):
    """A backend that was asked for is not there, or cannot do what is asked of it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of a backend.

    Attributes:
        form: of the loss.
        device: type of the device.
        each: the loss of every token by itself.
        bias: the layer has one.
    """

    form: Form
    device: str
    each: bool = False
    bias: bool = False


def choose(job: Job) -> str:
    """The backend of `auto`.

    On a CPU torch's own is passed over: it was slower than our chunks at every size that we measured
    (`benchmarks/loss.py`), and knows neither z-loss nor log Z.
    """
    if job.device != "cuda":
        return "chunked"
    return next((name for name in ("cce", "liger", "torch") if unfit(name, job) is None), "chunked")


def require(name: str, job: Job) -> str:
    """`name`, if that backend can do the job.

    Raises:
        Unable: it cannot, or is not there.
    """
    cause = unfit(name, job)
    if cause is not None:
        raise Unable(f"cross_entropy={name} {cause}")
    return name


def unfit(name: str, job: Job) -> str | None:
    """Why a backend cannot do a job, with the remedy; None where it can."""
    if name in ("dense", "chunked"):
        return None
    form = job.form
    lacking = cannot(name, softcap=form.softcap is not None, z_loss=form.z_loss > 0)
    if lacking is not None:
        return lacking
    return _unfit_torch(job) if name == "torch" else _unfit_kernel(name, job)


def cannot(name: str, *, softcap: bool = False, z_loss: bool = False) -> str | None:
    """What no version of a backend does, of what is asked for, as far as can be told without looking at it."""
    if name == "torch" and softcap:
        return "knows no cap of logits: use chunked"
    if name in ("torch", "cce") and z_loss:
        return "knows no z-loss: use chunked, or z_loss=0"
    return None


def _unfit_torch(job: Job) -> str | None:
    function = getattr(F, "linear_cross_entropy", None)
    known = function is not None and "options" in inspect.signature(function).parameters
    if not known or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"needs torch 2.13 or newer, and this is {torch.__version__}: use chunked"
    if job.form.lower == torch.bfloat16:
        return "gives the loss itself in bfloat16, with three digits: use chunked, or float32 products"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "computes all logits where it is traced or compiled: use chunked"
    return None


def _unfit_kernel(name: str, job: Job) -> str | None:
    if job.device != "cuda":
        return f"needs a CUDA device, got {job.device}: use chunked"
    module, attribute, remedy = _KERNELS[name]
    function = _loaded(name)
    if function is None:
        return f"needs {module.partition('.')[0]}, which cannot be imported: {remedy}, or use chunked"
    known = inspect.signature(function).parameters
    needed = {"reduction": True, "ignore_index": True, "softcap": job.form.softcap is not None}
    if name == "cce":
        if job.form.lower is None:
            return "computes in 16 bits alone: use bf16-mixed, or chunked"
        needed |= {"impl": True, "bias": job.bias}
    else:
        needed |= {"lse_square_scale": job.form.z_loss > 0}
        if job.each:
            return "gives no losses of single tokens that can be differentiated: use chunked"
    lacks = next((key for key, asked in needed.items() if asked and key not in known), None)
    return (
        None if lacks is None else f"has no {lacks} in the installed version of {attribute}: update it, or use chunked"
    )


def _loaded(name: str) -> Any:
    module, attribute, _ = _KERNELS[name]
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


# ---- how each is called: states (N, d) and weight (V, d) in the type of the products, scaled already


def _by_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, job: Job, chunk: int | None
) -> Tensor:
    options: Any = torch.nn.LinearCrossEntropyOptions
    with warnings.catch_warnings():
        # where it would compute all logits after all it only warns
        warnings.filterwarnings("error", message="linear_cross_entropy: ``options`` ignored")
        return F.linear_cross_entropy(
            hidden,
            weight,
            labels,
            linear_bias=bias,
            reduction="none" if job.each else "sum",
            ignore_index=job.form.ignore_index,
            options=options() if chunk is None else options(batch_chunk_size=chunk),
        )


def _by_cce(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, job: Job, chunk: int | None) -> Tensor:
    function = _loaded("cce")
    # Its default leaves out gradients below the precision of 16 bits, which rare tokens' rows are made of. Newer
    # versions have a form for pre-training that keeps the classifier's, and older ones one that keeps them all.
    newer = "filter_c_grad" in inspect.signature(function).parameters
    given = {} if bias is None else {"bias": bias}
    return function(
        hidden,
        weight,
        labels,
        ignore_index=job.form.ignore_index,
        softcap=job.form.softcap,
        reduction="none" if job.each else "sum",
        impl="cce_kahan_full_c" if newer else "cce_exact",
        **given,
    ).float()


def _by_liger(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, job: Job, chunk: int | None
) -> Tensor:
    kind, form = _loaded("liger"), job.form
    options: dict[str, Any] = {"ignore_index": form.ignore_index, "reduction": "sum"}
    if form.softcap is not None:
        options["softcap"] = form.softcap
    if form.z_loss:
        options["lse_square_scale"] = form.z_loss
    if "accum_dtype" in inspect.signature(kind).parameters:
        options["accum_dtype"] = torch.float32
    return kind(**options)(weight, hidden, labels, bias)


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor, Job, int | None], Tensor]] = {
    "torch": _by_torch,
    "cce": _by_cce,
    "liger": _by_liger,
}
