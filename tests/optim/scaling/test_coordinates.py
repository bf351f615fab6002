"""The coordinate check tells a rule of scale from none; gains and top singular values are what they are called."""

from typing import Any

import pytest
import torch
from grown import Net, batch, train
from torch import nn

from thinrank.optim import AdamWConfig, GaLoreConfig, MuonConfig, build
from thinrank.optim.layers import LowRank, convert
from thinrank.optim.scaling import (
    PRESETS,
    ScalingConfig,
    coordinate_check,
    matrix_kind,
    measure_gains,
    scale_init,
    scaling_of,
    top_sigma,
)

WIDTHS = (16, 48, 144)


def maker(rule):
    """Models of any width, with an optimizer of a large rate."""

    def make(width):
        model = Net(width, std=0.25)  # 1/√16, of the base
        scaling = None
        if rule is not None:
            config = ScalingConfig(**PRESETS[rule], base_width=16)
            scaling = scaling_of(config, lambda w, d: Net(w, d), width=width, depth=2, folded=True)
            scale_init(model, scaling)
        optimizer = build(model, AdamWConfig(lr=0.03), scaling=scaling)
        return model, lambda: train(model, optimizer, 1)

    return make


def test_the_usual_parametrisation_grows_and_the_rule_is_flat():
    usual = coordinate_check(maker(None), WIDTHS)
    ruled = coordinate_check(maker("const"), WIDTHS)
    assert usual.growing()["lm_head"] > 0.5
    assert usual.growing()["layers.1.mixer"] > 0.3
    assert ruled.growing() == {}
    inner = {name: slope.value for name, slope in ruled.slopes().items() if name.startswith("layers")}
    assert all(abs(value) < 0.2 for value in inner.values()), inner
    table = ruled.table()
    assert "(model)" in table
    assert len(table.splitlines()) == 1 + len(ruled.readings)


def test_what_is_no_comparison_is_refused():
    with pytest.raises(ValueError, match="at least two widths"):
        coordinate_check(maker(None), [16])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        coordinate_check(maker(None), [16, 32], steps=0)

    def uneven(width):
        model = Net(width, depth=width // 16)
        return model, lambda: model(batch()[:, :-1])

    with pytest.raises(ValueError, match="is not at every width"):
        coordinate_check(uneven, [16, 32], steps=1)


def test_gains_of_maps_and_branches():
    """A branch that doubles what comes in has gain 2 over what it is added to; nothing stays hooked."""

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4, bias=False)
            self.lin.weight.data = 2 * torch.eye(4)

        def forward(self, x):
            return self.lin(x)

    class Twice(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.norm, self.branch, self.residual_multiplier = nn.RMSNorm(4), Double(), factor

        def forward(self, h):
            return h + self.residual_multiplier * self.branch(self.norm(h))

    model = nn.Sequential(Twice(1.0), Twice(0.5))
    x = torch.ones(2, 3, 4) * 5
    found = measure_gains(model, lambda: model(x))
    assert float(found.linear["0.branch.lin"]) == pytest.approx(2.0)
    assert float(found.residual["0.branch"]) == pytest.approx(2 / 5, rel=1e-4)  # the norm has made ones of the fives
    assert float(found.residual["1.branch"]) == pytest.approx(1 / 7, rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_top_singular_values_of_matrices_and_of_what_factors_amount_to():
    model = Net(16)
    tops = top_sigma(model)
    assert "embed" not in tops
    assert "norm" not in tops
    weight = model.get_parameter("layers.0.up_proj.weight").detach()
    assert float(tops["layers.0.up_proj"]) == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-5)
    convert(model, LowRank(rank=3))
    layer: Any = model.get_submodule("layers.0.up_proj")
    assert float(top_sigma(model)["layers.0.up_proj"]) == pytest.approx(
        float(torch.linalg.svdvals((layer.B @ layer.A).detach())[0]), rel=1e-5
    )


def test_kinds_of_matrices_by_their_names():
    names = {
        "model.layers.0.self_attn.q_proj": "qk",
        "model.layers.0.self_attn.o_proj": "vo",
        "model.layers.3.mlp.gate_proj": "mlp_in",
        "model.layers.3.mlp.down_proj.weight": "mlp_out",
        "lm_head": None,
    }
    assert {name: matrix_kind(name) for name in names} == names


@pytest.mark.parametrize("shape", [(200, 200), (600, 256)])
def test_large_matrices_are_iterated_upon(shape):
    """Noise is the worst case, since its largest values lie close to each other."""
    layer = nn.Linear(*shape, bias=False)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(4))
    state = torch.get_rng_state()
    found = float(top_sigma(nn.Sequential(layer))["0"])
    assert torch.equal(state, torch.get_rng_state())
    exact = float(torch.linalg.matrix_norm(layer.weight.detach(), ord=2))
    assert 0.99 * exact < found <= exact * (1 + 1e-5)
    layer.weight.data[0] *= 9  # one stands out
    exact = float(torch.linalg.matrix_norm(layer.weight.detach(), ord=2))
    assert float(top_sigma(nn.Sequential(layer))["0"]) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "exponent"),
    [
        (AdamWConfig(lr=0.02), 1.0),
        (MuonConfig(lr=0.2), 0.0),
        (MuonConfig(lr=0.2, adjust_lr="match_rms_adamw"), 0.5),
        (GaLoreConfig(lr=0.1, rank=4, update_proj_gap=2, scale=1.0), 0.5),
    ],
    ids=["adamw", "muon", "muon, matched", "galore of fixed rank"],
)
def test_the_exponent_of_the_rate_is_that_of_the_updates_spectral_norm(method, exponent):
    """∝ width for Adam, constant for orthonormal updates, ∝ √width for those of matched RMS and of fixed rank."""

    def maker(a):
        def make(width):
            model = Net(width, std=0.18)
            config = ScalingConfig(name="const", base_width=32, lr_width_exp=a)
            scaling = scaling_of(config, lambda w, d: Net(w, d), width=width, depth=2, folded=True)
            scale_init(model, scaling)
            optimizer = build(model, method, scaling=scaling)
            return model, lambda: train(model, optimizer, 1)

        return make

    # where inputs have a mean, and updates the direction to go with it
    right, wrong = (coordinate_check(maker(a), (32, 128), steps=5).slopes() for a in (exponent, exponent - 0.75))
    for name in ("layers.0.down_proj", "layers.1.down_proj"):
        assert abs(right[name].value) < 0.25
        assert wrong[name].value > 0.3
