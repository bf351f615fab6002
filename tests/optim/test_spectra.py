"""Layers are read as they are, wherever their weights lie, and are what they were afterwards."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from test_replicated import BATCH, loss, mine, seeded_model
from test_sharded import fsdp
from test_zero import engine
from torch import nn
from torch.nn import functional as F

from thinrank.optim import AdamWConfig, GaLoreConfig, build
from thinrank.optim.layers import SST, CoLA, convert
from thinrank.optim.monitors.representation import (
    diffusion_entropy,
    matrix_entropy,
    matrix_nuclear_norm,
    reference_bandwidth,
    vendi_score,
)
from thinrank.optim.spectra import METRICS, OF_INPUTS, Spectra

LAYERS = ("up", "down")


class Two(nn.Module):
    """Two layers with something between them."""

    def __init__(self, width=12):
        super().__init__()
        self.first, self.second = nn.Linear(8, width, bias=False), nn.Linear(width, 8)
        self.lm_head = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.lm_head(self.second(F.gelu(self.first(x))))


@pytest.fixture
def two():
    torch.manual_seed(0)
    return Two()


def inputs(tokens=40):
    return torch.randn(2, tokens // 2, 8, generator=torch.Generator().manual_seed(1)) + 0.3


def test_every_value_is_what_its_formula_says(two):
    spectra = Spectra(two, metrics=tuple(METRICS))
    x = inputs()
    with torch.no_grad():
        spectra.begin()
        two(x)
        spectra.end()
        two.first.weight += 0.05 * torch.randn(two.first.weight.shape, generator=torch.Generator().manual_seed(9))
    spectra.begin()
    two(x).square().mean().backward()
    spectra.look_at_gradients()
    weight, gradient = two.first.weight.detach().clone(), two.first.weight.grad
    change = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        two.first.weight += change
    found = spectra.end()
    assert set(found) == {"first", "second"}  # the head is left out unless it is named
    assert gradient is not None
    left, sigma, right = torch.linalg.svd(weight)
    rows = x.reshape(-1, 8)
    aligned = rows @ right[0] / rows.norm(dim=1)
    gram = rows.double().T @ rows.double()
    positive = float((aligned > 0).float().mean())
    assert found["first"].values == pytest.approx(
        {
            "sign_diversity": 2 * min(positive, 1 - positive),
            "alignment_mean": abs(float(aligned.mean())) * math.sqrt(8),
            "alignment_size": float(aligned.abs().mean()) * math.sqrt(8),
            "sigma": float(sigma[0]),
            "sigma_gap": float(sigma[0] / sigma[1]),
            "stable_rank": float(weight.square().sum() / sigma[0] ** 2),
            "weight_rms": float(weight.square().mean().sqrt()),
            "drive": float(left[:, 0] @ gradient @ right[0]),
            "gain": float((rows @ weight.T).square().mean().sqrt() / rows.square().mean().sqrt()),
            "input_max": float(rows.abs().max()),
            "participation": float(gram.trace() ** 2 / gram.square().sum()),
            "leading_share": float(torch.linalg.svdvals(rows)[0] / rows.norm()),
            "matrix_entropy": float(matrix_entropy(rows)),
            "nuclear_norm": float(matrix_nuclear_norm(rows)),
            "vendi_score": float(vendi_score(rows)),
            "diffusion_entropy": diffusion_entropy(rows, reference_bandwidth(rows)),  # the rows of the first reading
            "effective_rank": float(torch.special.entr(sigma / sigma.sum()).sum().exp()),
            "condition": float(sigma[0] / sigma[7]),
            "spectrum_drift": found["first"]["spectrum_drift"],
            "update_rms": float(change.square().mean().sqrt()),
            "update_ratio": float(change.norm() / weight.norm()),
            "representation_change": float((rows @ change.T).norm() / (rows @ weight.T).norm()),
        },
        rel=1e-2,
        abs=1e-5,
    )
    assert 0 < found["first"]["spectrum_drift"] < 0.1


def test_a_power_law_is_looked_for_in_weights_with_enough_eigenvalues():
    model = nn.Sequential(nn.Linear(64, 80, bias=False), nn.Linear(80, 8, bias=False))
    spectra = Spectra(model, metrics=["hill_alpha", "farms_alpha"])
    spectra.begin()
    found = spectra.end()
    assert found["0"]["farms_alpha"] == pytest.approx(2.1, abs=0.25)  # of chance, whatever the shape
    assert found["0"]["hill_alpha"] > found["0"]["farms_alpha"] - 0.2
    assert found["1"].values == {}


def read(spectra, model, x):
    spectra.begin()
    model(x)
    return spectra.end()


@torch.no_grad()
def test_clumps_are_counted_at_the_scale_of_the_first_reading_which_a_checkpoint_keeps(two):
    spectra = Spectra(two, metrics=["diffusion_entropy"])
    assert read(spectra, two, torch.ones(2, 20, 8))["first"].values == {}  # all rows alike: no scale yet
    assert read(spectra, two, inputs())["first"].values == {}
    first = read(spectra, two, inputs())["first"]["diffusion_entropy"]
    near = 0.01 * inputs()
    assert 0 < read(spectra, two, near)["first"]["diffusion_entropy"] < 0.1 < first
    again = Spectra(two, metrics=["diffusion_entropy"])
    again.load_state_dict(copy.deepcopy(spectra.state_dict()))
    assert read(again, two, inputs())["first"]["diffusion_entropy"] == first


@torch.no_grad()
def test_inputs_that_are_no_numbers_or_of_one_feature_are_left_out(two):
    spectra = Spectra(two, metrics=[*OF_INPUTS, "diffusion_entropy", "sigma"])
    x = inputs()
    x[0, 0, 0] = math.nan
    for _ in range(2):
        assert set(read(spectra, two, x)["first"].values) == {"sigma"}
    assert set(read(spectra, two, inputs())["first"].values) == {"sigma", *OF_INPUTS}
    narrow = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 2))
    spectra = Spectra(narrow, metrics=[*OF_INPUTS], layers=["0"])
    assert read(spectra, narrow, torch.ones(4, 1))["0"].values == {}


def test_a_reading_leaves_nothing_behind(two):
    """Weights, gradients, the global random state and the hooks are those of a model that nobody reads."""
    other = copy.deepcopy(two)
    state = torch.get_rng_state()
    optimizers = [build(model, AdamWConfig(lr=1e-2)) for model in (two, other)]
    spectra = Spectra(two, optimizers[0], metrics=tuple(METRICS))
    for step in range(4):
        for model, optimizer in zip((two, other), optimizers, strict=True):
            optimizer.zero_grad()
            if model is two and step % 2:
                spectra.begin()
            model(inputs()).square().mean().backward()
            if model is two and step % 2:
                spectra.look_at_gradients()
                spectra.end()
            optimizer.step()
    for a, b in zip(two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in two.modules())


def test_what_is_computed_again_is_counted_once_and_only_the_first_micro_batch(two):
    spectra = Spectra(two)
    spectra.begin()
    for _ in range(3):
        two(inputs())
    found = spectra.end()
    assert found["first"].alignment is not None
    assert found["first"].alignment.tokens == 40


def test_layers_that_did_not_run_have_the_values_of_their_weights(two):
    spectra = Spectra(two)
    spectra.begin()
    found = spectra.end()
    assert set(found["first"].values) == {"sigma", "sigma_gap", "stable_rank", "weight_rms"}
    spectra.begin()
    spectra.cancel()
    assert not any(module._forward_hooks for module in two.modules())


def test_factors_are_watched_by_the_weight_they_amount_to(two):
    convert(two, SST(rank=4), targets=["first"])
    spectra = Spectra(two)
    spectra.begin()
    two(inputs())
    found = spectra.end()
    weight = two.get_submodule("first").weight().detach()
    assert found["first"]["sigma"] == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-4)
    assert "sign_diversity" in found["first"].values


def test_factors_without_a_weight_have_what_their_inputs_say(two):
    convert(two, CoLA(rank=4), targets=["first"])
    spectra = Spectra(two)
    assert "SiLU" in spectra.left_out["first"]
    spectra.begin()
    two(inputs())
    found = spectra.end()
    assert set(found["first"].values) == {"gain"}
    assert "sigma" in found["second"].values


def test_weights_that_are_stored_turned_have_their_inputs_direction():
    """GPT-2's layers hold (in, out)."""
    from transformers.pytorch_utils import Conv1D

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.turned, self.plain = Conv1D(12, 8), nn.Linear(8, 12)

        def forward(self, x):
            return self.turned(x) + self.plain(x)

    model = One()
    with torch.no_grad():
        model.turned.weight.copy_(torch.randn(8, 12, generator=torch.Generator().manual_seed(3)))
        model.plain.weight.copy_(model.turned.weight.T)
    spectra = Spectra(model)
    spectra.begin()
    model(inputs()).sum().backward()
    spectra.look_at_gradients()
    found = spectra.end()
    for name in ("sign_diversity", "sigma", "alignment_mean", "drive"):
        assert found["turned"][name] == pytest.approx(found["plain"][name], rel=1e-2, abs=1e-4), name


def test_a_state_goes_on_where_it_was(two):
    one, other = Spectra(two), Spectra(two)
    one.begin()
    one.end()
    other.load_state_dict(one.state_dict())
    for spectra in (one, other):
        spectra.begin()
    assert one.end() == other.end()


def test_unknown_names_are_refused(two):
    with pytest.raises(ValueError, match=r"'stable_rnak' is none of .*did you mean 'stable_rank'"):
        Spectra(two, metrics=["stable_rnak"])
    with pytest.raises(ValueError, match="'third' is no linear layer of the model"):
        Spectra(two, layers=["third"])
    with pytest.raises(ValueError, match="'third' is no linear layer of the model: correct or remove"):
        Spectra(two, exclude=["third"])
    with pytest.raises(ValueError, match="nothing is left"):
        Spectra(two, exclude=["."])
    with pytest.raises(ValueError, match="not a regular expression"):
        Spectra(two, layers=["("])
    assert set(Spectra(two, layers=["lm_head", "first"]).layers) == {"first", "lm_head"}


# --- on several ranks -------------------------------------------------------------------------------------------------


def readings(model, optimizer, forward):
    """The first and a later reading, of all ranks' data."""

    def reduce(x, how):
        dist.all_reduce(x, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return x

    spectra = Spectra(model, optimizer, layers=LAYERS)
    found = []
    for step in range(2):
        spectra.begin()
        forward(step)
        spectra.look_at_gradients()
        found.append({name: layer.values for name, layer in spectra.end(reduce).items()})
    wire = getattr(optimizer, "wire", None)
    return found, spectra.left_out, 0 if wire is None else wire.rare.payload["monitors"]


def under_fsdp():
    model = fsdp()
    optimizer = build(model, GaLoreConfig(rank=2))

    def forward(step):
        optimizer.zero_grad()
        for share in mine():
            loss(model, step, share).backward()

    return readings(model, optimizer, forward)


def under_zero(stage):
    run, optimizer = engine(AdamWConfig(lr=0.0), stage)

    def forward(step):
        for share in mine():
            run.engine.backward(loss(run.engine, step, share))

    found = readings(run.engine.module, optimizer, forward)
    run.release()
    return found


def in_one():
    """The same of all data in one process."""
    model = seeded_model(0, all_alike=True)
    spectra = Spectra(model, layers=LAYERS)
    found = []
    for step in range(2):
        model.zero_grad()
        spectra.begin()
        loss(model, step, slice(0, BATCH)).backward()
        spectra.look_at_gradients()
        found.append({name: layer.values for name, layer in spectra.end().items()})
    return found


def agree(answers, expected, without=()):
    for found, left_out, _ in answers:
        assert left_out == {}
        for one, other in zip(found, expected, strict=True):
            for name in LAYERS:
                wanted = {key: value for key, value in other[name].items() if key not in without}
                assert one[name] == pytest.approx(wanted, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_rows_on_ranks_are_read_as_one_process_reads_whole_weights(ranks, size):
    """FSDP2, some ranks with fewer rows or none; what travelled are vectors."""
    answers = ranks(size).run(under_fsdp)
    agree(answers, in_one())
    first, later, gradients = 2 * 30 + 1, 2 * 3 + 1, 2  # messages
    vectors = 2 * (24 + 8 + 8 + 24)  # two of each side of both matrices, half of them in a message
    exact = 4 * (vectors // 2 * (first + later - 2) + 2 * 2 + 2 * gradients)
    assert all(sent == exact for *_, sent in answers)


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_is_read_where_it_keeps_weights(ranks, stage):
    """ZeRO-3 cuts weights anywhere within a row; gradients are DeepSpeed's, so that nobody knows the drive."""
    answers = ranks(2).run(under_zero, stage)
    agree(answers, in_one(), without=("drive",))
    assert all((sent > 0) == (stage == 3) for *_, sent in answers)
