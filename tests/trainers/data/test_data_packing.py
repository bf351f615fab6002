"""Every token is used once in each pass, whatever the lengths, and the order is a function of the sample number."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinrank.trainers.data.packing import EpochOrder, token_type, windows

SIZES = st.integers(1, 12).flatmap(lambda length: st.tuples(st.integers(length, 60), st.just(length)))


@given(size=SIZES, seed=st.integers(0, 2**63 - 1))
def test_each_token_is_once_an_input_and_once_a_label_in_every_pass(size, seed):
    """After as many passes as make whole rows, every token was seen exactly that often; in no pass more than once."""
    tokens, length = size
    passes = length // np.gcd(tokens, length)
    order = EpochOrder(tokens, length, seed)
    rows = order.rows(0, tokens * passes // length)
    places = (rows[:, None] * length + np.arange(length + 1)).astype(int)
    inputs = Counter((place // tokens, place % tokens) for place in places[:, :-1].ravel())
    assert inputs == {(number, token): 1 for number in range(passes) for token in range(tokens)}
    labels = Counter(place % tokens for place in places[:, 1:].ravel())
    assert labels == dict.fromkeys(range(tokens), passes)


@given(size=SIZES, seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_an_epoch_visits_the_rows_that_begin_in_it(size, seed, epoch):
    tokens, length = size
    order = EpochOrder(tokens, length, seed)
    first, end = order.first(epoch), order.first(epoch + 1)
    assert sorted(order.rows(first, end - first)) == list(range(first, end))
    assert [row for row in range(end + 5) if row * length // tokens == epoch] == list(range(first, end))
    assert {order.epoch_of(sample) for sample in range(first, end)} <= {epoch}


@given(size=SIZES, seed=st.integers(0, 1000), start=st.integers(0, 50), parts=st.lists(st.integers(0, 9), max_size=9))
def test_samples_do_not_depend_on_how_they_are_asked_for(size, seed, start, parts):
    whole = EpochOrder(size[0], size[1], seed).rows(start, sum(parts))
    order, got = EpochOrder(size[0], size[1], seed), []
    for part in parts:
        got += order.rows(start + len(got), part).tolist()
    assert got == whole.tolist()
    assert [
        int(EpochOrder(size[0], size[1], seed).rows(start + index, 1)[0]) for index in range(len(whole))
    ] == whole.tolist()


def test_the_order_is_fixed_for_all_time():
    """A run that resumes under another NumPy must go on in the same order."""
    assert EpochOrder(80, 8, seed=3).order(0).tolist() == [6, 1, 8, 5, 2, 7, 9, 4, 3, 0]
    assert EpochOrder(80, 8, seed=3).order(1).tolist() == [9, 7, 8, 3, 5, 6, 4, 0, 2, 1]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [EpochOrder(8000, 8, seed).order(epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    # A random order leaves about one row in its place; a sorted one would leave a thousand.
    assert all(sum(place == row for place, row in enumerate(order)) < 20 for order in orders)


def test_windows_go_on_with_the_next_pass():
    tokens = np.arange(10, dtype=np.uint16)
    rows = windows(tokens, np.array([0, 2, 3]), 4)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [8, 9, 0, 1, 2], [2, 3, 4, 5, 6]]
    assert rows.dtype == np.int64


def test_large_runs_do_not_overflow():
    order = EpochOrder(10**6, 10**3, seed=0)
    sample = 10**17
    row = int(order.rows(sample, 1)[0])
    assert order.epoch_of(sample) == order.epoch_of(row) == 10**14
    assert windows(np.arange(10**6), np.array([row]), 10**3)[0, 0] == row * 10**3 % 10**6


def test_less_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a pass must have at least one row of 8 tokens, got 7"):
        EpochOrder(7, 8, 0)


@pytest.mark.parametrize(("vocab", "name"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_token_type_holds_every_id(vocab, name):
    assert token_type(vocab) == np.dtype(name)
    assert np.array([vocab - 1]).astype(token_type(vocab))[0] == vocab - 1
