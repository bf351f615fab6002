"""The table of multipliers, who belongs to which class, and the groups that every method gets from it."""

import pytest
import torch
from grown import Net, small, train
from torch import nn

from thinrank.optim import METHODS, AdamWConfig, MuonConfig, build, route
from thinrank.optim.layers import SST, LowRank, SLTrain, convert
from thinrank.optim.scaling import (
    PRESETS,
    Member,
    ParameterClass,
    ScalingConfig,
    classify,
    multipliers,
    scale_init,
    scaling_of,
)

RULES = [name for name in PRESETS if name != "none"]


def rule(name="sqrt_wd", **values):
    return ScalingConfig(**{**PRESETS[name], "base_width": 8, "base_depth": 2, **values})


def scaling(config, width=32, depth=2, **options):
    return scaling_of(config, lambda w, d: Net(w, d), width=width, depth=depth, **options)


def classes(narrow, wide, **options):
    return {name: member.kind.value for name, member in classify(narrow, wide, **options).items()}


# --- the table --------------------------------------------------------------------------------------------------------


def test_four_times_the_width():
    """lr a quarter and decay double by the square-root rule; by the linear one lr × decay stays."""
    hidden, vector = ParameterClass.HIDDEN, ParameterClass.VECTOR
    of = multipliers(hidden, rule("sqrt_wd"), 4)
    assert (of.lr, of.weight_decay, of.init) == (0.25, 2.0, 0.5)
    of = multipliers(vector, rule("sqrt_wd"), 4)
    assert (of.lr, of.weight_decay, of.init) == (1.0, 0.0, 1.0)
    of = multipliers(hidden, rule("linear_wd"), 4)
    assert of.weight_decay == 4.0
    assert of.lr * of.weight_decay == 1.0
    assert multipliers(hidden, rule("const"), 4).weight_decay == 1.0


@pytest.mark.parametrize("kind", ParameterClass)
def test_fan_in_decides_on_the_rate_and_two_growing_sides_on_decay(kind):
    of = multipliers(kind, rule("linear_wd"), 4)
    lowered = kind.fan_in_grows and kind is not ParameterClass.READOUT  # which has the factor in its forward
    assert of.lr == (0.25 if lowered else 1.0)
    assert of.weight_decay == (4.0 if kind.both_grow else 1.0)
    assert of.forward == (0.25 if kind is ParameterClass.READOUT else 1.0)


def test_depth_follows_the_branches():
    """α = 1 leaves the rates and divides eps; α = ½ divides the rates in blocks by the root of the depth."""
    hidden = ParameterClass.HIDDEN
    whole, half = rule("completep"), rule("completep", depth_exp=0.5)
    assert multipliers(hidden, whole, 4, 9, in_block=True).lr == 0.25
    assert multipliers(hidden, whole, 4, 9, in_block=True).eps == pytest.approx(1 / 36)
    assert multipliers(hidden, half, 4, 9, in_block=True).lr == pytest.approx(0.25 / 3)
    assert multipliers(hidden, half, 4, 9, in_block=False).lr == 0.25
    assert multipliers(ParameterClass.VECTOR, half, 4, 9, in_block=True).lr == pytest.approx(1 / 3)
    assert multipliers(hidden, rule("linear_wd"), 4, 9, in_block=True).lr == 0.25  # no rule of depth


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ParameterClass)
@pytest.mark.parametrize("folded", [True, False])
def test_at_the_base_nothing_is_multiplied(name, kind, folded):
    of = multipliers(kind, rule(name, vector_decay=1.0), 1, 1, in_block=True, folded=folded)
    assert (of.lr, of.weight_decay, of.init, of.forward, of.eps) == (1.0,) * 5


def test_the_exponent_of_the_rate_is_the_methods():
    """Orthogonalised updates of spectral scale need no smaller rate; the readout is AdamW's and keeps its own."""
    config = rule("linear_wd", lr_width_exp=0.0)
    assert multipliers(ParameterClass.HIDDEN, config, 4).lr == 1.0
    assert multipliers(ParameterClass.READOUT, config, 4, folded=True).lr == 0.25


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_width": None}, "base_width must be given"),
        ({"base_width": 0}, "base_width must be a number of at least 1"),
        ({"depth_exp": 1.0, "base_depth": None}, "base_depth must be given"),
        ({"depth_exp": 0.2}, "depth_exp must be a number at least 0.5"),
        ({"heads": "sise"}, "did you mean 'size'"),
        ({"overrides": {"x": "hiden"}}, "did you mean 'hidden'"),
        ({"overrides": {"(": "hidden"}}, "is not a regular expression"),
        ({"wd_width_exp": "half"}, "wd_width_exp must be a number"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(values, words):
    with pytest.raises(ValueError, match=words):
        rule("const", **values)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_by_shapes_alone():
    found = classes(Net(8), Net(16))
    assert found["embed.weight"] == "input"
    assert found["lm_head.weight"] == "readout"
    assert found["layers.0.mixer.weight"] == found["layers.1.down_proj.weight"] == "hidden"
    assert found["layers.0.up_proj.bias"] == found["norm.weight"] == "vector"


def test_blocks_are_what_there_is_more_of_in_a_deeper_model():
    found = classify(Net(8, 2), Net(16, 2), deep=Net(8, 4))
    assert {name for name, member in found.items() if not member.in_block} == {
        "embed.weight", "norm.weight", "lm_head.weight",
    }  # fmt: skip


def test_convolutions_and_turned_weights():
    class Conv1D(nn.Module):  # as transformers calls it
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(inputs, outputs))

    def model(width):
        return nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, width, 2),
                "deep": nn.Conv2d(width, width, 2),
                "down": Conv1D(width, 5),
                "up": Conv1D(5, width),
                "free": nn.Linear(3, 4),
            }
        )

    found = classes(model(8), model(16))
    assert found["conv.weight"] == "factor_out"
    assert found["deep.weight"] == "hidden"
    assert found["down.weight"] == "factor_in"
    assert found["up.weight"] == "factor_out"
    assert found["free.weight"] == "fixed"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LowRank(rank=3), {"A": "factor_in", "B": "factor_out"}),
        (LowRank(rank=0.5), {"A": "hidden", "B": "hidden"}),
        (SST(rank=3), {"V": "factor_in", "U": "factor_out"}),
        (SLTrain(rank=3), {"A": "factor_in", "B": "factor_out", "values": "hidden"}),
    ],
    ids=["fixed rank", "share of the width", "turned factor", "scattered entries"],
)
def test_factors_are_classed_by_their_fan_in(config, expected):
    """A side of fixed rank does not grow; scattered entries grow as a matrix does."""

    def model(width):
        net = Net(width)
        convert(net, config)
        return net

    with torch.device("meta"):
        found = classes(model(16), model(32))
    for last, kind in expected.items():
        assert found[f"layers.0.mixer.{last}"] == kind, last


def test_overrides_win_and_must_match():
    found = classes(Net(8), Net(16), overrides={r"mixer": "fixed", "proj": "vector"})
    assert found["layers.0.mixer.weight"] == "fixed"
    assert found["layers.0.up_proj.weight"] == "vector"
    with pytest.raises(ValueError, match="'nobody' matches no parameter"):
        classify(Net(8), Net(16), overrides={"nobody": "fixed"})


def test_models_that_cannot_be_compared_are_refused():
    class Cube(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.core = nn.Parameter(torch.empty(width, width, width))

    with pytest.raises(ValueError, match="grows along 3 sides"):
        classify(Cube(4), Cube(8))
    with pytest.raises(ValueError, match="different parameters"):
        classify(Net(8, 1), Net(16, 2))
    with pytest.raises(ValueError, match="no parameter grows"):
        classify(Net(8), Net(8))
    with pytest.raises(ValueError, match="no list of modules is longer"):
        classify(Net(8), Net(16), deep=Net(8))


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_its_group_values_from_the_rule(name):
    """And a schedule multiplies them further, each from its own."""
    config = small(name)
    plain = {g["role"]: g for g in build(Net(32), config).param_groups}
    rules = scaling(rule("linear_wd", eps_width_exp=1.0), folded=True)
    model = Net(32)
    optimizer = build(model, config, scaling=rules)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    of = rules.multipliers()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        base = plain[group["role"]]
        for each in group["param_names"]:
            assert group["lr"] == pytest.approx(base["lr"] * of[each].lr, rel=1e-12)
            assert group["weight_decay"] == pytest.approx(base["weight_decay"] * of[each].weight_decay, rel=1e-12)
            assert group["eps"] == pytest.approx(base["eps"] * of[each].eps, rel=1e-12)
        rates[group["label"]] = group["lr"]
    assert len(rates) == len(optimizer.param_groups)  # no two groups of one name
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)
    train(model, optimizer, 1)
    schedule.step()
    assert {g["label"]: g["lr"] for g in optimizer.param_groups} == pytest.approx({k: v / 2 for k, v in rates.items()})
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_at_the_base_training_is_bit_for_bit_what_it_was(name):
    config = small(name)
    one, other = Net(8), Net(8)
    rules = scaling(rule("completep"), width=8)
    scale_init(other, rules)
    train(one, build(one, config), 3)
    train(other, build(other, config, scaling=rules), 3)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layers_of_factors_are_grouped_and_stepped():
    def model(width, depth=2):
        net = Net(width, depth)
        convert(net, SST(rank=3))
        return net

    rules = scaling_of(rule("linear_wd"), model, width=32, depth=2, folded=True)
    optimizer = build(net := model(32), AdamWConfig(lr=0.01, weight_decay=0.1), scaling=rules)
    lr = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    assert lr["layers.0.mixer.V"] == pytest.approx(0.01 / 4)
    assert lr["layers.0.mixer.U"] == lr["layers.0.mixer.s"] == 0.01
    assert all(torch.isfinite(torch.tensor(train(net, optimizer, 2))))


def test_the_routing_table_shows_the_rule():
    text = route(Net(32), MuonConfig(), scaling=scaling(rule("sqrt_wd"), folded=True)).table()
    assert "scaling sqrt_wd: width × 4 (base 8), the readout's factor folded" in text
    line = next(line for line in text.splitlines() if line.startswith("hidden"))
    assert line.split()[1:] == ["6", "0.25", "2", "0.5", "1", "1"]


def test_a_model_that_was_not_classified_is_refused():
    rules = scaling(rule("const"))
    with pytest.raises(ValueError, match=r"no class of layers\.2\."):
        build(Net(32, 3), AdamWConfig(), scaling=rules)
    with pytest.raises(ValueError, match=r"no class of layers\.2\."):
        scale_init(Net(32, 3), rules)


# --- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_folded_readout_trains_as_a_divided_one(decay):
    """Adam's direction does not see the size of gradients, so init, rate, decay and eps can take the factor's place."""
    torch.set_default_dtype(torch.float64)
    try:
        config = AdamWConfig(lr=0.02, weight_decay=decay, eps=1e-3)  # eps large, so that it matters
        divided, folded = Net(32, divide=4.0), Net(32)
        losses = []
        for model, flag in ((divided, False), (folded, True)):
            rules = scaling(rule("linear_wd"), folded=flag)
            scale_init(model, rules)
            losses.append(train(model, build(model, config, scaling=rules), 12))
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][-1] < losses[0][0]
    weights = dict(folded.named_parameters())
    for name, p in divided.named_parameters():
        theirs = weights[name] * (4.0 if name == "lm_head.weight" else 1.0)
        assert torch.allclose(p, theirs, rtol=1e-8, atol=1e-10), name


def test_initial_weights_are_those_of_the_seed_times_their_factor():
    plain, scaled = Net(32), Net(32)
    rules = scaling(rule("const"), folded=True)
    scale_init(scaled, rules)
    factors = {"embed.weight": 1.0, "lm_head.weight": 0.25, "layers.0.mixer.weight": 0.5}
    theirs = dict(scaled.named_parameters())
    for name, p in plain.named_parameters():
        if name in factors:
            assert torch.equal(theirs[name], p * factors[name])


def test_members_are_plain_to_keep():
    rules = scaling(rule("completep"))
    assert rules.members["layers.0.mixer.weight"] == Member(ParameterClass.HIDDEN, True)
    assert rules.classes()["layers.0.mixer.weight"] == "hidden-block"
    assert rules.classes()["lm_head.weight"] == "readout"
