"""Other people's optimizers as black boxes: the same groups and gradients must lead to the same weights."""

import warnings

import pytest
import torch
from test_galore_parity import gradient
from torch import nn

from thinrank.optim import Apollo, Fira, GaLore

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


def test_moves_are_seen():
    """The comparison can fail: another rate is another walk."""
    with pytest.raises(AssertionError):
        equal(lambda weights: torch.optim.SGD(weights, lr=0.1), lambda weights: torch.optim.SGD(weights, lr=0.2), 2)
