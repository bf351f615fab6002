"""A cache on disk that is complete or absent: entries are checked by content, and replaced whole.

An entry is a folder with an index of its files' checksums. It is built under a temporary name and renamed when it is
complete, so a process that dies leaves no half entry, and two processes that build the same one at once do not mix.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from thinrank.trainers.errors import UserError

INDEX = "entry.json"

# What a full, read-only or misnamed folder answers; any other error of the system is no matter of the cache folder.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_NO_WRITING = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG}


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/thinrank`, or `~/.cache/thinrank` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinrank"


def fingerprint(value: Any) -> str:
    """Hex digest (32 letters) of a JSON value; equal values give equal digests on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Hex digest (32 letters) of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class Cache:
    """Entries below one folder.

    Args:
        folder: Where the entries lie; made at the first build.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder).expanduser() if folder else default_cache_dir()

    def entry(self, name: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """The folder and the description of an entry, built first if it is missing or damaged.

        Args:
            name: File name of the entry; it must contain the key of everything that the content depends on.
            build: Fills the empty folder that it is given and returns a description (a JSON object).

        Raises:
            UserError: The cache folder cannot be written.
        """
        path = self.folder / name
        meta = verified(path)
        if meta is not None:
            return path, meta
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(name):
            meta = verified(path)  # another process may have built it while this one waited
            if meta is None:
                meta = self._build(path, build)
        return path, meta

    def _build(self, path: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        with self._writing():
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=self.folder))
        try:
            with self._writing():
                meta = build(temporary)
                files = {
                    item.relative_to(temporary).as_posix(): {"size": item.stat().st_size, "blake2b": file_digest(item)}
                    for item in sorted(temporary.rglob("*"))
                    if item.is_file()
                }
                index = {"files": files, "meta": meta}
                index["checksum"] = fingerprint({"files": files, "meta": meta})
                (temporary / INDEX).write_text(json.dumps(index), encoding="utf-8")
                _install(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return meta

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns an error of the file system in the cache folder into a sentence; other errors pass."""
        try:
            yield
        except OSError as error:
            # Writing to an open file fails without a name; making, opening and renaming fail with one.
            named = None if error.filename is None else Path(os.fsdecode(error.filename))
            ours = named is None or named.is_relative_to(self.folder) or self.folder.is_relative_to(named)
            if not ours or error.errno not in (_NO_SPACE if named is None else _NO_SPACE | _NO_WRITING):
                raise
            raise UserError(
                f"the cache folder {self.folder} cannot be written ({os.strerror(error.errno or 0).lower()}); "
                "set data.cache_dir to a folder with free space and write permission"
            ) from error

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Lets one process build while the others wait. It saves work only: the rename alone keeps entries whole."""
        try:
            import fcntl
        except ImportError:  # not POSIX: each process builds for itself, and the last rename wins
            yield
            return
        with self._writing():
            file = (self.folder / f".{name}.lock").open("w")
        with file:
            # Some network file systems have no locks; there, too, each process builds for itself.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def verified(path: Path) -> dict[str, Any] | None:
    """The description of a complete entry; None if it is missing, truncated or altered."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        files, meta = index["files"], index["meta"]
        if index["checksum"] != fingerprint({"files": files, "meta": meta}):
            return None
        for name, expected in files.items():
            file = path / name
            if file.stat().st_size != expected["size"] or file_digest(file) != expected["blake2b"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # unreadable and wrong are the same here: the caller builds the entry anew
    return meta


def _install(temporary: Path, path: Path) -> None:
    """Puts a complete folder in its place; what lies there is damaged, or an equal entry of another process."""
    for _ in range(10):
        try:
            os.rename(temporary, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if verified(path) is not None:
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
        # Another process may have moved it first; then the next turn of the loop finds the place free or filled.
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside / path.name)
        shutil.rmtree(aside, ignore_errors=True)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
