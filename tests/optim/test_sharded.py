"""Weights in pieces on several ranks: N ranks that each hold rows of them equal one process."""

import copy
import re
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CONFIGS
from test_replicated import (
    PLAIN,
    STEPS,
    TINY,
    alone,
    apart,
    as_good,
    bound,
    mine,
    no_farther,
    run,
    seeded_model,
    shares,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from thinrank.optim import AdamWConfig, GaLoreConfig, build, route


def fsdp(mesh=None, dtype=torch.float32, start=0, weights=None, ignored=False, dim=0):
    # torch warns of layers whose output is a view, as that of a Linear is; nothing here writes into one
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model = seeded_model(start, all_alike=True)  # FSDP2 waits for ever where ranks do not use the same weights
    model = model.to(dtype)
    if weights is not None:
        model.load_state_dict({**model.state_dict(), **weights})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    how = {"mesh": mesh, "shard_placement_fn": (lambda p: Shard(dim) if p.ndim > 1 else Shard(0)) if dim else None}
    fully_shard(model.up, **how)
    fully_shard(model.down, **how)
    left_out = {p for name, p in model.named_parameters() if name == "square.weight"} if ignored else None
    fully_shard(model, ignored_params=left_out, **how)
    return model


def wide(name):
    """As far as rounding may take a run; moments of 8 bits, too, may fall to the next code."""
    return 2e-2 if getattr(CONFIGS[name], "state_bits", 32) == 8 else bound(name)


def whole(model):
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def by_rows(configs, parts=1, **options):
    found = {}
    for name, config in configs.items():
        model = fsdp()
        optimizer = build(model, config)
        optimizer.check_every = 7
        run(model, optimizer, mine(parts), **options)
        found[name] = whole(model)
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks_", "configs"), [(1, PLAIN), (2, CONFIGS), (4, PLAIN)], ids=["1", "2", "4"])
def test_rows_on_ranks_are_whole_weights_in_one_process(ranks, ranks_, configs):
    answers = ranks(ranks_).run(by_rows, configs, timeout=240)
    for name, config in configs.items():
        expected = alone(config, ranks_, all_alike=True)
        for found in answers:
            assert apart(found[name], expected) <= wide(name) or as_good(name, found[name], expected), name


def test_accumulated_gradients_are_stepped_once(ranks):
    answers = ranks(2).run(by_rows, TINY, parts=2)
    for name, config in TINY.items():
        assert apart(answers[1][name], alone(config, 4, all_alike=True)) <= wide(name), name


def test_clipping_is_by_the_norm_of_whole_gradients(ranks):
    answers = ranks(2).run(by_rows, TINY, clip=0.3)
    for name, config in TINY.items():
        expected = alone(config, 2, all_alike=True, clip=0.3, joint=True)
        assert apart(answers[0][name], expected) <= wide(name), name
        assert apart(alone(config, 2, all_alike=True), expected) > 1e-3  # it did clip


HALF = {
    f"{name} {way}": replace(CONFIGS[name], half_weights=way)
    for name in ("galore/power", "ldadam", "adamw")
    for way in ("nearest", "stochastic", "master")
}


def in_half(configs, cast=False):
    found = {}
    for name, config in configs.items():
        model = fsdp(dtype=torch.float32 if cast else torch.bfloat16)
        run(model, build(model, config), mine(), cast=cast)
        found[name] = whole(model)
    return found


def test_bfloat16_weights_and_autocast(ranks):
    """However 16-bit weights take their update: no farther from float32 than one process is."""
    half, cast = ranks(2).run(in_half, HALF)[0], ranks(2).run(in_half, TINY, cast=True)[0]
    for name, config in HALF.items():
        exact = alone(config, 2, all_alike=True)
        one = alone(config, 2, all_alike=True, dtype=torch.bfloat16)
        assert all(value.dtype is torch.bfloat16 for value in half[name].values())
        assert no_farther(name, half[name], exact, one), name
    for name, config in TINY.items():
        exact = alone(config, 2, all_alike=True)
        assert no_farther(name, cast[name], exact, alone(config, 2, all_alike=True, cast=True)), name


# --- state ------------------------------------------------------------------------------------------------------------

KEPT = {
    **{name: CONFIGS[name] for name in ("galore/power", "galore_plus/warmup", "ldadam/8bit moments", "muon", "adamw")},
    "adamw master": replace(CONFIGS["adamw"], half_weights="master"),
}


def dtype_of(name):
    return torch.bfloat16 if "master" in name else torch.float32


def handed_over(steps=9, by="full"):
    """Weights and optimizer of each run after some steps, as one process would have them, and what it would end as."""
    found = {}
    for name, config in KEPT.items():
        model = fsdp(dtype=dtype_of(name))
        optimizer = build(model, config)
        run(model, optimizer, mine(), steps=range(steps))
        state = optimizer.full_state_dict() if by == "full" else optimizer.state_dict()
        found[name] = whole(model), copy.deepcopy(state), optimizer.state_bytes()
        run(model, optimizer, mine(), steps=range(steps, STEPS))
        found[name] += (whole(model),)
    return found


def goes_on(handed, steps=9):
    found = {}
    for name, config in KEPT.items():
        weights, state, *_ = handed[name]
        model = fsdp(weights=weights, dtype=dtype_of(name))
        optimizer = build(model, config)
        optimizer.load_state_dict(copy.deepcopy(state))
        run(model, optimizer, mine(4 // dist.get_world_size()), steps=range(steps, STEPS))
        found[name] = whole(model)
    return found


def test_a_run_goes_on_to_the_bit_and_on_other_numbers_of_ranks(ranks):
    first = ranks(4).run(handed_over)
    handed = first[0]
    for name, config in KEPT.items():
        assert all(answer[name][1] == {} for answer in first[1:])  # it lies on the first rank
        model = seeded_model(all_alike=True).to(dtype_of(name))
        optimizer = build(model, config)
        alike = optimizer.state_dict()
        for i, state in handed[name][1]["state"].items():
            assert looks(state) == looks(alike["state"][i])
        states = alike["state"].values()
        shared = 4 * 4 * len(alike["state"])  # counts of steps, which every rank has of what is stepped in pieces
        shared += 3 * sum(state["basis"].nbytes for state in states if "basis" in state)  # of matrices cut into rows
        assert sum(answer[name][2] for answer in first) <= 1.02 * optimizer.state_bytes() + shared
        assert max(answer[name][2] for answer in first) <= 0.5 * optimizer.state_bytes() + shared / 4
    for n in (4, 2, 1):
        again = ranks(n).run(goes_on, handed)[0]
        for name in KEPT:
            if n == 4:
                assert all(torch.equal(again[name][key], value) for key, value in handed[name][3].items()), name
            else:
                assert apart(again[name], handed[name][3]) <= how_far(name), name
    for name, config in KEPT.items():  # and where nothing is sharded
        model = seeded_model(all_alike=True).to(dtype_of(name))
        model.load_state_dict(handed[name][0], strict=False)
        optimizer = build(model, config)
        optimizer.load_state_dict(copy.deepcopy(handed[name][1]))
        found = run(model, optimizer, shares(4), steps=range(9, STEPS))
        assert apart(found, handed[name][3]) <= how_far(name), name


def looks(state):
    return {key: (value.shape, value.dtype) for key, value in state.items()}


def how_far(name):
    return wide(name) if name in CONFIGS else 2e-2


class Tables(nn.Module):
    """Embeddings whose moments are codes: pieces are whole blocks of 256 entries of the first alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(1024, 16)
        self.other = nn.Embedding(1002, 16)


def drawn(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(1024, 16, generator=generator), torch.randn(1002, 16, generator=generator)


def coded(cut, steps=range(5), state=None):
    model = Tables()
    if cut:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = build(model, replace(CONFIGS["adamw"], state_bits=8))
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        for param, grad in zip(model.parameters(), drawn(step), strict=True):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if cut else grad
        optimizer.step()
    values = [p.full_tensor() if cut else p for p in model.parameters()]
    return [value.detach().clone() for value in values], copy.deepcopy(optimizer.full_state_dict()), optimizer.wire


def test_moments_of_8_bits_are_those_of_the_whole_weight(ranks):
    expected, whole, _ = coded(False)
    assert all("exp_avg_codes" in state for state in whole["state"].values())
    (values, state, first), (_, _, second) = ranks(2).run(coded, True)
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    for i, own in whole["state"].items():
        assert all(torch.equal(value, state["state"][i][key]) for key, value in own.items())
    half = 5 * 501 * 16 * 4  # of the second one, its gradient, and the weight there and back
    assert first.payload + second.payload == {"gradients": half, "weights": 2 * half}
    begun = coded(False, steps=range(3))[1]
    again = ranks(4).run(coded, True, steps=range(3, 5), state=begun)[0]
    for i, own in whole["state"].items():
        assert all(torch.equal(value, again[1]["state"][i][key]) for key, value in own.items())


def with_another_rate(config):
    """One goes on as it was, the other from what it loads; then both get another rate, and step."""
    found = []
    state, weights = {}, {}
    for loads in (False, True):
        model = fsdp(weights=weights or None)
        optimizer = build(model, config)
        if loads:
            optimizer.load_state_dict(copy.deepcopy(state))
        else:
            run(model, optimizer, mine(), steps=range(3))
            weights = whole(model)
            state = optimizer.state_dict()
        for group in optimizer.param_groups:
            group["lr"] *= 10.0
        run(model, optimizer, mine(), steps=range(3, 5))
        found.append(whole(model))
    return all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("name", ["muon", "galore/power"])
def test_what_was_loaded_follows_the_schedule(ranks, name):
    assert ranks(2).run(with_another_rate, replace(CONFIGS[name], weight_decay=0.1)) == [True, True]


def ranks_of_its_own(state=None):
    model = fsdp()
    given = {"square.weight": 2, "up.weight": 3, "down.weight": 1}
    optimizer = build(model, CONFIGS["galore/power"], ranks=given if state is None else None)
    if state is not None:
        optimizer.load_state_dict(state)
    run(model, optimizer, mine(), steps=range(3))
    return copy.deepcopy(optimizer.state_dict())


def test_ranks_of_their_own_are_loaded_into_pieces(ranks):
    first = ranks(2).run(ranks_of_its_own)[0]
    again = ranks(2).run(ranks_of_its_own, first)[0]
    shapes = {i: looks(own) for i, own in first["state"].items()}
    assert {i: looks(own) for i, own in again["state"].items()} == shapes
    assert len({own["basis"].shape for own in first["state"].values() if "basis" in own}) >= 3


def test_state_dict_is_that_of_one_process_on_every_rank(ranks):
    first, second = ranks(2).run(handed_over, by="plain")
    for name in KEPT:
        for i, state in first[name][1]["state"].items():
            assert all(torch.equal(value, second[name][1]["state"][i][key]) for key, value in state.items())


def through_torchs_checkpoint(folder, config):
    """torch's distributed checkpoint of model and optimizer, into fresh ones that start elsewhere."""
    model = fsdp()
    optimizer = build(model, config)
    run(model, optimizer, mine(), steps=range(9))
    mine_, theirs = get_state_dict(model, optimizer)
    dcp.save({"model": mine_, "optimizer": theirs}, checkpoint_id=folder)
    run(model, optimizer, mine(), steps=range(9, STEPS))
    other = fsdp(start=3)
    fresh = build(other, config)
    weights, state = get_state_dict(other, fresh)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state)
    run(other, fresh, mine(), steps=range(9, STEPS))
    expected = whole(model)
    return all(torch.equal(value, expected[name]) for name, value in whole(other).items())


@pytest.mark.parametrize("name", ["galore/power", "ldadam", "adamw"])
def test_torchs_distributed_checkpoint_carries_it(ranks, name, tmp_path):
    assert ranks(2).run(through_torchs_checkpoint, str(tmp_path / "saved"), CONFIGS[name]) == [True, True]


# --- what is measured and counted -------------------------------------------------------------------------------------


def measures(config):
    model = fsdp()
    optimizer = build(model, config)
    run(model, optimizer, mine(), steps=range(3))
    optimizer.measure = True
    run(model, optimizer, mine(), steps=range(3, 4))
    wire = optimizer.wire
    assert wire is not None
    return optimizer.measured, dict(wire.payload), wire.messages


def test_what_is_measured_is_that_of_one_process(ranks):
    config = CONFIGS["galore/power"]
    model = seeded_model(all_alike=True)
    optimizer = build(model, config)
    run(model, optimizer, shares(2), steps=range(3))
    optimizer.measure = True
    run(model, optimizer, shares(2), steps=range(3, 4))
    for found, _, _ in ranks(2).run(measures, config):
        assert found.keys() == optimizer.measured.keys()
        for what, values in optimizer.measured.items():
            assert found[what] == pytest.approx(values, rel=1e-4), what


def test_half_of_the_matrices_travels_and_comes_back(ranks):
    """On two ranks, every matrix of which one of them owns half: the other half travels, gradient and update."""
    used = sum(a * b for a, b in ((24, 8), (8, 24), (8, 8)))  # `seldom` has no gradient in steps 0, 1 and 3
    steps, seldom = 4, 8 * 8
    found = [(payload, messages) for _, payload, messages in ranks(2).run(measures, CONFIGS["muon"])]
    for kind in ("gradients", "updates"):
        assert sum(payload.get(kind, 0) for payload, _ in found) == 4 * (steps * used + seldom) / 2
    assert found[0][1] == found[1][1] == 2 * steps


def sums(config):
    model = fsdp()
    optimizer = build(model, config)
    found = []
    for step in (0, 1, 3):
        run(model, optimizer, mine(), steps=[step])
        assert optimizer.wire is not None
        found.append(dict(optimizer.wire.payload))
    return found


def test_matrices_whose_rows_lie_on_ranks_travel_as_small_sums_at_renewals_alone(ranks):
    """`up` and `square` are cut along the side that is kept; `down` along the other, and goes to its owner."""
    first, second, third = ranks(2).run(sums, CONFIGS["galore/power"])[0]
    assert 0 < first["sums"] == second["sums"] == third["sums"]
    both = [answer[2] for answer in ranks(2).run(sums, CONFIGS["galore/power"])]
    assert sum(each.get("gradients", 0) for each in both) == 4 * 3 * 8 * 24 / 2


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(what):
    try:
        what()
    except ValueError as error:
        return str(error)
    return "it was taken"


def refusals():
    model = fsdp()
    optimizer = build(model, CONFIGS["galore/power"])
    attempts = (
        lambda: optimizer.replicate(),
        lambda: optimizer.own(),
        lambda: optimizer.in_backward("step"),
        lambda: optimizer.allocate_ranks("weight"),
        lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]}),
        lambda: build(fsdp(ignored=True), CONFIGS["galore/power"]),
        lambda: build(fsdp(dim=1), CONFIGS["galore/power"]),
    )
    return [refused(what) for what in attempts]


def test_what_cannot_be_is_refused_in_one_sentence(ranks):
    found = ranks(2).run(refusals)[0]
    for sentence, word in zip(
        found,
        (
            "give mesh['replicate']",
            "leave own out",
            "'off'",
            "give the result as ranks",
            "at construction",
            "root",
            "rows",
        ),
        strict=True,
    ):
        assert word in sentence
        assert "\n" not in sentence


def uneven_columns():
    """Five columns on two ranks: cut by FSDP2, and by hand, which torch allows."""
    mesh, layers = init_device_mesh("cpu", (2,)), [nn.Linear(5, 6, bias=False) for _ in range(2)]
    layers[1].weight = nn.Parameter(distribute_tensor(layers[1].weight.data, mesh, [Shard(1)]))
    try:
        fully_shard(layers[0], mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    except NotImplementedError as error:
        return str(error), refused(lambda: build(layers[1], CONFIGS["galore/power"]))
    return "it was cut", ""


def test_columns_that_ranks_do_not_divide_are_refused_by_torch_and_here(ranks):
    for of_torch, ours in ranks(2).run(uneven_columns):
        assert re.fullmatch(r"FSDP does not support uneven sharding on dim 1: .*6, 5.*\(world size: 2\)", of_torch)
        assert re.search(r"weight is placed as .*Shard\(dim=1\).* use fully_shard without shard_placement_fn", ours)


def routed():
    model = fsdp()
    return [route(model, config).table() for config in (GaLoreConfig(rank=3), AdamWConfig())]


def test_what_a_method_costs_is_told_of_the_whole_weights(ranks):
    """`route` took the rows of a rank for the model, and sent messages to find that out."""
    expected = [route(seeded_model(all_alike=True), config).table() for config in (GaLoreConfig(rank=3), AdamWConfig())]
    assert ranks(2).run(routed) == [expected, expected]
