"""Tokenizers give back every text to the last byte, are equal on every run, and survive export."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinrank.trainers.data import PySourceConfig, TextData, open_source
from thinrank.trainers.data.cache import Cache
from thinrank.trainers.data.documents import Document
from thinrank.trainers.data.tokenizer import (
    END_OF_TEXT,
    Encoder,
    byte_letters,
    byte_tokenizer,
    end_of_text_id,
    load_tokenizer,
    sample,
    split_text,
    tokenizer_hash,
    train_bpe,
    vocab_size,
)
from thinrank.trainers.errors import UserError

TEXTS = [
    "def f(x):\n    return x  # naïve\n",
    "数据 🙂 \x00\x7f\ufeff",
    " two  spaces \t\n\n",
    "Größe<|endoftext|>",
    "",
]


def wrap(backend, **names):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


@pytest.fixture(scope="module")
def bpe():
    return wrap(train_bpe(iter(TEXTS * 3), 300), eos_token=END_OF_TEXT)


@pytest.fixture(scope="module")
def raw():
    return wrap(byte_tokenizer(), eos_token=END_OF_TEXT)


@pytest.fixture
def config(python_folder, tmp_path):
    def make(**change):
        return PySourceConfig(folder=str(python_folder), cache_dir=str(tmp_path / "cache"), **change)

    return make


def load(config):
    return load_tokenizer(config, open_source(config), Cache(config.cache_dir))


@pytest.mark.parametrize("kind", ["bpe", "raw"])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=150, deadline=None)
def test_decoding_gives_the_text_back(kind, request, text):
    tokenizer = request.getfixturevalue(kind)
    (ids,) = Encoder(tokenizer)([Document("", text)])
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1].tolist()) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None)
def test_byte_tokens_are_the_bytes(raw, text):
    (ids,) = Encoder(raw)([Document("", text)])
    assert ids.tolist() == [*text.encode(), 256]


def test_byte_letters_are_those_of_the_library():
    from tokenizers import pre_tokenizers

    assert sorted(byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_letters()[ord("a")] == "a"
    assert byte_letters()[ord(" ")] == "Ġ"


@pytest.mark.parametrize("kind", ["bpe", "raw"])
def test_a_document_cannot_end_itself(kind, request):
    tokenizer = request.getfixturevalue(kind)
    (ids,) = Encoder(tokenizer)([Document("", f"a{END_OF_TEXT}b")])
    assert ids.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1].tolist()) == f"a{END_OF_TEXT}b"
    # The tokenizer that the user gets still knows its special token.
    assert tokenizer(END_OF_TEXT)["input_ids"] == [tokenizer.eos_token_id]


def test_lengths_of_another_model_are_not_applied(bpe):
    """Many published tokenizers cut at 512 tokens or pad to a length; a corpus would silently lose its text."""
    backend = type(bpe.backend_tokenizer).from_str(bpe.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50, pad_token=END_OF_TEXT, pad_id=0)
    limited = wrap(backend, eos_token=END_OF_TEXT)
    documents = [Document("", text) for text in TEXTS]
    for got, expected in zip(Encoder(limited)(documents), Encoder(bpe)(documents), strict=True):
        assert got.tolist() == expected.tolist()
    assert tokenizer_hash(limited) == tokenizer_hash(bpe)


def test_split_text_loses_nothing_and_changes_no_token(bpe):
    text = "".join(f"line {n}:\n" + "  indented\n" * (n % 3) + "\n" * (n % 2) for n in range(300))
    parts = split_text(text, 100)
    assert len(parts) > 10
    assert "".join(parts) == text
    encode = Encoder(bpe)
    whole = encode([Document("", text)])[0][:-1]
    pieces = np.concatenate([encode([Document("", part)])[0][:-1] for part in parts])
    assert pieces.tolist() == whole.tolist()
    assert split_text("a" * 1000, 100) == ["a" * 1000]
    assert split_text("", 100) == [""]


def test_long_documents_are_encoded_whole(raw, monkeypatch):
    from thinrank.trainers.data import tokenizer as module

    text = "".join(f"line {n}\n" for n in range(100))
    monkeypatch.setattr(module.split_text, "__defaults__", (50,))
    ids = Encoder(raw)([Document("", "short"), Document("", text), Document("", "")])
    assert [bytes(part[:-1].tolist()) for part in ids] == [b"short", text.encode(), b""]


def test_training_is_reproducible_and_cached(config, monkeypatch):
    first = load(config(vocab_size=320))
    assert vocab_size(first) == len(first) == 320
    again = load(PySourceConfig(**{**vars(config(vocab_size=320)), "cache_dir": config().cache_dir + "2"}))
    assert tokenizer_hash(first) == tokenizer_hash(again)
    assert tokenizer_hash(load(config(vocab_size=321))) != tokenizer_hash(first)

    def untouchable(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr("thinrank.trainers.data.tokenizer.train_bpe", untouchable)
    assert tokenizer_hash(load(config(vocab_size=320))) == tokenizer_hash(first)


def test_held_out_text_does_not_shape_the_tokenizer(config, python_folder):
    before = load(config(vocab_size=300))
    held_out = list(open_source(config()).documents("validation"))
    for document in held_out:
        (python_folder / document.name).write_text("zqzqzqzqzqzqzqzq " * 1000)
    assert tokenizer_hash(load(config(vocab_size=300))) == tokenizer_hash(before)


def test_the_sample_is_bounded_and_spread(config):
    source = open_source(config())
    total = source.train_bytes or 0
    everything = [document.text for document in source.documents("train")]
    assert list(sample(source, 10**9)) == everything
    part = list(sample(source, total // 2))
    size = sum(len(text.encode()) for text in part)
    assert 0.2 * total < size < 0.8 * total
    assert part != everything[: len(part)]
    assert set(part) <= set(everything)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize("with_model", [False, True])
def test_an_exported_tokenizer_gives_identical_ids(config, tmp_path, kind, with_model):
    """Beside a model's config.json, transformers might choose the tokenizer class by the model's type."""
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = load(config(tokenizer=kind))
    tokenizer.save_pretrained(tmp_path / "export")
    if with_model:
        LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "export")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in [*TEXTS, f"a {END_OF_TEXT} b"]:
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert len(loaded) == len(tokenizer)
    # ... and the folder serves as a tokenizer of its own.
    assert tokenizer_hash(load(config(tokenizer=str(tmp_path / "export")))) == tokenizer_hash(tokenizer)


def test_a_tokenizer_of_ones_own(config, raw):
    data = TextData(config(), tokenizer=raw)
    data.prepare_data()
    assert data.tokenizer is raw
    assert data.vocab_size == 257
    assert data.manifest["tokenizer"] == tokenizer_hash(raw)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder", "a/b/c"])
def test_a_folder_that_does_not_exist(config, name):
    with pytest.raises(UserError, match=r"^tokenizer folder .* does not exist; set data.tokenizer to bpe, bytes"):
        load(config(tokenizer=name))


def test_a_folder_without_a_tokenizer(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer that transformers can load"):
        load(config(tokenizer=str(tmp_path / "empty")))


def test_a_tokenizer_without_an_end(config, tmp_path):
    wrap(byte_tokenizer()).save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="has no end-of-text token"):
        load(config(tokenizer=str(tmp_path / "endless")))


def test_a_separator_ends_documents_where_there_is_no_end(raw):
    assert end_of_text_id(wrap(byte_tokenizer(), sep_token=END_OF_TEXT)) == 256


def test_half_a_surrogate_pair(tmp_path):
    from thinrank.trainers.data import FilesConfig

    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "ok"}) + '\n{"text": "a\\ud800b"}\n')
    (tmp_path / "held.txt").write_text("held out")
    for kind in ("bpe", "bytes"):
        config = FilesConfig(
            train=[f"{tmp_path}/x.jsonl"],
            validation=[f"{tmp_path}/held.txt"],
            tokenizer=kind,
            cache_dir=str(tmp_path / "cache"),
        )
        with pytest.raises(UserError, match=r"^x.jsonl#1 holds a lone surrogate \(character 1: '\\ud800'\)"):
            TextData(config).prepare_data()
