"""A renewal that cannot be done is done another way or left out, said once, and counted."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CONFIGS
from laws import eye_error, seeded
from torch import nn

from thinrank.optim import METHODS, OPTIMIZERS, DCTAdamWConfig, GaLore, LDAdam, LowRankConfig, SubspaceAdamW
from thinrank.optim.lowrank import subspace as module
from thinrank.optim.methods import ldadam
from thinrank.optim.rule import Step

LOGGER = "thinrank.optim.skipped"
META = torch.device("meta")


def step(optimizer, params, count, spoilt=None, value=float("nan")):
    for i, p in enumerate(params):
        p.grad = seeded(*p.shape, seed=100 * count + i)
        if i == spoilt:
            p.grad[0, 0] = value
    optimizer.step()


ROOMS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": ("galore", {}),
    "galore/full": ("galore", {"proj_type": "full"}),
    "galore_plus": ("galore_plus", {"density": 0.0}),
    "fira": ("fira", {}),
    "apollo/svd": ("apollo", {"proj": "svd"}),
    "subspace_adamw": ("subspace_adamw", {}),
    "mfac": ("mfac", {}),
    "dct_adamw": ("dct_adamw", {}),
    "dct_adamw/identity": ("dct_adamw", {"basis": "identity"}),
    "dct_adamw/lazy": ("dct_adamw", {"lazy_overlap": 0.9}),
    "ldadam": ("ldadam", {}),
    "ldadam/power": ("ldadam", {"svd": "power", "error_feedback": "off"}),
    "dion": ("dion", {}),
    "dion/qr": ("dion", {"right_factor": "qr"}),
    "trion": ("trion", {}),
    "dion2": ("dion2", {}),
}
"""Every method whose subspace follows the gradient."""
DIRECTIONS = ("basis", "basis_long", "columns")


def ranked(method, **values):
    cls: Any = METHODS[method]
    return cls(rank=2, **values)


def room(name, params):
    """The optimizer of a case, renewing at every step."""
    method, values = ROOMS[name]
    config = ranked(method, **values)
    if isinstance(config, LowRankConfig):
        config = replace(config, update_proj_gap=1)
    cls: Any = OPTIMIZERS[type(config)]
    return cls(named(params), lr=0.01, weight_decay=0.0, **config.group())


def directions(optimizer, param):
    return {key: value.clone() for key, value in optimizer.state[param].items() if key in DIRECTIONS}


def same(before, after):
    return all(torch.equal(value, after[key]) for key, value in before.items())


def three():
    return [nn.Parameter(seeded(9, 6, seed=i)) for i in range(3)]


def named(params):
    return [(f"layer{i}.weight", p) for i, p in enumerate(params)]


def failing(monkeypatch, name, broken, module=module):
    """Makes `module.name` raise as LAPACK does, for batches that hold a matrix whose first entry is in `broken`."""
    real = getattr(module, name)

    def stand_in(x, *args, **kwargs):
        if broken & {round(float(first), 4) for first in x[..., 0, 0].flatten()}:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(module, name, stand_in)


def test_a_gradient_that_is_not_finite_is_counted_and_said_once(caplog):
    params = three()
    optimizer = SubspaceAdamW(named(params), rank=2, update_proj_gap=1, residual="off")
    with caplog.at_level(logging.WARNING, LOGGER):
        for count in range(4):
            step(optimizer, params, count, spoilt=1 if count in (1, 3) else None)
    assert optimizer.skipped_renewals == {"layer1.weight": 2}
    assert [r.getMessage() for r in caplog.records] == [
        "renewal of layer1.weight: its gradient was not finite; it keeps the subspace that it has (said once)"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("name", ROOMS)
def test_every_subspace_stays_and_is_counted(name, when, value, caplog):
    """Methods that choose by the device's own numbers used to choose by a gradient that was none, and say nothing."""
    params = three()
    optimizer = room(name, params)
    for count in range(when):
        step(optimizer, params, count)
    old = [directions(optimizer, p) for p in params]
    with caplog.at_level(logging.WARNING, LOGGER):
        step(optimizer, params, when, spoilt=1, value=value)
    assert old[1]
    assert optimizer.skipped_renewals == {"layer1.weight": 1}
    assert [r.getMessage() for r in caplog.records] == [
        "renewal of layer1.weight: its gradient was not finite; it keeps the subspace that it has (said once)"
    ]
    if when or not name.startswith("dion"):  # Dion's first basis is drawn, not found, or its columns are the first two
        assert same(old[1], optimizer.state[params[1]])
    assert not same(old[0], optimizer.state[params[0]]) or not same(old[2], optimizer.state[params[2]])


@pytest.mark.parametrize("name", [name for name in ROOMS if "lazy" not in name])
def test_what_was_not_renewed_has_no_overlap(name):
    params = three()
    optimizer = room(name, params)
    told = []
    for count in range(3):
        optimizer.measure = True
        step(optimizer, params, count, spoilt=1 if count == 2 else None)
        told.append(optimizer.measured["subspace_overlap"])
    every = {"layer0.weight", "layer1.weight", "layer2.weight"}
    if name.startswith("dion") and name != "dion2":  # its columns are not orthonormal, so that nothing is told
        every = set()
    assert [set(overlaps) for overlaps in told] == [set(), every, every - {"layer1.weight"}]


def test_a_skipped_renewal_between_two_readings_leaves_the_one_before_it():
    params = three()
    optimizer = room("dct_adamw", params)
    step(optimizer, params, 0)
    step(optimizer, params, 1)
    optimizer.measure = True
    step(optimizer, params, 2, spoilt=1)
    twins = three()
    other = room("dct_adamw", twins)
    for count in range(2):
        other.measure = True
        step(other, twins, count)
    name = "layer1.weight"
    assert optimizer.measured["subspace_overlap"][name] == other.measured["subspace_overlap"][name]


def test_with_a_gap_of_its_own_a_matrix_chooses_at_its_next_update():
    params = three()
    optimizer = room("dct_adamw/lazy", params)
    for count in range(4):
        step(optimizer, params, count, spoilt=1 if count in (1, 2) else None)
        if count == 2:
            assert float(optimizer.state[params[1]]["renewed"]) == 0.0
    assert [float(optimizer.state[p]["renewed"]) for p in params] == [3.0, 3.0, 3.0]
    step(optimizer, params, 4, spoilt=1)
    assert float(optimizer.state[params[0]]["renewed"]) == 4.0
    assert float(optimizer.state[params[1]]["renewed"]) == 3.0
    assert float(optimizer.state[params[1]]["gap"]) == 1.0


@pytest.mark.parametrize("transport", ["rotate", "keep", "reset"])
def test_moments_stay_with_columns_that_stay(transport):
    """Also where a new choice would begin them anew."""
    rule = DCTAdamWConfig(rank=2, transport=transport).matrix_rule()
    assert rule is not None
    state = rule.init((2, 9, 6), torch.device("cpu"))
    x = torch.stack([seeded(9, 6, seed=i) for i in range(2)])
    for count in range(3):
        rule.update(x, state, Step(count=[count, count]))
    old = {key: value.clone() for key, value in state.items()}
    x[0, 0, 0] = float("nan")
    rule.renew(x, state, Step(count=[3, 3]), [0, 1])
    assert all(torch.equal(value[0], old[key][0]) for key, value in state.items())
    for key in ("exp_avg", "exp_avg_sq", "age"):
        assert bool(state[key][1].any()) == (transport != "reset")


@pytest.mark.parametrize("name", ["dct_adamw", "ldadam", "dion", "trion", "dion2"])
def test_what_keeps_its_subspace_is_told_and_not_looked_at(name):
    """Tensors without data refuse to be read: a GPU would have been waited for."""
    rule = ranked(name).matrix_rule()
    assert rule is not None
    state = rule.init((3, 9, 6), torch.device("meta"))
    told = Step(count=[3, 4, 5], keys=[7, 8, 9], held=[])
    rule.update(torch.empty(3, 9, 6, device="meta"), state, told)
    assert told.held is not None
    ((which, held),) = told.held
    assert list(which) == [0, 1, 2]
    assert held.is_meta
    assert held.shape == (3,)


BETWEEN = [13, 14, 16]
"""Counts of updates at which nothing is due: the gap of `cases` is 3, and GaLore+'s search is over."""
NOT_ON_META = {"galore/stochastic": "rounds by random numbers of the device's own generator, and this device has none"}


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.matrix_rule() is not None])
def test_no_number_of_a_matrixs_step_between_renewals_is_read_by_the_host(name):
    """The matrices of the others, AdamW's, are in the next test."""
    rule = CONFIGS[name].matrix_rule()
    assert rule is not None
    state = rule.init((3, 9, 6), META)
    on_cpu = {"gap": 9.0, "renewed": 13.0}  # where a host may read them (`Renewals.init`)
    state |= {key: torch.full((3,), value) for key, value in on_cpu.items() if key in state}
    update = rule.update(torch.empty(3, 9, 6, device="meta"), state, Step(count=BETWEEN, keys=[7, 8, 9], held=[]))
    assert update.materialise().is_meta


@pytest.mark.parametrize("name", CONFIGS)
def test_no_number_of_an_elementwise_step_is_read_by_the_host(name):
    if name in NOT_ON_META:
        pytest.skip(NOT_ON_META[name])
    rule = CONFIGS[name].element_rule()
    kinds = [(shape, dtype) for shape in ((9, 6), (7,), (80, 64)) for dtype in (torch.float32, torch.bfloat16)]
    weights = [torch.empty(shape, dtype=dtype, device=META) for shape, dtype in kinds]  # the last two are coded
    states = [rule.init(weight) | {"step": torch.tensor(3.0)} for weight in weights]  # counts are read, on the CPU
    grads = [torch.empty_like(weight) for weight in weights]
    rule.step_(weights, grads, states, lr=0.1, weight_decay=0.1, seeds=range(len(weights)))
    assert all(weight.is_meta for weight in weights)


def test_counts_lie_on_the_device_until_somebody_asks(monkeypatch):
    """However many steps follow, of all parameters or of some; a reading, or a measured step, fetches them."""
    params = three()
    optimizer = room("dct_adamw", params)
    monkeypatch.setattr(optimizer._skipped, "fetch", lambda: None)  # on the CPU, where looking is free, it is at once
    for count in range(3):
        step(optimizer, params, count, spoilt=1)
    step(optimizer, params, 3)
    params[1].grad = None
    params[0].grad, params[2].grad = seeded(9, 6, seed=8), torch.full((9, 6), torch.nan)
    optimizer.step()
    (counts,) = optimizer._skipped._held.values()
    assert counts.tolist() == [0, 3, 1]
    monkeypatch.undo()
    for _ in range(2):
        assert optimizer.skipped_renewals == {"layer1.weight": 3, "layer2.weight": 1}


@pytest.mark.parametrize("svd", ["exact", "power"])
def test_where_nothing_converges_ldadam_keeps_its_basis(svd, monkeypatch, caplog):
    params = three()
    broken = {round(float(seeded(9, 6, seed=2)[0, 0]), 4)}
    failing(monkeypatch, "svd_basis", broken, ldadam)
    failing(monkeypatch, "subspace_iteration", broken)
    optimizer = LDAdam(named(params), rank=2, lr=0.01, svd=svd)
    old = [directions(optimizer, p) for p in params]
    with caplog.at_level(logging.WARNING, LOGGER):
        step(optimizer, params, 0)
    assert [same(old[i], optimizer.state[p]) for i, p in enumerate(params)] == [False, False, True]
    assert optimizer.skipped_renewals == {"layer2.weight": 1}
    assert len(caplog.records) == 1
    assert "layer2.weight: the factorisation of its gradient did not converge" in caplog.text
    step(optimizer, params, 1)  # and the warm iteration goes on from there
    assert not same(old[2], optimizer.state[params[2]])


@pytest.mark.parametrize(("cls", "where"), [(GaLore, module), (LDAdam, ldadam)], ids=["galore", "ldadam"])
def test_a_failed_svd_becomes_subspace_iteration(cls, where, monkeypatch, caplog):
    """Of the one matrix alone: the others of its batch have their SVD. LDAdam's own step used to raise."""
    params, twins = three(), three()
    failing(monkeypatch, "svd_basis", {round(float(seeded(9, 6, seed=1)[0, 0]), 4)}, where)
    optimizer = cls(named(params), rank=2, lr=0.01)
    with caplog.at_level(logging.WARNING, LOGGER):
        step(optimizer, params, 0)
    assert optimizer.skipped_renewals == {}
    assert [r.getMessage() for r in caplog.records] == [
        "renewal of layer1.weight: its exact SVD did not converge; subspace iteration took its place (said once)"
    ]
    monkeypatch.undo()
    other = cls(named(twins), rank=2, lr=0.01)
    step(other, twins, 0)
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        mine, exact = optimizer.state[p]["basis"], other.state[twin]["basis"]
        assert eye_error(mine) < 1e-5
        if i != 1:
            torch.testing.assert_close(p, twin)
            torch.testing.assert_close(mine, exact)
        else:  # nearly what the SVD would have found: it holds most of the gradient that the SVD's holds
            grad = seeded(9, 6, seed=1)
            assert float((grad @ mine).square().sum()) > 0.8 * float((grad @ exact).square().sum())


@pytest.mark.parametrize(
    ("cls", "options", "functions"),
    [
        (GaLore, {}, ("svd_basis", "subspace_iteration")),
        (GaLore, {"proj_type": "full"}, ("svd_bases",)),
        (SubspaceAdamW, {}, ("subspace_iteration",)),
    ],
    ids=["svd", "both sides", "iteration"],
)
def test_where_nothing_converges_the_old_basis_stays(cls, options, functions, monkeypatch, caplog):
    params = three()
    optimizer = cls(named(params), rank=2, lr=0.01, update_proj_gap=2, **options)
    for count in range(2):
        step(optimizer, params, count)
    old = [optimizer.state[p]["basis"].clone() for p in params]
    for name in functions:
        failing(monkeypatch, name, {round(float(seeded(9, 6, seed=202)[0, 0]), 4)})
    with caplog.at_level(logging.WARNING, LOGGER):
        step(optimizer, params, 2)
    assert [torch.equal(optimizer.state[p]["basis"], basis) for p, basis in zip(params, old, strict=True)] == [
        False,
        False,
        True,
    ]
    assert optimizer.skipped_renewals == {"layer2.weight": 1}
    assert len(caplog.records) == 1
    assert "layer2.weight: the factorisation of its gradient did not converge" in caplog.text
    assert all(bool(p.isfinite().all()) for p in params)
    monkeypatch.undo()
    step(optimizer, params, 3)
    step(optimizer, params, 4)  # and the next renewal is one
    assert not torch.equal(optimizer.state[params[2]]["basis"], old[2])


def test_a_section_is_named_with_its_parameter(caplog):
    fused = nn.Parameter(seeded(12, 4))
    optimizer = SubspaceAdamW([{"params": [("qkv.weight", fused)], "sections": (8, 4)}], rank=2)
    fused.grad = seeded(12, 4, seed=1)
    fused.grad[9, 0] = float("inf")
    with caplog.at_level(logging.WARNING, LOGGER):
        optimizer.step()
    assert optimizer.skipped_renewals == {"1.qkv.weight": 1}
