"""What the ranks do together to be seen: a product, sums and messages of which every value is known beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from thinrank.trainers.preflight.blame import rounds

_TIMES = 3  # repetitions, of which the fastest counts


def product(device: torch.device) -> tuple[float, int]:
    """Seconds of a float32 product on this rank, and how many of its rows are wrong.

    The entries are whole and so small that every sum is exact in float32 (and the factors in TF32), and the product is
    checked by Freivalds: (A B) v = A (B v), the right side in float64.
    """
    side = 2048 if device.type == "cuda" else 384
    row = torch.arange(side, device=device)
    a = ((row[:, None] * 3 + row[None, :]) % 7).float()
    b = ((row[:, None] + row[None, :] * 5) % 11).float()
    v = (row % 13).double()
    best, found = float("inf"), a @ b
    for _ in range(_TIMES + 2):
        started = _now(device)
        found = a @ b
        best = min(best, _now(device) - started)
    wrong = (found.double() @ v != a.double() @ (b.double() @ v)).sum()
    return best, int(wrong)


def reduction(
    rank: int, size: int, megabytes: float, device: torch.device, barrier: Callable[[], None]
) -> tuple[float, int]:
    """Seconds of an all-reduce, and how many of the sums that this rank got are wrong.

    Rank r gives i mod 251 + r mod 64 at place i, so that every sum is known and exact in float32.
    """
    places = torch.arange(_elements(megabytes), device=device)
    base = (places % 251).float()
    given = base + rank % 64
    expected = base * size + sum(r % 64 for r in range(size))
    best, wrong = float("inf"), 0
    for _ in range(_TIMES):
        sent = given.clone()
        barrier()
        started = _now(device)
        dist.all_reduce(sent)
        best = min(best, _now(device) - started)
        wrong = max(wrong, int((sent != expected).sum()))
    return best, wrong


def exchange(rank: int, size: int, device: torch.device, elements: int = 16384) -> list[int]:
    """For each rank, how many of the values that came from it are wrong here."""
    places = torch.arange(elements, device=device)
    got = [torch.empty(elements, device=device) for _ in range(size)]
    dist.all_gather(got, _pattern(places, rank))
    return [int((values != _pattern(places, sender)).sum()) for sender, values in enumerate(got)]


def link_rates(
    rank: int, size: int, most: int, megabytes: float, device: torch.device, barrier: Callable[[], None]
) -> dict[tuple[int, int], tuple[float, int]]:
    """For each measured link of this rank, the pair (a < b): GB/s in each direction at once, and wrong values received.

    Pairs exchange one after the other in rounds in which no rank has two.
    """
    places = torch.arange(_elements(megabytes), device=device)
    sent, got = _pattern(places, rank), torch.empty(len(places), device=device)
    found = {}
    for pairs in rounds(size, most):
        mine = next((pair for pair in pairs if rank in pair), None)
        peer = None if mine is None else mine[0] + mine[1] - rank
        best = float("inf")
        for attempt in range(_TIMES + 1):  # the first one makes the connection
            barrier()
            if peer is None:
                continue
            got.zero_()
            started = _now(device)
            _swap(sent, got, peer)
            if attempt:
                best = min(best, _now(device) - started)
        if mine is not None and peer is not None:
            wrong = int((got != _pattern(places, peer)).sum())
            found[mine] = (sent.numel() * sent.element_size() / 1e9 / best, wrong)
    return found


def _swap(sent: torch.Tensor, got: torch.Tensor, peer: int) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, got, peer)]):
        work.wait()


def _pattern(places: torch.Tensor, rank: int) -> torch.Tensor:
    """What a rank sends: at no place the same as another rank's (of 2**12), and never zero."""
    return (places % 251 * 4096 + rank % 4096 + 1).float()


def _elements(megabytes: float) -> int:
    return max(1, int(megabytes * 1e6 / 4))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
