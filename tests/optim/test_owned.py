"""Replicas that share out state and work: N ranks, each of which steps its matrices, equal one process."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS
from test_replicated import (
    CLIPPED,
    PLAIN,
    STEPS,
    TINY,
    alone,
    apart,
    bound,
    mine,
    no_farther,
    run,
    seeded_model,
    shares,
)
from test_sending import table_run
from test_sharded import HALF, KEPT, dtype_of, how_far, looks, refused, wide

from thinrank.optim import build
from thinrank.optim.owned import own
from thinrank.optim.replicated import ReplicaDrift, replicate


def owned(configs, parts=1, dtype=torch.float32, how=None, **options):
    found = {}
    for name, config in configs.items():
        model = seeded_model(dist.get_rank()).to(dtype)
        optimizer = build(model, config)
        own(model, optimizer, **{"check_every": 10, "even_from": 64, **(how or {})})
        found[name] = run(model, optimizer, mine(parts), **options)
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks_", "configs"), [(1, PLAIN), (2, CONFIGS), (4, PLAIN)], ids=["1", "2", "4"])
def test_owners_that_tell_their_updates_are_one_process(ranks, ranks_, configs):
    answers = ranks(ranks_).run(owned, configs, timeout=240)
    for name, config in configs.items():
        expected = alone(config, ranks_)
        for found in answers:
            assert apart(found[name], expected) <= wide(name), name
        for found in answers[1:]:
            assert all(torch.equal(value, answers[0][name][key]) for key, value in found[name].items()), name


def test_owners_that_are_sent_whole_gradients_are_one_process(ranks):
    """They tell directions all the same, and subspaces, which other ranks need for these alone."""
    configs = {name: CONFIGS[name] for name in ("galore/power", "galore/full", "galore_plus", "dct_adamw", "mfac")}
    for found in ranks(2).run(owned, configs, how={"messages": "full"}):
        for name, config in configs.items():
            assert apart(found[name], alone(config, 2)) <= wide(name), name


def projecting_all(configs, join, tied):
    found = {}
    for name, config in configs.items():
        model = seeded_model(dist.get_rank(), tied=tied)
        optimizer = build(model, config)
        join(model, optimizer)
        weights, wire = run(model, optimizer, mine()), optimizer.wire
        assert wire is not None
        found[name] = weights, dict(wire.payload)
    return found


@pytest.mark.parametrize("join", [replicate, own])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_embeddings_and_head_are_projected_like_matrices(ranks, join, tied):
    targets = ["all-linear", r".*embed.*", *([] if tied else [r".*head.*"])]  # what is tied has one name
    configs = {name: replace(CONFIGS[name], targets=targets) for name in ("galore/power", "muon", "dion")}
    first, second = ranks(2).run(projecting_all, configs, join, tied)
    vectors = sum(p.numel() for p in seeded_model(tied=tied).parameters() if p.ndim < 2 and p.requires_grad)
    for name, config in configs.items():
        model = seeded_model(tied=tied)
        (found, sent), (other, _) = first[name], second[name]
        assert apart(found, run(model, build(model, config), shares(2))) <= bound(name), name
        assert all(torch.equal(value, other[key]) for key, value in found.items()), name
        assert sent["dense"] == 4 * STEPS * vectors  # nothing else travels as what is stepped element by element


@pytest.mark.parametrize("how", [{"overlap": False}, {"bucket_bytes": 1}, {"even_from": 10**9}], ids=str)
def test_when_and_in_how_many_messages_makes_no_difference(ranks, how):
    answers = ranks(2).run(owned, TINY, how=how)
    for name, config in TINY.items():
        assert apart(answers[0][name], alone(config, 2)) <= wide(name), name


def test_accumulated_gradients_meet_once(ranks):
    answers = ranks(2).run(owned, TINY, parts=2)
    for name, config in TINY.items():
        assert apart(answers[1][name], alone(config, 4)) <= wide(name), name


def test_clipping_is_by_the_norm_of_whole_gradients(ranks):
    """What a rank owns counts there, what every rank steps counts once; sketches of small matrices are exact."""
    answers = ranks(2).run(owned, CLIPPED, clip=0.3)
    for name, config in CLIPPED.items():
        expected = alone(config, 2, clip=0.3, joint=True)
        assert apart(answers[0][name], expected) <= wide(name), name
        assert apart(alone(config, 2), expected) > 1e-3  # it did clip


def norm_where_one_rank_has_nothing():
    model = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    optimizer = build(model, CONFIGS["muon"])
    own(model, optimizer)
    model(torch.ones(2, 8, dtype=torch.bfloat16)).square().sum().backward()
    return optimizer.gradient_norm()


def test_the_norm_of_16_bit_gradients_is_that_of_all_ranks(ranks):
    first, second = ranks(2).run(norm_where_one_rank_has_nothing)
    assert first.dtype is torch.float32
    assert torch.equal(first, second)
    assert first > 0


def test_bfloat16_weights_messages_and_autocast(ranks):
    half = ranks(2).run(owned, HALF, dtype=torch.bfloat16)
    cast = ranks(2).run(owned, TINY, cast=True)[0]
    short = ranks(2).run(owned, TINY, how={"dtype": torch.bfloat16})
    for name, config in HALF.items():
        exact, one = alone(config, 2), alone(config, 2, dtype=torch.bfloat16)
        assert all(value.dtype is torch.bfloat16 for value in half[0][name].values())
        assert no_farther(name, half[0][name], exact, one), name
        assert all(torch.equal(value, half[1][name][key]) for key, value in half[0][name].items()), name
    for name, config in TINY.items():
        exact = alone(config, 2)
        assert no_farther(name, cast[name], exact, alone(config, 2, cast=True)), name
        if name == "galore/power":  # others choose by what has been rounded on its way
            assert apart(short[0][name], exact) > 0
            assert no_farther(name, short[0][name], exact, exact)
        assert all(torch.equal(value, short[1][name][key]) for key, value in short[0][name].items()), name


def begun(name, rank=0, weights=None):
    model = seeded_model(rank).to(dtype_of(name))
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    optimizer = build(model, KEPT[name])
    own(model, optimizer, even_from=64)
    return model, optimizer


def handed_over(steps=9):
    found = {}
    for name in KEPT:
        model, optimizer = begun(name)
        run(model, optimizer, mine(), steps=range(steps))
        weights = {key: value.detach().clone() for key, value in model.named_parameters()}
        state = copy.deepcopy(optimizer.full_state_dict())
        found[name] = weights, state, optimizer.state_bytes(), run(model, optimizer, mine(), steps=range(steps, STEPS))
    return found


def goes_on(handed, steps=9):
    found = {}
    for name in KEPT:
        model, optimizer = begun(name, 3 + dist.get_rank(), handed[name][0])
        optimizer.load_state_dict(copy.deepcopy(handed[name][1]))
        found[name] = run(model, optimizer, mine(4 // dist.get_world_size()), steps=range(steps, STEPS))
    return found


def test_a_run_goes_on_to_the_bit_and_on_other_numbers_of_ranks(ranks):
    first = ranks(4).run(handed_over)
    handed = first[0]
    for name in KEPT:
        assert all(answer[name][1] == {} for answer in first[1:])
        whole = build(seeded_model().to(dtype_of(name)), KEPT[name]).state_dict()
        for i, state in handed[name][1]["state"].items():
            assert looks(state) == looks(whole["state"][i])
    for n in (4, 2, 1):
        again = ranks(n).run(goes_on, handed)[0]
        for name in KEPT:
            if n == 4:
                assert all(torch.equal(again[name][key], value) for key, value in handed[name][3].items()), name
            else:
                assert apart(again[name], handed[name][3]) <= how_far(name), name
    for name, config in KEPT.items():  # and in one process
        model = seeded_model().to(dtype_of(name))
        model.load_state_dict(handed[name][0], strict=False)
        optimizer = build(model, config)
        optimizer.load_state_dict(copy.deepcopy(handed[name][1]))
        found = run(model, optimizer, shares(4), steps=range(9, STEPS))
        assert apart(found, handed[name][3]) <= how_far(name), name


def counted(config):
    """Bytes by kind of three steps, of which the first chooses a subspace, and of the state."""
    model = seeded_model()
    optimizer = build(model, config)
    own(model, optimizer, even_from=64)
    counts = []
    for step in (0, 3, 4):  # none of them goes through `seldom`
        run(model, optimizer, mine(), steps=[step])
        assert optimizer.wire is not None
        counts.append(dict(optimizer.wire.payload))
    return counts, optimizer.state_bytes()


def test_coordinates_go_to_owners_and_directions_come_back(ranks):
    """Three matrices of 24, 24 and 8 rows on the long side, rank 2: an owner sends nothing and tells three."""
    answers = ranks(4).run(counted, replace(CONFIGS["galore/power"], rank=2))
    long, never = 24 + 24 + 8, 8 * 8 + 12 * 8
    first = {kind: sum(counts[0].get(kind, 0) for counts, _ in answers) for kind in answers[0][0][0]}
    last = {kind: sum(c[2].get(kind, 0) - c[1].get(kind, 0) for c, _ in answers) for kind in answers[0][0][2]}
    assert first["renewals"] == 3 * 4 * (8 * long + never)  # whole gradients, and zeros of what has none
    assert last["renewals"] == 3 * 4 * never
    assert last["coordinates"] == last["updates"] == 3 * 4 * 2 * long
    assert first["bases"] == 3 * 4 * 3 * (8 * 2)
    assert last["bases"] == 0
    whole = build(seeded_model(), replace(CONFIGS["galore/power"], rank=2)).state_bytes()
    assert max(size for _, size in answers) < 0.7 * whole


def joins(model, optimizer, embeddings):
    own(model, optimizer, embeddings=embeddings, even_from=64)


def test_touched_rows_go_to_those_who_have_them(ranks):
    rows, whole = ranks(4).run(table_run, joins, "rows"), ranks(4).run(table_run, joins, "dense")
    for (found, sent), (expected, _) in zip(rows, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert 0 < sent["rows"] <= 4 * 4 * 8 * 24


def rounds(embeddings):
    model = seeded_model(tied=False)
    optimizer = build(model, CONFIGS["galore/power"])
    own(model, optimizer, embeddings=embeddings, even_from=64)
    weights = run(model, optimizer, mine(), steps=range(5))
    assert optimizer.wire is not None
    return weights, dict(optimizer.wire.payload)


def test_pieces_of_embeddings_may_travel_in_bfloat16(ranks):
    whole, rounded, both = (ranks(2).run(rounds, how)[0] for how in ("dense", "bfloat16", "rows_bfloat16"))
    kinds = ("dense", "rows")
    sent = [sum(payload.get(kind, 0) for kind in kinds) for _, payload in (whole, rounded, both)]
    assert sent[0] > sent[1] >= sent[2] > 0
    rest, same = ({k: v for k, v in payload.items() if k not in kinds} for _, payload in (rounded, whole))
    assert rest == same
    assert all(torch.equal(both[0][name], value) for name, value in rounded[0].items())
    assert 0 < apart(rounded[0], whole[0]) < 2**-8


def drifts():
    model = seeded_model()
    optimizer = build(model, CONFIGS["galore/power"])
    own(model, optimizer, check_every=1)
    run(model, optimizer, mine(), steps=range(2))
    if dist.get_rank() == 1:
        model.square.weight.data[0, 0] += 1e-6
    try:
        optimizer.check_replicas()
    except ReplicaDrift as error:
        return str(error)
    return ""


def test_replicas_that_drift_apart_are_stopped(ranks):
    assert all("square.weight is not the same" in sentence for sentence in ranks(2).run(drifts))


def refusals():
    model = seeded_model()
    optimizer = build(model, CONFIGS["galore/power"])
    run(model, optimizer, mine(), steps=range(1))
    shared = build(seeded_model(), replace(CONFIGS["galore/power"], rank_allocation="gradient"))
    fresh = build(seeded_model(), CONFIGS["galore/power"])
    own(seeded_model(), fresh)
    return [
        refused(lambda: own(model, optimizer)),
        refused(lambda: own(seeded_model(), shared)),
        refused(lambda: fresh.replicate()),
        refused(lambda: fresh.in_backward("step")),
        refused(lambda: fresh.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})),
    ]


def keeps_what_it_had(taken):
    """Bad values, and a step that was taken before: the optimizer goes on alone as if nobody had asked."""
    model, alike = seeded_model(), seeded_model()
    optimizer, other = build(model, CONFIGS["galore/power"]), build(alike, CONFIGS["galore/power"])
    for each, its in ((model, optimizer), (alike, other)):
        run(each, its, shares(1), steps=range(taken))
    said = refused(lambda: own(model, optimizer, even_from=64, embeddings="some"))
    found, expected = (run(m, o, shares(1), steps=range(taken, 4)) for m, o in ((model, optimizer), (alike, other)))
    return said, all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(("taken", "word"), [(0, "embeddings must be"), (2, "before the first step")])
def test_a_refusal_loses_nothing(ranks, taken, word):
    for said, same in ranks(2).run(keeps_what_it_had, taken):
        assert word in said
        assert same


def test_what_cannot_be_is_refused_in_one_sentence(ranks):
    words = ("before the first", "give the result as ranks", "into a new optimizer", "'off'", "at construction")
    for sentence, word in zip(ranks(2).run(refusals)[0], words, strict=True):
        assert word in sentence
        assert "\n" not in sentence
