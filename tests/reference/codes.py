"""Companded 8-bit codes as one reads of them: a table of levels in float64 and a search, one block, one loop."""

import bisect


def levels(signed: bool) -> list[float]:
    """The positive levels of a block whose largest number is one, by code."""
    top = 127 if signed else 255
    return [(code / top) ** 4 for code in range(top + 1)]


def neighbours(block: list[float], signed: bool) -> list[tuple[float, float]]:
    """For each number of a block the two levels (with its sign, times the largest of the block) it lies between."""
    table, largest = levels(signed), max(abs(x) for x in block)
    found = []
    for x in block:
        if largest == 0.0:
            found.append((0.0, 0.0))
            continue
        above = bisect.bisect_left(table, abs(x) / largest)
        below = above if table[above] == abs(x) / largest else above - 1
        sign = -1.0 if x < 0 else 1.0
        found.append((sign * table[below] * largest, sign * table[above] * largest))
    return found
