"""Messages that go straight from rank to rank, beside the backend's all-reduce."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from thinrank.optim.exchange import sums
from thinrank.optim.exchange.sums import Direct, Ring, Scattered

SIZES = (0, 1, 3, 1000, 70_001, 300_000)
"""Fewer entries than ranks, an uneven piece, and several chunks."""


def own(size, dtype=torch.float32, rank=None):
    generator = torch.Generator().manual_seed(dist.get_rank() if rank is None else rank)
    return torch.randn(size, generator=generator).to(dtype)


def both(dtype):
    ranks = dist.get_world_size()
    found = []
    for size in SIZES:
        straight = Direct(own(size, dtype), None, ranks).mean()
        in_float = sum(own(size, dtype, rank).double() for rank in range(ranks)) / ranks
        found.append((straight, in_float))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_two_hops_give_the_mean_to_all(ranks, size, dtype):
    """Of what was sent, rounded once; the same on every rank to the bit."""
    answers = ranks(size).run(both, dtype)
    for found in answers:
        for (mean, expected), (first, _) in zip(found, answers[0], strict=True):
            assert torch.equal(mean, first)
            torch.testing.assert_close(mean.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def in_another_order():
    """Several messages on their way together, which are finished in another order than they began in."""
    ranks = dist.get_world_size()
    values = [own(size) for size in (50_000, 50_000, 400_000)]
    expected = [Ring(value.clone(), None, ranks).mean() for value in values]
    several = [Direct(value.clone(), None, ranks) for value in values]
    found = {i: several[i].mean() for i in (2, 0, 1)}
    return [(found[i], expected[i]) for i in range(3)]


def test_messages_do_not_take_each_other_for_each_other(ranks):
    for answer in ranks(3).run(in_another_order):
        for found, expected in answer:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def among_some():
    """Groups that overlap have messages of their own, however many each has had."""
    pairs: list[Any] = [dist.new_group([0, 1]), dist.new_group([0, 2])]
    rank = dist.get_rank()
    if rank < 2:
        for _ in range(3):
            Direct(own(10), pairs[0], 2).mean()
    if rank != 1:
        return Direct(own(10), pairs[1], 2).mean(), (own(10, rank=0) + own(10, rank=2)) / 2
    return None


def test_groups_count_by_themselves(ranks):
    one, _, three = ranks(3).run(among_some)
    for found, expected in (one, three):
        torch.testing.assert_close(found, expected)


def shares():
    ranks, rank = dist.get_world_size(), dist.get_rank()
    value = own(10)
    pieces = [[value[:1], value[1:3]], [value[3:4]], []]
    expected = torch.stack([own(10, rank=other) for other in range(ranks)]).mean(0)
    return Scattered(pieces, None).mean(), expected[[slice(0, 3), slice(3, 4), slice(0, 0)][rank]]


def test_one_hop_gives_each_its_piece(ranks):
    for found, expected in ranks(3).run(shares):
        torch.testing.assert_close(found, expected)


def lengths():
    some = sums.summed(own(sums.DIRECT_BYTES // 4), None, 2)
    more = sums.summed(own(sums.DIRECT_BYTES // 4 + 1), None, 2)
    some.mean(), more.mean()
    return type(some).__name__, type(more).__name__


def test_short_messages_go_straight(ranks):
    assert ranks(2).run(lengths)[0] == ("Direct", "Ring")
