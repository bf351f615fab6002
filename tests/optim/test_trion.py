"""Trion and Dion2 against the equations of their papers, Muon, each other, and one rank against several."""

import pytest
import torch
import torch.distributed as dist
from cases import moved, stepped
from laws import decaying, seeded
from reference.dion import dct, dion2, muon, trion

from thinrank.optim import Dion2, Dion2Config, Trion, TrionConfig
from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.linalg.fixed import BASES, basis_matrix
from thinrank.optim.lowrank.subspace import FixedColumns
from thinrank.optim.methods.trion import TrionRule
from thinrank.optim.rule import Step
from thinrank.optim.update import Columns

STEPS = 30
SHAPES = pytest.mark.parametrize("shape", [(14, 9), (8, 15), (10, 10)], ids=["tall", "wide", "square"])
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def gradients(*shape):
    return [decaying(*shape, ratio=0.9, seed=i + 1) for i in range(STEPS)]


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("basis", BASES)
@SHAPES
def test_equals_the_direct_form_in_float64(shape, basis, norm):
    """The paper's: a plain momentum from which what was sent is subtracted, (1−μ) of it."""
    start, grads = seeded(*shape), gradients(*shape)
    short = min(shape)
    atoms = dct(short) if basis == "dct" else basis_matrix(basis, short, dtype=torch.float64, device="cpu")
    options = {"lr": 0.01, "rank": 4, "momentum": 0.9, "weight_decay": 0.1}
    weight, optimizer = stepped(Trion, start, grads, basis=basis, norm=norm, **options)
    expected, momentum = trion(start, grads, atoms=atoms, triples=JORDAN, norm=int(norm[1]), **options)
    assert moved(weight, expected) <= 1e-4 * moved(start, expected)
    own = optimizer.state[weight]["momentum"].double() @ atoms  # from coordinates of the short side
    torch.testing.assert_close(own if shape[0] >= shape[1] else own.mT, momentum, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("basis", BASES)
@SHAPES
def test_all_columns_are_muon_with_a_heavy_ball(shape, basis):
    """Nothing is left out, so all of the momentum decays; and Newton-Schulz does not see a rotation."""
    start, grads = seeded(*shape), gradients(*shape)
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    weight, _ = stepped(Trion, start, grads, basis=basis, rank=1.0, adjust_lr="match_rms_adamw", **options)
    expected = muon(start, grads, triples=JORDAN, adjust="match_rms_adamw", **options)
    assert moved(weight, expected) <= 1e-4 * moved(start, expected)


@SHAPES
def test_dion2_equals_its_listing(shape):
    start, grads = seeded(*shape), gradients(*shape)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    weight, optimizer = stepped(Dion2, start, grads, rank=3, **options)
    expected, momentum = dion2(start, grads, count=3, triples=JORDAN, **options)
    assert moved(weight, expected) <= 1e-4 * moved(start, expected)
    own = optimizer.state[weight]["momentum"]
    torch.testing.assert_close(own if shape[0] >= shape[1] else own.mT, momentum.float(), rtol=1e-4, atol=1e-5)


def test_dion2_touches_its_columns_alone():
    start, grads = seeded(12, 8), [seeded(12, 8, seed=1)]
    weight, optimizer = stepped(Dion2, start, grads, weight_decay=0.0)
    touched = (weight.detach() != start).any(0)
    columns = torch.zeros(8, dtype=torch.bool)
    columns[optimizer.state[weight]["columns"].long()] = True
    assert torch.equal(touched, columns)
    assert int(columns.sum()) == 2  # a quarter


def test_unit_vectors_need_no_product():
    state = {"columns": torch.tensor([[4, 0], [1, 2]], dtype=torch.int32)}
    low = seeded(2, 6, 2)
    update = FixedColumns(rank=2, basis="identity").up(low, state, 5)
    assert isinstance(update.basis, Columns)
    expected = torch.zeros(2, 6, 5)
    expected[0, :, [4, 0]], expected[1, :, [1, 2]] = low[0], low[1]
    assert torch.equal(update.materialise(), expected)


@pytest.mark.parametrize("basis", BASES)
def test_the_update_has_the_singular_values_of_what_was_orthogonalised(basis):
    rule = TrionRule(subspace=FixedColumns(rank=3, basis=basis), coefficients="you", adjust_lr="none")
    state = rule.init((2, 12, 7), torch.device("cpu"))
    values = torch.linalg.svdvals(rule.update(seeded(2, 12, 7), state, Step(count=[0, 0])).materialise())
    torch.testing.assert_close(values[:, :3], torch.ones(2, 3), rtol=0, atol=0.033)  # the set's own range
    assert float(values[:, 3:].max()) < 1e-5


def test_dion2_is_trion_in_unit_vectors():
    start, grads = seeded(14, 9), gradients(14, 9)
    ends = [
        stepped(Dion2, start, grads)[0],
        stepped(Trion, start, grads, rank=0.25, basis="identity", adjust_lr="spectral", eps=1e-8)[0],
    ]
    assert torch.equal(*ends)


def test_the_published_defaults():
    config = TrionConfig()
    assert (config.lr, config.momentum, config.weight_decay, config.adjust_lr) == (0.01, 0.95, 0.01, "original")
    assert (config.basis, config.norm, config.betas) == ("dct", "l1", (0.9, 0.95))
    assert "update_proj_gap" not in config.group()
    second = Dion2Config()
    assert (second.basis, second.rank, second.momentum, second.adjust_lr) == ("identity", 0.25, 0.95, "spectral")


# --- ranks -----------------------------------------------------------------------------------------------------------

RULE = TrionRule(subspace=FixedColumns(rank=3), momentum=0.9, adjust_lr="none")


def local(data):
    return [
        torch.stack([decaying(11, 8, ratio=0.9, seed=1000 * data + 10 * t + b) for b in range(2)]) for t in range(8)
    ]


def steps(grads, axis=WHOLE):
    """Updates, chosen columns and momenta after every step."""
    state = RULE.init((2, 11, 8), torch.device("cpu"))
    found = []
    for count, grad in enumerate(grads):
        update = RULE.update(grad, state, Step(count=[count, count], axis=axis)).materialise()
        found.append((update, state["columns"].long().clone(), state["momentum"].clone()))
    return found


def sharded(split):
    rows = slice(0, split[0]) if dist.get_rank() == 0 else slice(split[0], None)
    state = RULE.init((2, 11, 8), torch.device("cpu"))  # how many columns is the whole matrix's to say
    state["momentum"] = state["momentum"][:, rows].clone()
    axis = Axis(rows=dist.group.WORLD)
    return [
        RULE.update(grad[:, rows], state, Step(count=[count, count], axis=axis)).materialise()
        for count, grad in enumerate(local(0))
    ]


@pytest.mark.parametrize("split", [(7, 4), (11, 0)], ids=str)
def test_sharded_rows_equal_the_whole_matrix(ranks, split):
    """Only norms of columns and r × r matrices travel; a rank without rows is one of them."""
    parts = ranks(2).run(sharded, split)
    for count, (update, _, _) in enumerate(steps(local(0))):
        together = torch.cat([part[count] for part in parts], -2)
        torch.testing.assert_close(together, update, rtol=1e-3, atol=1e-4)
