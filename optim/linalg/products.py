"""Products of float32 matrices on a CPU, by the faster of the two libraries that torch has for them.

torch gives float32 products on an x86 processor to MKL, which is slow on processors that are not Intel's, and to oneDNN
where `torch.backends.mkldnn.matmul.fp32_precision` is `"bf16"`: permission to compute in bfloat16, of which oneDNN
makes use on processors with AMX alone. Everywhere else it computes in float32 all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

UNSET = "none"
"""What torch's setting says as long as nobody has chosen anything."""

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Largest relative error of a product (in the Frobenius norm) that counts as float32: 2e-6. Float32 makes 3e-7 of the
products that are tried, TF32 3e-4, bfloat16 2e-3."""


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Within it, float32 products on `device` are computed by oneDNN where that is faster and as accurate.

    That is: on a CPU whose maker is not Intel, without AMX, where products tried once in a process had float32's error
    (`pays`); a rule without timing, so that two runs on one machine do the same. Measured on an AMD EPYC (Zen 5), one
    thread, 768 × 768 by 768 × 192: 277 GFLOP/s of CPU time, MKL 120. Relative errors (Frobenius) of products over 768
    and 2048 terms: 4e-7 and 6e-7, MKL's 2.5e-7. Very small products gain nothing, and lose nothing.

    torch's own setting is respected: where it, or one that it inherits from (`torch.backends.fp32_precision`,
    `torch.set_float32_matmul_precision`), has been given a value, nothing is changed. So
    `torch.backends.mkldnn.matmul.fp32_precision = "ieee"` keeps MKL. The setting is one for all threads of a process;
    it is put back at the end, whatever happens. Within it `torch.get_float32_matmul_precision()` raises, for torch's
    older setting cannot say this; the compiler of `torch.compile` (inductor) asks for it, so compile before or after.
    """
    setting = torch.backends.mkldnn.matmul
    if device.type != "cpu" or setting.fp32_precision != UNSET or not pays():
        yield
        return
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = UNSET


@lru_cache(maxsize=1)
def pays() -> bool:
    """True where oneDNN's float32 products are known to be faster than MKL's, and found to be float32's."""
    vendor, flags = processor()
    known = vendor not in ("", "GenuineIntel") and not any(flag.startswith("amx") for flag in flags)
    if not (known and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        return largest_error() <= ROUNDING
    finally:
        setting.fp32_precision = before


def processor(path: str = "/proc/cpuinfo") -> tuple[str, frozenset[str]]:
    """Maker and instruction sets of the (first) processor; empty where the system does not tell, as outside Linux."""
    found = {"vendor_id": "", "flags": ""}
    try:
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in found and not found[name.strip()]:
                found[name.strip()] = value.strip()
    except OSError:
        pass
    return found["vendor_id"], frozenset(found["flags"].split())


def largest_error() -> float:
    """The largest relative error of float32 products as torch computes them now, in the forms that a step uses."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(256, 256, generator=generator) for _ in range(3))
    batch, thin = torch.stack([x, y]), z[:, :64].contiguous()
    tried = (
        (x @ y, x.double() @ y.double()),
        (x.mT @ thin, x.mT.double() @ thin.double()),
        (torch.addmm(z, x, y.mT), z.double() + x.double() @ y.mT.double()),
        (torch.bmm(batch, batch.mT), torch.bmm(batch.double(), batch.mT.double())),
    )
    return max(float(torch.linalg.norm(found - true) / torch.linalg.norm(true)) for found, true in tried)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, without a copy of either where a batch (batch, n, k) meets another (batch, k, m).

    The operator gives a batch of one matrix other strides on its way to the same kernel. If the matrix lies transposed,
    torch then does not see that, and copies it for oneDNN.
    """
    return torch.bmm(a, b) if a.ndim == b.ndim == 3 else a @ b
