"""Laws of the fixed bases and of the choice of columns."""

import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, eye_error, seeded

from thinrank.optim.linalg import fixed
from thinrank.optim.linalg.fixed import (
    BASES,
    basis_matrix,
    column_norms,
    dct_matrix,
    dct_rows_fft,
    hadamard_matrix,
    random_orthogonal,
    select_columns,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 12, 31, 64, 100, 257, 512])
@pytest.mark.parametrize("name", BASES)
def test_every_basis_is_orthogonal(name, n):
    matrix = basis_matrix(name, n, dtype=torch.float64, device="cpu")
    assert matrix.shape == (n, n)
    assert eye_error(matrix) < 1e-12
    assert eye_error(matrix.mT) < 1e-12


def test_rounding_to_float32_is_the_only_error():
    """An angle computed in float32 would be off by 1e-3 radians at this size."""
    assert eye_error(basis_matrix("dct", 2048, dtype=torch.float32, device="cpu")) < 5e-6


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 33, 100, 255, 256])
def test_matrix_engine_fft_engine_and_scipy_agree(n):
    """One basis in both engines (the published code has a different one in each)."""
    x = seeded(3, 5, n, dtype=torch.float64)
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), type=2, norm="ortho", axis=-1))
    torch.testing.assert_close(x @ dct_matrix(n).T, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dct_rows_fft(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 33), (1, 33), (2, 5, 32), (0, 8), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("limit", [1, 300, 2**20])
def test_fft_engine_works_in_parts_and_as_the_batch_lies(shape, limit, monkeypatch):
    """In float32; rows and columns as stored, a view with gaps, and in parts of any size."""
    monkeypatch.setattr(fixed, "FFT_BYTES", limit)
    n = shape[-1]
    for x in (seeded(*shape), seeded(*shape[:-2], n, shape[-2]).mT, seeded(*shape[:-1], 2 * n)[..., ::2]):
        coordinates = dct_rows_fft(x)
        torch.testing.assert_close(coordinates, x @ dct_matrix(n, torch.float32).T, rtol=1e-5, atol=1e-5)
        assert coordinates.mT.is_contiguous() or coordinates.is_contiguous()


def test_hadamard_has_equal_magnitudes_where_the_size_is_a_power_of_two():
    torch.testing.assert_close(hadamard_matrix(16).abs(), torch.full((16, 16), 0.25, dtype=torch.float64))


def test_random_orthogonal_depends_on_its_seed_alone():
    assert torch.equal(random_orthogonal(6, 1), random_orthogonal(6, 1))
    assert not torch.allclose(random_orthogonal(6, 1), random_orthogonal(6, 2))


def test_an_unknown_basis_is_refused():
    with pytest.raises(ValueError, match="basis must be one of dct, identity, hadamard, random, got 'fourier'"):
        basis_matrix("fourier", 4, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(("norm", "p"), [("l1", 1), ("l2", 2)])
def test_column_norms(norm, p):
    x = seeded(2, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(column_norms(x, norm), torch.linalg.vector_norm(x, p, dim=-2) ** p)


norms_of = st.lists(st.integers(0, 6), min_size=1, max_size=14)  # few values, so that ties are common


def brute_force(norms, previous, rank):
    """The slots by the words of the docstring."""
    order = sorted(range(len(norms)), key=lambda column: (-norms[column], column))[:rank]
    if previous is None:
        return sorted(order), [False] * rank
    fresh = iter(sorted(set(order) - set(previous)))
    return [column if column in order else next(fresh) for column in previous], [c in order for c in previous]


@given(norms_of, st.data())
@LAW
def test_slots_are_stable_and_ties_go_to_the_lower_column(norms, data):
    rank = data.draw(st.integers(1, len(norms)))
    previous = None
    if data.draw(st.booleans()):
        previous = data.draw(st.permutations(range(len(norms))))[:rank]
    columns, kept = select_columns(
        torch.tensor([norms], dtype=torch.float32), None if previous is None else torch.tensor([previous]), rank
    )
    expected, expected_kept = brute_force(norms, previous, rank)
    assert columns[0].tolist() == expected
    assert kept[0].tolist() == expected_kept


@given(st.integers(1, 30), st.data())
@LAW
def test_the_chosen_set_is_topk(n, data):
    rank = data.draw(st.integers(1, n))
    norms = seeded(3, n, seed=data.draw(st.integers(0, 99))).abs()
    previous = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i))[:rank] for i in range(3)])
    for before in (None, previous, previous.int()):
        columns, kept = select_columns(norms, before, rank)
        assert torch.equal(columns.sort(-1).values, norms.topk(rank).indices.sort(-1).values)
        if before is not None:
            assert torch.equal(kept, columns == before)


def test_choosing_again_changes_nothing():
    norms = seeded(2, 12).abs()
    columns, _ = select_columns(norms, None, 5)
    again, kept = select_columns(norms, columns, 5)
    assert torch.equal(again, columns)
    assert bool(kept.all())


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(BASES), st.data())
@LAW
def test_what_is_left_is_at_most_its_share(long, short, name, data):
    """l2 selection: ‖A − proj(A)‖² ≤ (1 − r/n) ‖A‖², whatever the orthogonal basis."""
    rank = data.draw(st.integers(1, short))
    x = seeded(long, short, seed=data.draw(st.integers(0, 99)), dtype=torch.float64)
    basis = basis_matrix(name, short, dtype=torch.float64, device="cpu")
    coordinates = x @ basis.T
    columns, _ = select_columns(column_norms(coordinates, "l2").unsqueeze(0), None, rank)
    atoms = basis[columns[0]]
    left = (x - (x @ atoms.T) @ atoms).square().sum()
    assert float(left) <= (1 - rank / short) * float(x.square().sum()) + 1e-12
