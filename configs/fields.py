"""Dataclass fields as configuration: types in words, the check of a value against a type, the way back to objects."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

from thinrank.configs.errors import ConfigError


class Text(str):
    """A command-line word. It is read as YAML, but a field that wants text gets it as it was typed."""

    value: Any
    """What YAML makes of the word."""

    def __new__(cls, typed: str, value: Any) -> Text:
        text = super().__new__(cls, typed)
        text.value = value
        return text


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of the fields of `cls` that its constructor takes, in their order."""
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls) if field.init}


def section(hint: Any) -> type | None:
    """The dataclass that `hint` is, or allows (``Optional``); None where there is none."""
    for member in _members(hint):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


def is_mapping(hint: Any) -> bool:
    """Whether `hint` is, or allows, a mapping with keys of any name."""
    return any(member in _MAPPINGS or typing.get_origin(member) in _MAPPINGS for member in _members(hint))


def default(cls: type, name: str) -> Any:
    """The default of a field, as plain values; `dataclasses.MISSING` if it has none."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return plain(field.default_factory())
    return plain(field.default)


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """Every key below a dataclass: its dotted name, the dataclass that holds it, and the field's name there."""
    for name, hint in hints(cls).items():
        below = section(hint)
        if below is None:
            yield f"{prefix}{name}", cls, name
        else:
            yield from leaves(below, f"{prefix}{name}.")


def plain(value: Any) -> Any:
    """Objects as YAML can write them: dataclasses as mappings, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in hints(type(value))}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def in_words(hint: Any) -> str:
    """A type as the help prints it: ``int``, ``int | float``, ``list[str]``, ``one of a, b``."""
    if hint is Any:
        return "any"
    if hint is type(None):
        return "null"
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " | ".join(in_words(member) for member in typing.get_args(hint))
    if origin in _SEQUENCES:
        inner = [in_words(member) for member in typing.get_args(hint) if member is not ...]
        return f"list[{', '.join(inner)}]"
    if origin in _MAPPINGS:
        return "mapping"
    return getattr(hint, "__name__", str(hint))


def typed(hint: Any, value: Any, path: str, place: str = "") -> Any:
    """`value` as a plain value of type `hint`: whole floats become ints where ints are wanted, ints become floats.

    Args:
        path: the dotted key, for the error.
        place: where the value was written, e.g. ``exp.yaml, line 3``.

    Raises:
        ConfigError: if the value is of another type.
    """
    if isinstance(value, Text):
        quoted = isinstance(value.value, str) and value[:1] in ("'", '"')
        wanted = not quoted and any(member is str for member in _members(hint))
        # Only text is left when no other type of the field takes what YAML reads.
        others = [m for m in _members(hint) if m is not str]
        if wanted and not any(_fits(member, value.value) is not _NO for member in others):
            return str(value)
        value = value.value
    for member in sorted(_members(hint), key=lambda m: not _same(m, value)):
        fitted = _fits(member, value)
        if fitted is not _NO:
            return fitted
    raise ConfigError(f"{place}{': ' if place else ''}{path} must be {_wanted(hint)}, got {_shown(value)}")


def construct(hint: Any, value: Any, path: str) -> Any:
    """The object for a checked plain value: dataclasses from mappings, tuples from lists.

    Raises:
        ConfigError: with the sentence of the dataclass that refuses its values, after the key that it is about.
    """
    below = section(hint)
    if below is not None and isinstance(value, dict):
        values = {name: construct(inner, value[name], f"{path}.{name}") for name, inner in hints(below).items()}
        try:
            return below(**values)
        except ValueError as error:
            sentence = str(error)
            joint = "." if sentence.partition(" ")[0] in hints(below) else ": "
            raise ConfigError(f"{path}{joint}{sentence}") from error
    if isinstance(value, list) and any(typing.get_origin(m) is tuple for m in _members(hint)):
        return tuple(value)
    return value


_NO = object()
_SEQUENCES = (list, tuple, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _same(hint: Any, value: Any) -> bool:
    return isinstance(hint, type) and type(value) is hint


def _fits(hint: Any, value: Any) -> Any:
    """`value` as a `hint` that is no union, or `_NO`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if hint is type(None):
        return None if value is None else _NO
    if origin is Literal:
        return value if any(value == choice and type(value) is type(choice) for choice in arguments) else _NO
    if hint is int:
        whole = isinstance(value, float) and value.is_integer()
        return int(value) if whole or type(value) is int else _NO
    if hint is float:
        return float(value) if type(value) in (int, float) else _NO
    if hint in (str, bool):
        return value if type(value) is hint else _NO
    if hint in _SEQUENCES or origin in _SEQUENCES:
        return _fits_list(hint, arguments, value)
    if hint in _MAPPINGS or origin in _MAPPINGS:
        return value if isinstance(value, dict) else _NO
    raise TypeError(f"a configuration field cannot have the type {hint}")


def _fits_list(hint: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list):
        return _NO
    if typing.get_origin(hint) is tuple and ... not in arguments:
        if len(arguments) != len(value):
            return _NO
        inner = list(arguments)
    else:
        inner = [arguments[0] if arguments else Any] * len(value)
    items = []
    for item_hint, item in zip(inner, value, strict=True):
        fitted = [_fits(member, item) for member in sorted(_members(item_hint), key=lambda m: not _same(m, item))]
        fitted = [item for item in fitted if item is not _NO]
        if not fitted:
            return _NO
        items.append(fitted[0])
    return items


def _wanted(hint: Any) -> str:
    return " or ".join(_wanted_one(member) for member in _members(hint))


def _wanted_one(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is tuple and ... not in arguments:
        return f"a list of {len(arguments)} ({', '.join(_wanted(a) for a in arguments)}), as [a, b]"
    if origin in _SEQUENCES or hint in _SEQUENCES:
        return f"a list (each {_wanted(arguments[0])}), as [a, b]" if arguments else "a list, as [a, b]"
    if origin in _MAPPINGS or hint in _MAPPINGS:
        return "a mapping, as {key: value}"
    return _NAMES.get(hint, in_words(hint))


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, (str, int, float)) else str(value)
