"""A key that several rooms have reaches the same slot of each one's rule."""

from dataclasses import fields
from typing import Any

import pytest
from cases import small

from thinrank.optim import METHODS
from thinrank.optim.lowrank.heads import SharedHead
from thinrank.optim.lowrank.subspace import PowerIteration, Svd
from thinrank.optim.lowrank.transport import Keep, Reset, Rotate


def rooms(key):
    """Names of the methods that have the field `key`."""
    return [name for name, cls in METHODS.items() if key in {f.name for f in fields(cls)}]


def rule(name, **values) -> Any:
    config: Any = small(name, **values)
    return config.matrix_rule()


def test_there_are_rooms_to_test():
    assert {"subspace_adamw", "dct_adamw", "fira", "galore_plus"} <= set(rooms("transport"))
    assert {"subspace_adamw", "dct_adamw", "fira"} <= set(rooms("residual_limit"))


@pytest.mark.parametrize("name", rooms("transport"))
def test_transport(name):
    betas = (0.8, 0.95)
    for key, expected in (("rotate", Rotate(betas)), ("keep", Keep()), ("reset", Reset())):
        assert rule(name, transport=key, betas=betas).transport == expected


@pytest.mark.parametrize("name", rooms("residual_limit"))
def test_residual_limit(name):
    options = {"residual": "full"} if "residual" in {f.name for f in fields(METHODS[name])} else {}
    for limit in (1.01, 1.5):
        assert rule(name, residual_limit=limit, **options).lift.limit == limit


@pytest.mark.parametrize("name", [name for name in rooms("svd") if name != "ldadam"])
def test_svd(name):
    """LDAdam's is of its first basis alone, and tested there."""
    for key, expected in (("exact", Svd), ("power", PowerIteration)):
        subspace = rule(name, svd=key).subspace
        assert type(subspace) is expected
        assert (subspace.rank, subspace.every) == (3, 3)


def test_svd_of_shared_heads():
    for key, expected in (("exact", Svd), ("power", PowerIteration)):
        subspace = rule("galore_plus", svd=key, heads=2, proj_type="right").subspace
        assert type(subspace) is SharedHead
        assert type(subspace.inner) is expected


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("subspace_adamw", {}),
        ("mfac", {}),
        ("galore_plus", {}),
        ("galore", {"svd": "power"}),
        ("fira", {"svd": "power"}),
    ],
)
def test_subspace_iteration_is_the_same_in_every_room(name, key):
    assert rule(name, **key).subspace == PowerIteration(rank=3, every=3, oversample=8, cold=2, warm=1)
