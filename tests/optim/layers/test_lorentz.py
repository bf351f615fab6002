"""Laws of hyperbolic space in the Lorentz model, and of the linear layer between such spaces."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinrank.optim import AdamWConfig, build
from thinrank.optim.layers import LOST, SST, LorentzLinear, LowRank, Upkeep, convert, layers, merge
from thinrank.optim.layers.relora import ReLoRA
from thinrank.optim.linalg.lorentz import centroid, chord2, distance2, from_tangent, inner, lifted

CURVATURES = (-1.0, -0.3, -4.0)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def points(count: int, d: int, curvature: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return lifted(numbers(count, d, seed=seed, dtype=dtype), curvature)


def off(x: Tensor, curvature: float) -> float:
    """How far from the hyperboloid, in units of what t² can be told by."""
    x = x.detach()
    return float(((inner(x, x) - 1 / curvature) / x[..., 0].square()).abs().max())


# --- space ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_lie_on_the_hyperboloid(curvature, dtype):
    eps = torch.finfo(dtype).eps
    s = numbers(50, 7, dtype=dtype)
    for made in (lifted(s, curvature), from_tangent(3 * s, curvature), from_tangent(1e-4 * s, curvature)):
        assert off(made, curvature) < 16 * eps
        assert bool((made[:, 0] > 0).all())
    weights = numbers(9, 50, seed=1, dtype=dtype).abs()
    assert off(centroid(weights, lifted(s, curvature), curvature), curvature) < 16 * eps


@pytest.mark.parametrize("curvature", CURVATURES)
def test_distances_are_those_of_the_definition(curvature):
    x, y = points(40, 5, curvature), points(40, 5, curvature, seed=1)
    torch.testing.assert_close(chord2(x, y), 2 / curvature - 2 * inner(x, y))
    expected = (curvature * inner(x, y)).acosh().square() / -curvature
    torch.testing.assert_close(distance2(x, y, curvature), expected)
    assert torch.equal(distance2(x, y, curvature), distance2(y, x, curvature))
    assert float(distance2(x, x, curvature).abs().max()) == 0.0
    z = points(40, 5, curvature, seed=2)
    a, b, c = (distance2(*pair, curvature).sqrt() for pair in ((x, y), (y, z), (x, z)))
    assert bool((c <= a + b + 1e-12).all())


def test_near_points_have_distances_in_float32_too():
    s = numbers(20, 4)
    step = 1e-4 * numbers(20, 4, seed=1)
    exact = distance2(lifted(s), lifted(s + step))
    near = distance2(lifted(s.float()), lifted((s + step).float()))
    # what is left is the rounding of the coordinates: 6e-8 of 1e-4 for each
    torch.testing.assert_close(near.double(), exact, rtol=2e-2, atol=0.0)


def test_the_series_meets_the_closed_form():
    """On both sides of where one takes over from the other."""
    z = torch.tensor([0.999e-3, 1.001e-3], dtype=torch.float64).sqrt()[:, None]
    got = distance2(lifted(torch.zeros_like(z)), lifted(z))
    torch.testing.assert_close(got, z[:, 0].asinh().square(), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(from_tangent(z)[:, 1], z[:, 0].sinh(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_tangent_vector_is_as_long_as_the_way(curvature):
    v = torch.cat([numbers(20, 4), 1e-3 * numbers(20, 4, seed=1)])
    origin = lifted(torch.zeros(1, 4, dtype=v.dtype), curvature)
    torch.testing.assert_close(distance2(origin, from_tangent(v, curvature), curvature), v.square().sum(-1))


def test_flat_space_is_the_limit():
    s, other = numbers(10, 3), numbers(10, 3, seed=1)
    got = distance2(lifted(s, -1e-8), lifted(other, -1e-8), -1e-8)
    torch.testing.assert_close(got, (s - other).square().sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_centroid_has_the_least_sum_of_chords(curvature):
    x = points(12, 3, curvature)
    weights = numbers(1, 12, seed=3).abs()
    middle = centroid(weights, x, curvature)
    least = float((weights * chord2(middle, x)).sum())
    for seed in range(20):
        other = lifted(middle[:, 1:] + 0.05 * numbers(1, 3, seed=10 + seed), curvature)
        assert float((weights * chord2(other, x)).sum()) > least
    torch.testing.assert_close(centroid(7 * weights, x, curvature), middle)
    torch.testing.assert_close(centroid(weights.to_sparse(), x, curvature), middle)
    torch.testing.assert_close(centroid(torch.eye(12, dtype=x.dtype), x, curvature), x)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_gradients_are_finite_at_equal_points_and_those_of_finite_differences(curvature):
    s = numbers(6, 3).requires_grad_()
    for of in (chord2, lambda x, y: distance2(x, y, curvature)):
        value = of(lifted(s, curvature), lifted(s.detach(), curvature)).sum()
        (gradient,) = torch.autograd.grad(value, s)
        assert float(gradient.abs().max()) == 0.0
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(from_tangent(zero, curvature)[:, 1:].sum(), zero)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))

    def measured(a: Tensor, b: Tensor) -> Tensor:
        return distance2(lifted(a, curvature), from_tangent(b, curvature), curvature)

    other = numbers(6, 3, seed=1).requires_grad_()
    near = (s.detach() + 1e-3 * numbers(6, 3, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(measured, (s, other))
    assert torch.autograd.gradcheck(lambda a, b: distance2(lifted(a, curvature), lifted(b, curvature)), (s, near))
    weights = numbers(2, 6, seed=4).abs().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, a: centroid(w, lifted(a, curvature), curvature), (weights, s))


# --- the layer --------------------------------------------------------------------------------------------------------


def layer(n: int = 6, m: int = 5, seed: int = 0, **more: Any) -> LorentzLinear:
    torch.manual_seed(seed)
    made = LorentzLinear(n, m, dtype=torch.float64, **more)
    with torch.no_grad():
        made.gate.copy_(numbers(n + 1, seed=seed + 1))
        made.gate_bias.fill_(0.3)
    return made


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_layer_is_its_formula(curvature):
    made = layer(curvature=curvature, inside=nn.Tanh(), scale=3.0)
    x = points(8, 6, curvature)
    y = made(x)
    z = torch.tanh(x) @ made.linear.weight.mT + made.linear.bias
    phi = 3.0 * torch.sigmoid(x @ made.gate + made.gate_bias)[:, None] * z / z.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(y[:, 1:], phi)
    torch.testing.assert_close(y[:, 0], (phi.square().sum(-1) - 1 / curvature).sqrt())
    assert off(y, curvature) < 16 * torch.finfo(torch.float64).eps
    assert float(y[:, 1:].detach().norm(dim=-1).max()) < 3.0
    assert made(x.view(2, 4, 7)).shape == (2, 4, 6)


def test_the_layers_gradients_are_those_of_finite_differences_and_finite_at_zero():
    made = layer(3, 2)
    x = points(4, 3, -1.0).requires_grad_()
    names = [name for name, _ in made.named_parameters()]

    def value(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in made.parameters()]
    assert torch.autograd.gradcheck(value, (x, *values))
    with torch.no_grad():
        made.linear.weight.zero_()
        made.linear.bias.zero_()
    made(x).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in made.parameters())


class Net(nn.Module):
    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.one, self.two = LorentzLinear(10, 12, **more), LorentzLinear(12, 8, **more)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(lifted(x)))


CONFIGS = [
    SST(rank=3, every=4, warmup=0),
    LowRank(rank=3),
    LOST(rank=3, delta=0.1, act="identity"),
    ReLoRA(rank=3, every=5, warmup=0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_conversion_replaces_the_matrix_and_nothing_else(config):
    torch.manual_seed(0)
    net = Net()
    before = {name: p for name, p in net.named_parameters() if ".linear." not in name}
    convert(net, config)
    assert set(layers(net)) == {"one.linear", "two.linear"}
    after = dict(net.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    x, target = numbers(64, 10, dtype=torch.float32), points(64, 8, -1.0, seed=1, dtype=torch.float32)
    optimizer = build(net, AdamWConfig(lr=1e-2))
    upkeep = Upkeep(net, optimizer)
    losses = []
    for _ in range(12):
        loss = distance2(net(x), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    upkeep.detach()
    assert losses[-1] < losses[0]
    y = net(x)
    assert off(y, -1.0) < 1e-5
    assert torch.equal(copy.deepcopy(net)(x), y)
    twin = convert_like(config)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), y)
    del optimizer
    merge(net)
    assert type(net.one.linear) is nn.Linear
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)


def convert_like(config: Any) -> Net:
    torch.manual_seed(5)
    net = Net()
    convert(net, config)
    return net


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_on_the_meta_device_it_has_the_same_shapes(config):
    nets = [Net(), Net(device="meta")]
    for net in nets:
        convert(net, config)
    one, other = ({name: tuple(v.shape) for name, v in net.state_dict().items()} for net in nets)
    assert one == other


def test_scale_and_curvature_are_as_given():
    made = LorentzLinear(4, 4, scale=2.0, train_scale=False, bias=False)
    assert math.isclose(float(made.log_scale.exp()), 2.0, rel_tol=1e-6)
    assert not made.log_scale.requires_grad
    assert made.linear.bias is None
    assert "curvature=-1" in repr(made)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"curvature": 1.0}, "curvature must be a negative number, got 1.0: -1.0 is usual"),
        ({"curvature": 0}, "curvature must be a negative number, got 0"),
        ({"curvature": True}, "curvature must be a negative number, got True"),
        ({"scale": 0.0}, "scale must be a number above 0, got 0.0"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        LorentzLinear(4, 4, **values)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="out_features must be at least 1 space coordinate, got 0"):
        LorentzLinear(4, 0)
    with pytest.raises(ValueError, match=r"5 numbers, got 4: lift space coordinates by thinrank\.optim\.linalg"):
        LorentzLinear(4, 4)(torch.zeros(2, 4))
