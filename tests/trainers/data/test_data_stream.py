"""Datasets through the Hugging Face loader: C4-shaped shards of this machine take the path that the hub's take."""

import io
import json
import shutil
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinrank.trainers.data import HuggingFaceConfig, TextData
from thinrank.trainers.data.documents import is_held_out
from thinrank.trainers.data.stream import StreamPositions, TokenStream
from thinrank.trainers.errors import UserError

LENGTH = 16


class Rows:
    """A dataset of numbers with the interface of a streamed one."""

    def __init__(self, count: int):
        self.count, self.next = count, 0

    def __iter__(self):
        while self.next < self.count:
            self.next += 1
            yield {"text": str(self.next - 1)}

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def document(text: str) -> np.ndarray:
    """Document `n` is `n % 5` times the token `n`, then the end of text."""
    return np.array([int(text)] * (int(text) % 5) + [999])


def stream(count=100, length=4, **options):
    return TokenStream(
        lambda: Rows(count),
        lambda row: row["text"],
        lambda texts: [document(t) for t in texts],
        length=length,
        **options,
    )


def tokens_of(count):
    return np.concatenate([document(str(number)) for number in range(count)])


@given(count=st.integers(1, 90), length=st.integers(1, 9), rows=st.integers(1, 60))
@settings(deadline=None)
def test_the_rows_are_the_documents_one_after_the_other(count, length, rows):
    got = stream(count, length).rows(rows)
    endless = np.resize(tokens_of(count), rows * length + 1)
    assert got[:, :-1].ravel().tolist() == endless[:-1].tolist()
    assert got[:, 1:].ravel().tolist() == endless[1:].tolist()


@given(
    count=st.integers(1, 150),
    length=st.integers(1, 9),
    shuffle=st.sampled_from([0, 1, 7, 40, 1000]),
    before=st.integers(0, 150),
    batch=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_stream_taken_up_again_goes_on_exactly(count, length, shuffle, before, batch):
    original = stream(count, length, shuffle=shuffle, seed=5)
    for _ in range(before):
        original.rows(batch)
    state = original.state()
    expected = original.rows(40)
    positions = StreamPositions()
    positions.put(1, state, 0)
    resumed = stream(count, length, shuffle=shuffle, seed=5)
    resumed.load(json.loads(json.dumps(positions.portable(1))))
    assert np.array_equal(resumed.rows(40), expected)


@pytest.mark.parametrize("shuffle", [7, 100, 1000])
def test_shuffling_keeps_every_document_of_a_pass(shuffle):
    count = 100
    total = len(tokens_of(count))
    one_pass = stream(count, total, shuffle=shuffle).rows(1)[0, :-1]
    assert Counter(one_pass.tolist()) == Counter(tokens_of(count).tolist())
    assert one_pass.tolist() != tokens_of(count).tolist()
    two = stream(count, total, shuffle=shuffle).rows(2)[:, :-1]
    assert two[0].tolist() == one_pass.tolist() != two[1].tolist()
    assert Counter(two[1].tolist()) == Counter(one_pass.tolist())
    assert stream(count, total, shuffle=shuffle, seed=1).rows(1)[0, :-1].tolist() != one_pass.tolist()


def test_a_dataset_without_documents():
    with pytest.raises(UserError, match=r"^the dataset has no document to train on; correct data.path, data.split"):
        stream(0).rows(1)


def test_positions_are_bounded_and_keep_the_one_in_use():
    positions = StreamPositions(keep=3)
    for position in range(1, 10):
        positions.put(position, {"carry": [], "at": position}, consumed=2)
    assert [position for position in range(10) if _known(positions, position)] == [2, 8, 9]
    positions.forget_before(9)
    assert [position for position in range(10) if _known(positions, position)] == [9]
    with pytest.raises(ValueError, match=r"position must be that of a batch which was read from this stream, got 4"):
        positions.at(4)


def _known(positions, position):
    try:
        return positions.at(position)["at"] == position
    except ValueError:
        return False


# -- C4-shaped shards --------------------------------------------------------------------------------------------------


@pytest.fixture
def c4(c4_folder, tmp_path):
    """A prepared module over the shards."""

    def build(config=None, **arguments):
        fields = {
            "path": "json",
            "data_files": [f"{c4_folder}/c4-train.*.json.gz"],
            "validation_data_files": [f"{c4_folder}/c4-validation.*.json.gz"],
            "tokenizer": "bytes",
            "sequence_length": LENGTH,
            "cache_dir": str(tmp_path / "cache"),
        }
        data = TextData(HuggingFaceConfig(**{**fields, **(config or {})}), **arguments)
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def texts(folder, pattern):
    import gzip

    rows = []
    for path in sorted(folder.glob(pattern)):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows += [json.loads(line)["text"] for line in file]
    return rows


def packed(documents):
    return [token for document in documents for token in [*document.encode(), 256]]


def take(data, count):
    return [batch for _, batch in zip(range(count), data.train_dataloader(), strict=False)]


def inputs(batches):
    return torch.cat([batch["input_ids"].ravel() for batch in batches]).tolist()


def test_shards_are_streamed_in_order_without_loss(c4, c4_folder):
    data = c4(batch_size=4)
    expected = packed(texts(c4_folder, "c4-train*"))
    count = len(expected) * 3 // (4 * LENGTH)
    assert inputs(take(data, count)) == np.resize(expected, count * 4 * LENGTH).tolist()
    assert data.train_tokens is None
    labels = torch.cat([batch["labels"].ravel() for batch in data.test_dataloader()])
    held_out = texts(c4_folder, "c4-validation*")
    assert labels[labels >= 0].tolist() == packed(held_out)
    size = len("".join(held_out).encode())
    assert data.test_bytes_per_token == size / (size + len(held_out))


@pytest.mark.parametrize("shuffle", [0, 50])
@pytest.mark.parametrize(("world", "micro_batches"), [(2, 1), (4, 1), (2, 2)])
def test_processes_share_a_stream(c4, world, micro_batches, shuffle):
    config = {"shuffle_buffer": shuffle}
    reference = take(c4(config, batch_size=8), 40)
    ranks = [
        take(c4(config, batch_size=8, micro_batches=micro_batches, rank=k, world=world), 40 * micro_batches)
        for k in range(world)
    ]
    for step, expected in enumerate(reference):
        parts = [ranks[k][step * micro_batches + j] for j in range(micro_batches) for k in range(world)]
        assert torch.equal(torch.cat([part["input_ids"] for part in parts]), expected["input_ids"])
        assert torch.equal(torch.cat([part["labels"] for part in parts]), expected["labels"])
        assert parts[-1]["position"] == expected["position"]


@pytest.mark.parametrize("shuffle", [0, 50])
@pytest.mark.parametrize(("done", "read_ahead"), [(0, 3), (1, 0), (30, 1), (77, 5), (400, 1)])
def test_a_fresh_process_takes_the_stream_up_exactly(c4, done, read_ahead, shuffle):
    """Forty batches make a pass: the position lies in the first shard, in the second, and in later passes."""
    config = {"shuffle_buffer": shuffle}
    reference = take(c4(config, batch_size=4), done + 60)
    data = c4(config, batch_size=4)
    for batch in take(data, done + read_ahead)[:done]:
        data.advance(batch["position"])
    file = io.BytesIO()
    torch.save(data.state_dict(), file)
    file.seek(0)
    resumed = c4(config, batch_size=4)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.consumed == 4 * done
    got = take(resumed, 60)
    assert inputs(got) == inputs(reference[done:])
    assert [batch["position"] for batch in got] == [batch["position"] for batch in reference[done:]]
    # ... and once more from there: the restored object can be saved like the first.
    resumed.advance(got[9]["position"])
    assert inputs(take(resumed, 5)) == inputs(reference[done + 10 : done + 15])
    assert resumed.state_dict()["consumed"] == 4 * (done + 10)


def test_positions_that_no_checkpoint_needs_are_forgotten(c4):
    data = c4(batch_size=4)
    for batch in take(data, 30)[:20]:
        data.advance(batch["position"])
    assert sorted(data._positions._states) == [4 * step for step in range(20, 31)]


def test_a_position_that_was_never_read_cannot_be_saved(c4):
    data = c4(batch_size=4)
    take(data, 2)
    data.advance(5)
    with pytest.raises(ValueError, match=r"position must be that of a batch which was read from this stream, got 5"):
        data.state_dict()


def test_prepared_and_streamed_datasets_hold_the_same_tokens(c4, c4_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    data = c4({"streaming": False}, batch_size=1)
    assert data._train.tokens.tolist() == packed(texts(c4_folder, "c4-train*"))
    assert data.manifest["train"]["documents"] == 210
    # Prepared rows have an order of their own: the blocks of a stream mean nothing here.
    assert c4({"streaming": False, "shuffle_buffer": 9}).manifest_hash == data.manifest_hash
    reference = take(data, 20)
    resumed = c4({"streaming": False}, batch_size=1)
    data.advance(7)
    resumed.load_state_dict(data.state_dict())
    assert inputs(take(resumed, 13)) == inputs(reference[7:])


def test_a_stream_without_a_held_out_split_is_split_by_text(c4, c4_folder):
    data = c4({"validation_data_files": [], "validation_fraction": 0.2}, batch_size=2)
    everything = texts(c4_folder, "c4-train*")
    kept = packed([text for text in everything if not is_held_out(text, 0.2)])
    held_out = packed([text for text in everything if is_held_out(text, 0.2)])
    assert inputs(take(data, 100)) == np.resize(kept, 100 * 2 * LENGTH).tolist()
    labels = torch.cat([batch["labels"].ravel() for batch in data.test_dataloader()])
    assert labels[labels >= 0].tolist() == held_out


def test_a_held_out_stream_is_read_no_further_than_needed(c4, c4_folder):
    data = c4({"validation_tokens": 300, "final_validation_tokens": 600})
    counts = data.manifest["validation"]
    assert 600 <= counts["tokens"] < 1000 < len(packed(texts(c4_folder, "c4-validation*")))
    labels = torch.cat([batch["labels"].ravel() for batch in data.val_dataloader()])
    assert 0 < (labels >= 0).sum() <= 300
    both = c4({"validation_tokens": 300, "final_validation_tokens": 600, "final_validation_unseen": True})
    labels = torch.cat([batch["labels"].ravel() for batch in both.test_dataloader()])
    assert 300 < (labels >= 0).sum() <= 600
    assert both.manifest["validation"]["tokens"] < 1300
    # How much is used may change when a run resumes.
    assert c4().manifest_hash == data.manifest_hash


def test_a_bpe_of_a_stream(c4):
    data = c4({"tokenizer": "bpe", "vocab_size": 300}, batch_size=2)
    assert data.vocab_size == 300
    assert data.tokenizer.decode(take(data, 1)[0]["input_ids"][0]) != ""


def test_parquet_and_a_folder_take_the_same_path(c4_folder, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = texts(c4_folder, "c4-train*")
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "train-00000.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": rows[:9]}), folder / "validation-00000.parquet")
    fields = {"tokenizer": "bytes", "sequence_length": LENGTH, "cache_dir": str(tmp_path / "cache"), "subset": None}
    for config in (
        HuggingFaceConfig(path=str(folder), **fields),
        HuggingFaceConfig(path="parquet", data_files=[f"{folder}/train-*.parquet"], **fields),
    ):
        data = TextData(config, batch_size=2)
        data.prepare_data()
        kept = [text for text in rows if not (config.holds_out_by_hash and is_held_out(text, 0.05))]
        assert inputs(take(data, 60)) == np.resize(packed(kept), 60 * 2 * LENGTH).tolist()


def test_the_manifest_of_local_files_does_not_depend_on_their_place_or_time(c4, c4_folder, tmp_path):
    manifest = c4().manifest
    assert [name for _, name, _, _ in manifest["files"]] == sorted(path.name for path in c4_folder.iterdir())
    copy = tmp_path / "copy"
    shutil.copytree(c4_folder, copy, copy_function=shutil.copyfile)
    moved = c4(
        {"data_files": [f"{copy}/c4-train.*.json.gz"], "validation_data_files": [f"{copy}/c4-validation.*.json.gz"]}
    )
    assert moved.manifest == manifest


def test_other_shards_are_other_data(c4, c4_folder):
    state = c4().state_dict()
    (c4_folder / "c4-train.00001-of-01024.json.gz").unlink()
    with pytest.raises(UserError, match=r"^the checkpoint was made with other data"):
        c4().load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data_files": ["nowhere/*.json"]}, "data.data_files pattern 'nowhere/\\*.json' matches no file in"),
        ({"validation_data_files": ["no.json"]}, "data.validation_data_files pattern 'no.json' matches no file in"),
        ({"data_files": [], "validation_data_files": []}, "data.path=json is a file format and names no data; set"),
        ({"text_field": "body"}, "a row of json has no 'body' where a text is needed; set data.text_field to one of"),
        ({"text_field": "timestamp"}, "a row of json has (datetime|Timestamp) in 'timestamp' where a text is needed"),
    ],
)
def test_data_files_that_will_not_do(c4, change, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        c4(change)


def test_a_split_that_does_not_exist(c4_folder, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / "train-00000.parquet")
    config = HuggingFaceConfig(path=str(folder), subset=None)
    with pytest.raises(UserError, match=r"has no split 'validation'; set data.split and data.validation_split to one"):
        TextData(config).prepare_data()
