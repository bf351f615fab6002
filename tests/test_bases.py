"""What benchmarks/bases.py compares: directions are orthonormal, and hold what their kind guarantees."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(
    0, str(Path(__file__).parent.parent / "benchmarks")
)  # a folder of scripts that import each other by name
bases = importlib.import_module("bases")


@pytest.mark.parametrize(("n", "rank"), [(12, 3), (16, 16), (7, 1)])
def test_every_basis_gives_orthonormal_directions_and_none_holds_more_than_the_singular_one(n, rank):
    x = torch.randn(40, n, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 2.0, n)
    held = {}
    for name, choose in bases.choosers(n, rank).items():
        found = choose(x)
        assert found.shape == (n, rank), name
        torch.testing.assert_close(found.mT @ found, torch.eye(rank), atol=1e-5, rtol=0.0)
        held[name] = bases.energy(x, found)
    assert max(held, key=lambda name: round(held[name], 5)) == "singular vectors"
    # the largest columns of an orthogonal basis hold their share at least
    assert all(value >= rank / n - 1e-5 for value in held.values())


def test_columns_of_the_identity_are_the_features_of_largest_norm():
    x = torch.diag(torch.tensor([1.0, 3.0, 2.0, 0.5]))
    found = bases.choosers(4, 2)["identity"](x)
    assert bases.energy(x, found) == pytest.approx(13 / 14.25)
