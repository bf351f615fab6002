"""Replicas, owners and islands among which no norms of gradients travel, since nobody asks for them."""

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, small
from test_replicated import loss, mine, run, seeded_model
from test_sharded import fsdp, whole
from torch.distributed.device_mesh import init_device_mesh

from thinrank.optim import build, route
from thinrank.optim.owned import own
from thinrank.optim.replicated import replicate
from thinrank.trainers.plan.held import Around
from thinrank.trainers.plan.owners import NORM, Owners
from thinrank.trainers.plan.wire import averaged_images

METHODS = {name: CONFIGS[name] for name in ("galore/power", "galore_plus/warmup", "dct_adamw", "dion", "ldadam")}
JOIN = {"replicas": replicate, "owners": own}


def trained(join, config, norms):
    model = seeded_model()
    optimizer = build(model, config)
    JOIN[join](model, optimizer, norms=norms)
    weights = run(model, optimizer, mine(), steps=range(9))
    assert optimizer.wire is not None
    return weights, optimizer.wire.payload, optimizer.knows_norm


@pytest.mark.parametrize("join", JOIN)
@pytest.mark.parametrize("name", METHODS)
def test_training_is_the_same_to_the_bit_and_sends_less(ranks, join, name):
    """By as much as norms are; of who remembers apart, all but a number that tells whether the step can be taken."""
    (found, sent, _), (expected, more, knows) = (
        ranks(2).run(trained, join, METHODS[name], norms)[0] for norms in (False, True)
    )
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert knows
    assert {**sent, "norms": 0} == {**more, "norms": 0}
    gradients_travel = join == "owners" and name in ("dion", "ldadam")
    assert sent["norms"] < more["norms"] or (gradients_travel and not more["norms"])
    if join == "replicas" and name.startswith(("galore", "dct")):
        assert "norms" not in sent


def asks(join, config):
    """What is said to who asks for the norm, before a step and after, and to who clips."""
    model = seeded_model()
    optimizer = build(model, config)
    JOIN[join](model, optimizer, norms=False)
    said = []
    for step in range(2):  # one that chooses, which has whole gradients, and one that does not
        optimizer.zero_grad()
        loss(model, step, *mine()).backward()
        for ask in (optimizer.gradient_norm, lambda: optimizer.clip_grad_norm_(1.0)):
            with pytest.raises(RuntimeError) as error:
                ask()
            said.append(str(error.value))
        optimizer.step()
    return said, optimizer.knows_norm


@pytest.mark.parametrize("join", JOIN)
def test_who_asks_for_a_norm_is_told_what_to_set(ranks, join):
    said, knows = ranks(2).run(asks, join, METHODS["galore/power"])[0]
    assert not knows
    assert len(said) == 4
    assert all("set norms=True in replicate or own (strategy.norms=always)" in sentence for sentence in said)


def knows_all_the_same(config, how):
    model = seeded_model()
    optimizer = build(model, config)
    replicate(model, optimizer, norms=False, **how)
    loss(model, 0, *mine()).backward()
    return optimizer.knows_norm, float(optimizer.gradient_norm())


@pytest.mark.parametrize(
    ("name", "how"),
    [("fira/power", {}), ("fira/power", {"messages": "signs"}), ("galore/power", {"messages": "full"}), ("adamw", {})],
)
def test_where_gradients_travel_their_norm_is_known(ranks, name, how):
    config = CONFIGS.get(name) or small("fira", svd="power")
    (knows, norm), (_, other) = ranks(2).run(knows_all_the_same, config, how)
    assert knows
    assert norm == other > 0


def is_thrown_away(join, config, bad):
    """One rank's gradients are no numbers in a step between renewals; all see it without a norm."""
    model = seeded_model()
    optimizer = build(model, config)
    JOIN[join](model, optimizer, norms=False)
    run(model, optimizer, mine(), steps=range(2))
    (loss(model, 2, *mine()) * (torch.nan if bad and dist.get_rank() == 1 else 1.0)).backward()
    finite = bool(optimizer.gradients_are_finite())
    optimizer.zero_grad()
    optimizer.step()
    return finite, run(model, optimizer, mine(), steps=range(3, 6))


@pytest.mark.parametrize("join", JOIN)
@pytest.mark.parametrize("name", [name for name in METHODS if "warmup" not in name])  # which takes in what it sees
def test_a_step_that_one_rank_cannot_take_is_seen_by_all(ranks, join, name):
    bad, good = (ranks(2).run(is_thrown_away, join, METHODS[name], bad) for bad in (True, False))
    for (finite, found), (fine, expected) in zip(bad, good, strict=True):
        assert (finite, fine) == (False, True)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def on_islands(norms):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fsdp(mesh["shard"])
    optimizer = build(model, METHODS["galore/power"])
    optimizer.replicate(mesh["replicate"].get_group(), norms=norms)
    run(model, optimizer, mine(), steps=range(5))
    loss(model, 5, *mine()).backward()
    finite = bool(optimizer.gradients_are_finite())
    optimizer.step()
    assert optimizer.wire is not None
    sent = dict(optimizer.wire.payload)
    try:
        optimizer.gradient_norm()
        said = ""
    except RuntimeError as error:
        said = str(error)
    return whole(model), sent, said, finite


def test_islands_leave_them_out_too(ranks):
    (found, sent, said, finite), (expected, more, nothing, _) = (
        ranks(4).run(on_islands, norms)[0] for norms in (False, True)
    )
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert finite
    assert "set norms=True" in said
    assert not nothing
    assert sent["norms"] < more["norms"]  # what is left of them: the sum by which an island knows what it holds
    assert sent["coordinates"] == more["coordinates"]


def steps_counted(join, config):
    model = seeded_model(all_alike=True)
    optimizer = build(model, config)
    JOIN[join](model, optimizer, norms=False)
    found = []
    for step in (0, 1):
        run(model, optimizer, mine(), steps=[step])
        assert optimizer.wire is not None
        found.append(dict(optimizer.wire.payload))
        optimizer.wire.payload.clear()
    return found


@pytest.mark.parametrize("name", ["galore/power", "dion"])
def test_the_plan_counts_none(ranks, name):
    config = METHODS[name]
    _, second = ranks(2).run(steps_counted, "replicas", config)[0]
    rows = [row for row in route(seeded_model(), config).rows if "unused" not in row.name and "seldom" not in row.name]
    said = averaged_images(rows, norms=False).kinds()
    kinds = ("factors", "norms") if name == "dion" else ("coordinates",)
    assert ("norms" in said) is (name == "dion")
    for kind in kinds:  # a weight that is never used sends zeros of its own
        assert second[kind] >= said[kind]["between"] > 0
    routing = route(seeded_model(), METHODS["galore/power"])
    owned = {on: Owners.of(Around(routing=routing), 2, norms=on).sent(routing.rows, 2).kinds() for on in (True, False)}
    assert owned[False]["norms"]["between"] == NORM < owned[True]["norms"]["between"]
