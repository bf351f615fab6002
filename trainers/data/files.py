"""Documents in files of the user's own: text, JSON lines and Parquet, found by glob patterns."""

from __future__ import annotations

import contextlib
import glob
import gzip
import importlib.util
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from thinrank.trainers.data.cache import file_digest
from thinrank.trainers.data.config import FilesConfig, HeadersConfig
from thinrank.trainers.data.documents import Document, Split, held_out_names, is_held_out
from thinrank.trainers.errors import UserError


class FoundFile(NamedTuple):
    """A file and its path relative to the fixed part of the pattern that found it."""

    name: str
    path: Path


def find_files(patterns: list[str], field: str) -> list[FoundFile]:
    """The files that some glob patterns match, each once, sorted by relative path.

    Args:
        patterns: Glob patterns; `**` matches any number of folders, `~` is the home folder.
        field: Name of the configuration field, for the error.

    Raises:
        UserError: A pattern matches no file.
    """
    found: dict[Path, str] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        matches = [Path(match) for match in glob.glob(expanded, recursive=True) if os.path.isfile(match)]
        if not matches:
            raise UserError(f"{field} pattern {pattern!r} matches no file in {os.getcwd()}; correct the pattern")
        root = _fixed_part(expanded)
        for match in matches:
            found.setdefault(match.resolve(), Path(os.path.relpath(match, root)).as_posix())
    # Two roots may hold files of one relative name: the resolved path then decides, so that the order is total.
    return sorted((FoundFile(name, path) for path, name in found.items()), key=lambda file: (file.name, str(file.path)))


def _fixed_part(pattern: str) -> Path:
    """The folder above the first wildcard: names relative to it do not depend on where the corpus lies."""
    parts = Path(pattern).parts
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed]) if fixed else Path(".")


def _kind(path: Path) -> str:
    """`parquet`, `json` (one object a line) or `text`, by the ending of the name."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return "parquet"
    return "json" if name.endswith((".jsonl", ".ndjson", ".json")) else "text"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}); "
            "convert it to UTF-8 or leave it out of the pattern"
        ) from error


def read_text(path: Path) -> str:
    """A whole text file, which must be UTF-8; `.gz` is unpacked."""
    with _reading(path), _open(path) as file:
        return _decode(file.read(), str(path))


def read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    """The text of each line's object; empty lines are passed over."""
    with _reading(path), _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise UserError(
                    f'{where} is not a JSON object ({error.msg}); write one object a line, such as {{"text": "..."}}'
                ) from error
            yield _field(row, text_field, where)


def read_parquet(path: Path, text_field: str) -> Iterator[str]:
    """The text column of a Parquet file, row by row."""
    import pyarrow
    import pyarrow.parquet

    try:
        with _reading(path), pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise UserError(_no_field(str(path), text_field, file.schema_arrow.names))
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    yield _text(value, text_field, f"{path} row {row}")
                    row += 1
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); replace it or leave it out"
        ) from error


def _field(row: object, text_field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object; write one object a line, such as {{"text": "..."}}')
    if text_field not in row:
        raise UserError(_no_field(where, text_field, list(row)))
    return _text(row[text_field], text_field, where)


def _text(value: object, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where} holds {type(value).__name__} in {text_field!r} where a text is needed; "
            "set data.text_field to the field that holds the text"
        )
    return value


def _no_field(where: str, text_field: str, names: list[str]) -> str:
    return f"{where} has no {text_field!r}; set data.text_field to one of {', '.join(map(str, names)) or '(none)'}"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns a file that cannot be read, or a damaged compressed one, into a sentence that names it."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}); replace it or leave it out") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path} cannot be read ({reason}); make it readable or leave it out") from error


def _identity(file: FoundFile) -> list[Any]:
    """Name, size in bytes and digest of a file."""
    with _reading(file.path):
        return [file.name, file.path.stat().st_size, file_digest(file.path)]


class FilesSource:
    """Documents of the files that the patterns match: a text file is one document, a line or row is one too.

    Where no held-out files are named, text files are split by a hash of their path, and the lines and rows by a hash
    of path and number.

    Args:
        config: The patterns.

    Raises:
        UserError: A pattern matches nothing, or a file is both for training and held out.
    """

    def __init__(self, config: FilesConfig):
        self._config = config
        self._train = find_files(config.train, "data.train")
        self._validation = find_files(config.validation, "data.validation")
        both = {file.path for file in self._train} & {file.path for file in self._validation}
        if both:
            raise UserError(
                f"{min(both)} is matched by data.train and by data.validation; "
                "a held-out file must not be trained on: narrow one of the patterns"
            )
        texts = [file.name for file in self._train if _kind(file.path) == "text"]
        self._held_out = frozenset() if config.validation else held_out_names(texts, config.validation_fraction)
        self._listing = {
            "train": [_identity(file) for file in self._train],
            "validation": [_identity(file) for file in self._validation],
        }

    @property
    def manifest(self) -> dict[str, Any]:
        split = None if self._config.validation else self._config.validation_fraction
        return {
            "source": "files",
            "text_field": self._config.text_field,
            "validation_fraction": split,
            "files": self._listing,
        }

    @property
    def train_bytes(self) -> int:
        return sum(size for _, size, _ in self._listing["train"])

    def documents(self, split: Split) -> Iterator[Document]:
        if self._config.validation:
            yield from self._read(self._train if split == "train" else self._validation)
            return
        for document, held_out in self._read_split():
            if held_out == (split == "validation"):
                yield document

    def _read(self, files: list[FoundFile]) -> Iterator[Document]:
        for file in files:
            kind = _kind(file.path)
            if kind == "text":
                yield Document(file.name, read_text(file.path))
                continue
            read = read_parquet if kind == "parquet" else read_json_lines
            for number, text in enumerate(read(file.path, self._config.text_field)):
                yield Document(f"{file.name}#{number}", text)

    def _read_split(self) -> Iterator[tuple[Document, bool]]:
        texts = {file.name for file in self._train if _kind(file.path) == "text"}
        for document in self._read(self._train):
            if document.name in texts:
                yield document, document.name in self._held_out
            else:
                yield document, is_held_out(document.name, self._config.validation_fraction)


class HeadersSource(FilesSource):
    """C++ headers below a folder, by default torch's own: one document each, split by a hash of the path.

    Raises:
        UserError: The folder is not there, or a pattern matches nothing in it.
    """

    def __init__(self, config: HeadersConfig):
        folder = Path(config.folder).expanduser() if config.folder else _torch_headers()
        if not folder.is_dir():
            raise UserError(f"the folder of headers {folder} does not exist; set data.folder, or use data=files")
        patterns = [os.path.join(glob.escape(str(folder)), pattern) for pattern in config.patterns]
        super().__init__(FilesConfig(train=patterns, validation_fraction=config.validation_fraction))

    @property
    def manifest(self) -> dict[str, Any]:
        return {**super().manifest, "source": "headers"}


def _torch_headers() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None  # torch is what this library stands on
    return Path(spec.origin).parent / "include"
