"""Files that are either whole or absent: write to a temporary name, sync, rename, sync the folder.

A process that dies at any moment leaves the old file or the new one, never half of one. What it may leave behind is
``NAME.tmp-PID``, which nobody reads and `remove_temporary` deletes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for reading and writing; it takes the name `path` if the block succeeds.

    Args:
        path: the final name; its folder has to exist.

    Yields:
        The open binary file. It is flushed and synced to the disk before the rename.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces the file `path` by one that holds `text` in UTF-8, atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Replaces the file `path` by the JSON form of `value`, atomically. NaN and infinities are written as null,
    which every JSON reader accepts."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def append_json_line(path: str | os.PathLike, value: dict, *, sync: bool = True) -> None:
    """Adds one line of JSON to `path` with a single write, after ending a line that a dead process left unfinished.

    Without `sync` a power cut, but no dying process, may take the newest lines with it; the training need not wait for
    the disk.
    """
    with open(path, "a+b") as file:
        unfinished = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            unfinished = file.read(1) != b"\n"
        line = json.dumps(_finite(value), allow_nan=False) + "\n"
        file.write(("\n" if unfinished else "").encode() + line.encode())
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_json_lines(path: str | os.PathLike) -> list[dict]:
    """The objects of a file of JSON lines, without the ones that a killed process left unfinished; [] where there is
    no such file."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process that wrote it was killed in the middle of the line
        if isinstance(row, dict):
            rows.append(row)
    return rows


def point(link: str | os.PathLike, target: str) -> None:
    """Makes `link` a relative symbolic link to `target`, a name in the same folder, replacing an older link at once."""
    link = Path(link)
    temporary = link.with_name(f"{link.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, link)
    _sync_folder(link.parent)


def remove_temporary(folder: str | os.PathLike) -> None:
    """Deletes what processes that died while writing left in `folder`. Call it only while holding the run's lock."""
    for path in Path(folder).glob("*.tmp-*"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable: without it a power cut may bring the old name back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)
