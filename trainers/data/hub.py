"""The Hugging Face hub: whether it can be reached, told at once, and datasets from it or through its loader."""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from thinrank.trainers.data.cache import file_digest
from thinrank.trainers.data.config import HuggingFaceConfig
from thinrank.trainers.data.documents import Document, Split, is_held_out
from thinrank.trainers.errors import UserError

PROBE_SECONDS = 5.0
T = TypeVar("T")


def offline_by_choice() -> bool:
    """Whether the environment (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_DATASETS_OFFLINE) forbids the hub."""
    from huggingface_hub import constants

    return constants.is_offline_mode() or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in {
        "1",
        "ON",
        "YES",
        "TRUE",
    }


def reachable() -> bool:
    """Whether the hub answers one request within PROBE_SECONDS, whatever it answers.

    The hub's own client tries again for tens of seconds before it gives up; this asks once. The request runs in a
    thread, since looking up a name can block beyond any time limit of the connection.
    """
    from huggingface_hub import constants, get_session

    answered = threading.Event()

    def ask() -> None:
        # The kinds of error differ between the releases' HTTP clients; each of them means no answer.
        with contextlib.suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Makes the libraries use only what they have cached: they read these flags at each call, not the environment."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def unreachable(what: str, remedy: str) -> UserError:
    """The error for something that is neither in the hub's cache on this machine nor can be fetched."""
    if offline_by_choice():
        return UserError(
            f"{what} is not in the Hugging Face cache of this machine and offline mode is on; "
            f"unset HF_HUB_OFFLINE, or {remedy}"
        )
    from huggingface_hub import constants

    return UserError(
        f"{what} is not in the Hugging Face cache of this machine and {constants.ENDPOINT} cannot be reached; "
        f"check the network, or {remedy}"
    )


def cached_or_fetched(what: str, remedy: str, cached: Callable[[], T], fetched: Callable[[], T]) -> T:
    """What the cache has, else what the hub sends, else one sentence at once.

    Args:
        what: Subject of the sentence.
        remedy: What else the user can do, after "or".
        cached: Loads from the cache alone; raises OSError or ValueError if it is not there.
        fetched: Loads from the hub.
    """
    try:
        return cached()
    except (OSError, ValueError) as missing:
        if offline_by_choice() or not reachable():
            raise unreachable(what, remedy) from missing
    try:
        return fetched()
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be loaded ({_first_line(error)}); correct the name, or {remedy}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


class HuggingFaceSource:
    """A dataset of the hub, a folder, or local data files, streamed or prepared on disk.

    Args:
        config: Which dataset.

    Raises:
        UserError: The dataset cannot be reached or does not exist, or has no such split.
    """

    def __init__(self, config: HuggingFaceConfig):
        import datasets

        self._config = config
        self._builder: Any = self._open_builder(datasets)
        self._prepared = False
        self._manifest: dict[str, Any] = {}
        known = self._builder.info.splits or getattr(self._builder.config, "data_files", None)
        needed = [config.split] if config.holds_out_by_hash else [config.split, config.validation_split]
        for name in needed:
            if known and name.partition("[")[0] not in known:
                raise UserError(
                    f"dataset {config.path} has no split {name!r}; "
                    f"set data.split and data.validation_split to one of {', '.join(map(str, known))}"
                )

    def _open_builder(self, datasets: Any) -> Any:
        config = self._config
        data_files = None
        if config.data_files:
            data_files = {config.split: list(config.data_files)}
            if config.validation_data_files:
                data_files[config.validation_split] = list(config.validation_data_files)

        def load() -> Any:
            return datasets.load_dataset_builder(
                config.path,
                None if data_files else config.subset,
                data_files=data_files,
                revision=config.revision,
            )

        what = f"dataset {config.path}"
        if config.path in datasets.packaged_modules._PACKAGED_DATASETS_MODULES or Path(config.path).is_dir():
            self._require_local_files()
            try:
                return load()
            except (OSError, ValueError) as error:
                raise UserError(f"{what} cannot be loaded ({_first_line(error)}); correct data.path") from error

        def from_cache() -> Any:
            with _offline():
                return load()

        # A hub that answers is asked first: the newest revision is meant unless one is named.
        remedy = "use data=pysource or data=files, which need no network"
        if not offline_by_choice() and reachable():
            try:
                return load()
            except (OSError, ValueError) as error:
                raise UserError(f"{what} cannot be loaded ({_first_line(error)}); correct data.path") from error
        try:
            return from_cache()
        except (OSError, ValueError) as error:
            raise unreachable(what, remedy) from error

    def _require_local_files(self) -> None:
        """Patterns of local files must match: the loader itself ends with a bare StopIteration where none does."""
        folder = self._config.path if Path(self._config.path).is_dir() else ""
        for field in ("data_files", "validation_data_files"):
            for pattern in getattr(self._config, field):
                path = os.path.join(folder, os.path.expanduser(pattern))
                if "://" not in pattern and not glob.glob(path, recursive=True):
                    raise UserError(
                        f"data.{field} pattern {pattern!r} matches no file in {folder or os.getcwd()}; "
                        "correct the pattern"
                    )
        if not folder and not self._config.data_files:
            raise UserError(
                f"data.path={self._config.path} is a file format and names no data; set data.data_files=[...]"
            )

    @property
    def manifest(self) -> dict[str, Any]:
        if not self._manifest:  # made once: it reads the local files
            self._manifest = self._describe()
        return self._manifest

    def _describe(self) -> dict[str, Any]:
        config = self._config
        found = getattr(self._builder.config, "data_files", None) or {}
        local = [
            [str(split), file.name, file.stat().st_size, file_digest(file)]
            for split, paths in found.items()
            for file in map(Path, map(str, paths))
            if file.is_file()
        ]
        return {
            "source": "hf",
            "path": None if local else config.path,
            "subset": None if config.data_files else config.subset,
            "split": config.split,
            "validation_split": None if config.holds_out_by_hash else config.validation_split,
            "validation_fraction": config.validation_fraction if config.holds_out_by_hash else None,
            "text_field": config.text_field,
            "streaming": config.streaming,
            "shuffle_buffer": config.shuffle_buffer if config.streaming else 0,
            "files": local,
            "data_files": None if local else [*config.data_files, *config.validation_data_files],
            # For a dataset of the hub the builder's hash is its commit, fetched or cached. For local files it depends
            # on their times, and the files' own digests say more.
            "commit": None if local else self._builder.hash,
        }

    @property
    def train_bytes(self) -> None:
        return None

    def open(self, split: Split) -> Any:
        """A fresh pass over a split: a `datasets` iterable with `state_dict` and `load_state_dict`, or a dataset."""
        config = self._config
        name = config.split if split == "train" or config.holds_out_by_hash else config.validation_split
        if config.streaming:
            return self._builder.as_streaming_dataset(split=name)
        if not self._prepared:
            self._builder.download_and_prepare()
            self._prepared = True
        return self._builder.as_dataset(split=name)

    def text(self, row: dict[str, Any], split: Split) -> str | None:
        """The text of a row; None if the row belongs to the other split.

        Raises:
            UserError: The row has no text field, or it holds something else.
        """
        field = self._config.text_field
        value = row.get(field)
        if not isinstance(value, str):
            found = f"{type(value).__name__} in {field!r}" if field in row else f"no {field!r}"
            raise UserError(
                f"a row of {self._config.path} has {found} where a text is needed; "
                f"set data.text_field to one of {', '.join(row)}"
            )
        if not self._config.holds_out_by_hash:
            return value
        return value if is_held_out(value, self._config.validation_fraction) == (split == "validation") else None

    def documents(self, split: Split) -> Iterator[Document]:
        for number, row in enumerate(self.open(split)):
            text = self.text(row, split)
            if text is not None:
                yield Document(f"{self._config.path} row {number}", text)
