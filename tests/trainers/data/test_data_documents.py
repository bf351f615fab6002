"""Sources find every document once, split by hash alone, and say what is wrong with a corpus."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from thinrank.trainers.data import FilesConfig, HeadersConfig, PySourceConfig, open_source
from thinrank.trainers.data.documents import decode_python, hash_share, held_out_names, is_held_out
from thinrank.trainers.errors import UserError


def everything(source):
    return {split: list(source.documents(split)) for split in ("train", "validation")}


# -- the split ---------------------------------------------------------------------------------------------------------


def test_hash_shares_are_uniform_and_independent_between_purposes():
    names = [f"file{number}.py" for number in range(4000)]
    held_out = [name for name in names if hash_share(name, "held-out") < 0.05]
    sampled = [name for name in names if hash_share(name, "tokenizer") < 0.5]
    # Binomial deviations: 3.5 sigma of 4000 * 0.05, of 4000 * 0.5 and of 4000 * 0.025.
    assert abs(len(held_out) - 200) < 49
    assert abs(len(sampled) - 2000) < 111
    assert abs(len(set(held_out) & set(sampled)) - 100) < 35


def test_hash_shares_never_change():
    """A checkpoint's corpus must split in the same way tomorrow: these values are fixed."""
    assert hash_share("os.py", "held-out") == 0.11915259335703537


def test_a_small_corpus_has_something_held_out():
    names = ["a", "b", "c"]
    nearest = min(names, key=lambda name: hash_share(name, "held-out"))
    assert held_out_names(names, 1e-9) == {nearest}
    assert held_out_names(["a"], 1e-9) == frozenset()
    many = [str(number) for number in range(100)]
    assert held_out_names(many, 0.3) == {name for name in many if is_held_out(name, 0.3)}


# -- Python sources ----------------------------------------------------------------------------------------------------


def test_python_files_are_split_without_loss_or_overlap(python_folder):
    source = open_source(PySourceConfig(folder=str(python_folder), validation_fraction=0.2))
    split = everything(source)
    found = {document.name: document.text for part in split.values() for document in part}
    assert len(found) == 40 == sum(map(len, split.values()))
    assert found == {
        path.relative_to(python_folder).as_posix(): path.read_text(encoding="utf-8")
        for path in python_folder.rglob("*.py")
    }
    for name, part in split.items():
        assert all(is_held_out(document.name, 0.2) == (name == "validation") for document in part)


def test_held_out_files_come_in_no_order_of_packages(python_folder):
    """By path the first held-out text was one package's, and a validation that stopped there measured that package."""
    source = open_source(PySourceConfig(folder=str(python_folder), validation_fraction=0.5))
    names = [document.name for document in source.documents("validation")]
    assert names == sorted(names, key=lambda name: hash_share(name, "order")) != sorted(names)
    train = [document.name for document in source.documents("train")]
    assert sorted(train) == train


def test_tests_and_installed_packages_do_not_belong_to_the_library(python_folder):
    before = open_source(PySourceConfig(folder=str(python_folder))).manifest
    for folder in ("test", "package/tests", "site-packages/x", "dist-packages", "__pycache__", "config-3.11-x86_64"):
        (python_folder / folder).mkdir(parents=True, exist_ok=True)
        (python_folder / folder / "extra.py").write_text("extra = 1\n")
    (python_folder / "_sysconfigdata__linux.py").write_text("build = '/tmp'\n")
    (python_folder / "notes.txt").write_text("not Python")
    assert open_source(PySourceConfig(folder=str(python_folder))).manifest == before


def test_declared_encodings_are_read_and_undecodable_files_listed(python_folder):
    (python_folder / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'Größe'\r\n".encode("latin-1"))
    (python_folder / "unknown.py").write_bytes(b"# coding: no-such-codec\n")
    (python_folder / "broken.py").write_bytes(b"name = '\xff\xfe'\n")
    source = open_source(PySourceConfig(folder=str(python_folder)))
    assert source.manifest["skipped"] == ["broken.py", "unknown.py"]
    texts = {document.name: document.text for part in everything(source).values() for document in part}
    assert texts["latin.py"] == "# -*- coding: latin-1 -*-\nname = 'Größe'\n"
    assert not {"unknown.py", "broken.py"} & set(texts)


def test_python_byte_order_mark_is_no_text():
    assert decode_python(b"\xef\xbb\xbfx = 1\r\ny = 2\r") == "x = 1\ny = 2\n"


def test_the_manifest_names_content_and_not_the_machine(python_folder, tmp_path):
    manifest = open_source(PySourceConfig(folder=str(python_folder))).manifest
    copy = tmp_path / "elsewhere"
    python_folder.rename(copy)
    assert open_source(PySourceConfig(folder=str(copy))).manifest == manifest
    assert str(tmp_path) not in json.dumps(manifest)
    (copy / "module00.py").write_text("changed = 1\n")
    assert open_source(PySourceConfig(folder=str(copy))).manifest != manifest


def test_the_standard_library_of_this_python_is_there():
    source = open_source(PySourceConfig())
    names = {name for name, _, _ in source.manifest["files"]}
    assert {"os.py", "asyncio/base_events.py"} <= names
    assert not any(name.startswith(("site-packages/", "test/")) for name in names)
    assert (source.train_bytes or 0) > 1_000_000


@pytest.mark.parametrize("files", [0, 1])
def test_a_folder_with_too_few_python_files(tmp_path, files):
    for number in range(files):
        (tmp_path / f"{number}.py").write_text("x = 1\n")
    with pytest.raises(UserError) as error:
        open_source(PySourceConfig(folder=str(tmp_path)))
    assert str(error.value).startswith(f"{files} readable Python files were found below {tmp_path}, and at least 2 are")
    assert "\n" not in str(error.value)


def test_everything_held_out(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"all 3 Python files below .* are held out; lower data.validation_fraction"):
        open_source(PySourceConfig(folder=str(tmp_path), validation_fraction=0.9999999))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """One file of each kind; each has its own texts."""
    root = tmp_path / "mixed"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "plain.txt").write_bytes("plain\r\ntext ü\n".encode())
    (root / "deep" / "er" / "notes.md").write_text("deep text", encoding="utf-8")
    with gzip.open(root / "packed.txt.gz", "wt", encoding="utf-8") as file:
        file.write("packed text")
    (root / "rows.jsonl").write_text('{"text": "row 0"}\n\n{"text": "row 1", "id": 7}\n', encoding="utf-8")
    with gzip.open(root / "rows.json.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "packed row 0"}')
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["cell 0", "cell 1"]}), root / "table.parquet")
    return root


def test_all_kinds_of_files(mixed, tmp_path):
    (tmp_path / "held.txt").write_text("held out")
    source = open_source(FilesConfig(train=[f"{mixed}/**/*.*"], validation=[str(tmp_path / "held.txt")]))
    split = everything(source)
    assert [tuple(document) for document in split["train"]] == [
        ("deep/er/notes.md", "deep text"),
        ("packed.txt.gz", "packed text"),
        ("plain.txt", "plain\r\ntext ü\n"),
        ("rows.json.gz#0", "packed row 0"),
        ("rows.jsonl#0", "row 0"),
        ("rows.jsonl#1", "row 1"),
        ("table.parquet#0", "cell 0"),
        ("table.parquet#1", "cell 1"),
    ]
    assert [tuple(document) for document in split["validation"]] == [("held.txt", "held out")]


def test_files_found_twice_count_once(mixed):
    once = open_source(FilesConfig(train=[f"{mixed}/**/*.*"])).manifest
    twice = open_source(FilesConfig(train=[f"{mixed}/**/*.*", f"{mixed}/*.txt", str(mixed / "rows.jsonl")])).manifest
    assert once == twice


def test_rows_are_split_by_hash(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(200)))
    split = everything(open_source(FilesConfig(train=[f"{tmp_path}/rows.jsonl"], validation_fraction=0.1)))
    assert sorted(int(document.text) for part in split.values() for document in part) == list(range(200))
    assert {document.text for document in split["validation"]} == {
        str(n) for n in range(200) if is_held_out(f"rows.jsonl#{n}", 0.1)
    }
    assert split["validation"]


def test_names_do_not_depend_on_where_the_corpus_lies(mixed, tmp_path, monkeypatch):
    absolute = open_source(FilesConfig(train=[f"{mixed}/**/*.*"])).manifest
    monkeypatch.chdir(mixed)
    assert open_source(FilesConfig(train=["**/*.*"])).manifest == absolute
    monkeypatch.chdir(tmp_path)
    os.rename(mixed, tmp_path / "moved")
    assert open_source(FilesConfig(train=["moved/**/*.*"])).manifest == absolute


def test_home_folder_in_a_pattern(mixed, monkeypatch):
    monkeypatch.setenv("HOME", str(mixed))
    assert open_source(FilesConfig(train=["~/*.jsonl"])).manifest["files"]["train"][0][0] == "rows.jsonl"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def wrong_table(folder: Path, columns: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda f: write(f / "x.txt", b"caf\xe9 au lait"),
            "{path} is not UTF-8 (byte 3: 0xe9); convert it to UTF-8 or leave it out of the pattern",
        ),
        (
            lambda f: write(f / "x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'),
            "{path} line 2 is not UTF-8 (byte 10: 0xe9); convert it to UTF-8 or leave it out of the pattern",
        ),
        (
            lambda f: write(f / "x.jsonl", b'{"text": "a"}\n{"text": \n'),
            '{path} line 2 is not a JSON object (Expecting value); write one object a line, such as {{"text": "..."}}',
        ),
        (
            lambda f: write(f / "x.json", b'["a", "b"]'),
            '{path} line 1 is not a JSON object; write one object a line, such as {{"text": "..."}}',
        ),
        (
            lambda f: write(f / "x.jsonl", b'{"body": "a", "id": 1}\n'),
            "{path} line 1 has no 'text'; set data.text_field to one of body, id",
        ),
        (
            lambda f: write(f / "x.jsonl", b'{"text": 3}\n'),
            "{path} line 1 holds int in 'text' where a text is needed; "
            "set data.text_field to the field that holds the text",
        ),
        (
            lambda f: write(f / "x.txt.gz", gzip.compress(b"text" * 1000)[:-12]),
            "{path} is not a complete gzip file (Compressed file ended before the end-of-stream marker was reached); "
            "replace it or leave it out",
        ),
        (
            lambda f: write(f / "x.txt.gz", b"no gzip"),
            "{path} is not a complete gzip file (Not a gzipped file (b'no')); replace it or leave it out",
        ),
        (
            lambda f: wrong_table(f, {"body": ["a"], "id": [1]}),
            "{path} has no 'text'; set data.text_field to one of body, id",
        ),
        (
            lambda f: wrong_table(f, {"text": ["a", None]}),
            "{path} row 1 holds NoneType in 'text' where a text is needed; "
            "set data.text_field to the field that holds the text",
        ),
    ],
    ids=["latin-1", "latin-1 row", "half json", "array", "no field", "number", "cut", "no gzip", "no column", "null"],
)
def test_files_that_are_no_text(tmp_path, make, sentence):
    path = make(tmp_path)
    (tmp_path / "held.txt").write_text("held out")
    source = open_source(FilesConfig(train=[str(path)], validation=[f"{tmp_path}/held.txt"]))
    with pytest.raises(UserError) as error:
        list(source.documents("train"))
    assert str(error.value) == sentence.format(path=path)


def test_a_damaged_parquet_file(tmp_path):
    path = wrong_table(tmp_path, {"text": ["a"]})
    path.write_bytes(path.read_bytes()[:-20])
    source = open_source(FilesConfig(train=[str(path)], validation_fraction=0.5))
    with pytest.raises(UserError, match=r"x\.parquet cannot be read as Parquet \(.*\); replace it or leave it out$"):
        list(source.documents("train"))


def test_a_pattern_without_a_match(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError) as error:
        open_source(FilesConfig(train=["*.txt"]))
    assert str(error.value) == f"data.train pattern '*.txt' matches no file in {tmp_path}; correct the pattern"
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"^data.validation pattern 'b\*' matches no file"):
        open_source(FilesConfig(train=["*.txt"], validation=["b*"]))


def test_a_held_out_file_must_not_be_trained_on(mixed):
    with pytest.raises(UserError, match=r"plain.txt is matched by data.train and by data.validation"):
        open_source(FilesConfig(train=[f"{mixed}/*.txt"], validation=[f"{mixed}/plain.*"]))


# -- headers -----------------------------------------------------------------------------------------------------------


def test_the_headers_of_torch_are_there_and_differ_from_the_python_sources():
    source = open_source(HeadersConfig())
    split = everything(source)
    sizes = {name: sum(len(document.text) for document in part) for name, part in split.items()}
    assert sizes["train"] > 500_000
    assert 0 < sizes["validation"] < 0.2 * sizes["train"]
    assert all(document.name.endswith(".h") for part in split.values() for document in part)
    assert sum("#include" in document.text for document in split["train"]) > 0.8 * len(split["train"])
    assert source.manifest["source"] == "headers"


def test_headers_of_a_folder(tmp_path):
    for name in ("a.h", "b.h", "c.txt"):
        (tmp_path / "[x]").mkdir(exist_ok=True)
        (tmp_path / "[x]" / name).write_text(name)
    config = HeadersConfig(folder=str(tmp_path / "[x]"), patterns=["*.h"], validation_fraction=0.01)
    found = everything(open_source(config))
    assert sorted(document.text for part in found.values() for document in part) == ["a.h", "b.h"]
    with pytest.raises(UserError, match=r"the folder of headers .*none does not exist; set data\.folder"):
        open_source(HeadersConfig(folder=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="patterns must name at least one"):
        HeadersConfig(patterns=[])
