"""Which signs and which order basis vectors have, where mathematics leaves them open: Adam's moments depend on them."""

from typing import Any

import pytest
import torch
from laws import decaying, seeded
from torch import Tensor

from thinrank.optim import METHODS
from thinrank.optim.rule import State, Step

SHAPE = (2, 12, 8)
FOLLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "subspace_adamw": ("subspace_adamw", {}),
    "mfac": ("mfac", {}),
    "galore_plus": ("galore_plus", {}),
    "galore_plus/exact": ("galore_plus", {"svd": "exact"}),
    "galore/power": ("galore", {"svd": "power"}),
    "fira/power": ("fira", {"svd": "power"}),
}
LAPACK: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": ("galore", {}),
    "galore/full": ("galore", {"proj_type": "full"}),
    "fira": ("fira", {}),
    "apollo/svd": ("apollo", {"proj": "svd"}),
    "galore_plus/galore": ("galore_plus", {"convention": "galore", "svd": "exact"}),
}


def renewed(name: str, values: dict[str, Any], steps: int = 1) -> tuple[Tensor, list[Tensor], State]:
    """The gradient of the last of so many steps, the basis after each of them, and the state."""
    cls: Any = METHODS[name]
    rule = cls(rank=3, **values).matrix_rule()
    state = rule.init(SHAPE, torch.device("cpu"))
    x, bases = torch.empty(0), []
    for count in range(steps):
        x = torch.stack([decaying(*SHAPE[1:], seed=count + i) + 0.02 * seeded(*SHAPE[1:], seed=i) for i in range(2)])
        rule.update(x, state, Step(count=[count] * 2, keys=[1, 2]))
        bases.append(state["basis"].clone())
    return x, bases, state


def peaks(basis: Tensor) -> Tensor:
    """The entry of largest magnitude of each column."""
    return basis.gather(-2, basis.abs().argmax(-2, keepdim=True))


@pytest.mark.parametrize("name", FOLLOW)
def test_columns_fall_and_their_largest_entries_are_positive(name):
    x, (basis,), _ = renewed(*FOLLOW[name])
    lengths = (x @ basis).norm(dim=-2)
    assert bool((lengths[:, :-1] >= lengths[:, 1:]).all())
    assert bool((peaks(basis) > 0).all())


@pytest.mark.parametrize("name", LAPACK)
def test_signs_are_lapacks_where_the_authors_moments_depend_on_them(name):
    x, (basis,), _ = renewed(*LAPACK[name])
    expected = torch.stack([torch.linalg.svd(each, full_matrices=False)[2][:3].mT for each in x])
    torch.testing.assert_close(basis, expected, rtol=1e-4, atol=1e-5)
    assert bool((peaks(expected) < 0).any())  # else there would be nothing to see


def test_ldadams_bases_follow_the_one_before_after_a_first_one_by_the_convention():
    _, (first, second), _ = renewed("ldadam", {}, steps=2)
    assert bool((peaks(first) > 0).all())
    # what an iteration turns the old columns into has a triangular factor in the new ones, of positive diagonal
    x, (*_, old, new), _ = renewed("ldadam", {"rho": 0.0, "error_feedback": "off"}, steps=3)
    triangle = new.mT @ (x.mT @ (x @ old))
    assert bool((triangle.diagonal(dim1=-2, dim2=-1) > 0).all())
    below = triangle.tril(-1).abs().amax()
    assert float(below) < 1e-5 * float(triangle.abs().amax())
    assert not torch.equal(second, first)


def test_dions_left_factor_has_the_signs_of_its_momentum():
    """P of `orth(M Q)`: the triangular factor of M Q in P has a positive diagonal."""
    cls: Any = METHODS["dion"]
    rule = cls(rank=3, adjust_lr="none").matrix_rule()
    state = rule.init(SHAPE, torch.device("cpu"))
    for count in range(3):
        x = torch.stack([decaying(*SHAPE[1:], seed=count + i) for i in range(2)])
        momentum, basis = state["momentum"] + x, state["basis"].clone()
        update = rule.update(x, state, Step(count=[count] * 2, keys=[1, 2]))
        if count:
            triangle = update.direction.mT @ (momentum @ basis)
            assert bool((triangle.diagonal(dim1=-2, dim2=-1) > 0).all())
            assert float(triangle.tril(-1).abs().amax()) < 1e-5 * float(triangle.abs().amax())
