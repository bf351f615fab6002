"""Where documents come from: the interface of a source, the split by hash, and the Python sources."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from thinrank.trainers.data.config import PySourceConfig
from thinrank.trainers.errors import UserError

Split = Literal["train", "validation"]


class Document(NamedTuple):
    """A text and its name, which is the same on every machine that has the same corpus."""

    name: str
    text: str


class Source(Protocol):
    """A corpus that is split into training and held-out documents."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What the documents are, as JSON: equal manifests mean equal documents. No path of this machine."""
        ...

    @property
    def train_bytes(self) -> int | None:
        """About how large the training text is, in bytes; None if that is not known in advance."""
        ...

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, always in the same order."""
        ...


def hash_share(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text alone, uniformly spread, and independent between purposes."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=purpose.encode()[:16])
    return int.from_bytes(digest.digest(), "big") / 2**64


def is_held_out(text: str, fraction: float) -> bool:
    """Whether the hash of a name (or of a text) lies in the held-out share."""
    return hash_share(text, "held-out") < fraction


def held_out_names(names: Iterable[str], fraction: float) -> frozenset[str]:
    """The names in the held-out share; where none is, the one nearest to it, so that there is something to measure."""
    names = list(dict.fromkeys(names))
    chosen = frozenset(name for name in names if is_held_out(name, fraction))
    if not chosen and len(names) > 1:
        chosen = frozenset([min(names, key=lambda name: hash_share(name, "held-out"))])
    return chosen


# Distributions package these with the library or leave them out; without them, installations agree.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def _python_files(root: Path) -> list[str]:
    """Relative POSIX paths of the Python files below a folder, sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        relative = Path(folder).relative_to(root)
        # _sysconfigdata_* and config-* are written when Python is built and hold paths of that machine.
        found += [
            (relative / name).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith("_sysconfigdata_")
        ]
    return sorted(found)


def decode_python(data: bytes) -> str:
    """The text of a Python file in the encoding that it declares (PEP 263), with line ends as `\\n`.

    Raises:
        SyntaxError: The declared encoding is unknown, or contradicts a byte order mark.
        UnicodeDecodeError: The bytes are not in that encoding.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


class PySource:
    """Python files below a folder, by default the standard library: one document each, split by a hash of the path.

    Args:
        config: The folder and the held-out share.

    Raises:
        UserError: The folder holds no Python file, or only one.
    """

    def __init__(self, config: PySourceConfig):
        self._root = Path(config.folder or sysconfig.get_paths()["stdlib"]).expanduser()
        self._skipped: list[str] = []
        self._files: dict[str, tuple[int, str]] = {}
        for name in _python_files(self._root):
            data = (self._root / name).read_bytes()
            try:
                decode_python(data)
            except (SyntaxError, UnicodeDecodeError):
                self._skipped.append(name)
                continue
            self._files[name] = (len(data), hashlib.blake2b(data, digest_size=16).hexdigest())
        if len(self._files) < 2:
            raise UserError(
                f"{len(self._files)} readable Python files were found below {self._root}, and at least 2 are needed "
                "(one to train on, one held out); set data.folder to a folder of Python files, or use data=files"
            )
        self._held_out = held_out_names(self._files, config.validation_fraction)
        if len(self._held_out) == len(self._files):
            raise UserError(
                f"all {len(self._files)} Python files below {self._root} are held out; lower data.validation_fraction "
                f"(now {config.validation_fraction})"
            )
        self._fraction = config.validation_fraction

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "source": "pysource",
            "python": platform.python_version(),
            "validation_fraction": self._fraction,
            "files": [[name, size, digest] for name, (size, digest) in self._files.items()],
            "skipped": self._skipped,
        }

    @property
    def train_bytes(self) -> int:
        return sum(size for name, (size, _) in self._files.items() if name not in self._held_out)

    def documents(self, split: Split) -> Iterator[Document]:
        if split == "train":
            names = [name for name in self._files if name not in self._held_out]
        else:
            # in an order without meaning: by path, the first documents would be those of one package, and a validation
            # that is cut short would measure that package alone
            names = sorted(self._held_out, key=lambda name: hash_share(name, "order"))
        for name in names:
            yield Document(name, decode_python((self._root / name).read_bytes()))
