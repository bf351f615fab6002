"""The text of ``--help``, made from the dataclasses: every key with its type, the value it would have, its meaning."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from thinrank.configs.arguments import Arguments
from thinrank.configs.compose import Schema
from thinrank.configs.fields import hints, in_words, leaves, section
from thinrank.configs.load import Resolved, resolve

_OPTIONS = (
    ("--help, -h", "this text; with a choice (--help optimizer=galore) the keys of that choice alone"),
    ("--cfg", "print the resolved configuration as YAML, which --config reads, and exit"),
    ("--dry-run", "print what would run (routing, parameters, state bytes, launch line) and exit"),
    ("--config FILE", "lay a YAML file over the defaults; repeatable, later files win"),
    ("--config-dir DIR", "look for GROUP/NAME.yaml here before the shipped ones; repeatable"),
    ("key=value", "set one key; the right-most wins; values are read as YAML"),
    ("group=NAME", "choose what a group holds: a name below, or the path of a YAML file"),
)


def help_text(schema: Schema, arguments: Arguments, *, usage: str, width: int | None = None) -> str:
    """The help for what the command line chooses; the values shown are those it would run with.

    Args:
        usage: the command, ahead of its arguments.
        width: columns to wrap at; those of the terminal by default.
    """
    width = width or max(60, min(shutil.get_terminal_size((100, 24)).columns, 140))
    resolved = resolve(schema, arguments)
    chosen = [key for word, _ in arguments.words if (key := schema.own_key(word)) in schema.groups]
    if chosen:
        return "\n".join(
            line for group in schema.groups if group in chosen for line in _section(resolved, schema, group, width)
        )
    lines = [f"usage: {usage} [OPTION]… [GROUP=NAME]… [KEY=VALUE]…", "", "options:"]
    for option, meaning in _OPTIONS:
        lines += _entry(f"  {option}", meaning, 20, width)
    lines += ["", "groups and their choices (* is chosen):"]
    for group in schema.groups:
        names = schema.choices(group, arguments.folders)
        current = resolved.names[group]
        known = ", ".join(f"{name}*" if name == current else name for name in names)
        also = [alias for alias, own in schema.aliases.items() if own == group]
        known += "".join(f" (or {alias}=…)" for alias in also)
        lines += _entry(f"  {group}", known, 20, width)
    for name in hints(schema.root):
        lines += ["", *_section(resolved, schema, name, width)]
    return "\n".join(lines)


def meaning(cls: type, name: str) -> str:
    """The one-line meaning that a field carries in its metadata; empty if it has none."""
    return next(field for field in dataclasses.fields(cls) if field.name == name).metadata.get("help", "")


def _section(resolved: Resolved, schema: Schema, name: str, width: int) -> Iterator[str]:
    hint = resolved.sections[name]
    cls = section(hint)
    if cls is None:
        yield from _entry(
            f"{name}: {in_words(hint)} = {_value(resolved.tree[name])}", meaning(schema.root, name), 4, width
        )
        return
    title = f"{name}={resolved.names[name]}" if name in schema.groups else name
    yield from textwrap.wrap(f"{title}: {_summary(cls)}", width, subsequent_indent="  ")
    for key, holder, field in leaves(cls, f"{name}."):
        value: Any = resolved.tree
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else None
        yield f"  {key}: {in_words(hints(holder)[field])} = {_value(value)}"
        yield from textwrap.wrap(meaning(holder, field), width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _summary(cls: type) -> str:
    """The first sentence of a dataclass's docstring."""
    doc = (cls.__doc__ or "").strip()
    return " ".join(doc.split("\n\n")[0].split()) if not doc.startswith(f"{cls.__name__}(") else ""


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if value and value == value.strip() else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    return str(value)


def _entry(head: str, text: str, indent: int, width: int) -> list[str]:
    if len(head) >= indent:
        return [head, *textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)]
    return textwrap.wrap(text, width, initial_indent=head.ljust(indent), subsequent_indent=" " * indent) or [head]
