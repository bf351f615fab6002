"""What a rank knows of itself: its machine, its software, its device, what it sees of the run folder."""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.cuda import nccl

import thinrank
from thinrank.trainers.report import code_version


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one rank."""

    host: str
    python: str
    torch: str
    cuda: str
    """CUDA and NCCL of this torch, where GPUs are used."""
    thinrank: str
    commit: str
    device: str
    """Kind and memory of its device: the GPU's name and GiB, or the processor's architecture."""
    devices: int
    """GPUs of its machine; 0 where none are used."""
    local_size: int
    sees_folder: bool
    """Whether it finds what rank 0 has made in the run folder."""


def collect(token: Path, *, local_size: int, cuda: bool) -> Facts:
    """The facts of this rank, once rank 0 has made the file `token`."""
    code = code_version()
    commit = "no checkout" if code["commit"] is None else code["commit"] + (" with changes" if code["dirty"] else "")
    libraries, device = "", platform.machine()
    if cuda:
        libraries = f"{torch.version.cuda}, NCCL {'.'.join(map(str, nccl.version()))}"
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = f"{properties.name}, {round(properties.total_memory / 2**30)} GiB"
    return Facts(
        host=socket.gethostname(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        cuda=libraries,
        thinrank=thinrank.__version__,
        commit=commit,
        device=device,
        devices=torch.cuda.device_count() if cuda else 0,
        local_size=local_size,
        sees_folder=token.exists(),
    )


def free_memory(*, cuda: bool, local_size: int) -> int:
    """Bytes that this rank can still take: of its GPU, or its share of the machine's."""
    if cuda:
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // local_size
    raise RuntimeError("/proc/meminfo does not say MemAvailable, which Linux has since 3.14")
