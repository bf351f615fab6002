"""A hub that cannot be reached is told at once, with what to do instead."""

import contextlib
import json
import socket
import threading
import time

import pytest

from thinrank.trainers.data import HuggingFaceConfig, PySourceConfig, TextData, hub
from thinrank.trainers.errors import UserError


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The libraries believe that they may use the network, at an address of this machine; the caches are empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

    def use(endpoint: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)

    use("http://127.0.0.1:9")  # nobody listens there
    return use


def dataset(tmp_path, **fields):
    return TextData(HuggingFaceConfig(cache_dir=str(tmp_path / "cache"), **fields))


@contextlib.contextmanager
def server(answer: bytes | None):
    """A server on this machine that answers each request with `answer`, or never (None)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # the test has closed the listener
                kept.append(connection)
                if answer is not None:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for connection in kept:
            connection.close()


def test_offline_by_choice(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("the network was asked in offline mode"))
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        dataset(tmp_path).prepare_data()
    assert str(error.value) == (
        "dataset allenai/c4 is not in the Hugging Face cache of this machine and offline mode is on; "
        "unset HF_HUB_OFFLINE, or use data=pysource or data=files, which need no network"
    )
    with pytest.raises(UserError) as error:
        TextData(PySourceConfig(tokenizer="t5-base", cache_dir=str(tmp_path))).prepare_data()
    assert str(error.value) == (
        "tokenizer t5-base is not in the Hugging Face cache of this machine and offline mode is on; "
        "unset HF_HUB_OFFLINE, or set data.tokenizer to bpe, bytes or a local folder"
    )
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_a_hub_that_cannot_be_reached(tmp_path, online, monkeypatch, silent):
    """The client alone would try again for half a minute, or wait longer still for a server that never answers."""
    monkeypatch.setattr(hub, "PROBE_SECONDS", 1.0)
    with server(None) as endpoint:
        if silent:
            online(endpoint)
        else:
            endpoint = "http://127.0.0.1:9"
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            dataset(tmp_path).prepare_data()
        assert time.monotonic() - start < 8
    assert str(error.value) == (
        f"dataset allenai/c4 is not in the Hugging Face cache of this machine and {endpoint} cannot be reached; "
        "check the network, or use data=pysource or data=files, which need no network"
    )


def test_a_tokenizer_that_cannot_be_reached(tmp_path, online):
    with pytest.raises(UserError, match=r"^tokenizer t5-base is not in .* http://127.0.0.1:9 cannot be reached; check"):
        TextData(PySourceConfig(tokenizer="t5-base", cache_dir=str(tmp_path))).prepare_data()


def test_a_name_that_cannot_be_looked_up_is_not_waited_for(online, monkeypatch):
    """Looking up a host blocks for as long as the resolver likes, whatever the time limit of the connection is."""
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    resolved = threading.Event()

    class Session:
        def head(self, url, timeout):
            resolved.wait(20)

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    start = time.monotonic()
    assert not hub.reachable()
    assert time.monotonic() - start < 5
    resolved.set()


def test_any_answer_counts_as_reachable(online, monkeypatch):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 3.0)
    assert not hub.reachable()
    with server(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as endpoint:
        online(endpoint)
        assert hub.reachable()


@pytest.fixture
def cached_dataset(tmp_path, monkeypatch):
    """The dataset `someone/tiny` as the loader leaves it on disk once it has been fetched from the hub."""
    import datasets

    datasets.disable_progress_bars()
    for name, rows in [("train", 50), ("validation", 5)]:
        lines = [json.dumps({"text": f"{name} {row}"}) for row in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    cache = tmp_path / "datasets"
    datasets.load_dataset("json", data_files=files, cache_dir=str(cache))
    datasets.enable_progress_bars()
    (prepared,) = cache.glob("json/*/0.0.0/*/")
    target = cache / "someone___tiny" / "en" / "0.0.0" / prepared.name
    target.parent.mkdir(parents=True)
    prepared.rename(target)
    for path in target.glob("json-*.arrow"):
        path.rename(target / path.name.replace("json-", "tiny-"))
    info = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "tiny", "config_name": "en"}))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("by_choice", [True, False], ids=["offline by choice", "unreachable"])
def test_a_cached_dataset_needs_no_hub(tmp_path, online, cached_dataset, monkeypatch, streaming, by_choice):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", by_choice)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", by_choice)
    data = dataset(tmp_path, path="someone/tiny", streaming=streaming, tokenizer="bytes", sequence_length=8)
    data.prepare_data()
    assert data.manifest["validation"] == {"documents": 5, "bytes": 60, "tokens": 65}
    rows = [row for _, batch in zip(range(4), data.train_dataloader(), strict=False) for row in batch["input_ids"]]
    text = "".join(f"train {row}|" for row in range(50)) * 2
    pieces = ["".join("|" if token == 256 else chr(token) for token in row.tolist()) for row in rows]
    assert all(piece in text for piece in pieces)
    assert not streaming or "".join(pieces) == text[: 4 * 16 * 8]


def test_what_is_cached_is_used_without_the_network(monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))
    assert hub.cached_or_fetched("x", "y", lambda: 1, lambda: 2) == 1


def missing():
    raise OSError("not cached")


def test_what_the_hub_sends_is_used(online, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert hub.cached_or_fetched("x", "y", missing, lambda: 2) == 2


def test_what_the_hub_does_not_know_is_named(online, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)

    def unknown():
        raise OSError("x/y is not a model identifier.\nMore advice.")

    with pytest.raises(UserError) as error:
        hub.cached_or_fetched("tokenizer x/y", "set it to bytes", missing, unknown)
    assert str(error.value) == (
        "tokenizer x/y cannot be loaded (x/y is not a model identifier); correct the name, or set it to bytes"
    )


def test_libraries_are_offline_only_while_the_cache_is_asked(online):
    import datasets
    from huggingface_hub import constants

    with hub._offline():
        assert constants.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
    assert not constants.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE
