"""Tokenizers: byte-level BPE trained on the corpus, raw bytes, or any of Hugging Face, with one interface."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thinrank.trainers.data.cache import Cache, fingerprint
from thinrank.trainers.data.config import DataConfig
from thinrank.trainers.data.documents import Document, Source, hash_share
from thinrank.trainers.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
# Longer documents are encoded in parts, for the encoder needs some hundred bytes of memory for each token.
PART_CHARACTERS = 4_000_000
_LINE_START = re.compile(r"(?<=\S\n)(?=\S)")


def load_tokenizer(config: DataConfig, source: Source, cache: Cache) -> PreTrainedTokenizerBase:
    """The tokenizer that a configuration asks for.

    Args:
        config: Names the tokenizer.
        source: Corpus to train a BPE on.
        cache: Where a trained BPE is kept.

    Raises:
        UserError: The named tokenizer is not there and cannot be fetched.
    """
    if config.tokenizer == "bytes":
        return _wrap(byte_tokenizer())
    if config.tokenizer == "bpe":
        return _wrap(_cached_bpe(config, source, cache))
    return _pretrained(config.tokenizer)


def _cached_bpe(config: DataConfig, source: Source, cache: Cache) -> Tokenizer:
    import tokenizers

    key = fingerprint(
        {
            "format": 1,
            "corpus": source.manifest,
            "vocab_size": config.vocab_size,
            "sample_bytes": config.tokenizer_sample_bytes,
            "tokenizers": tokenizers.__version__,
        }
    )

    def build(folder: Path) -> dict[str, Any]:
        texts = sample(source, config.tokenizer_sample_bytes)
        (folder / FILE).write_text(train_bpe(texts, config.vocab_size).to_str(), encoding="utf-8")
        return {}

    folder, _ = cache.entry(f"tokenizer-{key}", build)
    return tokenizers.Tokenizer.from_file(str(folder / FILE))


def sample(source: Source, sample_bytes: int) -> Iterator[str]:
    """Training texts of about `sample_bytes` in all, spread over the corpus where its size is known, else its start."""
    share = 1.0 if source.train_bytes is None else sample_bytes / max(source.train_bytes, 1)
    taken = 0
    for document in source.documents("train"):
        if taken >= sample_bytes:
            return
        if share >= 1.0 or hash_share(document.name, "tokenizer") < share:
            taken += len(encoded(document))
            yield document.text


def encoded(document: Document) -> bytes:
    """A document's UTF-8 bytes.

    Raises:
        UserError: The text holds half of a surrogate pair, which JSON can write and UTF-8 cannot.
    """
    try:
        return document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{document.name} holds a lone surrogate (character {error.start}: {document.text[error.start]!r}), "
            "which is no text; correct the document or leave it out"
        ) from error


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE without normalisation, so that decoding gives back the text to the last byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_letters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, whose id is its value, and 256 for the end of text: a BPE without merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(byte_letters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def byte_letters() -> list[str]:
    """The 256 printable letters by which byte-level tokenizers write the bytes 0 to 255, in that order.

    Bytes that Latin-1 prints stand for themselves; the others take the letters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, free = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else free))
        free += byte not in printable
    return letters


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _pretrained(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from thinrank.trainers.data.hub import cached_or_fetched

    folder = Path(name).expanduser()
    if folder.is_dir():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"folder {folder} holds no tokenizer that transformers can load; set data.tokenizer"
            ) from error
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"tokenizer folder {folder} does not exist; set data.tokenizer to bpe, bytes, a folder or a name"
        )
    else:
        tokenizer = cached_or_fetched(
            f"tokenizer {name}",
            "set data.tokenizer to bpe, bytes or a local folder",
            lambda: AutoTokenizer.from_pretrained(name, local_files_only=True),
            lambda: AutoTokenizer.from_pretrained(name),
        )
    end_of_text_id(tokenizer)
    return tokenizer


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a document.

    Raises:
        UserError: The tokenizer has none.
    """
    for name in ("eos_token_id", "sep_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    raise UserError(
        f"tokenizer {tokenizer.name_or_path} has no end-of-text token (eos_token or sep_token); "
        "set data.tokenizer to one that has"
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of all that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        # Truncation and padding are left by the last call of transformers and do not touch the ids.
        content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    return fingerprint([end_of_text_id(tokenizer), content])


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of rows that an embedding needs: the highest id and one, for some tokenizers leave ids out."""
    return max(tokenizer.get_vocab().values()) + 1


class Encoder:
    """Turns documents into token ids, each followed by one end-of-text token.

    The text of a special token inside a document is encoded as ordinary text: a document cannot end itself. Lengths
    that the tokenizer prescribes for its own model (truncation, padding) are not applied.

    Args:
        tokenizer: Stays unchanged.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        self._end = [end_of_text_id(tokenizer)]
        self._backend: Tokenizer | None = None
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            # Straight to the backend: twice as fast as the call of transformers, which builds masks and offsets too.
            self._backend = Tokenizer.from_str(backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True

    def __call__(self, documents: list[Document]) -> list[np.ndarray]:
        """One int64 array (tokens,) for each document."""
        texts, owners = [], []
        for owner, document in enumerate(documents):
            for part in split_text(document.text):
                texts.append(part)
                owners.append(owner)
        pieces: list[list[list[int]]] = [[] for _ in documents]
        for owner, ids in zip(owners, self._ids(texts), strict=True):
            pieces[owner].append(ids)
        return [np.concatenate([np.asarray(ids, dtype=np.int64) for ids in [*parts, self._end]]) for parts in pieces]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._backend is not None:
            return [item.ids for item in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        encode = self._tokenizer.encode
        return [encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]


def split_text(text: str, characters: int = PART_CHARACTERS) -> list[str]:
    """The text in parts of about so many characters, cut between a line's end and the next line's first letter.

    No byte-level pattern has a token across such a place, so the tokens are those of the whole text.
    """
    parts, start = [], 0
    while len(text) - start > characters and (cut := _LINE_START.search(text, start + characters)):
        parts.append(text[start : cut.start()])
        start = cut.start()
    return [*parts, text[start:]]
