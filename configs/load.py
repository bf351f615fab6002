"""From what was given to one checked configuration; nothing here knows what is configured.

Under the composed layers lie the defaults of the dataclasses. Every key is checked against them, ``${…}`` is resolved,
every value is checked against the type of its field, and the objects are built from the inside out.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from thinrank.configs.arguments import Arguments, parse
from thinrank.configs.compose import Composition, Schema, at, compose, merge
from thinrank.configs.errors import ConfigError
from thinrank.configs.fields import Text, construct, default, hints, leaves, section, typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration whose keys and types are right, before any dataclass has judged its values."""

    tree: dict[str, Any]
    """Every key with a plain value, interpolations resolved; loading it again gives the same."""
    names: dict[str, str]
    """What was chosen in each group."""
    sections: dict[str, Any]
    """The type of each top-level key: for a group, the dataclass of its choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded(Resolved):
    """A configuration, ready for use."""

    config: Any
    """The object of the schema's root class."""


def load(schema: Schema, argv: Sequence[str] | Arguments) -> Loaded:
    """Compose, resolve, check and build the configuration that the command line asks for.

    Raises:
        ConfigError: one sentence that names the key or the file and the remedy.
    """
    resolved = resolve(schema, argv)
    objects = {name: construct(hint, resolved.tree[name], name) for name, hint in resolved.sections.items()}
    try:
        config = schema.root(**objects)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Loaded(**vars(resolved), config=config)


def resolve(schema: Schema, argv: Sequence[str] | Arguments) -> Resolved:
    """As `load`, without building: for showing what a choice consists of, even if it still lacks a value.

    Raises:
        ConfigError: one sentence that names the key or the file and the remedy.
    """
    composition = compose(schema, argv if isinstance(argv, Arguments) else parse(argv))
    root = hints(schema.root)
    for key in composition.given:
        if key not in root:
            raise _unknown(composition, key)
    sections = {name: composition.classes.get(name, hint) for name, hint in root.items()}
    tree = {
        name: _complete(composition, hint, name, composition.given.get(name, {})) for name, hint in sections.items()
    }
    tree = _interpolate(tree)
    tree = {name: _checked(composition, hint, tree[name], name) for name, hint in sections.items()}
    for group, name in composition.names.items():
        if schema.classes(group):
            tree[group] = {"name": name, **tree[group]}
    return Resolved(tree=tree, names=composition.names, sections=sections)


def _complete(composition: Composition, hint: Any, path: str, value: Any) -> Any:
    """Given values with all defaults filled in and no unknown key."""
    below = section(hint)
    if below is None:
        return _word(hint, value, path)
    place = at(composition.places.get(path, ""))
    if not isinstance(value, dict):
        if (value is None or (isinstance(value, Text) and value.value is None)) and below is not hint:
            return None
        remedy = f"write {path}.{next(iter(hints(below)))}=…"
        if path in composition.schema.groups:
            remedy = f"choose by name, {path}=NAME"
        raise ConfigError(f"{place}{path} has keys of its own, so it cannot be {value}: {remedy}")
    fields, value = hints(below), dict(value)
    if composition.schema.classes(path):
        value.pop("name", None)
        if "name" in fields:
            value["name"] = composition.names[path]
    for key in value:
        if key not in fields:
            raise _unknown(composition, f"{path}.{key}")
    complete = {}
    for name, inner in fields.items():
        preset = default(below, name)
        if name not in value and preset is dataclasses.MISSING and section(inner) is None:
            raise ConfigError(f"{path}.{name} must be given: add {path}.{name}=…")
        given = value.get(name, {} if preset is dataclasses.MISSING else preset)
        if isinstance(given, dict) and isinstance(preset, dict) and section(inner):
            given = merge(preset, given)
        complete[name] = _complete(composition, inner, f"{path}.{name}", given)
    return complete


def _word(hint: Any, value: Any, path: str) -> Any:
    """A value without `Text` in it. Text with an interpolation in it is typed only after that is resolved."""
    if isinstance(value, dict):
        return {key: _word(Any, item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Text):
        return str(value) if "${" in value else typed(hint, value, path)
    return value


def _interpolate(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace ``${other.key}``, ``${oc.env:HOME}`` and the like."""
    if "${" not in repr(tree):
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        reason = str(error).splitlines()[0].rstrip(".")
        remedy = r"name another key in full, as ${run.name}, or write \${ for the characters themselves"
        raise ConfigError(f"{key} cannot be resolved: {reason}; {remedy}") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _checked(composition: Composition, hint: Any, value: Any, path: str) -> Any:
    below = section(hint)
    if below is not None and isinstance(value, dict):
        return {
            name: _checked(composition, inner, value[name], f"{path}.{name}") for name, inner in hints(below).items()
        }
    return typed(hint, value, path, composition.places.get(path, ""))


def _unknown(composition: Composition, path: str) -> ConfigError:
    group, _, last = path.rpartition(".")
    start = f"{at(composition.places.get(path, ''))}unknown key {path}"
    if others := [name for name, cls in composition.schema.classes(group).items() if last in hints(cls)]:
        chosen = composition.names[group]
        return ConfigError(f"{start}: {last} belongs to {group}={' and '.join(others)}, and {group}={chosen} is chosen")
    keys = list(_keys(composition))
    near = [key for key in keys if key.rpartition(".")[2] == last][:3]
    near = near or difflib.get_close_matches(path, keys, n=1, cutoff=0.7)
    near = [key for key in near if not path.startswith(f"{key}.")]
    if not near:
        tails = {key.rpartition(".")[2]: key for key in keys}
        near = [tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.7)]
    return ConfigError(f"{start}: {'did you mean ' + ' or '.join(near) + '?' if near else 'see --help for all keys'}")


def _keys(composition: Composition) -> Iterator[str]:
    for name, hint in hints(composition.schema.root).items():
        yield name
        below = section(composition.classes.get(name, hint))
        if below is not None:
            yield from (key for key, _, _ in leaves(below, f"{name}."))
