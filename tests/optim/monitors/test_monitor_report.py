"""A row for every weight, whatever it is made of and whatever is wrong with it."""

import math

import pytest
import torch
from planted import normal, pareto_quantiles, with_values
from torch import nn

from thinrank.optim.layers import (
    LOST,
    SST,
    SVFT,
    CoLA,
    LowRank,
    Maestro,
    QRLoRA,
    ReLoRA,
    SLTrain,
    SpectralAdapter,
    SVFit,
    convert,
    layers,
    merge,
)
from thinrank.optim.layers.sorsa import SORSA
from thinrank.optim.monitors import ReportConfig, farms_tail, hill_alpha, power_law, singular_values, spectral_report
from thinrank.optim.monitors.report import COMPARED, METRICS, compared
from thinrank.optim.monitors.spectrum import eigenvalues, kernel_matrices
from thinrank.optim.monitors.weights import weights

FAST = ReportConfig(metrics=("stable_rank", "matrix_rank", "alpha"))


class Stack(nn.Module):
    """Two linear layers of 64 × 96 and a head tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 80, bias=False)
        self.head.weight = self.embed.weight
        for index, p in enumerate(self.parameters()):
            p.data = normal(*p.shape, seed=index)


def by_name(rows):
    return {row["name"]: row for row in rows}


def strange():
    """Weights of all that may be wrong with one."""
    model = nn.Module()
    broken = normal(60, 60)
    broken[3, 5], broken[4, 4] = math.nan, math.inf
    for name, weight in {
        "zero": torch.zeros(60, 60),
        "row": normal(1, 30),
        "broken": broken,
        "low": with_values(torch.linspace(2, 1, 5), 70, 60).float(),
        "small": normal(8, 8),
        "empty": torch.zeros(0, 7),
        "nothing": torch.zeros(7, 0),
        "alike": torch.eye(64),
        "faint": 1e-6 * normal(64, 64),
        "sixteen": normal(64, 80).bfloat16(),
        "meta": torch.empty(64, 64, device="meta"),
        "codes": normal(60, 60).to(torch.float8_e4m3fn),
    }.items():
        model.register_parameter(name, nn.Parameter(weight))
    model.register_parameter("vector", nn.Parameter(torch.ones(9)))
    return model


def test_a_row_has_all_columns_and_the_values_of_the_measures():
    weight = with_values(pareto_quantiles(2.5, 120).sqrt(), 140, 120).float()
    (row,) = spectral_report({"layer.weight": weight})
    assert tuple(row) == ReportConfig().columns
    assert set(METRICS) < set(row)
    s = singular_values(weight)
    fit = power_law(eigenvalues(s))
    assert (row["name"], row["kind"], row["M"], row["N"], row["num_evals"]) == ("layer", "dense", 120, 140, 120)
    assert (row["alpha"], row["D"], row["num_pl_spikes"], row["xmin"]) == (
        fit.alpha,
        fit.D,
        fit.num_pl_spikes,
        fit.xmin,
    )
    assert row["alpha"] == pytest.approx(2.5, rel=0.03)
    assert row["reliable"] is True
    assert row["warning"] == ""
    assert row["spectral_norm"] == pytest.approx(float(s[0]) ** 2)
    assert row["norm"] == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert row["ERG_gap"] == row["detX_num"] - row["num_pl_spikes"]
    assert row["farms_alpha"] == float(farms_tail(weight).alpha)
    assert row["alpha_weighted"] == pytest.approx(row["alpha"] * row["log_spectral_norm"])
    assert all(value is not None for value in row.values())


def test_noise_is_called_unreliable_and_its_alpha_stands_there():
    (row,) = spectral_report({"w": normal(100, 130)})
    assert row["reliable"] is False
    assert row["warning"] == "alpha unreliable: D is not below 0.1"
    assert row["alpha"] > 0
    assert (row["num_spikes"], row["num_outliers"], row["num_traps"]) == (0, 0, 0)


@pytest.mark.parametrize("as_dict", [False, True])
def test_what_is_wrong_with_a_weight_stands_in_its_row(as_dict):
    model = strange()
    rows = by_name(spectral_report(dict(model.named_parameters()) if as_dict else model))
    assert {name: row["warning"] for name, row in rows.items()} == {
        "zero": "all zeros",
        "row": "one singular value: no spectrum",
        "broken": "2 entries are not finite",
        "low": "rank 5 of 60; no alpha: 5 eigenvalues, fewer than 50",
        "small": "no alpha: 8 eigenvalues, fewer than 50",
        "empty": "empty",
        "nothing": "empty",
        "alike": "no alpha: all eigenvalues alike",
        "faint": "no alpha: 0 eigenvalues above 1e-05, fewer than 50",
        "sixteen": "alpha unreliable: D is not below 0.1",
        "meta": "no values (meta device)",
        "codes": "codes of float8_e4m3fn, whose scales are stored apart",
    }
    assert rows["low"]["matrix_rank"] == 5
    assert math.isinf(rows["low"]["kappa"])
    assert rows["faint"]["hill_alpha"] > 1  # which needs no floor
    assert rows["row"]["sv_max"] == pytest.approx(float(model.get_parameter("row").detach().norm()))


def test_models_without_matrices():
    assert spectral_report(nn.ReLU()) == []
    assert spectral_report({}) == []
    assert spectral_report(nn.LayerNorm(5)) == []


def test_a_report_changes_nothing():
    model, state = Stack(), torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = spectral_report(model), spectral_report(model)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad


def test_tied_weights_have_one_row_in_models_and_state_dicts():
    model = Stack()
    rows = spectral_report(model, config=FAST)
    assert [row["name"] for row in rows] == ["embed", "up", "down"]
    assert spectral_report(model.state_dict(), config=FAST) == rows
    assert [row["layer_id"] for row in rows] == [0, 1, 2]


def test_only_what_is_wanted_is_there_and_computed(monkeypatch):
    def never(*args, **more):
        raise AssertionError("nobody has asked for it")

    for name in ("fitted_bulk", "bulk", "farms_tail", "correlation_trap", "power_law"):
        monkeypatch.setattr(f"thinrank.optim.monitors.report.{name}", never)
    rows = spectral_report(Stack(), layers="^(up|down)$", config=ReportConfig(metrics=("kappa", "detX_num")))
    assert [row["name"] for row in rows] == ["up", "down"]
    assert tuple(rows[0])[7:] == ("kappa", "detX_num", "warning")


def test_what_cannot_be_reported():
    with pytest.raises(ValueError, match="metrics must be of the report's columns, got 'alfa'"):
        ReportConfig(metrics=("alfa",))
    with pytest.raises(ValueError, match="min_evals must be at least 2, got 1"):
        ReportConfig(min_evals=1)
    with pytest.raises(ValueError, match="layers must be a regular expression"):
        spectral_report(Stack(), layers="(")


def test_few_and_many_eigenvalues():
    state = {"w": normal(20, 30)}
    assert spectral_report(state)[0]["alpha"] is None
    assert spectral_report(state, config=ReportConfig(min_evals=10))[0]["alpha"] > 1
    (row,) = spectral_report(state, config=ReportConfig(max_evals=19))
    assert row["warning"] == "more than 19 eigenvalues: left out"


def test_convolutions_are_pooled_over_their_kernel():
    conv = nn.Conv2d(60, 70, 3)
    conv.weight.data = normal(70, 60, 3, 3)
    (row,) = spectral_report(conv)
    assert (row["kind"], row["M"], row["N"], row["num_evals"]) == ("conv", 60, 70, 540)
    pooled = eigenvalues(singular_values(kernel_matrices(conv.weight)).flatten())
    assert row["hill_alpha"] == pytest.approx(float(hill_alpha(pooled)), rel=1e-9)
    assert row["sigma_mp"] == pytest.approx(1, abs=0.05)
    again = spectral_report({"weight": conv.weight})[0]
    assert {**again, "name": ""} == {**row, "name": ""}
    assert [row["kind"] for row in spectral_report(nn.Conv1d(5, 6, 3), config=FAST)] == ["conv"]


def test_stacks_of_experts_have_a_row_each():
    model = nn.Module()
    model.register_parameter("experts", nn.Parameter(normal(3, 60, 70)))
    for source in (model, model.state_dict()):
        rows = spectral_report(source, config=FAST)
        assert [(row["name"], row["N"]) for row in rows] == [(f"experts[{i}]", 70) for i in range(3)]


# Layers of factors ---------------------------------------------------------------------------------------------------

KINDS = [
    LowRank(rank=6),
    SST(rank=6),
    LOST(rank=6, act="identity"),
    SLTrain(rank=6),
    ReLoRA(rank=6),
    Maestro(),
    SORSA(rank=6, gamma=0.0),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_layers_of_factors_have_the_row_of_their_weight(config):
    model = Stack()
    convert(model, config)
    assert layers(model)
    for layer in layers(model).values():
        for p in layer.parameters():
            if p.ndim == 2:
                p.data = normal(*p.shape, seed=p.shape[0]) / p.shape[1] ** 0.5
    rows = by_name(spectral_report(model))
    assert list(rows) == ["embed", "up", "down"]
    assert rows["up"]["kind"] == "factors"
    expected = by_name(spectral_report(merge(model)))
    for name in ("up", "down"):
        for column in ("M", "N", "num_evals", "stable_rank", "effective_rank", "entropy_rank", "sv_max", "norm"):
            assert rows[name][column] == pytest.approx(expected[name][column], rel=1e-4), column
    if config.name == "lowrank":
        assert rows["up"]["warning"] == "rank 6 of 64; no alpha: 6 eigenvalues, fewer than 50"
        assert rows["up"]["mp_softrank"] is None


@pytest.mark.parametrize(
    "config", [*KINDS, SVFT(), SVFit(rank=6), QRLoRA(), SpectralAdapter(rank=6)], ids=lambda c: c.name
)
def test_factors_are_those_of_the_weight(config):
    """And only where the weight is a product: the others have None."""
    model = Stack()
    convert(model, config)
    products = 0
    for layer in layers(model).values():
        for p in layer.parameters():
            p.data = normal(*p.shape, seed=p.shape[0])
        if (factors := layer.factors()) is not None:
            products += 1
            torch.testing.assert_close(factors[0] @ factors[1], layer.weight(), rtol=1e-4, atol=1e-3)
    assert (products == 2) == (config.name in ("lowrank", "maestro", "svft"))


def test_factors_in_a_state_dict_are_found_by_their_names():
    model = Stack()
    convert(model, LowRank(rank=6))
    rows = spectral_report(model.state_dict(), config=FAST)
    expected = spectral_report(model, config=FAST)
    assert [row["name"] for row in rows] == [row["name"] for row in expected]
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine["stable_rank"] == pytest.approx(theirs["stable_rank"], rel=1e-5)
        assert mine["kind"] == theirs["kind"]


def test_layers_of_which_a_part_is_not_here_say_so():
    """As of a checkpoint, which leaves out what is frozen."""
    model = Stack()
    convert(model, SORSA(rank=6, gamma=0.0))
    layer = layers(model)["up"]
    layer.residual = nn.Parameter(torch.empty(96, 64, device="meta"), requires_grad=False)
    rows = by_name(spectral_report(model, config=FAST))
    assert rows["up"]["warning"] == "no values of residual"
    assert rows["down"]["stable_rank"] > 0


def test_layers_without_a_matrix_say_so_and_show_their_factors():
    model = Stack()
    convert(model, CoLA(rank=6))
    rows = by_name(spectral_report(model))
    assert list(rows) == ["embed", "up", "up.A", "up.B", "down", "down.A", "down.B"]
    assert rows["up"]["warning"] == "no matrix: there is a SiLU between its factors"
    assert rows["up.A"]["M"] == 6


# Comparisons ---------------------------------------------------------------------------------------------------------


def one(weight, name="w"):
    return next(iter(weights({name: weight})))


def test_a_comparison_with_itself_and_with_something_planted():
    reference = with_values(10 * 0.75 ** torch.arange(40.0), 80, 40)
    values, reason = compared(one(reference), one(reference))
    assert reason == ""
    assert tuple(values) == ("relative_change", "intruders", "least_similarity", "drift_l1", "drift_js")
    assert set(values) == set(COMPARED)
    assert values["relative_change"] == values["intruders"] == 0
    assert values["least_similarity"] == pytest.approx(1)
    assert values["drift_l1"] == pytest.approx(0, abs=1e-12)
    extra = torch.linalg.qr(torch.cat([reference, normal(80, 1).double()], 1)).Q[:, -1:]
    changed = reference + 20 * extra @ torch.nn.functional.normalize(normal(1, 40).double())
    values, _ = compared(one(changed), one(reference))
    assert values["intruders"] == 1
    assert values["least_similarity"] < 0.2
    assert values["drift_js"] > 0
    assert values["relative_change"] == pytest.approx(20 / float(reference.norm()))


def test_directions_of_no_size_are_nobodys():
    """Ten leading directions are looked at, of which a matrix of rank 3 has three."""
    left, right = normal(60, 3), normal(3, 50, seed=1)
    values, _ = compared(one(left @ right), one(left @ right + 1e-9 * normal(60, 50, seed=2)))
    assert values["intruders"] == 0


@pytest.mark.parametrize(
    ("now", "then", "reason"),
    [
        (normal(5, 6), normal(6, 5), "shapes differ: 5 × 6 and 6 × 5"),
        (torch.zeros(5, 6), normal(5, 6), "all zeros"),
        (normal(5, 6), torch.zeros(5, 6), "all zeros"),
        (normal(5, 6), torch.full((5, 6), math.nan), "the other: 30 entries are not finite"),
    ],
)
def test_what_cannot_be_compared(now, then, reason):
    values, found = compared(one(now), one(then))
    assert found == reason
    assert "intruders" not in values
