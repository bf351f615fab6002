"""Who is to blame: the mathematics alone, on tables with a known culprit."""

import itertools
import random

import pytest

from thinrank.trainers.preflight.blame import Place, culprits, deviating, laggards, named, rounds, slow_links


def places(size, per_host=1):
    return [Place(rank=rank, host=f"host{rank // per_host}") for rank in range(size)]


@pytest.mark.parametrize(
    ("values", "odd"),
    [
        ("aaaa", []),
        ("a", []),
        ("aaba", [2]),
        ("abab", [0, 1, 2, 3]),  # no majority: nobody can be said to be wrong
        ("ab", [0, 1]),
        ("aabbccaaa", [2, 3, 4, 5]),
    ],
)
def test_who_deviates_from_the_majority(values, odd):
    assert deviating(values) == odd


def smallest_covers(faults):
    """By trying all sets of ranks, the slow way."""
    touched = sorted({rank for cell in faults for rank in cell})
    for size in range(len(touched) + 1):
        found = [some for some in itertools.combinations(touched, size) if all(set(c) & set(some) for c in faults)]
        if found:
            return found
    raise AssertionError


@pytest.mark.parametrize("seed", range(30))
def test_the_culprits_account_for_every_fault_and_are_as_few_as_can_be(seed):
    draw = random.Random(seed)
    faults = {(draw.randrange(7), draw.randrange(7)) for _ in range(draw.randrange(1, 9))}
    found, best = culprits(faults), smallest_covers(faults)
    assert all(set(cell) & set(found) for cell in faults)
    if len(best[0]) == 1 and len(best) == 1:
        assert found == best[0]
    elif len(best[0]) == 1:  # either end of the one link would do: both are named
        assert {found} == {tuple(sorted(itertools.chain(*best)))}
    elif len(best[0]) <= 3:
        assert found in best


@pytest.mark.parametrize("bad", range(5))
def test_one_bad_sender_or_receiver_or_machine_is_named(bad):
    others = [rank for rank in range(5) if rank != bad]
    assert culprits((receiver, bad) for receiver in others) == (bad,)
    assert culprits((bad, sender) for sender in others) == (bad,)
    assert culprits([(bad, bad)]) == (bad,)
    assert named([(bad, other) for other in others[:2]], places(5)) == f"rank {bad} on host{bad}"


def test_no_faults_no_culprit():
    assert culprits([]) == ()
    assert named([], places(3)) == ""


def test_a_single_fault_between_two_is_the_link():
    assert culprits([(1, 3)]) == (1, 3)
    assert named([(1, 3), (3, 1)], places(4)) == "the link between rank 1 on host1 and rank 3 on host3"


def test_a_machine_whose_ranks_are_all_at_fault_is_named_as_one():
    faults = [(a, b) for a in (2, 3) for b in (0, 1, 4, 5)]
    assert named(faults, places(6, per_host=2)) == "host1 (ranks 2, 3)"


def test_between_two_machines_it_is_their_link():
    faults = [(a, b) for a in (0, 1) for b in (2, 3)]
    assert named(faults, places(4, per_host=2)) == "the link between host0 and host1"


def test_many_unrelated_faults_name_several():
    faults = [(a, a + 1) for a in range(0, 10, 2)]
    found = culprits(faults)
    assert all(set(cell) & set(found) for cell in faults)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.1, 0.9, 1.0], []),
        ([1.0, 5.0, 0.9, 1.0], [1]),
        ([1.0, 5.0], [1]),
        ([1.0], []),
        ([1.0, 1.0, 1.0, 9.0, 7.0], [3, 4]),
        ([1.0, 4.0, 1.0], []),  # just at the bound
    ],
)
def test_laggards(seconds, slow):
    assert laggards(seconds, 4.0) == slow


def all_links(size, rate):
    return {(a, b): rate(a, b) for a in range(size) for b in range(a + 1, size)}


def test_links_are_compared_with_their_kind_alone():
    """Inside a machine a link is ten times faster; that does not make those between machines slow."""
    hosts = [place.host for place in places(8, per_host=2)]
    links = all_links(8, lambda a, b: 100.0 if a // 2 == b // 2 else 10.0)
    assert slow_links(links, hosts, floors=(0.0, 0.0), factor=4.0) == []
    links[0, 1] = 10.0
    assert slow_links(links, hosts, floors=(0.0, 0.0), factor=4.0) == [(0, 1)]


@pytest.mark.parametrize(("size", "bad"), [(size, bad) for size in (3, 4, 6, 9) for bad in range(size)])
def test_the_links_of_a_slow_rank_are_slow_and_name_it(size, bad):
    """Of three ranks two links in three are slow, of four every second one."""
    links = all_links(size, lambda a, b: 1.0 if bad in (a, b) else 10.0)
    slow = slow_links(links, [f"h{rank}" for rank in range(size)], floors=(0.0, 0.0), factor=4.0)
    assert len(slow) == size - 1
    assert named(slow, places(size)) == f"rank {bad} on host{bad}"


def test_floors_hold_for_their_kind_and_also_for_a_single_link():
    assert slow_links({(0, 1): 5.0}, ["a", "b"], floors=(6.0, 0.0), factor=4.0) == [(0, 1)]
    assert slow_links({(0, 1): 5.0}, ["a", "a"], floors=(6.0, 0.0), factor=4.0) == []
    assert slow_links({(0, 1): 5.0}, ["a", "a"], floors=(0.0, 6.0), factor=4.0) == [(0, 1)]
    assert slow_links({(0, 1): 5.0}, ["a", "b"], floors=(5.0, 0.0), factor=4.0) == []


@pytest.mark.parametrize("size", range(1, 18))
def test_everybody_meets_everybody_once_and_nobody_two_at_a_time(size):
    table = rounds(size, 100)
    assert sorted(itertools.chain(*table)) == [(a, b) for a in range(size) for b in range(a + 1, size)]
    for pairs in table:
        assert len(set(itertools.chain(*pairs))) == 2 * len(pairs)


@pytest.mark.parametrize(("size", "most"), [(16, 4), (17, 8), (512, 8), (3, 1)])
def test_fewer_rounds_are_a_part_of_the_tournament(size, most):
    table = rounds(size, most)
    assert len(table) == most
    assert len({pair for pairs in table for pair in pairs}) == sum(map(len, table))
    if most > 1:
        assert set(itertools.chain(*itertools.chain(*table))) == set(range(size))
