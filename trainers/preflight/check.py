"""The look at all machines: measured by all ranks, judged by every one of them from the same tables.

So all ranks come to the same sentence, and all of them end.
"""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from thinrank.trainers.errors import PreflightError
from thinrank.trainers.preflight import measure
from thinrank.trainers.preflight.blame import Place
from thinrank.trainers.preflight.config import PreflightConfig
from thinrank.trainers.preflight.facts import collect, free_memory
from thinrank.trainers.preflight.judge import judge_facts, judge_links, judge_products, judge_run, judge_sums
from thinrank.trainers.strategies import World

T = TypeVar("T")


def check_machines(world: World, config: PreflightConfig, folder: Path, *, cuda: bool) -> str:
    """Compares software and devices, then computes, sums and sends, all on every rank.

    Args:
        world: the processes; the process group is connected.
        config: what is not tolerated.
        folder: the run folder, made by rank 0.
        cuda: whether tensors will be on GPUs.

    Returns:
        A line on what was measured.

    Raises:
        PreflightError: on all ranks, with the rank, the link or the machine that is to blame.
    """
    group = _Group(world, config)
    group.wait("the start")
    # A file that rank 0 makes tells whether the folder of that name is the same one on another machine. Its name is
    # new, for a network file system may remember that an older one was not there.
    token = group.gather(f".preflight.tmp-{secrets.token_hex(8)}")[0]
    if world.main:
        (folder / token).touch()
    group.wait("the run folder")
    facts = group.gather(collect(folder / token, local_size=world.local_size, cuda=cuda))
    group.places = [Place(rank=rank, host=fact.host) for rank, fact in enumerate(facts)]
    if world.main:
        (folder / token).unlink()
    judge_facts(facts, group.places, folder)

    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    group.wait("a product")
    products = group.gather(measure.product(device))
    judge_products(products, group.places, config.slow_factor)
    if world.size == 1:
        return f"{group.places[0]}"
    group.wait("an all-reduce")
    reduced = group.gather(measure.reduction(world.rank, world.size, config.megabytes, device, group.barrier))
    group.wait("an exchange")
    exchanged = group.gather(measure.exchange(world.rank, world.size, device))
    judge_sums([wrong for _, wrong in reduced], exchanged, group.places)
    group.wait("the links")
    seen = group.gather(
        measure.link_rates(world.rank, world.size, config.rounds, config.megabytes, device, group.barrier)
    )
    group.close()
    links = judge_links(seen, group.places, config)
    slowest = min(links, key=lambda link: links[link])
    seconds = max(seconds for seconds, _ in reduced)
    spread = max(s for s, _ in products) / min(s for s, _ in products)
    hosts = ", ".join(sorted({place.host for place in group.places}))
    return (
        f"{world.size} ranks on {hosts}; all-reduce of {config.megabytes:g} MB in {seconds * 1e3:.1f} ms; slowest link "
        f"{links[slowest]:.2f} GB/s, from {group.places[slowest[0]]} to {group.places[slowest[1]]}; slowest product "
        f"{spread:.2f} times the fastest"
    )


def check_run(world: World, config: PreflightConfig, manifest: str, needed: int, *, cuda: bool) -> None:
    """Compares the data of all ranks, and their free memory with what training has to hold.

    Args:
        world: the processes.
        config: what is not tolerated.
        manifest: this rank's hash of the data manifest.
        needed: bytes of weights, gradients and optimizer state.
        cuda: whether they will be on a GPU.

    Raises:
        PreflightError: on all ranks.
    """
    group = _Group(world, config)
    here = Place(rank=world.rank, host=socket.gethostname())
    found = group.gather((here, manifest, free_memory(cuda=cuda, local_size=world.local_size), needed))
    group.close()
    judge_run([row[0] for row in found], [row[1] for row in found], [row[2:] for row in found])


class _Group:
    """The ranks on the processor's side, for words between them; who does not answer in time is named."""

    def __init__(self, world: World, config: PreflightConfig) -> None:
        self.world, self.timeout = world, timedelta(seconds=config.timeout)
        self.places: list[Place] = [Place(rank=rank, host="an unknown host") for rank in range(world.size)]
        # Any: torch declares a number for ranks outside of the group, and here is none
        self._group: Any = dist.new_group(backend="gloo", timeout=self.timeout) if world.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self._group is None:
            return [value]
        values: list[T | None] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        """Waits for all ranks, in as little time as it takes."""
        dist.barrier(self._group)

    def close(self) -> None:
        """Lets go of the connection."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def wait(self, what: str) -> None:
        """Waits for all ranks."""
        if self._group is None:
            return
        try:
            dist.monitored_barrier(self._group, timeout=self.timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise PreflightError(
                f"before {what}, not all ranks answered within {self.timeout.total_seconds():g} s "
                f"({late(str(error), self.places)}): look at the logs of that rank, or raise run.preflight.timeout"
            ) from error


def late(message: str, places: Sequence[Place]) -> str:
    """The ranks that torch's monitored barrier names in its error, with their machines."""
    found = re.search(r"[Rr]anks? ([\d, ]+)(?: failed)", message)
    if found is None:
        return message.splitlines()[0]
    return ", ".join(str(places[int(number)]) for number in re.findall(r"\d+", found[1]))
