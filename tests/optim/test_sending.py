"""What is sent of one gradient besides coordinates: rows, rounded entries, and a sketch by which shares are known."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, small
from test_replicated import apart, mine, run, seeded_model
from torch import nn

from thinrank.optim import GaLoreConfig, build
from thinrank.optim.linalg.norms import SKETCH
from thinrank.optim.owned import own
from thinrank.optim.replicated import replicate


class Table(nn.Module):
    """An embedding of which a step touches few rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(200, 8)
        self.lm_head = nn.Linear(8, 5)

    def forward(self, tokens):
        return self.lm_head(self.embed(tokens))


def table_run(join, embeddings):
    model = Table()
    optimizer = build(model, replace(CONFIGS["adamw"], state_bits=32))
    join(model, optimizer, embeddings)
    counts = []
    for step in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * dist.get_rank() + step)
        model(torch.randint(200, (6,), generator=generator)).square().sum().backward()
        optimizer.step()
        assert optimizer.wire is not None
        counts.append(dict(optimizer.wire.payload))
    return [p.detach().clone() for p in model.parameters()], counts[-1]


def joins(model, optimizer, embeddings):
    replicate(model, optimizer, embeddings=embeddings)


def test_rows_of_an_embedding_that_nobody_touched_need_not_travel(ranks):
    rows, whole = ranks(4).run(table_run, joins, "rows"), ranks(4).run(table_run, joins, "dense")
    for (found, sent), (expected, all_sent) in zip(rows, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all_sent["dense"] - sent["dense"] == 4 * 4 * 200 * 8
        assert 4 * 4 * 8 * 18 <= sent["rows"] <= 4 * 4 * 8 * 24  # of 24 tokens, few are the same
        assert sent["present"] - all_sent["present"] == 4 * 200


def rounds(embeddings):
    """A model of ours with an untied head: what it sends of each kind, and where it gets."""
    model = seeded_model(tied=False)
    optimizer = build(model, small("galore", svd="power"))
    replicate(model, optimizer, embeddings=embeddings)
    weights = run(model, optimizer, mine(), steps=range(5))
    assert optimizer.wire is not None
    return weights, dict(optimizer.wire.payload)


def test_embeddings_and_the_head_alone_may_travel_in_bfloat16(ranks):
    """Half of their bytes; matrices and vectors keep theirs, and weights part by what rounding to 8 bits does."""
    whole, rounded, both = (ranks(2).run(rounds, how)[0] for how in ("dense", "bfloat16", "rows_bfloat16"))
    assert whole[1]["dense"] - rounded[1]["dense"] == 5 * 2 * 2 * 13 * 8
    assert {**rounded[1], "dense": 0} == {**whole[1], "dense": 0}
    assert 0 < both[1]["rows"] <= 5 * 2 * 13 * 8
    assert both[1]["rows"] + both[1]["dense"] <= rounded[1]["dense"]
    assert all(torch.equal(both[0][name], value) for name, value in rounded[0].items())
    assert 0 < apart(rounded[0], whole[0]) < 2**-8
    assert all(value.dtype is torch.float32 for value in rounded[0].values())


def widens():
    model = seeded_model()
    with pytest.raises(ValueError, match="leave the messages' dtype at None"):
        replicate(model, build(model, small("galore")), embeddings="bfloat16", dtype=torch.float32)


def test_rounded_embeddings_in_wide_messages_are_refused(ranks):
    ranks(2).run(widens)


def shares_of_energy(join, how):
    """Captured energy of each matrix at each step, as somebody who exchanges so measures it."""
    model = seeded_model(all_alike=True)
    optimizer = build(model, small("galore", svd="power"))
    join(model, optimizer, messages=how)
    found = []
    for step in range(7):
        optimizer.measure = True
        run(model, optimizer, mine(), steps=[step], clip=0.1)
        found.append(optimizer.measured["captured_energy"])
    return found


@pytest.mark.parametrize("join", [replicate, own], ids=["replicas", "owners"])
def test_captured_energy_is_known_where_coordinates_travel(ranks, join):
    """These matrices have fewer entries than a sketch has sums, so that their norms are exact."""
    found, expected = (ranks(2).run(shares_of_energy, join, how)[0] for how in ("auto", "full"))
    for mine_, other in zip(found, expected, strict=True):
        assert len(mine_) >= 3
        assert mine_ == pytest.approx(other, abs=1e-4)
    assert any(value < 0.99 for value in found[-1].values())


def share_of_a_large_matrix(how):
    torch.manual_seed(0)
    model = nn.Linear(64, 96, bias=False)
    optimizer = build(model, GaLoreConfig(rank=16, svd="power", update_proj_gap=50))
    replicate(model, optimizer, messages=how)
    for _ in range(2):  # the second sends coordinates
        optimizer.measure = True
        optimizer.zero_grad()
        model(torch.randn(256, 64)).square().sum().backward()
        optimizer.step()
    return optimizer.measured["captured_energy"]["weight"]


def test_captured_energy_of_a_large_matrix_is_as_exact_as_its_sketch(ranks):
    """The square of a norm from `SKETCH` sums deviates by sqrt(2 / SKETCH) of itself; 5 deviations are allowed."""
    found, expected = (ranks(2).run(share_of_a_large_matrix, how)[0] for how in ("auto", "full"))
    assert 0.1 < expected < 0.9
    assert found != expected
    assert found == pytest.approx(expected, rel=5 * (2 / SKETCH) ** 0.5)
