"""From what all ranks have seen to the one to name: pure functions of tables that every rank has."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank and its machine."""

    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def deviating(values: Sequence[Hashable]) -> list[int]:
    """The ranks whose value is not that of the majority; all of them where no value has more than half.

    Args:
        values: one for each rank.
    """
    common, count = Counter(values).most_common(1)[0]
    if count == len(values):
        return []
    majority = 2 * count > len(values)
    return [rank for rank, value in enumerate(values) if not majority or value != common]


def culprits(cells: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The fewest ranks that account for all faults between pairs of ranks.

    A fault (a, b) happened between a and b; (a, a) within a. A rank accounts for the faults that it takes part in, so
    what is sought is a smallest vertex cover.

    Returns:
        Nothing without faults; one rank if it alone accounts for all of them; two, the ends of a link, where either of
        them would do; else several: the exact cover for up to three ranks, beyond that by greed, most faults first.
    """
    faults = {(min(cell), max(cell)) for cell in cells}
    if not faults:
        return ()
    touched = sorted({rank for cell in faults for rank in cell})
    alone = [rank for rank in touched if all(rank in cell for cell in faults)]
    if alone:
        return tuple(alone)  # two of them only if the one link between them is at fault
    for size in (2, 3):
        for some in combinations(touched, size):
            if all(set(cell) & set(some) for cell in faults):
                return some
    chosen: list[int] = []
    left = set(faults)
    while left:
        counts = Counter(rank for cell in left for rank in set(cell))
        worst = min(counts, key=lambda rank: (-counts[rank], rank))
        chosen.append(worst)
        left = {cell for cell in left if worst not in cell}
    return tuple(chosen)


def laggards(seconds: Sequence[float], factor: float) -> list[int]:
    """The ranks that took more than `factor` times the median, the slowest first.

    Of an even number of ranks the lower median is taken: of two, the slow one is measured by the fast one.
    """
    bound = statistics.median_low(seconds) * factor
    return sorted((rank for rank, value in enumerate(seconds) if value > bound), key=lambda rank: -seconds[rank])


def slow_links(
    links: Mapping[tuple[int, int], float], hosts: Sequence[str], *, floors: tuple[float, float], factor: float
) -> list[tuple[int, int]]:
    """The links below their floor, or `factor` times slower than the faster quarter of their kind (of three or more).

    Not than the median: of four ranks, one slow one slows half of all links.

    Args:
        links: GB/s between two ranks, a < b.
        hosts: the machine of each rank.
        floors: GB/s that a link has to carry between two machines, and inside one.
        factor: above 1.
    """
    slow = []
    for inside in (False, True):
        kind = {link: rate for link, rate in links.items() if (hosts[link[0]] == hosts[link[1]]) is inside}
        bound = floors[inside]
        if len(kind) >= 3:
            bound = max(bound, sorted(kind.values(), reverse=True)[len(kind) // 4] / factor)
        slow += [link for link, rate in kind.items() if rate < bound]
    return sorted(slow)


def named(faults: Iterable[tuple[int, int]], places: Sequence[Place]) -> str:
    """The rank, the link, the machine or the several ranks that account for `faults`, in words; empty without faults.

    A machine is named where no single rank accounts for all faults, but all ranks of one machine do.
    """
    faults = list(faults)
    found = culprits(faults)
    if not found:
        return ""
    if len(found) == 1:
        return str(places[found[0]])
    if len(set(map(frozenset, faults))) == 1:
        return f"the link between {places[found[0]]} and {places[found[1]]}"
    names = sorted({place.host for place in places})
    index = {name: number for number, name in enumerate(names)}
    machines = culprits((index[places[a].host], index[places[b].host]) for a, b in faults)
    if len(machines) == 1:
        ranks = sorted({rank for cell in faults for rank in cell if index[places[rank].host] == machines[0]})
        return f"{names[machines[0]]} (ranks {', '.join(map(str, ranks))})"
    if len(machines) == 2 and len(names) == 2:
        return f"the link between {names[machines[0]]} and {names[machines[1]]}"
    return ", ".join(str(places[rank]) for rank in found)


def rounds(size: int, most: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of ranks, so that a slow rank holds up one link at a time.

    The circle method of tournaments: in ``size − 1`` rounds (``size`` if it is odd) everybody meets everybody once.

    Args:
        size: ranks.
        most: how many rounds to take, evenly spaced, of the tournament.

    Returns:
        For each round, pairs (a, b) with a < b.
    """
    if size < 2:
        return []
    players = size + size % 2  # of an odd number, one rests
    turns = players - 1
    chosen = range(turns) if most >= turns else sorted({round(i * (turns - 1) / max(most - 1, 1)) for i in range(most)})
    table = []
    for turn in chosen:
        pairs = [(turns, turn)] + [((turn + i) % turns, (turn - i) % turns) for i in range(1, players // 2)]
        table.append(sorted((min(pair), max(pair)) for pair in pairs if max(pair) < size))
    return table
