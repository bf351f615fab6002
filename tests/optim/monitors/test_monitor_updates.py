"""What a step does: identities, and Adam's equilibrium in a run of it."""

import math

import pytest
import torch
from planted import normal

from thinrank.optim.monitors.updates import (
    adam_ratio,
    alignment,
    angular_update,
    equilibrium_rms,
    equilibrium_rotation,
    equilibrium_update,
    linear_gain,
    relative_representation_change,
    relative_update,
    residual_gain,
    rms,
    update_per_rate,
)


def test_sizes():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert float(rms(x)) == 2.5
    assert rms(x, (-1,)).tolist() == pytest.approx([5 / 2**0.5, 0])
    assert float(update_per_rate(x, 0.5)) == 5
    assert float(relative_update(x, 2 * x)) == 0.5
    assert rms(x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="lr must be above 0"):
        update_per_rate(x, 0.0)


def test_angles_keep_their_digits():
    a, b = torch.zeros(1000), torch.zeros(1000)
    a[0], b[0] = 1.0, 1.0
    b[1] = 1e-6
    assert float(angular_update(a, b)) == pytest.approx(1e-6, rel=1e-5)
    assert float(angular_update(a, 7 * a)) == 0
    assert float(angular_update(a, -a)) == pytest.approx(math.pi)
    assert float(angular_update(a, b.flip(0))) == pytest.approx(math.pi / 2)


def test_adamw_comes_to_its_equilibrium():
    """Gradients without correlation, 500 steps with η = 0.01 and λ = 1: ten relaxation times of the weights."""
    d, lr, decay, betas = 64, 1e-2, 1.0, (0.9, 0.95)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(d, d))
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay, betas=betas)
    before = weight.detach().clone()
    angles, sizes, ratios = [], [], []
    for step in range(500):
        weight.grad = torch.randn(d, d, generator=generator)
        before.copy_(weight.detach())
        optimizer.step()
        if step >= 400:
            angles.append(float(angular_update(before, weight)))
            sizes.append(float(rms(weight.detach() - before * (1 - lr * decay))))
            state = optimizer.state[weight]
            second = state["exp_avg_sq"] / (1 - betas[1] ** (step + 1))
            ratios.append(float(adam_ratio(weight.grad, second)))
    mean = sum(angles) / 100, sum(sizes) / 100, sum(ratios) / 100
    assert float(rms(weight)) == pytest.approx(0.067, rel=0.05)
    assert float(rms(weight)) == pytest.approx(equilibrium_rms(lr, decay), rel=0.1)
    assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(1.02, rel=0.07)
    assert mean[0] == pytest.approx(equilibrium_rotation(lr, decay, betas[0]), rel=0.1)
    assert mean[1] == pytest.approx(equilibrium_update(lr, betas[0]), rel=0.1)
    assert mean[2] == pytest.approx(1, abs=0.1)


def test_equilibria_in_closed_form():
    assert equilibrium_rotation(0.01, 0.5) == pytest.approx(0.1)
    assert equilibrium_update(1.0, 0.9) == pytest.approx(0.2294, abs=1e-4)
    assert equilibrium_rms(0.02, 1.0) == pytest.approx(0.1)
    assert equilibrium_rotation(0.0, 0.1) == 0
    with pytest.raises(ValueError, match="weight_decay must be above 0"):
        equilibrium_rms(0.1, 0.0)
    with pytest.raises(ValueError, match="beta1 in"):
        equilibrium_rotation(0.1, 0.1, 1.0)


def test_gains():
    x = normal(50, 8)
    assert float(linear_gain(2 * torch.eye(8), x)) == pytest.approx(2)
    weight = normal(300, 200)
    assert float(linear_gain(weight, normal(2000, 200, seed=1))) == pytest.approx(
        float(rms(weight)) * 200**0.5, rel=0.01
    )
    assert float(residual_gain(x / 4, x)) == pytest.approx(0.25)


def test_alignments_and_what_a_step_changes():
    weight, update, x = normal(20, 16), normal(20, 16, seed=1), normal(3, 10, 16, seed=2)
    ratio = float(torch.linalg.vector_norm(update) / torch.linalg.vector_norm(weight))
    expected = float(alignment(update, x) / alignment(weight, x)) * ratio
    assert float(relative_representation_change(update, weight, x)) == pytest.approx(expected, rel=1e-5)
    assert float(relative_representation_change(weight / 8, weight, x)) == pytest.approx(1 / 8)
    direction = torch.nn.functional.normalize(normal(1, 16, seed=3), dim=1)
    assert float(alignment(normal(20, 1, seed=4) @ direction, normal(30, 1, seed=5) @ direction)) == pytest.approx(1)
    free = float(alignment(normal(256, 128), normal(400, 128, seed=6)))
    assert free == pytest.approx(128**-0.5, rel=0.05)


def test_a_second_moment_that_lags_is_seen():
    gradient, second = normal(30, 30), torch.ones(30, 30)
    calm = float(adam_ratio(gradient, second))
    assert calm == pytest.approx(1, abs=0.05)
    assert float(adam_ratio(10 * gradient, second)) == pytest.approx(10 * calm)
    assert float(adam_ratio(torch.full((4,), 1e-6), torch.zeros(4), eps=1e-6)) == pytest.approx(1)
