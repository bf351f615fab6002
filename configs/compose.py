"""Layer upon layer: which choice each group has, which values were given, and where they were written.

The layers, each over the one before: the base file, every ``--config FILE``, the command line. The right-most wins. A
*group* (say ``optimizer``) is a key whose content is chosen by name: choosing puts the YAML file of the choice in place
of whatever the group held, and the other keys of the same layer are laid over that.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinrank.configs.arguments import Arguments
from thinrank.configs.errors import ConfigError
from thinrank.configs.fields import Text, hints, is_mapping, section
from thinrank.configs.reader import Document, read, word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """What can be configured."""

    root: type
    """The dataclass of the whole configuration."""
    groups: Mapping[str, type | Mapping[str, type]]
    """For each group: the dataclass of each name, or one dataclass for all of its YAML files."""
    folder: Path
    """Where the base file and the YAML files of the groups (``GROUP/NAME.yaml``) are."""
    own: Path | None = None
    """A folder of the same form whose files come before those of `folder`."""
    base: str
    """The file in `folder`, without its ending, that makes the first choices."""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Dotted key below a group → the group that it stands for, with all keys below."""

    def own_key(self, key: str) -> str:
        """A dotted key as it is kept, whichever way it is written."""
        for alias, group in self.aliases.items():
            if key == alias or key.startswith(f"{alias}."):
                return group + key[len(alias) :]
        return key

    def own_document(self, document: Document) -> Document:
        """A file with its keys as they are kept."""
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in document.values.items()}
        for alias, group in self.aliases.items():
            outer, _, inner = alias.rpartition(".")
            if isinstance(values.get(outer), dict) and inner in values[outer]:
                if group in values:
                    where = at(document.places.get(alias, ""))
                    raise ConfigError(f"{where}{alias} and {group} are one and the same: write one of them")
                values[group] = values[outer].pop(inner)
        return Document(values=values, places={self.own_key(key): place for key, place in document.places.items()})

    def classes(self, group: str) -> dict[str, type]:
        """The dataclasses of a group by name; empty for a group of one dataclass, and for what is no group."""
        classes = self.groups.get(group)
        return dict(classes) if isinstance(classes, Mapping) else {}

    def choices(self, group: str, folders: Sequence[Path] = ()) -> dict[str, Path | None]:
        """The names that a group can be given, with their YAML files, those of `folders` before the shipped ones."""
        found: dict[str, Path | None] = dict.fromkeys(self.classes(group))
        shipped = (self.folder,) if self.own is None else (self.folder, self.own)
        for folder in (*shipped, *reversed(folders)):
            found |= {path.stem: path for path in sorted((folder / group).glob("*.yaml"))}
        return found


class Composition:
    """The values given so far."""

    def __init__(self, schema: Schema, folders: Sequence[Path]):
        self.schema = schema
        self.folders = folders
        self.names: dict[str, str] = {}
        """For each group, the name that was chosen."""
        self.classes: dict[str, type] = {}
        """For each group, the dataclass of that choice."""
        self.given: dict[str, Any] = {}
        """Nested values; words of the command line as `Text`, since their type is not known yet."""
        self.places: dict[str, str] = {}
        """For each dotted key that a file gave, the file and the line."""

    def lay(self, document: Document) -> None:
        """Lay a file over what is there: its choices first, then its other keys."""
        document = self.schema.own_document(document)
        for key, value in document.values.items():
            if self._is_choice(key, value):
                self.choose(key, value, document.places[key])
            elif key in self.schema.groups and isinstance(value, dict) and isinstance(value.get("name"), str):
                self.rename(key, value["name"], document.places[f"{key}.name"])
        merge(self.given, {key: value for key, value in document.values.items() if not self._is_choice(key, value)})
        self.places |= document.places

    def lay_words(self, words: Sequence[tuple[str, str]]) -> None:
        """Lay the command line over what is there: its choices first, wherever they stand, then its other keys."""
        values = []
        for written, typed in words:
            key, value = self.schema.own_key(written), word(typed)
            whole = isinstance(value, dict) and self._holds_keys(key)
            if self._is_choice(key, typed) and not whole:
                self.choose(key, typed, "")
                continue
            if key in self.schema.groups and isinstance(value.get("name"), str):
                self.rename(key, value["name"], "")
            elif key.removesuffix(".name") in self.schema.groups:
                self.rename(key.removesuffix(".name"), typed, "")
            values.append((key, value if whole else Text(typed, value)))
        for key, value in values:
            merge(self.given, _nested(key, value))
            self.places.pop(key, None)

    def choose(self, group: str, label: str, place: str) -> None:
        """Replace the content of a group by a choice: a known name, or the path of a YAML file."""
        known = self.schema.choices(group, self.folders)
        if label in known:
            path = known[label]
        elif label.endswith((".yaml", ".yml")):
            path = Path(label).expanduser()
        else:
            near = difflib.get_close_matches(label, list(known), n=1)
            hint = f"did you mean {near[0]}? The choices are" if near else "choose one of"
            names = f"{', '.join(known)} or a path to a YAML file"
            raise ConfigError(f"{at(place)}unknown choice {group}={label}: {hint} {names}")
        document = read(path) if path else Document(values={}, places={})
        name = str(document.values.get("name", path.stem if path else label))
        classes = self.schema.classes(group)
        if classes and name not in classes:
            names = ", ".join(classes)
            raise ConfigError(f"{path} does not say what it configures: add a line `name: …` with one of {names}")
        chosen = classes[name] if classes else self.schema.groups[group]
        assert isinstance(chosen, type)
        self.names[group], self.classes[group] = name, chosen
        self.given[group] = dict(document.values)
        if not classes and "name" in hints(chosen):
            self.given[group].setdefault("name", name)
        self.places = {key: where for key, where in self.places.items() if not key.startswith(f"{group}.")}
        self.places |= {f"{group}.{key}": where for key, where in document.places.items()}

    def rename(self, group: str, name: str, place: str) -> None:
        """A ``name`` among a group's keys: the choice of that name, unless the group is that already."""
        if self.names.get(group) == name:
            return
        if self.schema.classes(group) or name in self.schema.choices(group, self.folders):
            self.choose(group, name, place)

    def _is_choice(self, key: str, value: Any) -> bool:
        return key in self.schema.groups and isinstance(value, str)

    def _holds_keys(self, key: str) -> bool:
        """Whether ``key`` is a section or a mapping, so that ``key={a: 1}`` is no text."""
        head, *rest = key.split(".")
        hint: Any = self.classes.get(head) or hints(self.schema.root).get(head)
        for part in rest:
            below = section(hint)
            if below is None:
                return is_mapping(hint)
            hint = hints(below).get(part)
        return section(hint) is not None or is_mapping(hint)


def compose(schema: Schema, arguments: Arguments) -> Composition:
    """All layers that the command line asks for."""
    composition = Composition(schema, arguments.folders)
    composition.lay(read(schema.folder / f"{schema.base}.yaml"))
    for file in arguments.files:
        composition.lay(read(file))
    composition.lay_words(arguments.words)
    for group in schema.groups:
        if group not in composition.classes:
            choices = ", ".join(schema.choices(group, arguments.folders))
            raise ConfigError(f"{group} is not chosen: write {group}=NAME with one of {choices}")
    return composition


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `values` over `into`, mapping by mapping; anything else replaces what was there."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = merge({}, value) if isinstance(value, dict) else value
    return into


def at(place: str) -> str:
    """The beginning of an error about something that a file gave."""
    return f"{place}: " if place else ""


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
