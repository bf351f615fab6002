"""Other people's optimizers as black boxes: the same groups and gradients must lead to the same weights."""

import warnings
from typing import Any

import pytest
import torch
from laws import seeded
from test_galore_parity import gradient
from torch import nn

from thinrank.optim import Apollo, Fira, GaLore, Muon
from thinrank.optim.lowrank import subspace

SHAPES = {"tall": (24, 10), "wide": (9, 31), "square": (12, 12)}
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they import says a lot
        return pytest.importorskip(name, reason=f"{name} (extra `compare`) is not installed")


def walk(make, steps):
    """Weights of the three shapes after `steps` of an optimizer of them."""
    weights = [nn.Parameter(gradient(shape, 999, i) * 0.1) for i, shape in enumerate(SHAPES.values())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(weights)
        for step in range(steps):
            for i, weight in enumerate(weights):
                weight.grad = gradient(weight.shape, step, i)
            optimizer.step()
    return [weight.detach() for weight in weights]


def equal(mine, theirs, steps):
    """To a millionth of what the run has moved, a few float32 roundings a step."""
    start = walk(lambda weights: torch.optim.SGD(weights, lr=0.0), 0)
    for own, other, old in zip(walk(mine, steps), walk(theirs, steps), start, strict=True):
        assert float((own - other).abs().max()) <= 1e-5 * float((other - old).abs().max())


@pytest.mark.parametrize("gap", [20, 100])
@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("free", [False, True])
def test_apollo_torch(gap, per, free):
    """With an SVD in the place of its random projection, which is drawn otherwise; over two renewals and over none."""
    theirs = package("apollo_torch").APOLLOAdamW

    def groups(weights):
        group = {"params": weights, "rank": 4, "update_proj_gap": gap, "scale": 16.0, "proj": "svd"}
        return [group | {"proj_type": "std", "scale_type": per}]

    equal(
        lambda weights: Apollo(groups(weights), disable_nl=free, **OPTIONS),
        lambda weights: theirs(groups(weights), disable_nl=free, **OPTIONS),
        50,
    )


@pytest.mark.parametrize("name", ["GaLore", "Fira"])
def test_pytorch_optimizer_within_a_gap(name):
    """Across renewals it goes other ways: it counts from one, and renews a step before the authors' packages do."""
    theirs = getattr(package("pytorch_optimizer"), name)
    ours = {"GaLore": GaLore, "Fira": Fira}[name]
    options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}

    def group(weights):
        return {"params": weights, "rank": 4, "update_proj_gap": 1000, "scale": 0.25}

    equal(
        lambda weights: ours([{**group(weights), "proj_type": "std"}], **options),
        lambda weights: theirs([{**group(weights), "projection_type": "std"}], **options),
        30,
    )


def apart(mine, theirs, steps):
    """For each shape, how far two walks end apart, in lengths of theirs."""
    start = walk(lambda weights: torch.optim.SGD(weights, lr=0.0), 0)
    ends = zip(walk(mine, steps), walk(theirs, steps), start, strict=True)
    return [float((own - other).norm() / (other - old).norm()) for own, other, old in ends]


@pytest.mark.parametrize("adjusted", [False, True], ids=["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
def test_pytorch_optimizer_muon(nesterov, adjusted):
    """The same step where its `use_adjusted_lr` is False and our `adjust_lr` "original", or True and "match_rms_adamw",
    with its three coefficients, which are Jordan's, and its products, which are bfloat16 and nothing else: eight bits,
    rounded in other places, through five iterations that do not converge."""
    theirs = package("pytorch_optimizer").Muon
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}

    def ours(weights, nesterov=nesterov):
        scale = "match_rms_adamw" if adjusted else "original"
        return Muon(weights, nesterov=nesterov, adjust_lr=scale, ns_dtype="bfloat16", **options)

    def other(weights):
        group = {"params": weights, "use_muon": True}
        return theirs([group], nesterov=nesterov, use_adjusted_lr=adjusted, **options)

    assert max(apart(ours, other, 10)) <= 0.03
    assert min(apart(lambda weights: ours(weights, not nesterov), other, 10)) > 0.1  # which could be told apart


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pytorch_optimizer_apollo(shape, per, monkeypatch):
    """Its APOLLO is another step: what it scales is not the gradient G but G P Pᵀ, whose rank is P's, and the columns
    of P are not orthonormal. What can be compared is what both scale by: our step with its P, sent through P Pᵀ, is
    its step. With its `scale`, which enters there by its power 3/2, at one, and with gradients that shrink and are
    forgotten soon, so that the limiters, which see different norms, have nothing to do."""
    theirs = package("pytorch_optimizer").APOLLO
    group: dict[str, Any] = {"rank": 4, "update_proj_gap": 1000, "scale": 1.0}
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.3, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    own, other = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    torch.manual_seed(0)
    peer = theirs([{**group, "params": [other], "projection_type": "std"}], scale_type=per, **options)
    mine = Apollo([own], scale_type=per, **group, **options)
    wide = shape[0] < shape[1]
    for step in range(8):
        grad = seeded(*shape, seed=step) * 0.2**step
        for weight in (own, other):
            weight.grad = grad.clone()
            weight.data.zero_()  # so that it is the update, and nothing of that is rounded away
        peer.step()
        drawn = peer.state[other]["projector"].ortho_matrix
        drawn = drawn if wide else drawn.T  # (short, rank)
        monkeypatch.setattr(subspace, "gaussian_projection", lambda *_, drawn=drawn, **__: drawn)
        mine.step()
        ours, seen = own.detach(), other.detach()
        assert int(torch.linalg.matrix_rank(seen)) == 4 < int(torch.linalg.matrix_rank(ours))
        image = drawn @ (drawn.T @ ours) if wide else ours @ drawn @ drawn.T
        assert float((image - seen).norm()) <= 1e-5 * float(seen.norm())


def test_moves_are_seen():
    """The comparison can fail: another rate is another walk."""
    with pytest.raises(AssertionError):
        equal(lambda weights: torch.optim.SGD(weights, lr=0.1), lambda weights: torch.optim.SGD(weights, lr=0.2), 2)
