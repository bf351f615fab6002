"""The data module: equal on any number of processes, exact when resumed, honest about what it trains on."""

import io
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from thinrank.trainers.data import FilesConfig, PySourceConfig, TextData
from thinrank.trainers.errors import UserError

LENGTH = 16


@pytest.fixture
def make(python_folder, tmp_path):
    """A prepared module over the small corpus; keywords of the configuration go into `config`."""

    def build(config=None, **arguments):
        fields = {"tokenizer": "bytes", "sequence_length": LENGTH, "cache_dir": str(tmp_path / "cache")}
        data = TextData(PySourceConfig(folder=str(python_folder), **{**fields, **(config or {})}), **arguments)
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def take(data, count):
    return [batch for _, batch in zip(range(count), data.train_dataloader(), strict=False)]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a["input_ids"], b["input_ids"])
        and torch.equal(a["labels"], b["labels"])
        and a["position"] == b["position"]
        for a, b in zip(left, right, strict=True)
    )


def test_one_epoch_uses_every_token_of_the_corpus_once(make):
    data = make({"validation_fraction": 0.3}, batch_size=1)
    documents = [document.text.encode() for document in data._source.documents("train")]
    stream = [token for document in documents for token in [*document, 256]]
    assert data.train_tokens == len(stream) == data.manifest["train"]["tokens"]
    # As many passes as make whole rows: then each token was an input, and a label, exactly once in each of them.
    passes = LENGTH // math.gcd(len(stream), LENGTH)
    batches = take(data, len(stream) * passes // LENGTH)
    inputs = Counter(torch.cat([batch["input_ids"].ravel() for batch in batches]).tolist())
    labels = Counter(torch.cat([batch["labels"].ravel() for batch in batches]).tolist())
    assert inputs == labels == {token: count * passes for token, count in Counter(stream).items()}
    # Each row is a piece of the text, with the token that follows as the label.
    text = bytes(token % 256 for token in stream * 2)
    for batch in batches[:50]:
        row = [*batch["input_ids"][0].tolist(), int(batch["labels"][0, -1])]
        assert torch.equal(batch["input_ids"][0, 1:], batch["labels"][0, :-1])
        assert bytes(token % 256 for token in row) in text


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_processes_together_see_the_same_global_batches(make, world, micro_batches):
    steps, size = 30, 8
    reference = take(make(batch_size=size), steps)
    ranks = [
        take(make(batch_size=size, micro_batches=micro_batches, rank=k, world=world), steps * micro_batches)
        for k in range(world)
    ]
    for step, expected in enumerate(reference):
        parts = [ranks[k][step * micro_batches + j] for j in range(micro_batches) for k in range(world)]
        assert torch.equal(torch.cat([part["input_ids"] for part in parts]), expected["input_ids"])
        assert torch.equal(torch.cat([part["labels"] for part in parts]), expected["labels"])
        assert parts[-1]["position"] == expected["position"] == (step + 1) * size


def saved(data):
    """A state after its way through a checkpoint that refuses anything but plain values."""
    file = io.BytesIO()
    torch.save(data.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("read_ahead", [0, 1, 5])
@pytest.mark.parametrize("done", [0, 1, 7, 100])
def test_a_fresh_process_goes_on_exactly(make, done, read_ahead):
    reference = take(make(batch_size=4), done + 20)
    data = make(batch_size=4)
    for batch in take(data, done + read_ahead)[:done]:
        data.advance(batch["position"])
    assert data.consumed == 4 * done
    resumed = make(batch_size=4)
    resumed.load_state_dict(saved(data))
    assert same(take(resumed, 20), reference[done:])


def test_resuming_on_another_number_of_processes_keeps_the_order(make):
    reference = take(make(batch_size=4), 20)
    data = make(batch_size=4)
    data.advance(reference[9]["position"])
    ranks = [make(batch_size=4, rank=k, world=2, micro_batches=2) for k in range(2)]
    for rank in ranks:
        rank.load_state_dict(saved(data))
    parts = [take(rank, 20) for rank in ranks]
    for step, expected in enumerate(reference[10:]):
        rows = [parts[k][2 * step + j]["input_ids"] for j in range(2) for k in range(2)]
        assert torch.equal(torch.cat(rows), expected["input_ids"])


def test_a_position_may_be_restored_before_setup(make, python_folder):
    data = make(batch_size=4)
    data.advance(12)
    late = TextData(data.config, batch_size=4)
    late.load_state_dict(saved(data))
    late.setup("fit")
    assert late.consumed == 12
    assert take(late, 1)[0]["position"] == 16


def test_positions_do_not_go_back(make):
    data = make()
    data.advance(32)
    with pytest.raises(ValueError, match=r"position must be at least 32 \(samples already consumed\), got 16"):
        data.advance(16)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sequence_length": 8}, {"tokenizer": "bpe"}, {"validation_fraction": 0.5}]
)
def test_a_position_of_other_data_is_refused(make, change):
    state = saved(make())
    with pytest.raises(UserError, match=r"^the checkpoint was made with other data \(manifest [0-9a-f]{12}, now"):
        make(change).load_state_dict(state)


def test_what_a_validation_uses_may_change_on_resume(make):
    data = make({"validation_tokens": 50, "final_validation_tokens": 100})
    assert make().manifest_hash == data.manifest_hash


def test_the_seed_changes_the_order_and_nothing_else(make):
    first, second = make({"seed": 0}, batch_size=1), make({"seed": 1}, batch_size=1)
    rows = -(-first._train.tokens.size // LENGTH)  # those that begin in the first pass
    left, right = take(first, rows), take(second, rows)
    assert not same(left[:5], right[:5])
    assert Counter(map(str, (b["input_ids"].tolist() for b in left))) == Counter(
        map(str, (b["input_ids"].tolist() for b in right))
    )


def test_the_manifest_describes_the_corpus(make, python_folder, tmp_path):
    data = make()
    manifest = json.loads(json.dumps(data.manifest))
    assert manifest == data.manifest
    assert len(data.manifest_hash) == 32
    assert manifest["source"] == "pysource"
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == 40
    assert manifest["train"]["bytes"] + manifest["train"]["documents"] == manifest["train"]["tokens"]
    assert str(tmp_path) not in json.dumps(manifest)
    (python_folder / "module07.py").write_text("changed = 1\n")
    assert make().manifest_hash != data.manifest_hash


def test_held_out_documents_are_complete_and_unseen(make):
    data = make({"validation_fraction": 0.2, "validation_tokens": 0})
    held_out = [document.text.encode() for document in data._source.documents("validation")]
    labels = torch.cat([batch["labels"].ravel() for batch in data.val_dataloader()])
    assert labels[labels >= 0].tolist() == [token for document in held_out for token in [*document, 256]]
    text = bytes(min(int(token), 255) for token in data._train.tokens)
    assert not any(len(document) > 30 and document in text for document in held_out)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("take", [1, 2, 4, 0])
def test_bytes_per_token_are_exact_for_every_limit(make, tokenizer, take):
    fields = {"validation_fraction": 0.3, "tokenizer": tokenizer, "vocab_size": 300}
    ends = make(fields)._validation.documents[:, 0].cumsum().tolist()
    limit = ends[take - 1] + 3 if take else 0  # a few tokens more than so many whole documents
    data = make({**fields, "validation_tokens": limit, "final_validation_tokens": 0})
    labels = torch.cat([batch["labels"].ravel() for batch in data.val_dataloader()])
    labels = labels[labels >= 0].tolist()
    end = data.tokenizer.eos_token_id
    text = data.tokenizer.decode([token for token in labels if token != end])
    assert labels[-1] == end
    assert len(labels) == ends[take - 1]
    assert data.validation_bytes_per_token == len(text.encode()) / len(labels)
    counts = data.manifest["validation"]
    assert data.test_bytes_per_token == counts["bytes"] / counts["tokens"]


@pytest.mark.parametrize("limit", [1, 400, 10**6])
def test_the_unseen_part_is_what_validation_leaves_over(make, limit):
    """Also where the first document alone is too long for the validation: it is read in part, so it is not unseen."""
    fields = {"validation_fraction": 0.3, "tokenizer": "bpe", "vocab_size": 300}
    ends = make(fields)._validation.documents[:, 0].cumsum().tolist()
    if limit >= ends[-1]:
        with pytest.raises(UserError, match=r"covers all \d+ held-out documents, so none is left"):
            make({**fields, "validation_tokens": limit, "final_validation_unseen": True})
        return
    read = max(1, sum(end <= limit for end in ends))

    def labels(batches):
        found = torch.cat([batch["labels"].ravel() for batch in batches])
        return found[found >= 0].tolist()

    data = make({**fields, "validation_tokens": limit, "final_validation_unseen": True})
    whole = labels(make(fields).test_dataloader())
    unseen = labels(data.test_dataloader())
    assert unseen == whole[ends[read - 1] :]
    text = data.tokenizer.decode([token for token in unseen if token != data.tokenizer.eos_token_id])
    assert data.test_bytes_per_token == len(text.encode()) / len(unseen)
    size = data._validation.documents[read, 0]
    first = make(
        {**fields, "validation_tokens": limit, "final_validation_unseen": True, "final_validation_tokens": size}
    )
    assert labels(first.test_dataloader()) == unseen[:size]


def test_every_process_has_as_many_validation_batches(make):
    sizes = {
        sum(1 for _ in make(batch_size=8, rank=rank, world=4, micro_batches=2).test_dataloader()) for rank in range(4)
    }
    assert len(sizes) == 1


def test_a_batch_that_cannot_be_divided_is_refused_at_construction(python_folder):
    config = PySourceConfig(folder=str(python_folder))
    with pytest.raises(ValueError, match=r"batch_size must be divisible by 3 .* got 16; set it to 15 or 18"):
        TextData(config, batch_size=16, world=3)
    with pytest.raises(ValueError, match=r"batch_size must be divisible by 32 .* got 16; set it to 32"):
        TextData(config, batch_size=16, micro_batches=32)


def test_a_configuration_of_no_source():
    from thinrank.trainers.data import DataConfig

    with pytest.raises(
        TypeError, match=r"data must be a PySourceConfig, HeadersConfig, FilesConfig or HuggingFaceConfig, got DataCon"
    ):
        TextData(DataConfig()).prepare_data()


def test_use_before_preparation(python_folder):
    data = TextData(PySourceConfig(folder=str(python_folder)))
    for use in (data.train_dataloader, data.val_dataloader, data.state_dict, lambda: data.tokenizer):
        with pytest.raises(RuntimeError, match=r"call prepare_data"):
            use()


def test_the_second_start_encodes_nothing(make, monkeypatch):
    reference = take(make({"tokenizer": "bpe"}), 3)

    def untouchable(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr("thinrank.trainers.data.encode.Encoder", untouchable)
    monkeypatch.setattr("thinrank.trainers.data.tokenizer.train_bpe", untouchable)
    assert same(take(make({"tokenizer": "bpe"}), 3), reference)


def test_damaged_tokens_are_never_trained_on(make, tmp_path):
    reference = take(make(), 3)
    damaged = list((tmp_path / "cache").glob("tokens-train-*/tokens.bin"))
    assert len(damaged) == 1
    tokens = np.fromfile(damaged[0], dtype="<u2")
    tokens[len(tokens) // 2 :] = 65
    tokens.tofile(damaged[0])
    assert same(take(make(), 3), reference)


def test_an_edited_corpus_is_encoded_again(make, python_folder):
    """The same size and the same time of change, as some editors and copies leave them, must not hide an edit."""
    import os

    path = python_folder / "module39.py"
    before, status = make().manifest_hash, path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert make().manifest_hash != before


# -- a corpus that will not do -----------------------------------------------------------------------------------------


def files(tmp_path, **fields):
    return TextData(FilesConfig(tokenizer="bytes", cache_dir=str(tmp_path / "cache"), **fields))


def test_empty_documents(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("")
    with pytest.raises(UserError, match=r"^the training documents \(2\) are all empty; name files or a dataset"):
        files(tmp_path, train=[f"{tmp_path}/*.txt"]).prepare_data()


def test_no_document_at_all(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"^the corpus has no document; name files or a dataset that hold text$"):
        files(tmp_path, train=[f"{tmp_path}/rows.jsonl"]).prepare_data()


def test_nothing_held_out(tmp_path):
    (tmp_path / "only.txt").write_text("text " * 1000)
    with pytest.raises(UserError, match=r"^no document fell into the held-out share; name held-out documents"):
        files(tmp_path, train=[f"{tmp_path}/only.txt"]).prepare_data()


def test_everything_held_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"^all documents of the corpus are held out; lower data.validation_fraction"):
        files(tmp_path, train=[f"{tmp_path}/rows.jsonl"], validation_fraction=0.9999999).prepare_data()


def test_less_text_than_one_row(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("abc")
    with pytest.raises(UserError, match=r"^the training text has 4 tokens, fewer than one row of 256; lower data.seq"):
        files(tmp_path, train=[f"{tmp_path}/a.txt"], validation=[f"{tmp_path}/b.txt"]).prepare_data()


def test_a_missing_folder(tmp_path):
    data = TextData(PySourceConfig(folder=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"^0 readable Python files were found below .*nowhere"):
        data.prepare_data()


def test_a_cache_folder_that_cannot_be_written(python_folder, tmp_path):
    (tmp_path / "file").write_text("")
    data = TextData(PySourceConfig(folder=str(python_folder), cache_dir=str(tmp_path / "file")))
    with pytest.raises(UserError, match=r"^the cache folder .*file cannot be written \(.*\); set data.cache_dir"):
        data.prepare_data()
