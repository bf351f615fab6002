"""A parameter with multipliers is stepped as in a group of its own, by every method and wherever its pieces lie."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, copies, equal, make, run, weights
from laws import seeded
from test_replicated import apart, bound, mine, seeded_model, shares
from test_replicated import run as train
from test_sharded import fsdp, whole

from thinrank.optim import build
from thinrank.optim.owned import own
from thinrank.optim.replicated import ReplicaDrift, replicate
from thinrank.optim.update import Columns, Entries, Update

STEPS = 4  # two of them choose a subspace, at the gap of 3
PAIRS = [(1.7, 3.0), (0.0, 1.0), (0.6, 0.0)]


def kinds(dtype=torch.float32):
    """Two alike, which are stepped in one batch, a wide one, a vector and a convolution."""
    return [p for i, p in enumerate(weights(dtype)) if i in (0, 1, 2, 4, 5)]


def factors(count):
    return [0.9, 1.0, 0.5, 0.99][:count], [0.1, 0.02, 0.0, 0.3][:count]


def updates(dtype):
    direction, basis = seeded(3, 6, 2, seed=1).to(dtype), seeded(3, 4, 2, seed=2).to(dtype)
    rest, rows = seeded(3, 6, 4, seed=3), seeded(3, 6, 1, seed=4)
    columns = Columns(index=torch.tensor([[0, 2], [1, 3], [3, 0]]), short=4)
    entries = Entries(index=torch.tensor([[0, 5], [7, 2], [1, 23]]), values=seeded(3, 2, seed=5))
    return {
        "product": Update(direction=direction, basis=basis),
        "columns": Update(direction=direction, basis=columns),
        "rest": Update(rest=rest),
        "rows": Update(rest=rest, rows=rows),
        "all": Update(direction=direction, basis=basis, rest=rest, rows=rows, entries=entries),
        "columns and rest": Update(direction=direction, basis=columns, rest=rest, entries=entries),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", updates(torch.float32))
def test_a_batch_with_factors_of_its_own_is_each_matrix_alone(name, transposed, dtype):
    """Factors for each of a batch are those factors for each matrix by itself, whatever an update is made of."""
    update, (keeps, steps) = updates(dtype)[name], factors(3)
    start = [seeded(4, 6, seed=i).mT if transposed else seeded(6, 4, seed=i) for i in range(3)]
    together, one_by_one = ([w.clone() for w in start] for _ in range(2))
    update.apply_(together, keep=keeps, step=steps)
    for i, weight in enumerate(one_by_one):
        entries = (
            None
            if update.entries is None
            else Entries(index=update.entries.index[i : i + 1], values=update.entries.values[i : i + 1])
        )
        basis = update.basis
        if isinstance(basis, Columns):
            basis = Columns(index=basis.index[i : i + 1], short=4)
        elif basis is not None:
            basis = basis[i : i + 1]
        direction, rest, rows = (
            None if part is None else part[i : i + 1] for part in (update.direction, update.rest, update.rows)
        )
        alone = Update(direction=direction, basis=basis, rest=rest, rows=rows, entries=entries)
        alone.apply_([weight], keep=keeps[i], step=steps[i])
    for a, b in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=8 * 2**-23)
    assert not torch.allclose(together[0], start[0], atol=1e-3)


def moved(config, start, pair=None, **values):
    """The weights after some steps with these multipliers for all, lists of ones among them, or values for the group,
    and the optimizer."""
    params = copies(start)
    optimizer = make(config, params, **values)
    if pair is not None:
        lists = ([float(value)] * len(params) for value in pair)
        optimizer.param_groups[0].update(zip(("lr_multipliers", "decay_multipliers"), lists, strict=True))
    run(optimizer, params, 0, STEPS)
    return params, optimizer


@pytest.mark.parametrize("name", CONFIGS)
def test_multipliers_of_all_are_the_groups_own_values(name):
    """Of powers of two, to the bit, for 16-bit weights too; and ones are no multipliers at all."""
    config = CONFIGS[name]
    values = {"lr": 4 * config.lr, "weight_decay": 0.5 * config.weight_decay}
    start = kinds()
    none, _ = moved(config, start)
    assert equal(moved(config, start, (1, 1))[0], none)
    multiplied, _ = moved(config, start, (4, 0.5))
    assert equal(multiplied, moved(config, start, **values)[0])
    assert not equal(multiplied, none)
    if "/" in name and config.half_weights == "nearest":
        return  # a variant steps 16-bit weights as its method does
    half = kinds(torch.bfloat16)
    assert equal(moved(config, half, (4, 0.5))[0], moved(config, half, **values)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_multiplied_parameter_is_a_group_of_its_own(name):
    """With the same gradients, the state is to the bit that of a run without multipliers, and each weight goes where
    it does in a run whose whole group has its values: but for the rounding of one product a step."""
    config, start = CONFIGS[name], kinds()
    params = copies(start)
    optimizer = make(config, params)
    pairs = [PAIRS[i % len(PAIRS)] for i in range(len(params))]
    optimizer.set_multipliers(dict(zip(optimizer.names(0), pairs, strict=True)))
    run(optimizer, params, 0, STEPS)
    for m, k in PAIRS:
        others, other = moved(config, start, lr=m * config.lr, weight_decay=k * config.weight_decay)
        for i, pair in enumerate(pairs):
            if pair == (m, k):
                scale = float(torch.maximum(start[i].detach().abs().max(), others[i].detach().abs().max()))
                torch.testing.assert_close(params[i], others[i], rtol=0.0, atol=4 * STEPS * 2**-23 * scale)
                for key, value in other.state[others[i]].items():
                    assert torch.equal(value, optimizer.state[params[i]][key]), key


@pytest.mark.parametrize("name", ["galore/power", "fira/power", "muon", "adamw/master", "galore/stochastic"])
def test_16_bit_weights_of_a_batch_are_multiplied_too(name):
    """To a few roundings, of which a step without multipliers makes one less, or one elsewhere."""
    config, start = CONFIGS[name], kinds(torch.bfloat16)
    pairs = [(1.7, 3.0), (0.25, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    params = copies(start)
    optimizer = make(config, params)
    optimizer.set_multipliers(dict(zip(optimizer.names(0), pairs, strict=True)))
    run(optimizer, params, 0, STEPS)
    for i, (m, k) in enumerate(pairs[:3]):
        others, _ = moved(config, start, lr=m * config.lr, weight_decay=k * config.weight_decay)
        scale = float(torch.maximum(start[i].detach().abs().max(), others[i].detach().abs().max()))
        torch.testing.assert_close(params[i], others[i], rtol=0.0, atol=STEPS * 2**-8 * scale)


@pytest.mark.parametrize("name", ["galore/power", "galore_plus/dense", "dct_adamw", "muon"])
def test_all_parts_of_a_fused_weight_have_its_multipliers(name):
    """Two weights of three heads each, stepped as one batch of six matrices."""
    config, start = CONFIGS[name], [torch.nn.Parameter(seeded(24, 5, seed=i)) for i in (1, 2)]
    pairs = [(1.7, 3.0), (0.3, 1.0)]
    found = copies(start)
    rates, decays = zip(*pairs, strict=True)
    fused = {"params": found, "blocks": 3, "lr_multipliers": rates, "decay_multipliers": decays}
    run(make(config, [fused]), found, 0, STEPS)
    for i, (m, k) in enumerate(pairs):
        others = copies(start)
        values = {"lr": m * config.lr, "weight_decay": k * config.weight_decay}
        run(make(config, [{"params": others, "blocks": 3}], **values), others, 0, STEPS)
        torch.testing.assert_close(
            found[i], others[i], rtol=0.0, atol=4 * STEPS * 2**-23 * float(start[i].detach().abs().max())
        )
        assert not torch.allclose(found[1 - i], others[1 - i], atol=1e-3)


@pytest.mark.parametrize("name", ["galore/power", "muon", "adamw", "adamw/8bit"])
def test_a_step_in_backward_multiplies_too(name):
    found = {}
    for mode in ("off", "step"):
        model = seeded_model()
        optimizer = build(model, CONFIGS[name])
        optimizer.set_multipliers(SOME)
        optimizer.in_backward(mode)
        found[mode] = train(model, optimizer, shares(1), steps=range(STEPS))
    assert apart(found["step"], found["off"]) <= bound(name)


def test_what_is_measured_stays_and_measuring_changes_nothing():
    """An update before the learning rate does not depend on it, whoever multiplies that."""
    measured, ends = [], []
    for pairs in ({}, SOME):
        for measure in (False, True):
            model = seeded_model()
            optimizer = build(model, CONFIGS["galore/power"])
            optimizer.set_multipliers(pairs)
            optimizer.measure = measure
            ends.append(train(model, optimizer, shares(1), steps=range(1)))
            measured += [optimizer.measured["update_rms"]] if measure else []
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)  # differences of weights, of which few digits are left
    for without, with_ in zip(ends[::2], ends[1::2], strict=True):
        assert all(torch.equal(value, with_[key]) for key, value in without.items())


# --- kept, and refused ------------------------------------------------------------------------------------------------

SOME = {
    "up.weight": (1.7, 3.0), "square.weight": (0.4, 20.0), "seldom.weight": (2.3, 1.0), "embed.weight": (0.5, 8.0),
    "norm.bias": (3.0, 1.0),
}  # fmt: skip
OTHERS = {"down.weight": (1.2, 0.5), "square.weight": (1.0, 1.0)}


@pytest.mark.parametrize("name", ["galore/power", "adamw"])
def test_multipliers_are_saved_with_the_groups(name):
    found = []
    for again in (False, True):
        model = seeded_model()
        optimizer = build(model, CONFIGS[name])
        for step in range(STEPS):
            if step == 1:
                optimizer.set_multipliers(SOME)
            if step == 3 and again:
                file = io.BytesIO()
                torch.save([optimizer.state_dict(), model.state_dict()], file)
                file.seek(0)
                state, weights_ = torch.load(file, weights_only=True)
                model = seeded_model(1)
                model.load_state_dict(weights_)
                optimizer = build(model, CONFIGS[name])
                optimizer.load_state_dict(state)
                assert optimizer.multipliers() == SOME
            train(model, optimizer, shares(1), steps=[step])
        found.append({key: value.clone() for key, value in model.state_dict().items()})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_checkpoint_of_before_loads_as_ones():
    params = kinds()
    optimizer = make(CONFIGS["galore/power"], params)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["lr_multipliers"], group["decay_multipliers"]
    optimizer.set_multipliers({optimizer.names(0)[0]: (2.0, 2.0)})
    optimizer.load_state_dict(old)
    assert optimizer.multipliers() == {}
    assert optimizer.param_groups[0]["lr_multipliers"] is None


def test_those_that_are_not_named_keep_theirs():
    optimizer = build(seeded_model(), CONFIGS["galore/power"])
    optimizer.set_multipliers(SOME)
    optimizer.set_multipliers(OTHERS)
    left = {name: pair for name, pair in SOME.items() if name != "square.weight"}
    assert optimizer.multipliers() == {**left, "down.weight": (1.2, 0.5)}
    optimizer.set_multipliers(dict.fromkeys(optimizer.multipliers(), (1.0, 1.0)))
    assert all(group["lr_multipliers"] is group["decay_multipliers"] is None for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"up.weight": (2.0, 1.0), "nothing": (1.0, 1.0)}, "'nothing' is no parameter that GaLore steps"),
        ({"up.weight": (2.0, 1.0), "square.weight": (-1.0, 1.0)}, "lr_multipliers of square.weight must be a number"),
        ({"up.weight": (2.0, float("nan"))}, "decay_multipliers of up.weight must be a number at least 0, got nan"),
    ],
)
def test_bad_multipliers_change_nothing(given, sentence):
    optimizer = build(seeded_model(), CONFIGS["galore/power"])
    with pytest.raises(ValueError, match=sentence):
        optimizer.set_multipliers(given)
    assert optimizer.multipliers() == {}


def test_a_group_with_a_list_of_another_length_is_refused():
    params = weights()
    with pytest.raises(ValueError, match="lr_multipliers must be a list of one number for each of the 2 parameters"):
        make(CONFIGS["galore/power"], [{"params": params[:2], "lr_multipliers": [1.0]}])
    optimizer = make(CONFIGS["galore/power"], [{"params": params[:2], "decay_multipliers": [1.0, 2.0]}])
    assert optimizer.multipliers() == {"0.1": (1.0, 2.0)}
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["decay_multipliers"] = [1.0]
    with pytest.raises(ValueError, match=r"does not fit .*decay_multipliers must be a list"):
        optimizer.load_state_dict(bad)


# --- several ranks ----------------------------------------------------------------------------------------------------

SEVERAL = {name: CONFIGS[name] for name in ("galore/power", "fira/power", "ldadam", "muon", "dion", "adamw")}


def joined(model, optimizer, how):
    if how == "owned":
        own(model, optimizer, even_from=64)
    elif how == "replicated":
        replicate(model, optimizer)
    return optimizer


def on_ranks(how):
    found = {}
    for name, config in SEVERAL.items():
        model = fsdp() if how == "rows" else seeded_model(dist.get_rank(), all_alike=True)
        optimizer = joined(model, build(model, config), how)
        optimizer.check_every = 2
        optimizer.set_multipliers(SOME)
        weights_ = train(model, optimizer, mine(), steps=range(STEPS))
        found[name] = whole(model) if how == "rows" else weights_
    return found


def in_one(config, pairs):
    model = seeded_model(all_alike=True)
    optimizer = build(model, config)
    optimizer.set_multipliers(pairs)
    return train(model, optimizer, shares(2), steps=range(STEPS))


@pytest.mark.parametrize("how", ["replicated", "owned", "rows"])
def test_two_ranks_multiply_as_one_process_does(ranks, how):
    answers = ranks(2).run(on_ranks, how)
    for name, config in SEVERAL.items():
        for found in answers:
            assert apart(found[name], in_one(config, SOME)) <= bound(name), name
        assert apart(in_one(config, SOME), in_one(config, {})) > 1e-2


def under_zero():
    from test_zero import engine
    from test_zero import run as train_zero

    found = {}
    for name in ("galore/power", "ldadam", "adamw"):
        zero, optimizer = engine(CONFIGS[name], 1, start=dist.get_rank())
        optimizer.set_multipliers(SOME)
        found[name] = train_zero(zero, steps=range(STEPS))
    return found


def test_zero_multiplies_as_one_process_does(ranks):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    first, _ = ranks(2).run(under_zero)
    for name, found in first.items():
        assert apart(found, in_one(CONFIGS[name], SOME)) <= bound(name), name


def drifts(how):
    model = fsdp() if how == "rows" else seeded_model()
    optimizer = joined(model, build(model, CONFIGS["galore/power"]), how)
    optimizer.check_replicas()
    optimizer.set_multipliers(SOME if dist.get_rank() else OTHERS)
    try:
        optimizer.check_replicas()
    except ReplicaDrift as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["replicated", "owned", "rows"])
def test_ranks_with_other_multipliers_are_stopped(ranks, how):
    for sentence in ranks(2).run(drifts, how):
        assert "drifted apart: the multipliers of learning rates and weight decays is not the same" in sentence
