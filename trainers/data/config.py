"""What to train on, and how text becomes rows of tokens: one frozen dataclass per source."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DataConfig", "FilesConfig", "HeadersConfig", "HuggingFaceConfig", "PySourceConfig"]

MIN_BPE_VOCAB = 257  # the 256 bytes and the end-of-text token: with fewer, some text could not be written


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _require_list(name: str, value: object) -> None:
    # A lone string would be taken apart into its letters, each of them a pattern.
    _require(
        isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value),
        f"{name} must be a list of non-empty strings, got {value!r}; write {name}=[...]",
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The fields that every source has in common; use one of its subclasses.

    Raises:
        ValueError: A value is outside of its range; the sentence names the field and the rule.
    """

    name: str = field(default="", metadata={"help": "source of the text: pysource, headers, files or hf"})
    tokenizer: str = field(
        default="bpe",
        metadata={"help": "bpe (byte-level BPE trained on the corpus), bytes, or a Hugging Face name or folder"},
    )
    vocab_size: int = field(
        default=1024,
        metadata={"help": "most tokens of the trained BPE, end-of-text included; others bring theirs"},
    )
    tokenizer_sample_bytes: int = field(
        default=16_000_000, metadata={"help": "about how many bytes of training text the BPE is trained on"}
    )
    sequence_length: int = field(default=256, metadata={"help": "tokens in a row of a batch"})
    validation_fraction: float = field(
        default=0.05,
        metadata={"help": "share of the documents held out, chosen by a hash, where no held-out set is named"},
    )
    validation_tokens: int = field(
        default=65_536, metadata={"help": "held-out tokens used by each validation during training; 0 means all"}
    )
    final_validation_tokens: int = field(
        default=0, metadata={"help": "held-out tokens used by the last validation; 0 means all"}
    )
    final_validation_unseen: bool = field(
        default=False,
        metadata={"help": "the last validation begins after the held-out documents that validation_tokens covers"},
    )
    seed: int = field(
        default=0, metadata={"help": "seed of the order of the training rows, apart from all other seeds"}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder of tokenizers and tokens; default: thinrank in the user's cache folder"}
    )

    def __post_init__(self) -> None:
        _require(
            bool(self.tokenizer),
            f"tokenizer must be bpe, bytes, or a Hugging Face name or folder, got {self.tokenizer!r}",
        )
        _require(
            self.tokenizer != "bpe" or self.vocab_size >= MIN_BPE_VOCAB,
            f"vocab_size must be at least {MIN_BPE_VOCAB} (256 bytes and the end-of-text token), got {self.vocab_size}",
        )
        _require(
            self.tokenizer_sample_bytes >= 1,
            f"tokenizer_sample_bytes must be at least 1, got {self.tokenizer_sample_bytes}",
        )
        _require(self.sequence_length >= 1, f"sequence_length must be at least 1, got {self.sequence_length}")
        _require(
            0.0 < self.validation_fraction < 1.0,
            f"validation_fraction must lie between 0 and 1, both excluded, got {self.validation_fraction}",
        )
        for name in ("validation_tokens", "final_validation_tokens"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} must be at least 1, or 0 for all held-out tokens, got {value}")
        _require(
            self.validation_tokens > 0 or not self.final_validation_unseen,
            "final_validation_unseen needs validation_tokens of at least 1, got 0: with all held-out tokens read "
            "during training none is left",
        )
        _require(0 <= self.seed < 2**63, f"seed must lie in [0, 2**63), got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class PySourceConfig(DataConfig):
    """The source text of the Python standard library found on this machine (or of any folder of Python files)."""

    name: str = field(default="pysource", metadata={"help": "source of the text: pysource"})
    folder: str | None = field(
        default=None, metadata={"help": "folder of Python files; default: the running Python's standard library"}
    )


@dataclass(frozen=True, kw_only=True)
class HeadersConfig(DataConfig):
    """The C++ headers that come with the installed torch (or those of any folder)."""

    name: str = field(default="headers", metadata={"help": "source of the text: headers"})
    folder: str | None = field(default=None, metadata={"help": "folder of headers; default: torch's own include/"})
    patterns: list[str] = field(
        default_factory=lambda: ["c10/core/**/*.h", "c10/util/**/*.h"],
        metadata={"help": "glob patterns of the files below that folder; the default is about 1.3 MB"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_list("patterns", self.patterns)
        _require(len(self.patterns) > 0, "patterns must name at least one glob pattern, got none; leave it out")


@dataclass(frozen=True, kw_only=True)
class FilesConfig(DataConfig):
    """Text, JSON lines and Parquet files found by glob patterns."""

    name: str = field(default="files", metadata={"help": "source of the text: files"})
    train: list[str] = field(
        default_factory=list,
        metadata={"help": "glob patterns of the training files: .parquet, .jsonl, .json, else text; .gz is unpacked"},
    )
    validation: list[str] = field(
        default_factory=list,
        metadata={"help": "glob patterns of the held-out files; empty: validation_fraction of the training documents"},
    )
    text_field: str = field(
        default="text", metadata={"help": "key (JSON lines) or column (Parquet) that holds the text"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_list("train", self.train)
        _require_list("validation", self.validation)
        _require(len(self.train) > 0, "train must name at least one glob pattern, got none; write train=[corpus/*.txt]")
        _require(bool(self.text_field), f"text_field must not be empty, got {self.text_field!r}")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(DataConfig):
    """A Hugging Face dataset by name, or local files through the same loader."""

    name: str = field(default="hf", metadata={"help": "source of the text: hf"})
    path: str = field(
        default="allenai/c4",
        metadata={"help": "dataset name, folder, or a format (json, parquet, text) for data_files"},
    )
    subset: str | None = field(default="en", metadata={"help": "configuration of the dataset; ignored with data_files"})
    revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the dataset; default: newest"}
    )
    split: str = field(default="train", metadata={"help": "split to train on"})
    validation_split: str = field(
        default="validation",
        metadata={
            "help": "held-out split; empty: validation_fraction of the training documents by a hash of their text"
        },
    )
    data_files: list[str] = field(
        default_factory=list, metadata={"help": "files of the training split, in the dataset or on this machine"}
    )
    validation_data_files: list[str] = field(
        default_factory=list, metadata={"help": "files of the held-out split; empty with data_files: held out by hash"}
    )
    streaming: bool = field(
        default=True, metadata={"help": "tokenize on the fly (true), or download and tokenize everything first (false)"}
    )
    text_field: str = field(default="text", metadata={"help": "column that holds the text"})
    shuffle_buffer: int = field(
        default=0,
        metadata={"help": "streaming: documents shuffled together, block by block; 0 keeps the dataset's order"},
    )
    final_validation_tokens: int = field(
        default=10_000_000, metadata={"help": "held-out tokens used by the last validation; 0 means all"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("path", "split", "text_field"):
            _require(bool(getattr(self, name)), f"{name} must not be empty, got {getattr(self, name)!r}")
        _require_list("data_files", self.data_files)
        _require_list("validation_data_files", self.validation_data_files)
        _require(
            bool(self.data_files) or not self.validation_data_files,
            "validation_data_files needs data_files, got none; name the training files too",
        )
        _require(
            self.split != self.validation_split,
            f"validation_split must differ from split, got {self.split!r} for both; leave it empty to hold out by hash",
        )
        _require(self.shuffle_buffer >= 0, f"shuffle_buffer must be at least 0, got {self.shuffle_buffer}")

    @property
    def holds_out_by_hash(self) -> bool:
        """Whether held-out documents are taken from the training split, by a hash of their text."""
        return not self.validation_split or bool(self.data_files and not self.validation_data_files)
