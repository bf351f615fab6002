"""How fast compressors work, and what they lose.

    python benchmarks/compressors.py
    OMP_NUM_THREADS=1 python benchmarks/compressors.py --mib 16 --repeats 9 --out benchmarks/results/compressors.md

A matrix of Gaussian entries is encoded into memory that is there, and decoded. Speeds are gigabytes of its float32 in a
second, medians over the repeats; `copy` is what the device copies within its own memory, counted once, the most that a
pass over the matrix can reach. Bits are a payload's for each entry, alpha is the norm of the error over the matrix's,
the bound what no vector exceeds. The last rows are what else a message goes through. On a CPU only the time that this
process had counts, so that others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from machine import page, save
from torch import Tensor

from thinrank.optim.gossip.compress import COMPRESSORS, Compressor, Measured, compressor, finite
from thinrank.optim.gossip.message import HEADER_BYTES, Header, fingerprint, pack, unpack

MORE = {
    "uniform8, nearest": compressor("uniform8", stochastic=False),
    "uniform4, nearest": compressor("uniform4", stochastic=False),
    "uniform4, scaled": compressor("uniform4", scaled=True),
    "bf16, stochastic": compressor("bf16", stochastic=True),
}
"""Besides every name with its own options."""


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of `work`, after once for the caches."""
    found = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = time.perf_counter()
            work()
            torch.cuda.synchronize(device)
            found.append(time.perf_counter() - before)
        else:
            before = time.process_time()
            work()
            found.append(time.process_time() - before)
    return statistics.median(found[1:])


def row(name: str, *figures: str) -> str:
    return "| " + " | ".join([name, *figures]) + " |"


def of_compressor(name: str, config: Compressor, x: Tensor, repeats: int) -> str:
    """One line of the table."""
    codec = config.bind([x.shape])
    flat, size = x.view(-1), x.numel() * 4e-9
    payload = codec.encode(flat, 1)
    decoded = codec.decode(payload, 1)
    alpha = ((decoded - flat).norm() / flat.norm()).item()
    encode = size / seconds(lambda: codec.encode(flat, 1, out=payload), x.device, repeats)
    decode = size / seconds(lambda: codec.decode(payload, 1, out=decoded), x.device, repeats)
    bits = 8 * codec.nbytes / codec.numel
    return row(name, f"{bits:.2f}", f"{alpha:.4f}", f"{codec.error:.4f}", f"{encode:.2f}", f"{decode:.2f}")


def others(x: Tensor, repeats: int) -> list[str]:
    """What is not a compressor: speeds of float32, or of any bytes."""
    flat, size = x.view(-1), x.numel() * 4e-9
    room, measured = torch.empty_like(flat), Measured()
    message = torch.empty(HEADER_BYTES + 4 * flat.numel(), dtype=torch.uint8, device=x.device)
    payload = message[HEADER_BYTES:].copy_(flat.view(torch.uint8))
    header = Header(codec=1, step=0, part=0, source=0, numel=flat.numel())
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: room.copy_(flat),
        "finite": lambda: finite(flat),
        "Measured.add": lambda: measured.add(flat, room),
        "fingerprint": lambda: fingerprint(flat),
        "message packed in place": lambda: pack(header, payload, out=message),
        "message unpacked": lambda: unpack(message),
    }
    if x.device.type == "cpu":
        data = flat.view(torch.uint8).numpy().tobytes()
        works["CRC-32 of zlib, for comparison"] = lambda: zlib.crc32(data)
    return [row(name, "", "", "", f"{size / seconds(work, x.device, repeats):.2f}", "") for name, work in works.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=16, help="float32 of the matrix")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--devices", nargs="+", default=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    parser.add_argument("--out", type=Path, default=None, help="write the page to this file too")
    args = parser.parse_args()
    side = math.isqrt(args.mib * 2**18)
    text: list[str] = []
    for device in map(torch.device, args.devices):
        x = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)
        facts = [f"a matrix of {side} by {side}, medians of {args.repeats}"]
        if device.type == "cpu":
            facts.append(f"load when it began: {os.getloadavg()[0]:.1f} processes of {os.cpu_count()} cores")
        head = ["compressor", "bits", "alpha", "bound", "encode, GB/s", "decode, GB/s"]
        text += page(f"Compressors on {device.type}", facts, head, device=device)
        text += [of_compressor(name, compressor(name), x, args.repeats) for name in COMPRESSORS]
        text += [of_compressor(name, config, x, args.repeats) for name, config in MORE.items()]
        text += [*others(x, args.repeats), ""]
    print("\n".join(text), flush=True)
    save(text, args.out)


if __name__ == "__main__":
    main()
