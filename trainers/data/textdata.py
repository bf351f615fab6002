"""`TextData`: text from any source as batches of tokens, for Lightning or a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning import LightningDataModule

from thinrank.trainers.data.batches import EvalBatches, HeldOut, Layout, TrainBatches, held_out, past
from thinrank.trainers.data.cache import Cache, fingerprint
from thinrank.trainers.data.config import (
    DataConfig,
    FilesConfig,
    HeadersConfig,
    HuggingFaceConfig,
    PySourceConfig,
)
from thinrank.trainers.data.documents import Document, PySource, Source
from thinrank.trainers.data.encode import EncodedSplit, encode_split
from thinrank.trainers.data.files import FilesSource, HeadersSource
from thinrank.trainers.data.packing import EpochOrder, windows
from thinrank.trainers.data.stream import StreamBatches, StreamPositions, TokenStream
from thinrank.trainers.data.tokenizer import (
    Encoder,
    end_of_text_id,
    load_tokenizer,
    tokenizer_hash,
    vocab_size,
)
from thinrank.trainers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from thinrank.trainers.data.hub import HuggingFaceSource


def open_source(config: DataConfig) -> Source:
    """The corpus that a configuration names.

    Raises:
        UserError: It is missing, empty, or cannot be reached.
        TypeError: The configuration is of no known source.
    """
    if isinstance(config, PySourceConfig):
        return PySource(config)
    if isinstance(config, FilesConfig):
        return FilesSource(config)
    if isinstance(config, HeadersConfig):
        return HeadersSource(config)
    if isinstance(config, HuggingFaceConfig):
        from thinrank.trainers.data.hub import HuggingFaceSource

        return HuggingFaceSource(config)
    raise TypeError(
        f"data must be a PySourceConfig, HeadersConfig, FilesConfig or HuggingFaceConfig, got {type(config).__name__}"
    )


class TextData(LightningDataModule):
    """Batches of tokens whose order does not depend on the number of processes, with a position to resume from.

    A batch is a dict: `input_ids` and `labels`, int64 (rows, sequence_length), labels already shifted, -100 for none;
    training batches also have `position`, the samples consumed by all processes once the batch is done. Whoever trains
    calls `advance(batch["position"])` after each finished optimizer step; a checkpoint then holds that position,
    however far a loader has read ahead.

    Example:
        >>> data = TextData(PySourceConfig(), batch_size=16)
        >>> data.prepare_data()
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))

    Args:
        config: Where the text comes from and how it is tokenized.
        tokenizer: A tokenizer to use instead of the one that the configuration names.
        batch_size: Rows of a global batch, that is of one optimizer step on all processes together.
        micro_batches: Parts of a global batch that are computed one after the other; None takes Lightning's
            `accumulate_grad_batches`, or 1 without a trainer.
        rank: This process among those that see different data; None takes the trainer's, or 0.
        world: The number of those processes; None takes the trainer's, or 1.

    Raises:
        ValueError: The batch cannot be divided evenly. With a trainer this is raised by `setup`.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        micro_batches: int | None = None,
        rank: int | None = None,
        world: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.batch_size = batch_size
        self._micro_batches, self._rank, self._world = micro_batches, rank, world
        self._tokenizer = tokenizer
        self._consumed = 0
        self._left_out: list[tuple[int, int]] = []
        self._prepared = False
        self._source: Source | None = None
        self._train: EncodedSplit | None = None
        self._validation: EncodedSplit | None = None
        self._manifest: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None
        self._positions = StreamPositions()
        self.layout()

    # -- preparation ---------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Trains the tokenizer and encodes the corpus, if the cache does not have them yet.

        Raises:
            UserError: The corpus is missing, empty or no text, or the cache cannot be written.
        """
        if self._prepared:
            return
        config, cache = self.config, Cache(self.config.cache_dir)
        self._source = source = open_source(config)
        self._tokenizer = tokenizer = self._tokenizer or load_tokenizer(config, source, cache)
        if self._streams:
            # All held-out documents of a streamed dataset may be too many to keep: stop where the last use does.
            first, last = config.validation_tokens, config.final_validation_tokens
            limit = (first + last if config.final_validation_unseen else max(first, last)) if first and last else 0
        else:
            limit = 0
            self._train = encode_split(source, "train", tokenizer, cache)
            tokens = self._train.counts["tokens"]
            if tokens < config.sequence_length:
                raise UserError(
                    f"the training text has {tokens} tokens, fewer than one row of {config.sequence_length}; "
                    "lower data.sequence_length or add text"
                )
        self._validation = encode_split(source, "validation", tokenizer, cache, limit=limit)
        self._manifest = {
            **source.manifest,
            "train": None if self._train is None else self._train.counts,
            "validation": self._validation.counts,
            "tokenizer": tokenizer_hash(tokenizer),
            "sequence_length": config.sequence_length,
            "seed": config.seed,
        }
        self._prepared = True

    def setup(self, stage: str | None = None) -> None:
        """Maps the tokens into memory, builds what is missing, and checks that the batch can be divided.

        Raises:
            ValueError: The batch size does not fit the number of processes and micro-batches.
            UserError: As `prepare_data`; or a restored position belongs to another corpus.
        """
        self.layout()
        self.prepare_data()
        self._test_part()  # so that one without a document is told before the training
        if self._loaded is not None:
            self._restore(self._loaded)

    def layout(self) -> Layout:
        """How the global batch is divided among micro-batches and processes, and which part is this process's.

        Raises:
            ValueError: It cannot be divided evenly.
        """
        rank, world, micro_batches = self._rank, self._world, self._micro_batches
        if self.trainer is not None:
            replicas = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
            rank = replicas["rank"] if rank is None else rank
            world = replicas["num_replicas"] if world is None else world
            micro_batches = self.trainer.accumulate_grad_batches if micro_batches is None else micro_batches
        return Layout(batch_size=self.batch_size, micro_batches=micro_batches or 1, rank=rank or 0, world=world or 1)

    @property
    def _streams(self) -> bool:
        return isinstance(self.config, HuggingFaceConfig) and self.config.streaming

    def _needs_preparation(self, value: Any) -> Any:
        if value is None or not self._prepared:
            raise RuntimeError("call prepare_data() or setup() of TextData first")
        return value

    # -- what was found ------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with `save_pretrained`."""
        return self._needs_preparation(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        """Rows that the model's embedding needs: the highest token id and one."""
        return vocab_size(self.tokenizer)

    @property
    def manifest(self) -> dict[str, Any]:
        """What is trained on, as JSON: files with size and digest, counts, tokenizer, row length and seed.

        No absolute path is in it, so the same corpus has the same manifest on every machine.
        """
        return self._needs_preparation(self._manifest)

    @property
    def manifest_hash(self) -> str:
        """Hex digest of the manifest: equal hashes mean equal samples at equal positions.

        The held-out counts stay out: of a stream they depend on how much of it a validation uses, and a run may change
        that when it resumes.
        """
        return fingerprint({key: value for key, value in self.manifest.items() if key != "validation"})

    @property
    def train_tokens(self) -> int | None:
        """Tokens of one pass over the training text; None for a stream."""
        self._needs_preparation(self._source)
        return None if self._train is None else self._train.counts["tokens"]

    @property
    def validation_bytes_per_token(self) -> float:
        """UTF-8 bytes for each token of `val_dataloader()`: nats per token / ln 2 / this = bits per byte."""
        return self._val_part().bytes_per_token

    @property
    def test_bytes_per_token(self) -> float:
        """UTF-8 bytes for each token of `test_dataloader()`."""
        return self._test_part().bytes_per_token

    def _val_part(self) -> HeldOut:
        return held_out(self._needs_preparation(self._validation), self.config.validation_tokens)

    def _test_part(self) -> HeldOut:
        after = self.config.validation_tokens if self.config.final_validation_unseen else None
        return held_out(self._needs_preparation(self._validation), self.config.final_validation_tokens, after=after)

    # -- loaders -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainBatches:
        """Endless batches of this process; each iteration begins at `consumed`.

        Raises:
            ValueError: `micro_batches` is not what the trainer accumulates.
        """
        source = self._needs_preparation(self._source)
        layout, config = self.layout(), self.config
        accumulated = layout.micro_batches if self.trainer is None else self.trainer.accumulate_grad_batches
        if layout.micro_batches != accumulated:
            raise ValueError(
                f"micro_batches must equal the trainer's accumulate_grad_batches ({accumulated}), "
                f"got {layout.micro_batches}; leave it out to take the trainer's"
            )
        if self._streams:
            return StreamBatches(
                layout, lambda: self._consumed, lambda: self._new_stream(source), self._positions, self._past
            )
        tokens = self._needs_preparation(self._train).tokens
        order = EpochOrder(len(tokens), config.sequence_length, config.seed)

        def rows(start: int, count: int, part: slice) -> np.ndarray:
            return windows(tokens, order.rows(start, count)[part], config.sequence_length)

        return TrainBatches(layout, lambda: self._consumed, rows, self._past)

    def _new_stream(self, source: HuggingFaceSource) -> TokenStream:
        assert isinstance(self.config, HuggingFaceConfig)
        encode = Encoder(self.tokenizer)
        return TokenStream(
            lambda: source.open("train"),
            lambda row: source.text(row, "train"),
            lambda texts: encode([Document("", text) for text in texts]),
            length=self.config.sequence_length,
            shuffle=self.config.shuffle_buffer,
            seed=self.config.seed,
        )

    def val_dataloader(self) -> EvalBatches:
        """Batches of the first `validation_tokens` held-out tokens."""
        return self._eval_batches(self._val_part())

    def test_dataloader(self) -> EvalBatches:
        """Batches of the first `final_validation_tokens` held-out tokens, or with `final_validation_unseen` of the
        first ones that `val_dataloader` leaves over."""
        return self._eval_batches(self._test_part())

    def _eval_batches(self, part: HeldOut) -> EvalBatches:
        return EvalBatches(
            part.tokens,
            end_of_text=end_of_text_id(self.tokenizer),
            length=self.config.sequence_length,
            layout=self.layout(),
        )

    # -- position ------------------------------------------------------------------------------------------------

    @property
    def consumed(self) -> int:
        """Samples (rows) that all processes together have trained on."""
        return self._consumed

    @property
    def next(self) -> int:
        """The first sample of the coming step, which is `consumed` unless samples are left out there."""
        return self._past(self._consumed)

    def _past(self, position: int) -> int:
        return past(position, self._left_out)

    def leave_out(self, samples: Iterable[tuple[int, int]]) -> None:
        """Says which samples training shall not see, beside those that it has been told; checkpoints keep them.

        Args:
            samples: first and end of each range; both must be where a step begins, so that none is cut.

        Raises:
            ValueError: An end is none of a step, or lies before its beginning.
        """
        wanted = list(samples)
        for first, end in wanted:
            if first < 0 or end < first or first % self.batch_size or end % self.batch_size:
                raise ValueError(
                    f"samples to leave out must be whole batches of {self.batch_size}, got {first} to {end}: "
                    "give multiples of batch_size"
                )
        self._left_out = sorted({*self._left_out, *wanted})

    def advance(self, position: int) -> None:
        """Says that training has finished the step which ends at a position; checkpoints begin from there.

        Args:
            position: The `position` of the step's last batch.

        Raises:
            ValueError: The position lies before the present one.
        """
        if position < self._consumed:
            raise ValueError(f"position must be at least {self._consumed} (samples already consumed), got {position}")
        self._consumed = position
        self._positions.forget_before(position)

    def state_dict(self) -> dict[str, Any]:
        """The position, of which corpus, and what is left out, for a checkpoint: plain numbers, strings and lists."""
        state = {"consumed": self._consumed, "manifest": self.manifest_hash, "stream": None}
        if self._streams and self._consumed:
            state["stream"] = self._positions.portable(self._consumed)
        if self._left_out:
            state["left_out"] = [list(each) for each in self._left_out]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to a saved position; before `setup` this only notes it.

        Raises:
            UserError: The state belongs to another corpus, tokenizer, row length or seed.
        """
        self._loaded = state_dict
        if self._prepared:
            self._restore(state_dict)

    def _restore(self, state: dict[str, Any]) -> None:
        if state["manifest"] != self.manifest_hash:
            raise UserError(
                f"the checkpoint was made with other data (manifest {state['manifest'][:12]}, now "
                f"{self.manifest_hash[:12]}) and its position means nothing here; restore the corpus, tokenizer, "
                "sequence_length and seed, or begin a new run"
            )
        self._loaded = None
        self._consumed = state["consumed"]
        self.leave_out((int(first), int(end)) for first, end in state.get("left_out", ()))
        self._positions = StreamPositions()
        if state["stream"] is not None:
            self._positions.put(self._consumed, state["stream"], self._consumed)
