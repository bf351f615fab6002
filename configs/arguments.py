"""The words of the command line: a few options, and ``key=value``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path

from thinrank.configs.errors import ConfigError

ACTIONS = {"--help": "help", "-h": "help", "--cfg": "cfg", "--dry-run": "dry-run"}
_VALUED = ("--config", "--config-dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What was asked for."""

    action: str = "run"
    """``run``, ``help``, ``cfg`` or ``dry-run``; the first of the last three wins, in this order."""
    files: tuple[Path, ...] = ()
    """Configuration files, later ones over earlier ones."""
    folders: tuple[Path, ...] = ()
    """Folders with the user's own ``GROUP/NAME.yaml``, searched before the shipped ones."""
    words: tuple[tuple[str, str], ...] = ()
    """``key=value``, split."""


def parse(argv: Sequence[str]) -> Arguments:
    """Split the command line.

    Raises:
        ConfigError: an unknown option, an option without its value, or a word that is not ``key=value``.
    """
    actions: set[str] = set()
    values: dict[str, list[Path]] = {option: [] for option in _VALUED}
    words: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if argument in ACTIONS:
            actions.add(ACTIONS[argument])
        elif option in _VALUED:
            if not equals and not rest:
                raise ConfigError(f"{option} needs a path: write {option} PATH")
            values[option].append(Path(value if equals else rest.pop(0)).expanduser())
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {argument}: {_remedy(argument)}")
        elif not equals or not option:
            raise ConfigError(f"cannot read {argument!r}: write key=value, or see --help for the keys and the options")
        else:
            words.append((option, value))
    for folder in values["--config-dir"]:
        if not folder.is_dir():
            raise ConfigError(f"the folder {folder} given with --config-dir does not exist: check the path")
    action = next((name for name in ("help", "cfg", "dry-run") if name in actions), "run")
    return Arguments(
        action=action, files=tuple(values["--config"]), folders=tuple(values["--config-dir"]), words=tuple(words)
    )


def _remedy(argument: str) -> str:
    option = argument.partition("=")[0]
    if near := difflib.get_close_matches(option, [*ACTIONS, *_VALUED], n=1):
        return f"did you mean {near[0]}?"
    if "=" in argument:
        return f"keys take no dashes, write {argument.lstrip('-')}"
    return "see --help"
