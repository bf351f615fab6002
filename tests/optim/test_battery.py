"""What every method must do, whatever it is. A new room is tested here as soon as it is registered."""

from typing import Any, cast

import pytest
import torch
from cases import (
    CAPTURING,
    CONFIGS,
    LOW_RANK,
    SHAPES,
    captures,
    copies,
    equal,
    give,
    make,
    moved,
    run,
    small,
    snapshot,
    weights,
)
from laws import decaying, eye_error, seeded
from torch import nn

from thinrank.optim import METHODS, DionConfig, MatrixConfig, RankedConfig, build
from thinrank.optim import optimizer as optimizer_module
from thinrank.optim.linalg.fixed import basis_matrix

pytestmark = pytest.mark.filterwarnings("ignore:rank 3 is above the 1 directions")
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
low_rank = pytest.mark.parametrize("config", LOW_RANK.values(), ids=LOW_RANK)


def test_every_method_is_in_the_battery():
    assert set(METHODS) <= set(CONFIGS)


class Classifier(nn.Module):
    """An embedding, two hidden layers, a norm and a head: every role."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 12)
        self.layers = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 16, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.norm(self.layers(self.table(tokens))))


TOKENS = torch.arange(16)


def losses(model, optimizer, steps):
    """Learns the next letter of a fixed permutation of 16."""
    target = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS), target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@every
def test_learns(config):
    """Less than a tenth of the first loss after 60 steps."""
    model = Classifier()
    found = losses(model, build(model, config), 60)
    assert found[-1] < 0.1 * found[0]


@every
def test_matrices_alone_learn(config):
    """With everything else frozen: it is the projected matrices, at rank 3 of 12, that do the work."""
    model = Classifier()
    for name, p in model.named_parameters():
        p.requires_grad_("layers" in name and p.ndim == 2)
    found = losses(model, build(model, config), 60)
    assert found[-1] < 0.65 * found[0]


@every
def test_two_runs_are_equal_to_the_bit(config):
    runs = []
    for _ in range(2):
        model = Classifier()
        runs.append((losses(model, build(model, config, seed=3), 8), list(model.parameters())))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])


@every
def test_a_tied_weight_is_stepped_once(config):
    model = Classifier(tied=True)
    optimizer = build(model, config)
    names = [name for index in range(len(optimizer.param_groups)) for name in optimizer.names(index)]
    assert "table.weight" in names
    assert "head.weight" not in names
    found = losses(model, optimizer, 60)
    assert model.head.weight is model.table.weight
    assert found[-1] < 0.2 * found[0]


@every
def test_bfloat16_parameters(config):
    """They move, their matrices' state is float32 but for bases whose products are not, and the path is that of float32
    up to their precision."""
    half, full = weights(torch.bfloat16), weights()
    start = copies(half)
    optimizers = make(config, half), make(config, full)
    for params, optimizer in zip((half, full), optimizers, strict=True):
        run(optimizer, params, 0, 4)
    # Where rounding decides which columns or entries are chosen, a share of the way is another's; all of the entries of
    # GaLore+ in a matrix that three directions hold.
    chosen = 0.5 if 0.0 < getattr(config, "density", 0.0) < 1.0 else 0.1
    for p, q, before in zip(half, full, start, strict=True):
        assert p.dtype is torch.bfloat16
        assert not torch.equal(p, before)
        rounding = 5 * 2.0**-9 * float(q.detach().norm())  # of the weight, at the start and in every step
        assert moved(p, q) <= rounding + chosen * moved(before, q), tuple(p.shape)
    if isinstance(config, MatrixConfig):
        floating = {name for name, value in optimizers[0].state[half[0]].items() if value.is_floating_point()}
        narrow = {name for name in floating if optimizers[0].state[half[0]][name].dtype is not torch.float32}
        assert not narrow or (narrow == {"basis"} and getattr(config, "projection_dtype", None) == "bfloat16")


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (16, 16), (1, 9), (9, 1), (1, 1)], ids=str)
@every
def test_shapes_and_full_rank(config, shape):
    """Also as a fraction: 1.0 is every direction there is."""
    params = [nn.Parameter(seeded(*shape))]
    options = {"rank": 1.0} if isinstance(config, RankedConfig) else {}
    optimizer = make(config, params, weight_decay=0.0, **options)
    before = copies(params)
    run(optimizer, params, 0, 7)
    change = (params[0].detach() - before[0].detach()).abs().max()
    assert 0 < float(change) < 7 * 10 * config.lr


@every
def test_a_zero_gradient_moves_nothing_at_first(config):
    params = weights()
    optimizer = make(config, params, weight_decay=0.0)
    before = copies(params)
    for _ in range(4):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert equal(params, before)
    run(optimizer, params, 4, 8)  # and nothing is spoilt: the next gradients are stepped as ever
    assert all(bool(p.isfinite().all()) for p in params)
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("size", [1e30, 1e-30])
@every
def test_gradients_of_any_size_keep_weights_finite(config, size):
    """1e30 squared is no float32; the first step and a renewal (3) both meet it."""
    for when in (0, 1, 3):
        params = weights()
        optimizer = make(config, params)
        for step in range(8):
            give(params, step)
            if step == when:
                for p in params:
                    assert p.grad is not None
                    p.grad *= size
            optimizer.step()
            assert all(bool(p.isfinite().all()) for p in params), (when, step)


@low_rank
def test_a_gradient_that_is_not_finite_does_not_destroy_the_basis(config):
    """An SVD of NaN raises, a power iteration of NaN is NaN for ever; the renewal is skipped instead."""
    for when in (0, 3):  # the two renewals
        for value in (float("nan"), float("inf")):
            params = [nn.Parameter(seeded(8, 5, seed=i)) for i in range(2)]
            optimizer = make(config, params)
            for step in range(5):
                give(params, step)
                if step == when:
                    assert params[0].grad is not None
                    params[0].grad[2, 3] = value
                optimizer.step()
            for key in ("basis", "basis_long"):
                if key in optimizer.state[params[0]]:
                    stored = optimizer.state[params[0]][key]
                    basis, exact = stored.float(), 1e-5 if stored.dtype is torch.float32 else 2.0**-8
                    torch.testing.assert_close(basis.norm(dim=-2), torch.ones(basis.shape[-1]), rtol=0, atol=exact)
                    if getattr(config, "right_factor", "qr") == "qr":  # Dion's columns are of length one, no more
                        assert eye_error(basis) < exact
            if "columns" in optimizer.state[params[0]]:
                columns = optimizer.state[params[0]]["columns"].tolist()
                assert len(set(columns)) == 3
                assert set(columns) <= set(range(5))
            # the other matrix of the bucket has not noticed
            alone = [nn.Parameter(seeded(8, 5, seed=1))]
            lonely = make(config, [("0.1", alone[0])])
            for step in range(5):
                alone[0].grad = seeded(8, 5, seed=1000 * (step + 1) + 1)
                lonely.step()
            torch.testing.assert_close(params[1], alone[0], rtol=1e-4, atol=1e-5)


# --- stacks -----------------------------------------------------------------------------------------------------------


@every
def test_stacked_matrices_equal_single_ones(config):
    """One batched call for all matrices of a shape, against an optimizer for each: rounding apart the same."""
    params = weights()
    alone = copies(params)
    together = make(config, [(f"p{i}", p) for i, p in enumerate(params)])
    apart = [make(config, [(f"p{i}", p)]) for i, p in enumerate(alone)]
    for step in range(7):
        give(params, step)
        give(alone, step)
        together.step()
        for each in apart:
            each.step()
    for p, a in zip(params, alone, strict=True):
        torch.testing.assert_close(p, a, rtol=1e-4, atol=1e-5)


@every
def test_how_a_stack_is_split_does_not_matter(config, monkeypatch):
    ends = []
    for limit in (2**26, 1, 4 * 8 * 5 * 2):
        monkeypatch.setattr(optimizer_module, "CPU_BATCH_BYTES", limit)
        params = [nn.Parameter(seeded(8, 5, seed=i)) for i in range(5)]
        run(make(config, params), params, 0, 7)
        ends.append(params)
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- what is measured -------------------------------------------------------------------------------------------------


@every
def test_measuring_changes_nothing_and_tells_the_truth(config):
    model, twin = Classifier(), Classifier()
    optimizer, silent = build(model, config), build(twin, config)
    losses(model, optimizer, 3)
    losses(twin, silent, 3)
    assert optimizer.measured == {}
    optimizer.measure = True
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses(model, optimizer, 1)
    losses(twin, silent, 1)
    assert equal(list(model.parameters()), list(twin.parameters()))
    assert not optimizer.measure
    labels = {group["label"] for group in optimizer.param_groups}
    measured = optimizer.measured
    assert set(measured) == {"captured_energy", "subspace_overlap", "update_rms", "effective_lr"}
    assert set(measured["update_rms"]) == labels == set(measured["effective_lr"])
    projected = {"layers.0.weight", "layers.2.weight"} if captures(config) else set()
    assert set(measured["captured_energy"]) == projected
    assert all(0.0 < value <= 1.0 for value in measured["captured_energy"].values())
    assert set(measured["subspace_overlap"]) <= projected  # this step is a renewal where the gap is 1 or 3
    assert all(0.0 <= value <= 1.0 + 1e-5 for value in measured["subspace_overlap"].values())
    # the update of the matrices, computed from what it did to them
    group = next(g for g in optimizer.param_groups if g["role"] == "matrix")
    decay = group["lr"] * group["weight_decay"]
    moved = [
        (before[name] * (1 - decay) - p.detach()) / measured["effective_lr"][group["label"]]
        for name, p in model.named_parameters()
        if name in ("layers.0.weight", "layers.2.weight")
    ]
    rms = torch.cat([m.flatten() for m in moved]).square().mean().sqrt()
    assert measured["update_rms"][group["label"]] == pytest.approx(float(rms), rel=2e-3)
    assert optimizer.scale(group) * group["lr"] == measured["effective_lr"][group["label"]]


@pytest.mark.parametrize("config", CAPTURING.values(), ids=CAPTURING)
def test_full_rank_captures_everything(config):
    params = [nn.Parameter(decaying(8, 5))]
    optimizer = make(config, [("weight", params[0])], rank=1.0)
    optimizer.measure = True
    run(optimizer, params, 0, 1)
    assert optimizer.measured["captured_energy"]["weight"] == pytest.approx(1.0, abs=1e-4)


def held(config, grad, before, after):
    """Squares of what the subspace holds of a matrix and of the matrix itself, from the state before and after a step.

    The matrix is the gradient, with the error where that is fed back, or a momentum that this gradient has entered.
    """
    rule: Any = config.matrix_rule()
    if "momentum" in before and "basis" in before:  # Dion: of what was sent, a share of 1−μ was taken away
        x = before["momentum"] + grad
        sent = (x - after["momentum"]) / (1 - rule.momentum)
    elif "momentum" in before:  # Trion: what was sent was multiplied by μ
        chosen = after["columns"].long()
        x = after["momentum"].clone()
        sent = x[:, chosen] = x[:, chosen] / rule.momentum
    else:
        x = rule.feedback.enter(grad.unsqueeze(0), {key: value.unsqueeze(0) for key, value in before.items()})[0]
        if "columns" in after:
            atoms = basis_matrix(rule.subspace.basis, x.shape[1], dtype=torch.float32, device="cpu")
            sent = x @ atoms[after["columns"].long()].mT
        else:
            sent = x @ after["basis"].float()
            sent = after["basis_long"].mT @ sent if "basis_long" in after else sent
    return float(sent.double().square().sum()), float(x.double().square().sum())


def shared(before, after):
    """The share of the old subspace that is in the new one."""
    if "columns" in before:
        old, new = set(before["columns"].tolist()), set(after["columns"].tolist())
        return len(old & new) / len(old)
    return float((after["basis"].double().mT @ before["basis"].double()).square().sum()) / before["basis"].shape[1]


@pytest.mark.parametrize("config", CAPTURING.values(), ids=CAPTURING)
def test_energy_and_overlap_are_those_of_the_subspace(config):
    """At renewals and between them; to float32's precision, and twice that of a bfloat16 product."""
    names = ["tall", "wide", "other"]
    params = dict(zip(names, [nn.Parameter(seeded(*shape)) for shape in ((8, 5), (5, 8), (8, 5))], strict=True))
    optimizer = make(config, list(params.items()))
    exact = 1e-5 if getattr(config, "projection_dtype", "float32") == "float32" else 2.0**-7
    overlaps = 0
    for step in range(8):
        give(list(params.values()), step)
        before = {name: {key: value.clone() for key, value in optimizer.state[p].items()} for name, p in params.items()}
        optimizer.measure = True
        optimizer.step()
        for name, p in params.items():
            assert p.grad is not None
            old, new = before[name], optimizer.state[p]
            short = new["basis"].shape[0] if "basis" in new else 5
            sent, total = held(config, p.grad if p.grad.shape[1] == short else p.grad.mT, old, new)
            energy = optimizer.measured["captured_energy"][name]
            assert energy == pytest.approx(sent / total, abs=exact)
            if name in optimizer.measured["subspace_overlap"]:
                overlaps += 1
                assert optimizer.measured["subspace_overlap"][name] == pytest.approx(shared(old, new), abs=exact)
    assert overlaps or isinstance(config, DionConfig)


# --- compiled models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_model_trains_as_the_plain_one(name):
    """The backends that need no C++ compiler: what matters here is the names and the gradients."""
    torch.compiler.reset()
    found = {}
    for backend in ("none", "eager", *(("aot_eager",) if name == "dct_adamw" else ())):
        model = Classifier()
        runner = model if backend == "none" else torch.compile(model, backend=backend)
        found[backend] = losses(runner, build(model, small(name)), 6)
    assert found["eager"] == found["none"]
    assert found.get("aot_eager", found["none"]) == pytest.approx(found["none"], rel=1e-4)
    torch.compiler.reset()
    compiled = cast("nn.Module", torch.compile(Classifier(), backend="eager"))
    optimizer = build(compiled, small(name))  # from the wrapper, whose names have a prefix
    assert {group["role"] for group in optimizer.param_groups} == {"embedding", "matrix", "vector", "head"}
    assert losses(compiled, optimizer, 30)[-1] < 1.0


# --- memory -----------------------------------------------------------------------------------------------------------


@every
def test_snapshot_sees_all_of_the_state(config):
    """Guards the guard: `unchanged` in these tests compares as many tensors as the optimizer says it has."""
    params = weights()
    optimizer = make(config, params)
    counted = sum(t.numel() * t.element_size() for t in snapshot(optimizer, params)[len(SHAPES) :])
    assert counted == optimizer.state_bytes()
