"""Cache entries are whole or absent, and their content is checked, not trusted."""

import errno
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thinrank.trainers.data.cache import INDEX, Cache, default_cache_dir, fingerprint, verified
from thinrank.trainers.errors import UserError


class Builder:
    """Writes two files and counts how often."""

    def __init__(self, content: bytes = b"content"):
        self.content = content
        self.calls = 0

    def __call__(self, folder: Path) -> dict:
        self.calls += 1
        (folder / "a.bin").write_bytes(self.content)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(self.content * 2)
        return {"length": len(self.content)}


def names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


def test_an_entry_is_built_once(tmp_path):
    build = Builder()
    cache = Cache(tmp_path / "cache")
    first = cache.entry("x", build)
    assert first == cache.entry("x", build) == Cache(tmp_path / "cache").entry("x", build)
    assert build.calls == 1
    assert first[1] == {"length": 7}
    assert (first[0] / "sub" / "b.bin").read_bytes() == b"contentcontent"
    assert names(tmp_path / "cache") == ["x"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "a.bin").write_bytes(b"contenT"),
        lambda path: (path / "a.bin").write_bytes(b"conten"),
        lambda path: (path / "sub" / "b.bin").unlink(),
        lambda path: (path / INDEX).unlink(),
        lambda path: (path / INDEX).write_text(""),
        lambda path: (path / INDEX).write_text("[]"),
        lambda path: (path / INDEX).write_text((path / INDEX).read_text().replace('"length": 7', '"length": 8')),
        lambda path: (path / INDEX).write_bytes(b"\xff\xfe"),
    ],
    ids=["altered", "truncated", "missing", "no index", "empty index", "wrong index", "altered index", "no text"],
)
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    build = Builder()
    cache = Cache(tmp_path)
    path, _ = cache.entry("x", build)
    damage(path)
    assert verified(path) is None
    assert cache.entry("x", build) == (path, {"length": 7})
    assert build.calls == 2
    assert (path / "a.bin").read_bytes() == b"content"
    assert names(tmp_path) == ["x"]


def test_a_file_in_the_entrys_place_is_replaced(tmp_path):
    (tmp_path / "x").write_text("in the way")
    assert Cache(tmp_path).entry("x", Builder())[1] == {"length": 7}


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match=r"in the middle"):
        Cache(tmp_path).entry("x", build)
    assert names(tmp_path) == []


def test_of_two_that_build_at_once_one_waits_for_the_other(tmp_path):
    """A lock belongs to an open file, so two threads meet at it as two processes do."""
    start = threading.Barrier(2)

    class Slow(Builder):
        def __call__(self, folder: Path) -> dict:
            time.sleep(0.2)
            return super().__call__(folder)

    def run(build: Builder) -> tuple[Path, dict]:
        start.wait(10)
        return Cache(tmp_path).entry("x", build)

    builders = [Slow(), Slow()]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, builders))
    assert results == [(tmp_path / "x", {"length": 7})] * 2
    assert sum(build.calls for build in builders) == 1
    assert names(tmp_path) == ["x"]


def test_an_entry_built_elsewhere_meanwhile_is_kept(tmp_path):
    """Where the file system has no locks two processes may both build: the second must not fail at its rename."""
    cache = Cache(tmp_path)
    other = Builder()

    def build(folder):
        Cache(tmp_path)._build(tmp_path / "x", other)
        return Builder()(folder)

    path = tmp_path / "x"
    assert cache._build(path, build) == {"length": 7}
    assert verified(path) == {"length": 7}
    assert names(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        Cache(tmp_path / "file" / "cache").entry("x", Builder())
    assert str(error.value) == (
        f"the cache folder {tmp_path}/file/cache cannot be written (not a directory); "
        "set data.cache_dir to a folder with free space and write permission"
    )


def test_a_folder_that_cannot_be_written():
    with pytest.raises(UserError, match=r"^the cache folder /proc/self/cache cannot be written"):
        Cache("/proc/self/cache").entry("x", Builder())


def test_a_full_disk(tmp_path):
    def build(folder):
        # Writing to an open file fails without the file's name.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"cannot be written \(no space left on device\); set data.cache_dir"):
        Cache(tmp_path).entry("x", build)
    assert names(tmp_path) == []


def test_errors_outside_of_the_cache_are_not_blamed_on_it(tmp_path):
    def build(folder):
        return {"read": (tmp_path / "corpus.txt").read_bytes()}

    with pytest.raises(FileNotFoundError, match=r"corpus.txt"):
        Cache(tmp_path / "cache").entry("x", build)


def test_fingerprint_depends_on_the_value_alone():
    assert fingerprint({"b": 1, "a": [1, "ü"]}) == fingerprint(json.loads('{"a": [1, "\\u00fc"], "b": 1}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint(None)) == 32


def test_the_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "thinrank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/thinrank")
