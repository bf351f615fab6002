"""The versions of torch, Lightning and DeepSpeed that thinrank is tested with, and what is said of others.

Imports nothing heavy, so that it can be asked before any of them is used.
"""

from __future__ import annotations

import re

TESTED: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "torch": ((2, 11), (2, 14)),
    "Lightning": ((2, 6), (2, 7)),
    "DeepSpeed": ((0, 19), (0, 20)),
}
"""The first minor version, and the first one too many: the bounds of pyproject.toml, which pip may have been told to
ignore (tests/test_versions.py compares). For DeepSpeed, tests/optim/test_zero.py passes with 0.19.8 and 0.19.0, and not
with 0.18.9."""


class UnsupportedVersion(ImportError):
    """A package is too old for thinrank to be imported; one sentence, with the remedy."""


def is_older(name: str, version: str) -> bool:
    """Whether `version`, such as "2.9.1+cu128", comes before those that are tested; a preview counts as its release."""
    return _minor(version) < TESTED[name][0]


def is_newer(name: str, version: str) -> bool:
    """Whether it comes after them."""
    return _minor(version) >= TESTED[name][1]


def requirement(name: str) -> str:
    """What pip is to be asked for, such as ``torch>=2.11,<2.14``."""
    first, end = (".".join(map(str, minor)) for minor in TESTED[name])
    return f"{name.lower()}>={first},<{end}"


def untested(name: str, version: str) -> str | None:
    """The sentence about a version that is not tested, with the remedy; None where it is."""
    if not is_older(name, version) and not is_newer(name, version):
        return None
    return f"{name} {version} has not been tested with thinrank: pip install '{requirement(name)}'"


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
