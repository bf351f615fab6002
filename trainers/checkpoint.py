"""Checkpoint files that are whole or not there, and that say so themselves.

A checkpoint is what `torch.save` writes (a zip archive, readable by `torch.load`) with the archive's comment used as a
seal: the size and the CRC-32 of the file. A file without an intact seal is not a checkpoint. So completeness needs no
second file that could be out of step with the first, and the names on the disk need no order of writing.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
import zlib
from collections import Counter, OrderedDict
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io import CheckpointIO
from typing_extensions import override

from thinrank.trainers.errors import UserError
from thinrank.trainers.files import replacing

_END = b"PK\x05\x06"  # the last record of a zip archive: 22 bytes, of which the last two are the comment's length
_END_BYTES = 22
_SEAL = re.compile(rb"thinrank-checkpoint 1 size=([0-9a-f]{16}) crc32=([0-9a-f]{8})")
_SEAL_BYTES = len(b"thinrank-checkpoint 1 size=0123456789abcdef crc32=01234567")
_NAME = re.compile(r"step-(\d{8,})\.ckpt")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter)
_PLAIN += (torch.Size, torch.device, torch.dtype)


def checkpoint_name(step: int) -> str:
    """The file name of the checkpoint after `step` optimizer steps, in an order that sorts: ``step-00000200.ckpt``."""
    return f"step-{step:08d}.ckpt"


def step_of(path: str | os.PathLike) -> int | None:
    """The optimizer step in a checkpoint's name, or None for another name."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def listed(folder: str | os.PathLike) -> list[Path]:
    """The files in `folder` that are named like checkpoints, newest (highest step) first, complete or not."""
    folder = Path(folder)
    paths = [path for path in folder.iterdir() if step_of(path) is not None] if folder.is_dir() else []
    return sorted(paths, key=lambda path: step_of(path) or 0, reverse=True)


def save(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a checkpoint atomically and seals it.

    Args:
        checkpoint: dicts, lists, tuples, sets, numbers, strings and tensors: what loads with ``weights_only=True``.
        path: the final name; the folder is made if missing.

    Raises:
        TypeError: a value that `torch.load(weights_only=True)` would refuse, named by its place.
        UserError: the disk is full or refuses to be written. Older checkpoints are untouched.
    """
    _refuse_objects(checkpoint, "checkpoint")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            sink = _Sink(file)
            try:
                torch.save(checkpoint, cast(IO[bytes], sink))  # it only calls write and flush
            except Exception:
                if sink.error is not None:  # torch hides the cause behind a failed assertion about positions
                    raise sink.error from None
                raise
            _write_seal(file, sink)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "free some space" if error.errno == errno.ENOSPC else "make the folder writable"
        raise UserError(
            f"cannot write the checkpoint {path} ({reason}): {remedy} and resume; older checkpoints are intact"
        ) from error


def load(path: str | os.PathLike, *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint with ``weights_only=True``, after its seal was checked.

    Args:
        path: a file that `save` wrote.
        map_location: where tensors go; by default to the CPU.
        mmap: leave tensors on the disk until they are used, and check the seal's size but not its CRC: for looking
            at a few values of a large file.

    Raises:
        UserError: no such file, or one that is truncated or damaged.
    """
    problem = defect(path, full=not mmap)
    if problem:
        raise UserError(
            f"{path} {problem}: name another checkpoint, or use run.resume=auto for the newest complete one"
        )
    return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def defect(path: str | os.PathLike, *, full: bool = True) -> str | None:
    """What is wrong with a checkpoint file, as the end of a sentence that starts with its name; None if nothing is.

    Args:
        path: the file.
        full: also compare the CRC-32, which reads the whole file; else just size and seal.
    """
    path = Path(path)
    if not path.is_file():
        return "does not exist"
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _SEAL_BYTES))
        seal = _SEAL.fullmatch(file.read())
        if seal is None or int(seal[1], 16) + _SEAL_BYTES != size:
            return "is truncated or was not written by this library"
        if full:
            file.seek(0)
            content, crc = int(seal[1], 16) - 2, 0  # the last two bytes became the length of the comment
            while content:
                block = file.read(min(content, 1 << 22))
                crc = zlib.crc32(block, crc)
                content -= len(block)
            if zlib.crc32(b"\0\0", crc) != int(seal[2], 16):
                return "is damaged (its checksum differs)"
    return None


def newest(folder: str | os.PathLike) -> Path | None:
    """The complete checkpoint of the highest step in `folder`; each incomplete one that is newer is warned about.

    Returns:
        Its path, or None where there is none.
    """
    for path in listed(folder):
        problem = defect(path)
        if problem is None:
            return path
        warnings.warn(f"the checkpoint {path} {problem} and is skipped", stacklevel=2)
    return None


def require_space(folder: str | os.PathLike, checkpoint_bytes: int, copies: int = 3) -> None:
    """Refuses to start where the disk cannot hold the checkpoints of the run.

    Args:
        folder: an existing folder on the disk in question.
        checkpoint_bytes: the estimated size of one checkpoint.
        copies: how many lie there at once: newest, best, and the one being written.
    """
    free = shutil.disk_usage(folder).free
    held = sum(path.stat().st_size for path in listed(folder))  # they will be replaced
    need = checkpoint_bytes * copies
    if free + held < need:
        raise UserError(
            f"{folder} has {free / 2**30:.2f} GiB free, but {copies} checkpoints of {checkpoint_bytes / 2**30:.2f} GiB "
            f"need {need / 2**30:.2f} GiB: free some space or set run.dir to another disk"
        )


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's plugin for single-file checkpoints with `save` and `load` of this module:
    ``Trainer(plugins=[AtomicCheckpointIO()])``. Files of other writers are refused, and so are pickled objects."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options: it writes to local or mounted folders")
        save(checkpoint, path)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load(path, map_location=map_location or "cpu")

    @override
    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class _Sink:
    """What `torch.save` writes into: passes on to the file, keeps the CRC-32, and remembers an error of the disk."""

    def __init__(self, file: Any) -> None:
        self.file, self.crc, self.size = file, 0, 0
        self.error: OSError | None = None

    def write(self, block: Any) -> int:
        try:
            self.file.write(block)
        except OSError as error:
            self.error = error
            raise
        view = memoryview(block)
        self.crc = zlib.crc32(view, self.crc)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self.file.flush()


def _write_seal(file: Any, sink: _Sink) -> None:
    file.seek(sink.size - _END_BYTES)
    if file.read(4) != _END:
        raise RuntimeError(
            "torch.save no longer ends its file with a zip end record without comment: the seal needs one"
        )
    seal = b"thinrank-checkpoint 1 size=%016x crc32=%08x" % (sink.size, sink.crc)
    file.seek(sink.size - 2)
    file.write(len(seal).to_bytes(2, "little") + seal)


def _refuse_objects(value: Any, place: str) -> None:
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            _refuse_objects(key, f"a key of {place}")
            _refuse_objects(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _refuse_objects(item, f"{place}[{index}]")
    else:
        raise TypeError(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which weights_only=True does not load: "
            "keep plain values and tensors in state dicts"
        )
