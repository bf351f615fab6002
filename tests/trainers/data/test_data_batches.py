"""A global batch is divided without rest, and the held-out set is measured whole on any number of processes."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinrank.trainers.data.batches import IGNORE, EvalBatches, Layout, TrainBatches, held_out
from thinrank.trainers.data.encode import EncodedSplit


@given(share=st.integers(1, 4), micro_batches=st.integers(1, 4), world=st.integers(1, 5))
def test_ranks_and_micro_batches_partition_the_global_batch_in_order(share, micro_batches, world):
    size = share * micro_batches * world

    def numbers(start, count, part):
        return np.arange(start, start + count)[part][:, None].repeat(2, axis=1)

    loaders = [
        iter(
            TrainBatches(Layout(batch_size=size, micro_batches=micro_batches, rank=k, world=world), lambda: 7, numbers)
        )
        for k in range(world)
    ]
    seen = []
    for step in range(2):
        for micro in range(micro_batches):
            batches = [next(loader) for loader in loaders]
            assert {batch["position"] for batch in batches} == {7 + step * size + (micro + 1) * share * world}
            seen += [int(number) for batch in batches for number in batch["input_ids"][:, 0]]
    assert seen == list(range(7, 7 + 2 * size))


def test_micro_batches_are_slices_of_the_global_batch():
    layout = Layout(batch_size=12, micro_batches=3, rank=1, world=2)
    assert layout.micro_batch == 4
    assert layout.share == slice(2, 4)


def test_inputs_and_labels_are_one_apart_and_contiguous():
    loader = TrainBatches(Layout(batch_size=2), lambda: 0, lambda *_: np.array([[1, 2, 3], [4, 5, 6]]))
    batch = next(iter(loader))
    assert batch["input_ids"].tolist() == [[1, 2], [4, 5]]
    assert batch["labels"].tolist() == [[2, 3], [5, 6]]
    assert batch["input_ids"].is_contiguous()
    assert batch["labels"].is_contiguous()
    assert batch["labels"].dtype == batch["input_ids"].dtype == torch.int64
    assert batch["position"] == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"batch_size": 16, "world": 3},
            "batch_size must be divisible by 3 (1 micro-batches on 3 processes), got 16; set it to 15 or 18",
        ),
        (
            {"batch_size": 4, "micro_batches": 4, "world": 2},
            "batch_size must be divisible by 8 (4 micro-batches on 2 processes), got 4; set it to 8",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4, "micro_batches": 0}, "micro_batches must be at least 1, got 0"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank must lie in [0, 2), got 2"),
    ],
)
def test_batches_that_cannot_be_divided(change, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Layout(**change)


# -- the held-out set --------------------------------------------------------------------------------------------------


@given(
    tokens=st.lists(st.integers(0, 99), min_size=1, max_size=60),
    length=st.integers(1, 7),
    share=st.integers(1, 3),
    micro_batches=st.integers(1, 2),
    world=st.integers(1, 4),
)
def test_each_held_out_token_is_predicted_once_after_its_true_context(tokens, length, share, micro_batches, world):
    array = np.array(tokens, dtype=np.uint16)
    size = share * micro_batches * world
    ranks = []
    for rank in range(world):
        layout = Layout(batch_size=size, micro_batches=micro_batches, rank=rank, world=world)
        loader = EvalBatches(array, end_of_text=100, length=length, layout=layout)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(batch["input_ids"].shape == batch["labels"].shape == (share, length) for batch in batches)
        ranks.append(batches)
    assert len({len(batches) for batches in ranks}) == 1
    pairs = [
        (int(i), int(o))
        for number in range(len(ranks[0]))
        for rank in range(world)
        for i, o in zip(ranks[rank][number]["input_ids"].ravel(), ranks[rank][number]["labels"].ravel(), strict=True)
        if o != IGNORE
    ]
    # In the order of the ranks the rows are the text itself: after the end-of-text token comes the first token.
    assert pairs == list(zip([100, *tokens[:-1]], tokens, strict=True))


def test_padding_comes_last():
    loader = EvalBatches(np.arange(1, 6), end_of_text=9, length=4, layout=Layout(batch_size=3))
    (batch,) = loader
    assert batch["input_ids"].tolist() == [[9, 1, 2, 3], [4, 9, 9, 9], [9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [5, -100, -100, -100], [-100] * 4]


def split_of(*documents: tuple[int, int]) -> EncodedSplit:
    total = sum(tokens for tokens, _ in documents)
    return EncodedSplit(tokens=np.arange(total), documents=np.array(documents, dtype=np.int64))


@pytest.mark.parametrize(
    ("limit", "tokens", "ratio"),
    [
        (0, 60, 150 / 60),
        (1000, 60, 150 / 60),
        (60, 60, 150 / 60),
        (59, 30, 90 / 30),
        (30, 30, 90 / 30),
        (29, 10, 50 / 10),
        (10, 10, 50 / 10),
        (4, 4, 50 / 10),  # no whole document fits: the first is cut, and its own ratio stands for the part
    ],
)
def test_a_limit_takes_whole_documents_and_their_exact_bytes(limit, tokens, ratio):
    taken = held_out(split_of((10, 50), (20, 40), (30, 60)), limit)
    assert taken.tokens.tolist() == list(range(tokens))
    assert taken.bytes_per_token == ratio


def test_bits_per_byte_of_a_uniform_guess():
    """Guessing uniformly over 257 byte tokens costs log2(257) bits for each token, ends of text included."""
    taken = held_out(split_of((11, 10), (21, 20)), 0)
    nats = math.log(257)
    assert nats / math.log(2) / taken.bytes_per_token == pytest.approx(math.log2(257) * 32 / 30, rel=1e-15)


def test_counts():
    assert split_of((10, 50), (20, 40)).counts == {"documents": 2, "bytes": 90, "tokens": 30}
    assert Counter(split_of((1, 0)).counts.values()) == Counter([1, 0, 1])
