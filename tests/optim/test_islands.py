"""Replicas of models that are sharded: HSDP, islands, and what ranks hold alike."""

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS
from test_replicated import BATCH, PLAIN, STEPS, TINY, alone, apart, loss, mine, run, seeded_model, shares
from test_sharded import fsdp, whole, wide
from torch.distributed.device_mesh import init_device_mesh

from thinrank.optim import build
from thinrank.optim.replicated import ReplicaDrift


def replicas_of_rows(configs):
    """Two replicas of two ranks each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found = {}
    for name, config in configs.items():
        model = fsdp(mesh)
        optimizer = build(model, config)
        optimizer.check_every = 7
        run(model, optimizer, mine())
        found[name] = whole(model)
    return found


def test_replicas_of_sharded_models_are_one_process(ranks):
    answers = ranks(4).run(replicas_of_rows, TINY)
    for name, config in TINY.items():
        expected = alone(config, 4, all_alike=True)
        assert all(apart(found[name], expected) <= wide(name) for found in answers), name


def islands(configs, clip=None, how=None):
    """Two islands of two ranks: FSDP2 knows its own island alone, and the islands exchange what a step needs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found = {}
    for name, config in configs.items():
        model = fsdp(mesh["shard"])
        if dist.get_rank() >= 2:  # becomes the first island's
            with torch.no_grad():
                model.up.weight.mul_(2.0)
        optimizer = build(model, config)
        optimizer.replicate(mesh["replicate"].get_group(), check_every=5, **(how or {}))
        run(model, optimizer, mine(), clip=clip)
        assert optimizer.wire is not None
        found[name] = whole(model), dict(optimizer.wire.payload)
    return found


def test_islands_of_sharded_models_exchange_coordinates(ranks):
    answers = ranks(4).run(islands, PLAIN, timeout=240)
    for name, config in PLAIN.items():
        expected = alone(config, 4, all_alike=True)
        for found in answers:
            assert apart(found[name][0], expected) <= wide(name), name
            alike = answers[0][name][0]
            assert all(torch.equal(value, alike[key]) for key, value in found[name][0].items()), name
    for name in ("subspace_adamw", "dct_adamw"):
        sent = answers[0][name][1]
        assert ("coordinates" in sent) is (getattr(PLAIN[name], "residual", "off") == "off"), name


def test_islands_clip_by_the_norm_of_whole_gradients(ranks):
    """Of pieces as small as these a sketch shows all there is."""
    config = CONFIGS["galore/power"]
    (found, sent) = ranks(4).run(islands, {"x": config}, clip=0.3)[3]["x"]
    whole_messages, _ = ranks(4).run(islands, {"x": config}, clip=0.3, how={"messages": "full"})[3]["x"]
    assert sent["coordinates"] > 0
    expected = alone(config, 4, all_alike=True, clip=0.3, joint=True)
    assert apart(whole_messages, expected) <= 2e-6
    assert apart(found, expected) <= 2e-6
    assert apart(alone(config, 4, all_alike=True), expected) > 1e-3  # it did clip


def island(config, **how):
    """This rank's part of a model on two islands of two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fsdp(mesh["shard"])
    optimizer = build(model, config)
    optimizer.replicate(mesh["replicate"].get_group(), **how)
    return model, optimizer


def bursts(config):
    """A gradient that is no number on one rank, and whose step is left out; and a run that never saw it."""
    found, norms = [], []
    for burst in (True, False):
        model, optimizer = island(config)
        run(model, optimizer, mine(), steps=range(2))
        if burst:
            (loss(model, 2, *mine()) * (torch.nan if dist.get_rank() == 3 else 1.0)).backward()
            norms.append(float(optimizer.gradient_norm()))
            optimizer.zero_grad()
        run(model, optimizer, mine(), steps=range(3, 8))
        found.append(whole(model))
    return norms, all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_gradient_that_is_no_number_on_one_rank_is_none_on_all_islands(ranks):
    for norms, same in ranks(4).run(bursts, CONFIGS["galore/power"]):
        assert torch.tensor(norms).isnan().all()
        assert same


def goes_another_way(config):
    """The second island alone goes through `seldom`, now and then."""
    model, optimizer = island(config, bucket_bytes=1)
    model.all_alike = dist.get_rank() >= 2
    run(model, optimizer, mine())
    return whole(model)


def test_islands_may_use_other_weights_than_each_other(ranks):
    config = CONFIGS["galore/power"]
    model = seeded_model()
    optimizer = build(model, config)
    for step in range(STEPS):
        optimizer.zero_grad()
        for share in shares(4):
            model.all_alike = share.start >= BATCH // 2
            (loss(model, step, share) / 4).backward()
        optimizer.step()
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert apart(expected, alone(config, 4)) > 1e-3
    for found in ranks(4).run(goes_another_way, config):
        assert apart(found, expected) <= wide("galore/power")


def without_a_rate(config):
    """A step at rate 0, in which the gradients of one island alone are zeros, is a step of all."""
    model, optimizer = island(config)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    (loss(model, 0, *mine()) * (dist.get_rank() // 2)).backward()
    optimizer.step()
    return [float(state["step"]) for state in optimizer.state.values() if "step" in state]


def test_islands_agree_whether_a_step_at_rate_0_is_one(ranks):
    for counts in ranks(4).run(without_a_rate, CONFIGS["galore/power"]):
        assert 1.0 in counts


def drifts(how, what):
    """What a rank says once the last bit of one number is another on rank 1."""
    config = CONFIGS["galore/power"]
    if how == "islands":
        model, optimizer = island(config, check_every=3)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if how == "HSDP" else None
        model = fsdp(mesh)
        optimizer = build(model, config)
        optimizer.check_every = 3
    run(model, optimizer, mine(), steps=range(2))
    if dist.get_rank() == 1:
        weight = model.up.weight
        tensor = weight.to_local() if what == "weight" else optimizer.state[weight][what]
        with torch.no_grad():
            tensor.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
    try:
        run(model, optimizer, mine(), steps=[2])
    except ReplicaDrift as drift:
        assert optimizer.wire is not None
        return str(drift), optimizer.wire.rare.payload["checks"]
    return "", 0


@pytest.mark.parametrize(
    ("how", "what", "name"),
    [
        ("FSDP2", "basis", "basis of up.weight"),
        ("HSDP", "weight", "up.weight"),
        ("HSDP", "basis", "basis of up.weight"),
        ("islands", "weight", "up.weight"),
        ("islands", "basis", "basis of up.weight"),
    ],
)
def test_what_ranks_hold_alike_and_that_drifts_apart_stops_all_of_them(ranks, how, what, name):
    """Two numbers a tensor travel, and a flag where ranks with other pieces must be told."""
    named = {name, "up.weight"}  # weights come first, and whether a bit of a basis reaches them is a matter of rounding
    for sentence, size in ranks(2 if how == "FSDP2" else 4).run(drifts, how, what):
        assert any(f"drifted apart: {one} is not the same on all ranks after 3 steps" in sentence for one in named)
        assert 0 < size < 1500
