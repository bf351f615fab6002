"""Reading YAML: the values, and the line on which each key stands, so that an error can point at it.

Plain words follow YAML 1.2 rather than PyYAML's 1.1: ``1e-3`` is a number, ``00:30:00`` and ``no`` are text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from thinrank.configs.errors import ConfigError


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own way to say which words are not text)


_NUMBERS = "-+.0123456789iInN"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list(_NUMBERS)),
    ("float", r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?", list(_NUMBERS)),
    ("float", r"[-+]?\.?(inf|Inf)|\.?(nan|NaN)", list(_NUMBERS)),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(re.sub(r"\.(?=[iInN])", "", node.value)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A YAML file: its values and where they stand."""

    values: dict[str, Any]
    """The mapping that the file holds; empty for an empty file."""
    places: dict[str, str]
    """For each dotted key, ``file, line n``."""


def read(path: Path) -> Document:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: if there is no such file, it is not UTF-8 text, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"the configuration file {path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read as text: {error}") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line} is not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if node is None or values is None:
        return Document(values={}, places={})
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values (`key: value`), it holds {type(values).__name__}")
    places: dict[str, str] = {}
    for key, line in _keys(node, ""):
        if key in places:
            raise ConfigError(f"{path}, line {line} gives {key} a second time: keep one of the two")
        places[key] = f"{path}, line {line}"
    return Document(values=_text_keys(values), places=places)


def word(text: str) -> Any:
    """The value of one command-line word, read as YAML; text that is not YAML stands for itself."""
    try:
        return _text_keys(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError:
        return text


def _keys(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _keys(value, f"{name}.")


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return value


class _Dumper(yaml.SafeDumper):
    pass


# Text that this loader, or any reader of YAML 1.1, would take for a number is written in quotes.
_LIKE_A_NUMBER = re.compile(r"([-+.]?[0-9][-+.0-9_eE]*|[-+]?\.?(inf|Inf|nan|NaN))\Z")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _LIKE_A_NUMBER, list(_NUMBERS))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # values are final: `${` in one is meant as it stands
    # PyYAML writes these line breaks as they are, and reads them as spaces.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", escaped, style=style)


_Dumper.add_representer(str, _text)


def write(tree: dict[str, Any]) -> str:
    """A tree of plain values as YAML text, in its own order; loading it gives the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
