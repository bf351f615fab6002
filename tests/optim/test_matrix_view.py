"""Any parameter as (long, short) matrices: writing to the view is writing to the parameter."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, seeded
from torch import nn

from thinrank.optim import DCTAdamW, GaLore, SubspaceAdamW, matrix_views
from thinrank.optim.matrix import SIDES, writable

shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)


@given(shapes, st.sampled_from(SIDES), st.data())
@LAW
def test_views_cover_every_entry_once(shape, side, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[0] - 1), max_size=3))) if shape[0] > 1 else []
    edges = [0, *cuts, shape[0]]
    sections = tuple(b - a for a, b in itertools.pairwise(edges))
    blocks = data.draw(st.sampled_from([b for b in (1, 2, 3) if all(s % b == 0 for s in sections)]))
    parameter = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    before = parameter.clone()
    views = matrix_views(shape, side, sections=sections, blocks=blocks)
    seen = []
    for view, section in zip(views, sections, strict=True):
        part = view.of(parameter)
        assert part.shape == (blocks, *view.shape)
        assert set(view.shape) == {section // blocks, math.prod(shape[1:])}
        seen += part.flatten().tolist()
        part.add_(1000.0)
    assert sorted(seen) == before.flatten().tolist()
    assert torch.equal(parameter, before + 1000.0)


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((5, 3), "std", (5, 3)),
        ((3, 5), "std", (5, 3)),
        ((4, 4), "std", (4, 4)),
        ((5, 3), "full", (5, 3)),
        ((5, 3), "reverse_std", (3, 5)),
        ((3, 5), "reverse_std", (3, 5)),
        ((5, 3), "right", (5, 3)),
        ((3, 5), "right", (3, 5)),
        ((5, 3), "left", (3, 5)),
        ((3, 5), "left", (5, 3)),
        ((6, 2, 2, 2), "std", (8, 6)),
    ],
)
def test_which_side_is_kept(shape, side, expected):
    (view,) = matrix_views(shape, side)
    assert view.shape == expected


def test_a_square_matrix_is_compressed_along_its_columns():
    (view,) = matrix_views((4, 4), "std")
    assert not view.transposed
    (view,) = matrix_views((4, 4), "reverse_std")
    assert view.transposed


def test_sections_of_a_fused_weight_choose_their_own_side():
    """q, k, v of grouped-query attention: (8 + 2 + 2) × 4."""
    views = matrix_views((12, 4), sections=(8, 2, 2))
    assert [view.shape for view in views] == [(8, 4), (4, 2), (4, 2)]
    weight = seeded(12, 4)
    assert torch.equal(views[1].of(weight)[0], weight[8:10].mT)


def test_blocks_are_heads():
    (view,) = matrix_views((12, 4), blocks=3)
    weight = seeded(12, 4)
    assert view.shape == (4, 4)
    assert torch.equal(view.of(weight)[1], weight[4:8])


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        ((3,), {}, "at least two non-empty dimensions"),
        ((3, 0), {}, "at least two non-empty dimensions"),
        ((4, 4), {"side": "up"}, "proj_type must be one of std, reverse_std, left, right, full, got 'up'"),
        ((4, 4), {"sections": (2, 1)}, "add up to the 4 rows"),
        ((4, 4), {"sections": (5, -1)}, "sections must be positive"),
        ((4, 4), {"blocks": 3}, "blocks must divide the 4 rows of its section, got 3"),
        ((4, 4), {"blocks": 0}, "blocks must divide"),
    ],
)
def test_errors_are_sentences(shape, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        matrix_views(shape, **options)


def test_writable_tells_a_view_from_a_copy():
    plain = torch.zeros(4, 3, 2, 2)
    assert writable(plain)
    assert not writable(plain.contiguous(memory_format=torch.channels_last))
    assert writable(torch.zeros(3, 4).mT)  # two dimensions need no flattening


@pytest.mark.parametrize("make", [GaLore, DCTAdamW, SubspaceAdamW])
def test_convolutions_are_really_updated(make):
    """A published optimizer changed a reshaped copy: its convolutions never moved. Channels-last is the same trap."""
    weights = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        start = seeded(6, 3, 3, 2)
        weight = nn.Parameter(start.clone(memory_format=layout))
        optimizer = make([weight], lr=0.1, rank=2, weight_decay=0.1)
        for step in range(3):
            weight.grad = seeded(6, 3, 3, 2, seed=step + 1).contiguous(memory_format=layout)
            optimizer.step()
        assert weight.is_contiguous(memory_format=layout)
        assert float((weight.detach() - start).abs().min()) > 0
        weights[layout] = weight.detach()
    torch.testing.assert_close(*weights.values(), rtol=1e-5, atol=1e-6)


def test_a_transposed_parameter_is_updated_in_place():
    base = seeded(4, 6)
    weight = nn.Parameter(base.clone().mT)
    twin = nn.Parameter(base.clone().mT.contiguous())
    for parameter in (weight, twin):
        optimizer = DCTAdamW([parameter], lr=0.1, rank=2)
        parameter.grad = seeded(6, 4, seed=1)
        optimizer.step()
    torch.testing.assert_close(weight, twin)
    assert not torch.equal(weight, base.mT)
