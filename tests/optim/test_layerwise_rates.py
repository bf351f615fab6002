"""Rates by layer: the maps from tails to multipliers, and a schedule that sets them while a model trains."""

import io
import math

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS
from laws import decaying, seeded
from test_replicated import mine, shares
from torch import nn

from thinrank.optim import AdamWConfig, build
from thinrank.optim.layers import LOST, LowRank, convert
from thinrank.optim.layers.lowrank import LowRankLinear
from thinrank.optim.layerwise import LAYERWISE, LLR, AlphaDecay, TailSchedule
from thinrank.optim.monitors.farms import farms_alpha
from thinrank.optim.monitors.layerwise import (
    MAPS,
    eligible,
    limited,
    multipliers,
    product_evals,
    ramped,
    with_geometric_mean_one,
)
from thinrank.optim.monitors.tail import hill_alpha
from thinrank.optim.owned import own
from thinrank.optim.replicated import replicate

ALPHAS = torch.tensor([2.0, 5.0, 3.0, 3.5], dtype=torch.float64)


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", MAPS)
def test_a_lighter_tail_has_more_and_equal_tails_have_one(how):
    found = multipliers(ALPHAS, how, s1=0.5, s2=3.0)
    assert torch.equal(found.argsort(), ALPHAS.argsort())
    torch.testing.assert_close(multipliers(ALPHAS.flip(0), how, s1=0.5, s2=3.0), found.flip(0), rtol=1e-15, atol=0.0)
    assert torch.equal(multipliers(torch.full((3,), 2.5), how), torch.ones(3, dtype=torch.float64))
    assert multipliers(torch.empty(0), how).shape == (0,)


def test_the_linear_map_is_the_papers():
    found = multipliers(ALPHAS, s1=0.667, s2=3.0)
    assert found.tolist() == pytest.approx([0.667, 3.0, 0.667 + 2.333 / 3, 0.667 + 2.333 / 2])
    assert multipliers(3.0 * ALPHAS + 1.0, s1=0.667, s2=3.0).tolist() == pytest.approx(found.tolist())
    down = multipliers(ALPHAS, s1=3.0, s2=0.5)
    assert down.argmax() == ALPHAS.argmin()


def test_the_other_maps():
    assert multipliers(torch.tensor([2.0, 4.0, 4.0, 9.0]), "rank", s1=1.0, s2=4.0).tolist() == [1.0, 2.5, 2.5, 4.0]
    for how, value in (("sqrt", math.sqrt), ("log2", math.log2)):
        mean = sum(map(value, ALPHAS.tolist())) / 4
        assert multipliers(ALPHAS, how).tolist() == pytest.approx([value(alpha) / mean for alpha in ALPHAS.tolist()])
    two = multipliers(torch.tensor([2.0, 3.0]), "sigmoid")  # one standard deviation below the mean, and above
    assert two.tolist() == pytest.approx([2 / (1 + math.e**4), 2 / (1 + math.e**-4)])
    with pytest.raises(ValueError, match="the map must be one of linear, sqrt"):
        multipliers(ALPHAS, "cubic")


def test_the_geometric_mean_is_one_and_changes_are_limited():
    factors = with_geometric_mean_one(torch.tensor([1.0, 5.0, 2.0]))
    assert float(factors.log().sum()) == pytest.approx(0.0, abs=1e-6)
    assert (factors / factors[0]).tolist() == pytest.approx([1.0, 5.0, 2.0])
    before = torch.tensor([1.0, 2.0, 0.5])
    found = limited(torch.tensor([3.0, 1.0, 0.55]), before, 1.25)
    assert found.tolist() == pytest.approx([1.25, 1.6, 0.55])
    assert torch.equal(limited(factors, before, None), factors)


def test_a_ramp_is_a_straight_line_and_ends():
    assert [ramped(1.0, 2.0, done, 4) for done in range(6)] == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0]
    assert ramped(1.0, 2.0, 0, 0) == 2.0


def test_the_ends_and_what_is_too_thin_take_no_part():
    evals = [64, 64, 49, 50, 64]
    assert eligible(evals) == [False, True, False, True, False]
    assert eligible(evals, ends="keep") == [True, True, False, True, True]
    assert eligible(evals, min_evals=5) == [False, True, True, True, False]
    assert eligible([]) == []


@pytest.mark.parametrize(("out", "columns", "rank"), [(40, 24, 8), (24, 40, 24), (16, 16, 1)])
def test_the_spectrum_of_a_product_is_found_without_the_product(out, columns, rank):
    left, right = seeded(out, rank, seed=1), seeded(rank, columns, seed=2)
    exact = torch.linalg.svdvals(left.double() @ right.double())[:rank].square()
    torch.testing.assert_close(product_evals(left, right).double(), exact, rtol=64 * 2**-23, atol=0.0)


# --- the schedule -----------------------------------------------------------------------------------------------------

NAMES = [f"layers.{i}.weight" for i in range(4)]
TAILS = (0.97, 0.75, 0.9, 0.6)
"""Ratios of singular values: the smaller, the heavier the tail."""


class Stack(nn.Module):
    """An embedding, four matrices with tails of their own, and a head."""

    def __init__(self, size=24):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(13, size)
        self.layers = nn.ModuleList(nn.Linear(size, size + 8 * (i % 2), bias=i == 1) for i in range(4))
        self.lm_head = nn.Linear(size, 13, bias=False)
        with torch.no_grad():
            for i, (layer, ratio) in enumerate(zip(self.layers, TAILS, strict=True)):
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(decaying(*layer.weight.shape, ratio=ratio, seed=i))

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))[..., : x.shape[-1]]
        return self.lm_head(x)


def loss(model, step, share=slice(0, 8)):
    data = torch.randint(13, (8, 6), generator=torch.Generator().manual_seed(step))[share]
    return nn.functional.cross_entropy(model(data[:, :-1]).flatten(0, 1), data[:, 1:].flatten())


SMALL = {"min_evals": 5, "window": 12, "per_side": 3, "every": 3}


def train(model, optimizer, schedule, steps, share=slice(0, 8)):
    looked = []
    for step in steps:
        if schedule is not None and schedule.update(model, optimizer, step):
            looked.append(step)
        optimizer.zero_grad()
        loss(model, step, share).backward()
        optimizer.step()
    return looked


def made(method="tempbalance", config=None, **settings):
    model = Stack()
    optimizer = build(model, config or AdamWConfig(lr=0.01, weight_decay=0.1))
    return model, optimizer, TailSchedule(method, **{**SMALL, **settings})


def test_lighter_tails_get_larger_rates_at_the_cadence():
    model, optimizer, schedule = made(ends="keep", most=None)
    assert train(model, optimizer, schedule, range(3)) == []
    assert optimizer.multipliers() == {}
    alphas = {
        name: float(farms_alpha(model.get_parameter(name), rows=12, per_side=3)) for name in (*NAMES, "lm_head.weight")
    }
    assert train(model, optimizer, schedule, range(3, 5)) == [3]
    assert schedule.alphas == pytest.approx(alphas)
    found = {name: lr for name, (lr, _) in optimizer.multipliers().items()}
    assert found == schedule.multipliers == pytest.approx(found)
    assert sorted(found, key=lambda name: found[name]) == sorted(alphas, key=lambda name: alphas[name])
    assert max(found.values()) / min(found.values()) == pytest.approx(3.0)  # s2 / s1
    assert math.prod(found.values()) == pytest.approx(1.0)
    assert all(decay == 1.0 for _, decay in optimizer.multipliers().values())
    assert set(schedule.measured()) == {f"layerwise/{what}/{name}" for what in ("alpha", "lr") for name in alphas}


def test_the_first_and_the_last_are_dropped_and_changes_are_limited():
    model, optimizer, schedule = made()
    train(model, optimizer, schedule, range(4))
    assert sorted(schedule.alphas) == NAMES[1:]  # the first projection and the head take no part
    one = dict(schedule.multipliers)
    assert all(0.8 <= value <= 1.25 for value in one.values())
    train(model, optimizer, schedule, range(4, 7))
    assert all(
        one[name] / 1.25 - 1e-12 <= value <= one[name] * 1.25 + 1e-12 for name, value in schedule.multipliers.items()
    )
    assert max(schedule.multipliers.values()) > 1.25


def test_alphadecay_multiplies_decays_and_leaves_rates_to_others():
    model, optimizer, schedule = made("alphadecay", min_evals=5)
    optimizer.set_multipliers({NAMES[1]: (2.0, 7.0)})
    train(model, optimizer, schedule, range(4))
    assert {name: decay for name, (_, decay) in optimizer.multipliers().items()} == schedule.multipliers
    assert optimizer.multipliers()[NAMES[1]][0] == 2.0
    assert set(schedule.measured()) >= {f"layerwise/decay/{name}" for name in NAMES[1:]}


def test_one_schedule_of_rates_and_one_of_decays_go_together():
    model, optimizer, rates = made("llr", ramp=0)
    decays = TailSchedule("alphadecay", **SMALL)
    for step in range(4):
        rates.update(model, optimizer, step)
        train(model, optimizer, decays, [step])
    found = optimizer.multipliers()
    assert {name: rate for name, (rate, _) in found.items() if rate != 1.0} == rates.multipliers
    assert {name: decay for name, (_, decay) in found.items() if decay != 1.0} == decays.multipliers


def test_llr_goes_to_its_multipliers_on_a_ramp_and_leaves_the_head_out():
    model, optimizer, schedule = made("llr", every=4, ramp=4, normalise=False, most=None)
    seen = []
    for step in range(8):
        train(model, optimizer, schedule, [step])
        seen.append(dict(schedule.multipliers))
    assert seen[3] == {}
    assert sorted(seen[4]) == NAMES
    light = max(NAMES, key=lambda name: schedule.alphas[name])
    assert [round(each[light], 9) for each in seen[4:]] == [1.0, 2.0, 3.0, 4.0]  # on the way from 1 to 5
    assert schedule.config.every == 4


@pytest.mark.parametrize("method", ["alphadecay", "llr"])
@pytest.mark.parametrize("name", ["galore/power", "adamw"])
def test_a_run_that_was_stopped_between_two_looks_goes_on_to_the_bit(name, method):
    """Looks at 3, 6 and 9; stopped at 4, on LLR's ramp, and at 6, before the look."""
    ends = []
    for stops in ([], [4], [6], [4, 7]):
        model, optimizer, schedule = made(method, CONFIGS[name], ramp=2)
        first = 0
        for stop in [*stops, 11]:
            train(model, optimizer, schedule, range(first, stop))
            if stop != 11:
                file = io.BytesIO()
                torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                model, optimizer, schedule = made(method, CONFIGS[name], ramp=2)
                for each, state in zip((model, optimizer, schedule), saved, strict=True):
                    each.load_state_dict(state)
            first = stop
        ends.append((model.state_dict(), schedule.summary()))
    for weights, summary in ends[1:]:
        assert summary == ends[0][1]
        assert all(torch.equal(value, ends[0][0][key]) for key, value in weights.items())
    model, optimizer, _ = made(method, CONFIGS[name], ramp=2)
    train(model, optimizer, None, range(11))
    assert not torch.equal(model.get_parameter(NAMES[2]), ends[0][0][NAMES[2]])  # it did act


def test_nothing_is_drawn_and_weights_are_only_read():
    model, optimizer, schedule = made(every=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert schedule.update(model, optimizer, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not schedule.update(model, optimizer, 1)  # asked twice, as by every micro-batch


def test_a_tail_that_is_no_number_keeps_its_multiplier():
    model, optimizer, schedule = made(every=1)
    schedule.update(model, optimizer, 1)
    kept = schedule.multipliers[NAMES[2]]
    with torch.no_grad():
        model.get_parameter(NAMES[2]).fill_(0.0)  # the logarithm of nothing
    schedule.update(model, optimizer, 2)
    assert NAMES[2] not in schedule.alphas
    assert schedule.multipliers[NAMES[2]] == kept
    assert optimizer.multipliers()[NAMES[2]] == (kept, 1.0)


def test_factors_have_the_tail_of_their_product_and_share_its_multiplier():
    model = Stack()
    convert(model, LowRank(rank=12, exclude=[r"layers\.0"]))
    optimizer = build(model, AdamWConfig(lr=0.01))
    schedule = TailSchedule("llr", every=1, min_evals=5, window=12, per_side=3, ramp=0)
    schedule.update(model, optimizer, 1)
    assert sorted(schedule.alphas) == ["layers.0.weight", *(f"layers.{i}.B" for i in (1, 2, 3))]
    layer = model.get_submodule("layers.2")
    assert isinstance(layer, LowRankLinear)
    evals = torch.linalg.svdvals(layer.weight().detach())[:12].square()
    assert schedule.alphas["layers.2.B"] == pytest.approx(float(hill_alpha(evals)), rel=1e-3)
    for i in (1, 2, 3):
        assert optimizer.multipliers()[f"layers.{i}.A"] == optimizer.multipliers()[f"layers.{i}.B"]
    thin = TailSchedule("llr", every=1, ramp=0, min_evals=13)  # more than the factors have, and less than the matrix
    with pytest.raises(ValueError, match=r"1 of 4 take part: lower layerwise\.min_evals"):
        thin.update(model, optimizer, 0)


def test_layers_of_other_kinds_of_factors_take_no_part():
    model = Stack()
    convert(model, LOST(rank=8, exclude=[r"layers\.[01]"]))
    optimizer = build(model, AdamWConfig(lr=0.01))
    schedule = TailSchedule("llr", **SMALL, ramp=0)
    assert [each.name for each in schedule.candidates(model, optimizer)] == NAMES[:2]


def test_misuse_is_answered_with_the_remedy():
    model, optimizer, _ = made()
    with pytest.raises(ValueError, match="need an optimizer of thinrank, which has multipliers, got SGD: use"):
        TailSchedule("llr").update(model, torch.optim.SGD(model.parameters()), 0)
    with pytest.raises(ValueError, match=r"compares matrices, and 0 of 5 take part"):
        TailSchedule("tempbalance", min_evals=500).update(model, optimizer, 0)
    with pytest.raises(ValueError, match=r"method must be one of tempbalance.*did you mean 'llr'"):
        TailSchedule("lrr")
    with pytest.raises(ValueError, match="layerwise=alphadecay multiplies weight decay, which is 0: give"):
        TailSchedule("alphadecay", **SMALL).update(model, build(model, AdamWConfig()), 0)
    with pytest.raises(ValueError, match="settings are given beside a configuration"):
        TailSchedule(LLR(), every=3)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"s1": 0.0}, "s1 must be a number above 0, got 0.0"),
        ({"map": "linaer"}, "map must be one of .*did you mean 'linear'"),
        ({"every": 0}, "every must be at least 1 step"),
        ({"ramp": 101}, r"ramp must be at most every \(100 steps\), got 101: a multiplier would be replaced"),
        ({"ramp": -1}, "ramp must be a whole number of at least 0"),
        ({"most": 1.0}, "most must be a number above 1"),
        ({"per_side": 1}, "per_side must be a whole number of at least 2"),
        ({"ends": "none"}, "ends must be one of drop, keep"),
    ],
)
def test_bad_values_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        LLR(**values)


def test_the_methods_are_their_papers():
    assert [LAYERWISE[name]().acts for name in LAYERWISE] == [False, True, True, True]
    assert (AlphaDecay().s1, AlphaDecay().s2, AlphaDecay().every, AlphaDecay().SCALES) == (0.667, 3.0, 500, "decay")
    assert (LLR().s1, LLR().s2, LLR().every, LLR().ramp, LLR().SCALES) == (1.0, 5.0, 100, 50, "lr")


# --- several ranks ----------------------------------------------------------------------------------------------------


def on_ranks(how):
    torch.manual_seed(dist.get_rank())
    model, optimizer, schedule = made(ends="keep")
    if how == "rows":
        from test_sharded import fully_shard

        fully_shard(model)
        optimizer = build(model, AdamWConfig(lr=0.01, weight_decay=0.1))
    else:
        (own if how == "owned" else replicate)(model, optimizer)
    optimizer.check_every = 2
    pieces = {name: optimizer.piece_of(model.get_parameter(name)).clone() for name in NAMES}
    schedule.update(model, optimizer, 3)
    alphas = dict(schedule.alphas)
    assert optimizer.wire is not None
    assert optimizer.wire.rare.payload["measured"] > 0  # what it sends is counted, and no step's
    train(model, optimizer, schedule, range(3, 8), mine()[0])
    return alphas, {name: float(farms_alpha(p, rows=12, per_side=3)) for name, p in pieces.items()}, schedule.summary()


@pytest.mark.parametrize("how", ["replicated", "owned", "rows"])
def test_two_ranks_have_the_same_numbers(ranks, how):
    """Of whole weights those of one process; of rows, the mean over the ranks."""
    (found, here, summary), (other, there, other_summary) = ranks(2).run(on_ranks, how)
    assert found == other
    assert summary == other_summary
    for name in NAMES:
        assert found[name] == pytest.approx((here[name] + there[name]) / 2, rel=1e-12)
    if how != "rows":
        model, optimizer, schedule = made(ends="keep")
        schedule.update(model, optimizer, 3)
        assert found == pytest.approx(schedule.alphas, rel=1e-12)
        for step in range(3, 8):  # and the run is that of one process with all the data
            schedule.update(model, optimizer, step)
            optimizer.zero_grad()
            torch.stack([loss(model, step, share) for share in shares(2)]).mean().backward()
            optimizer.step()
        assert summary["multipliers"] == pytest.approx(schedule.multipliers, rel=1e-4)


def looked_at_under_zero():
    from test_zero import engine

    found = []
    for stage in (1, 3):
        model = Stack()
        zero, optimizer = engine(AdamWConfig(lr=0.01), stage, model=model)
        schedule = TailSchedule("tempbalance", **{**SMALL, "min_evals": 5}, ends="keep")
        schedule.update(model, optimizer, 3)
        pieces = [optimizer.piece_of(model.get_parameter(name)) for name in NAMES]
        alphas = [float(farms_alpha(p, rows=12, per_side=3)) if min(p.shape) >= 5 else 0.0 for p in pieces]
        found.append((schedule.summary(), [len(piece) for piece in pieces], alphas, optimizer.multipliers()))
        zero.release()
    return found


def test_under_zero_ranks_have_the_mean_of_their_pieces(ranks):
    """ZeRO-1 cuts the four matrices as one, wherever that is; ZeRO-3 cuts each in two."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    for stage, (first, second) in zip((1, 3), zip(*ranks(2).run(looked_at_under_zero), strict=True), strict=True):
        (summary, here, mine_, multiplied), (other, there, theirs, _) = first, second
        assert summary == other
        assert {name: lr for name, (lr, _) in multiplied.items()} == summary["multipliers"]
        assert any(0 in pair for pair in zip(here, there, strict=True)) is (stage == 1)
        for name, a, b, alpha, beta in zip(NAMES, here, there, mine_, theirs, strict=True):
            a, b = (0 if rows < 5 else rows for rows in (a, b))
            assert summary["alphas"][name] == pytest.approx((a * alpha + b * beta) / (a + b), rel=1e-12), stage


def refused_in_pieces():
    from test_sharded import fully_shard

    said = []
    for factors in (False, True):
        model = Stack()
        if factors:
            convert(model, LowRank(rank=12))
        fully_shard(model)
        optimizer = build(model, AdamWConfig(lr=0.01))
        with pytest.raises(ValueError) as error:  # noqa: PT011 - looked at by the test
            TailSchedule("llr", every=1, ramp=0, min_evals=5 if factors else 14).update(model, optimizer, 0)
        said.append(str(error.value))
    return said


def test_what_pieces_do_not_tell_is_refused(ranks):
    for rows, factors in ranks(2).run(refused_in_pieces):
        assert "of layers.0.weight no rank has more than 12 whole rows" in rows
        assert "cannot be told from pieces of them: use a strategy with whole weights" in factors
