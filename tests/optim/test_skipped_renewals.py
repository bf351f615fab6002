"""A renewal that cannot be done is done another way or left out, said once, and counted."""

import logging

import pytest
import torch
from laws import eye_error, seeded
from torch import nn

from thinrank.optim import GaLore, SubspaceAdamW
from thinrank.optim.lowrank import subspace as module

LOGGER = "thinrank.optim.optimizer"


def step(optimizer, params, count, spoilt=None):
    for i, p in enumerate(params):
        p.grad = seeded(*p.shape, seed=100 * count + i)
        if i == spoilt:
            p.grad[0, 0] = float("nan")
    optimizer.step()


def three():
    return [nn.Parameter(seeded(9, 6, seed=i)) for i in range(3)]


def named(params):
    return [(f"layer{i}.weight", p) for i, p in enumerate(params)]


def failing(monkeypatch, name, broken):
    """Makes `module.name` raise as LAPACK does, for batches that hold a matrix whose first entry is in `broken`."""
    real = getattr(module, name)

    def stand_in(x, *args, **kwargs):
        if broken & {round(float(first), 4) for first in x[..., 0, 0].flatten()}:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(module, name, stand_in)


def test_a_gradient_that_is_not_finite_is_counted_and_said_once(caplog):
    params = three()
    optimizer = SubspaceAdamW(named(params), rank=2, update_proj_gap=1, residual="off")
    with caplog.at_level(logging.WARNING, LOGGER):
        for count in range(4):
            step(optimizer, params, count, spoilt=1 if count in (1, 3) else None)
    assert optimizer.skipped_renewals == {"layer1.weight": 2}
    assert [r.getMessage() for r in caplog.records] == [
        "renewal of layer1.weight: its gradient was not finite; it keeps the subspace that it has (said once)"
    ]


def test_a_failed_svd_becomes_subspace_iteration(monkeypatch, caplog):
    """Of the one matrix alone: the others of its batch have their SVD."""
    params, twins = three(), three()
    failing(monkeypatch, "svd_basis", {round(float(seeded(9, 6, seed=1)[0, 0]), 4)})
    optimizer = GaLore(named(params), rank=2, lr=0.01)
    with caplog.at_level(logging.WARNING, LOGGER):
        step(optimizer, params, 0)
    assert optimizer.skipped_renewals == {}
    assert [r.getMessage() for r in caplog.records] == [
        "renewal of layer1.weight: its exact SVD did not converge; subspace iteration took its place (said once)"
    ]
    monkeypatch.undo()
    other = GaLore(named(twins), rank=2, lr=0.01)
    step(other, twins, 0)
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        mine, exact = optimizer.state[p]["basis"], other.state[twin]["basis"]
        assert eye_error(mine) < 1e-5
        if i != 1:
            torch.testing.assert_close(p, twin)
            torch.testing.assert_close(mine, exact)
        else:  # nearly what the SVD would have found: it holds most of the gradient that the SVD's holds
            grad = seeded(9, 6, seed=1)
            assert float((grad @ mine).square().sum()) > 0.8 * float((grad @ exact).square().sum())


@pytest.mark.parametrize(
    ("cls", "options", "functions"),
    [
        (GaLore, {}, ("svd_basis", "subspace_iteration")),
        (GaLore, {"proj_type": "full"}, ("svd_bases",)),
        (SubspaceAdamW, {}, ("subspace_iteration",)),
    ],
    ids=["svd", "both sides", "iteration"],
)
def test_where_nothing_converges_the_old_basis_stays(cls, options, functions, monkeypatch, caplog):
    params = three()
    optimizer = cls(named(params), rank=2, lr=0.01, update_proj_gap=2, **options)
    for count in range(2):
        step(optimizer, params, count)
    old = [optimizer.state[p]["basis"].clone() for p in params]
    for name in functions:
        failing(monkeypatch, name, {round(float(seeded(9, 6, seed=202)[0, 0]), 4)})
    with caplog.at_level(logging.WARNING, LOGGER):
        step(optimizer, params, 2)
    assert [torch.equal(optimizer.state[p]["basis"], basis) for p, basis in zip(params, old, strict=True)] == [
        False,
        False,
        True,
    ]
    assert optimizer.skipped_renewals == {"layer2.weight": 1}
    assert len(caplog.records) == 1
    assert "layer2.weight: the factorisation of its gradient did not converge" in caplog.text
    assert all(bool(p.isfinite().all()) for p in params)
    monkeypatch.undo()
    step(optimizer, params, 3)
    step(optimizer, params, 4)  # and the next renewal is one
    assert not torch.equal(optimizer.state[params[2]]["basis"], old[2])


def test_a_section_is_named_with_its_parameter(caplog):
    fused = nn.Parameter(seeded(12, 4))
    optimizer = SubspaceAdamW([{"params": [("qkv.weight", fused)], "sections": (8, 4)}], rank=2)
    fused.grad = seeded(12, 4, seed=1)
    fused.grad[9, 0] = float("inf")
    with caplog.at_level(logging.WARNING, LOGGER):
        optimizer.step()
    assert optimizer.skipped_renewals == {"1.qkv.weight": 1}
