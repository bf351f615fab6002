"""The columns of `weightwatcher`, where it is installed, on matrices without and with structure."""

import logging
import warnings

import pytest
import torch
from planted import normal, pareto, with_values
from torch import nn

from thinrank.optim.monitors import ReportConfig, spectral_report

SHAPES = {"square noise": 0, "spiked": 1, "heavy": 2, "wide noise": 3}
EXACT = (
    "alpha",
    "D",
    "sigma",
    "xmin",
    "alpha_weighted",
    "log_alpha_norm",
    "stable_rank",
    "entropy",
    "norm",
    "log_norm",
)
EXACT += ("spectral_norm", "log_spectral_norm", "sv_max", "raw_alpha")
COUNTS = ("M", "N", "num_evals", "num_pl_spikes", "matrix_rank", "detX_num", "num_ERG_spikes", "ERG_gap")


def model():
    heavy = with_values(pareto(2.5, 150, seed=1).sqrt(), 300, 150)
    spiked = normal(200, 260) / 16 + 3 * with_values(torch.tensor([2.0, 1.5]), 200, 260, seed=3)
    parts = [normal(150, 150), spiked, heavy, normal(120, 300, seed=2) / 20]
    layers = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in parts))
    for layer, weight in zip(layers, parts, strict=True):
        layer.weight.data = weight.float()
    return layers


@pytest.fixture(scope="module")
def theirs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("weightwatcher", reason="weightwatcher is not installed")
        logging.getLogger("weightwatcher").setLevel(logging.ERROR)
        watcher = package.WeightWatcher(model=model())
        plain = watcher.analyze(plot=False, detX=True, mp_fit=True, min_evals=10)
        clipped = watcher.analyze(plot=False, fix_fingers="clip_xmax", min_evals=10)
    return plain.set_index("name"), clipped.set_index("name")


@pytest.fixture(scope="module")
def ours():
    plain, clipped = (spectral_report(model(), config=ReportConfig(max_fingers=n)) for n in (0, 10))
    return {row["name"]: row for row in plain}, {row["name"]: row for row in clipped}


@pytest.mark.parametrize("kind", SHAPES)
def test_columns_are_theirs(theirs, ours, kind):
    mine, other = ours[0][str(SHAPES[kind])], theirs[0].loc[str(SHAPES[kind])]
    for name in EXACT:
        if name in other:
            assert mine[name] == pytest.approx(float(other[name]), rel=1e-3), name
    for name in COUNTS:
        assert mine[name] == int(other[name]), name


@pytest.mark.parametrize("kind", SHAPES)
def test_fingers_are_theirs(theirs, ours, kind):
    """Their number of fingers is one less than the values they remove."""
    mine, other = ours[1][str(SHAPES[kind])], theirs[1].loc[str(SHAPES[kind])]
    assert mine["alpha"] == pytest.approx(float(other["alpha"]), rel=1e-3)
    assert mine["raw_alpha"] == pytest.approx(float(other["raw_alpha"]), rel=1e-3)
    assert max(0, mine["num_fingers"] - 1) == int(other["num_fingers"])


@pytest.mark.parametrize("kind", ["spiked", "wide noise", "square noise"])
def test_the_bulk_is_theirs(theirs, ours, kind):
    """But for how the best σ is refined, and the quarter circle of square matrices, which is theirs where σ is one."""
    mine, other = ours[0][str(SHAPES[kind])], theirs[0].loc[str(SHAPES[kind])]
    assert mine["sigma_mp"] == pytest.approx(float(other["sigma_mp"]), rel=0.02)
    assert mine["mp_softrank"] == pytest.approx(float(other["mp_softrank"]), rel=0.04)
    assert mine["num_spikes"] == int(other["num_spikes"])
