"""Small corpora, made anew for each test."""

import gzip
import json
import random
from pathlib import Path

import pytest

WORDS = [
    "def",
    "return",
    "import",
    "class",
    "self",
    "value",
    "for",
    "in",
    "else",
    "naïve",
    "Größe",
    "数据",
    "🙂",
    "x",
    "=",
    "(",
]


def write_text(seed: int, words: int) -> str:
    """Reproducible text of several lines, with letters of one to four UTF-8 bytes."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", " ", "\n", "\n    "]) for _ in range(words))


@pytest.fixture
def python_folder(tmp_path: Path) -> Path:
    """Forty Python-like files in two folders, some of them empty."""
    root = tmp_path / "library"
    for number in range(40):
        path = root / ("package" if number % 3 else ".") / f"module{number:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(write_text(number, number * 5), encoding="utf-8")
    return root


@pytest.fixture
def c4_folder(tmp_path: Path) -> Path:
    """Two training shards and a held-out one in the shape of C4: gzipped JSON lines with text, timestamp and url."""
    root = tmp_path / "c4"
    root.mkdir()
    row = 0
    for name, rows in [
        ("c4-train.00000-of-01024", 120),
        ("c4-train.00001-of-01024", 90),
        ("c4-validation.00000-of-00008", 25),
    ]:
        with gzip.open(root / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            for _ in range(rows):
                record = {
                    "text": write_text(1000 + row, 1 + row * 37 % 60),
                    "timestamp": "2019-04-25T12:57:54Z",
                    "url": f"https://example.org/{row}",
                }
                file.write(json.dumps(record) + "\n")
                row += 1
    return root
