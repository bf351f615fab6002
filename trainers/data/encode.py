"""The tokens of a corpus on disk: encoded once, mapped into memory afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thinrank.trainers.data.cache import Cache, fingerprint
from thinrank.trainers.data.documents import Document, Source, Split
from thinrank.trainers.data.packing import token_type
from thinrank.trainers.data.tokenizer import Encoder, encoded, tokenizer_hash, vocab_size
from thinrank.trainers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """The tokens of one split.

    Attributes:
        tokens: All documents one after the other, each with its end-of-text token: uint16 or uint32 (tokens,), mapped.
        documents: For each document its tokens, end of text included, and its UTF-8 bytes: int64 (documents, 2).
    """

    tokens: np.ndarray
    documents: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """Documents, bytes and tokens of the split."""
        return {
            "documents": len(self.documents),
            "bytes": int(self.documents[:, 1].sum()),
            "tokens": int(self.documents[:, 0].sum()),
        }


def encode_split(
    source: Source, split: Split, tokenizer: PreTrainedTokenizerBase, cache: Cache, *, limit: int = 0
) -> EncodedSplit:
    """A split's tokens from the cache, encoded first if they are not there.

    Args:
        source: The corpus.
        split: Which of its splits.
        tokenizer: Gives the ids.
        cache: Where the tokens are kept.
        limit: Stop after the document that brings the tokens to this number; 0 means never.

    Raises:
        UserError: The split has no document, or a document is no text.
    """
    dtype = token_type(vocab_size(tokenizer))
    key = fingerprint(
        {
            "format": 1,
            "corpus": source.manifest,
            "split": split,
            "tokenizer": tokenizer_hash(tokenizer),
            "limit": limit,
            "dtype": dtype.str,
        }
    )

    def build(folder: Path) -> dict[str, Any]:
        return _write(folder, source, split, tokenizer, dtype, limit)

    folder, _ = cache.entry(f"tokens-{split}-{key}", build)
    documents = np.fromfile(folder / "documents.bin", dtype="<i8").reshape(-1, 2)
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
    return EncodedSplit(tokens=tokens, documents=documents)


def _write(
    folder: Path, source: Source, split: Split, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype, limit: int
) -> dict[str, Any]:
    encode = Encoder(tokenizer)
    documents: list[tuple[int, int]] = []
    total = 0
    with (folder / "tokens.bin").open("wb") as file:
        for batch in _batches(source.documents(split)):
            for document, ids in zip(batch, encode(batch), strict=True):
                file.write(ids.astype(dtype).tobytes())
                documents.append((len(ids), len(encoded(document))))
                total += len(ids)
                if limit and total >= limit:
                    break
            if limit and total >= limit:
                break
    if not documents:
        raise UserError(_nothing(source, split))
    if not any(size for _, size in documents):
        which = "training" if split == "train" else "held-out"
        raise UserError(
            f"the {which} documents ({len(documents)}) are all empty; name files or a dataset that hold text"
        )
    (folder / "documents.bin").write_bytes(np.array(documents, dtype="<i8").tobytes())
    return {}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups that bound the memory of the encoder."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        encoded(document)  # a text that UTF-8 cannot write would end the encoder without its name
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _nothing(source: Source, split: Split) -> str:
    if next(iter(source.documents("validation" if split == "train" else "train")), None) is None:
        return "the corpus has no document; name files or a dataset that hold text"
    if split == "train":
        return "all documents of the corpus are held out; lower data.validation_fraction, or add documents"
    return (
        "no document fell into the held-out share; name held-out documents "
        "(data.validation, data.validation_data_files), or raise data.validation_fraction"
    )
