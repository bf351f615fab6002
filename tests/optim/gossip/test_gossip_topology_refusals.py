"""What is no topology is refused, in a sentence that says the rule, what was found and what to do."""

import math
from typing import Any

import pytest
import torch

from thinrank.optim.gossip.mixing import SLACK
from thinrank.optim.gossip.topology import (
    Topology,
    exponential,
    from_edges,
    from_matrix,
    hierarchical,
    hypercube,
    one_peer_exponential,
    ring,
    topology,
    torus,
)

NO_SIZE: Any = 2.5
HALF = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ring(0), r"at least 1, got 0"),
        (lambda: ring(NO_SIZE), r"whole number of ranks, at least 1, got 2\.5"),
        (lambda: ring(True), r"got True"),
        (lambda: torus(0), r"at least 1, got 0"),
        (lambda: torus(7), r"a torus of 7 ranks, a prime, would be a ring: use ring"),
        (lambda: torus(12, rows=5), r"rows must divide the 12 ranks .*, got 5"),
        (lambda: torus(12, rows=12), r"of two or more, got 12"),
        (lambda: torus(12, rows=1), r"of two or more, got 1"),
        (lambda: hypercube(6), r"a power of two of ranks, got 6: use one_peer_exponential, ring or torus"),
        (lambda: hypercube(5), r"a power of two of ranks, got 5: use one_peer_exponential or ring$"),
        (lambda: hierarchical(8, 3), r"per_node must be a divisor of the 8 ranks, got 3"),
        (lambda: hierarchical(8, 0), r"per_node must be a divisor of the 8 ranks, got 0"),
        (lambda: hierarchical(8, 2, ring(3)), r"as many ranks as the run, 4, got 3"),
        (lambda: from_edges(3, [(0, 1), (1, 2, 0.5)]), r"either all edges or none must have a weight"),
        (lambda: from_edges(3, [(0,), (1,)]), r"must be \(i, j\) or \(i, j, weight\), got \(0,\)"),
        (lambda: from_edges(3, [(0, 3)]), r"two of the ranks 0 to 2, got \(0, 3\)"),
        (lambda: from_edges(3, [(0, -1)]), r"two of the ranks 0 to 2, got \(0, -1\)"),
        (lambda: from_edges(3, [(0, 1.5)]), r"two of the ranks 0 to 2, got \(0, 1\.5\)"),
        (lambda: from_edges(3, [(1, 1)]), r"two different ranks, got \(1, 1\)"),
        (lambda: from_edges(3, [(0, 1), (1, 0)]), r"listed once, in one direction, got a second one of ranks 1 and 0"),
        (lambda: from_edges(2, [(0, 1, -0.5)]), r"above 0 and finite, got \(0, 1, -0\.5\)"),
        (lambda: from_edges(2, [(0, 1, math.nan)]), r"above 0 and finite, got \(0, 1, nan\)"),
        (lambda: from_edges(3, [(0, 1, 0.6), (1, 2, 0.6)]), r"sum to at most 1, got 1\.2 at rank 1"),
        (lambda: from_edges(5, [(0, 1), (2, 3), (3, 4)]), r"nothing of rank 0 ever reaches ranks 2, 3, 4: add edges"),
        (lambda: from_edges(3, [(0, 1)]), r"nothing of rank 0 ever reaches rank 2: add edges"),
        (lambda: from_edges(13, [(0, 1)]), r"ranks 2, 3, 4, 5, 6, 7, 8, 9 and 3 more: add"),
        (lambda: from_edges(2, [(0, 1, 1.0)]), r"only swap what they hold for ever: give each rank a positive weight"),
        (lambda: from_matrix(torch.eye(3).roll(1, 0)), r"only swap what they hold for ever"),
        (lambda: from_matrix(torch.ones(2, 3) / 3), r"custom, round 0: weights must be a square matrix.*got \(2, 3\)"),
        (lambda: from_matrix(torch.ones(2)), r"must be a square matrix.*got \(2,\)"),
        (lambda: from_matrix([[1.0], [0.5, 0.5]]), r"weights must be numbers in rows of one length"),
        (lambda: from_matrix("ring"), r"weights must be numbers in rows of one length"),
        (lambda: from_matrix([]), r"weights must be numbers in rows of one length"),
        (lambda: from_matrix(HALF, 3), r"as many ranks as the run, 3, got 2"),
        (lambda: from_matrix([[0.5, math.inf], [0.5, 0.5]]), r"finite, got inf for what rank 0 hears from rank 1"),
        (lambda: from_matrix([[0.5, 0.5], [math.nan, 0.5]]), r"finite, got nan for what rank 1 hears from rank 0"),
        (lambda: from_matrix([[1.5, -0.5], [-0.5, 1.5]]), r"at least 0, got -0\.5 for what rank 0 hears from rank 1"),
        (
            lambda: from_matrix([[0.5, 0.5], [0.4, 0.5]]),
            r"each row .*must sum to 1, got 0\.9 in row 1: its own weight must be",
        ),
        (
            lambda: from_matrix([[0.5, 0.5], [0.4, 0.6]]),
            r"each column .*must sum to 1, got 0\.9 in column 0: a rank must give as much",
        ),
        (lambda: from_matrix(torch.full((3, 3), 1 / 3, dtype=torch.float32)), r"each row of weights must sum to 1"),
        (lambda: Topology("mine", ()), r"mine: a topology needs at least one round of weights, got none"),
        (
            lambda: Topology("mine", (HALF, torch.ones(1, 1))),
            r"mine, round 1: all rounds must have as many ranks .*2, got 1",
        ),
        (lambda: Topology("mine", (HALF,), gone=(1,)), r"the weight 1 for itself, rank 1 has not"),
        (lambda: Topology("mine", (HALF,), gone=(2,)), r"the weight 1 for itself, rank 2 has not"),
        (lambda: ring(3).without([3]), r"ring: rank must be from 0 to 2, got 3"),
        (lambda: ring(3).without([0, 1, 2]), r"at least one of 3 ranks must remain"),
        (lambda: ring(3).sources(-1), r"rank must be from 0 to 2, got -1"),
        (lambda: ring(3).targets(3), r"rank must be from 0 to 2, got 3"),
        (
            lambda: exponential(8).require_symmetric("DCD"),
            r"round 0: DCD needs symmetric .* rank 0 hears rank 1 with 0 and is heard with 0\.25: use",
        ),
        (lambda: one_peer_exponential(4).require_symmetric(), r"this exchange needs symmetric weights"),
        (
            lambda: hypercube(4).require_static("CHOCO"),
            r"CHOCO needs the same neighbours in every round, got a schedule of 2",
        ),
        (lambda: topology("rings", 4), r"topology must be one of ring, torus, .*custom, got 'rings'"),
        (lambda: topology("ring", 4, rows=2), r"ring takes no options, got rows"),
        (lambda: topology("torus", 4, columns=2), r"torus takes rows, got columns"),
        (lambda: topology("hierarchical", 4), r"hierarchical needs per_node, got none"),
        (lambda: topology({"rows": 2}, 4), r"must have a name, one of ring, .*got \{'rows': 2\}"),
        (lambda: topology([(0, 1)], 2, rows=2), r"only a topology that is named takes options, got rows"),
        (lambda: topology(ring(3), 4), r"ring: a topology must have as many ranks as the run, 4, got 3"),
        (lambda: topology("custom", 2), r"needs either edges or a matrix, got none"),
        (lambda: topology("custom", 2, edges=[(0, 1)], matrix=HALF), r"needs either edges or a matrix, got both"),
    ],
)
def test_refusals_say_the_rule_and_what_was_found(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_sum_that_is_off_by_little_is_refused():
    """A row of 1 - 1e-9 would shrink a model by a thousandth in a million steps."""
    w = ring(4).weights().clone()
    w[2, 2] -= 1000 * SLACK
    with pytest.raises(ValueError, match="in row 2"):
        from_matrix(w)
