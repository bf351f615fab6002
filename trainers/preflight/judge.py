"""The sentences about machines that are not as they should be, from the tables that every rank has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thinrank.trainers.errors import PreflightError
from thinrank.trainers.preflight.blame import Place, deviating, laggards, named, slow_links
from thinrank.trainers.preflight.config import PreflightConfig
from thinrank.trainers.preflight.facts import Facts

_EXCLUDE = "leave that machine out (Slurm: job.options='[--exclude=HOST]', Kubernetes: kubectl cordon HOST)"
_ALIKE = {
    "python": ("Python", "install the same environment on every machine"),
    "torch": ("torch", "install the same environment on every machine"),
    "cuda": ("CUDA", "install the same environment on every machine"),
    "thinrank": ("thinrank", "install the same version on every machine"),
    "commit": ("the code of commit", "check out the same commit on every machine"),
    "device": ("a device", "ask for machines of one kind"),
    "devices": ("a number of GPUs of", "ask for machines of one kind, or look for a lost GPU with nvidia-smi"),
    "local_size": ("processes per machine of", "start torchrun with the same --nproc-per-node everywhere"),
}


def judge_facts(facts: Sequence[Facts], places: Sequence[Place], folder: Path) -> None:
    """Raises a `PreflightError` where the ranks are not alike, or do not see the same run folder."""
    for name, (what, remedy) in _ALIKE.items():
        values = [getattr(fact, name) for fact in facts]
        odd = deviating(values)
        if not odd:
            continue
        if len(odd) == len(values):
            other = next(rank for rank in odd if values[rank] != values[odd[0]])
            said = f"{places[odd[0]]} has {what} {values[odd[0]]} and {places[other]} {values[other]}"
        else:
            common = next(value for rank, value in enumerate(values) if rank not in odd)
            said = f"{_some(odd, places)} has {what} {values[odd[0]]}, the others have {common}"
        raise PreflightError(f"{said}: {remedy}")
    blind = [rank for rank, fact in enumerate(facts) if not fact.sees_folder]
    if blind:
        raise PreflightError(
            f"{_some(blind, places)} does not find in the run folder {folder} what {places[0]} has written there: set "
            "run.dir to a folder that all machines share"
        )


def judge_products(products: Sequence[tuple[float, int]], places: Sequence[Place], factor: float) -> None:
    """Raises a `PreflightError` where a rank (seconds, wrong rows) computes wrongly or slowly."""
    wrong = [rank for rank, (_, rows) in enumerate(products) if rows]
    if wrong:
        raise PreflightError(f"{_some(wrong, places)} computes wrong products: {_EXCLUDE}")
    seconds = [value for value, _ in products]
    slow = laggards(seconds, factor)
    if slow:
        raise PreflightError(
            f"{_some(slow, places)} takes {seconds[slow[0]] / min(seconds):.1f} times as long as the fastest for a "
            f"product ({seconds[slow[0]] * 1e3:.2f} ms): {_EXCLUDE}, or raise run.preflight.slow_factor ({factor:g})"
        )


def judge_sums(reduced: Sequence[int], exchanged: Sequence[Sequence[int]], places: Sequence[Place]) -> None:
    """Raises a `PreflightError` where values arrive wrong.

    Args:
        reduced: wrong sums of an all-reduce on each rank.
        exchanged: row r, column c: values wrong on r that came from c.
        places: of the ranks.
    """
    faults = [(r, c) for r, row in enumerate(exchanged) for c, wrong in enumerate(row) if wrong]
    if faults:
        raise PreflightError(f"values that pass {named(faults, places)} arrive wrong: {_EXCLUDE}")
    wrong = [rank for rank, count in enumerate(reduced) if count]
    if wrong:
        whose = "all ranks" if len(wrong) == len(places) else _some(wrong, places)
        raise PreflightError(
            f"an all-reduce gives wrong sums on {whose} though single messages arrive: try other machines, or another "
            "NCCL_ALGO"
        )


def judge_links(
    seen: Sequence[dict[tuple[int, int], tuple[float, int]]], places: Sequence[Place], config: PreflightConfig
) -> dict[tuple[int, int], float]:
    """GB/s of every measured link, the lesser of what its two ends have seen.

    Raises:
        PreflightError: a link is slow or brings wrong values.
    """
    wrong = {link for table in seen for link, (_, count) in table.items() if count}
    if wrong:
        raise PreflightError(f"messages that pass {named(wrong, places)} arrive wrong: {_EXCLUDE}")
    links: dict[tuple[int, int], float] = {}
    for table in seen:
        for link, (rate, _) in table.items():
            links[link] = min(rate, links.get(link, rate))
    hosts = [place.host for place in places]
    floors = (config.min_bandwidth, config.min_bandwidth_inside)
    slow = slow_links(links, hosts, floors=floors, factor=config.slow_factor)
    if slow:
        worst = min(slow, key=lambda link: links[link])
        inside = hosts[worst[0]] == hosts[worst[1]]
        key = "min_bandwidth_inside" if inside else "min_bandwidth"
        if links[worst] < floors[inside]:
            bound, change = f"run.preflight.{key} asks for {floors[inside]:g}", f"lower run.preflight.{key}"
        else:
            bound = f"less than 1/{config.slow_factor:g} of the faster links"
            change = "raise run.preflight.slow_factor"
        raise PreflightError(
            f"{named(slow, places)} is slow: {places[worst[0]]} and {places[worst[1]]} exchange {links[worst]:.3g} "
            f"GB/s, {bound}: {_EXCLUDE}, or {change}"
        )
    return links


def judge_run(places: Sequence[Place], manifests: Sequence[str], memory: Sequence[tuple[int, int]]) -> None:
    """Raises a `PreflightError` where ranks have other data, or too little memory (free, needed; bytes)."""
    odd = deviating(manifests)
    if odd:
        whose = "the ranks have different data" if len(odd) == len(places) else f"{_some(odd, places)} has other data"
        values = ", ".join(f"{manifests[rank][:12]} on {places[rank]}" for rank in (odd[0], _other(manifests, odd[0])))
        raise PreflightError(
            f"{whose} (manifests {values}): copy the same files to every machine, or put them where all see them"
        )
    short = [rank for rank, (free, needed) in enumerate(memory) if free < needed]
    if short:
        free, needed = memory[short[0]]
        raise PreflightError(
            f"{_some(short, places)} has {free / 2**30:.2f} GiB of memory free, and weights, gradients and optimizer "
            f"state need {needed / 2**30:.2f} GiB: end what else runs there, or use more or larger devices"
        )


def _other(values: Sequence[str], rank: int) -> int:
    return next(index for index, value in enumerate(values) if value != values[rank])


def _some(ranks: Sequence[int], places: Sequence[Place]) -> str:
    """One rank in full, and how many more."""
    more = f" (and {len(ranks) - 1} more: {', '.join(map(str, ranks[1:9]))})" if len(ranks) > 1 else ""
    return f"{places[ranks[0]]}{more}"
