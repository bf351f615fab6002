"""What a subspace misses of gradients, sent in signs: collective, splitting, and whole runs against a slow one."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, small
from test_replicated import STEPS, Language, loss, mine, run, seeded_model, shares
from test_replicated import apart as furthest

from thinrank.optim import METHODS, DCTAdamWConfig, Fira, SubspaceAdamWConfig, build
from thinrank.optim.exchange.bits import digits, pack_bits, pack_counts, unpack_bits, unpack_counts
from thinrank.optim.exchange.signs import TALLIES, Signs
from thinrank.optim.lowrank.remainder import apart, leaves_remainder, together, with_untold
from thinrank.optim.lowrank.subspace import FixedColumns, PowerIteration
from thinrank.optim.messages import UNUSED_FEEDBACK
from thinrank.optim.replicated import replicate
from thinrank.optim.rule import Step

METHODS_WITH_REST = ("fira", "fira/power", "subspace_adamw/sign", "subspace_adamw/full", "dct_adamw/gap")
REMEMBERING = ("fira/feedback", "subspace_adamw/feedback", "dct_adamw/feedback of signs")
CODED = ("fira/8bit feedback", "fira/4bit feedback")


def config_of(name):
    if name == "subspace_adamw/full":
        return small("subspace_adamw", residual="full", transport="keep")
    if name == "dct_adamw/gap":
        return small("dct_adamw", residual="full", error_feedback="off", update_proj_gap=3)
    if name == "fira/feedback":
        return replace(CONFIGS["fira/power"], sign_feedback="full")
    if name in CODED:
        return replace(CONFIGS["fira/power"], sign_feedback=name.split("/")[1].split()[0])
    if name == "subspace_adamw/feedback":
        return replace(CONFIGS["subspace_adamw/sign"], sign_feedback="full")
    if name == "dct_adamw/feedback of signs":
        return replace(config_of("dct_adamw/gap"), sign_feedback="full")
    return CONFIGS[name]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 6, 7, 15, 16, 255])
def test_counts_are_packed_as_many_to_a_byte_as_fit(most):
    own = digits(most)
    assert (most + 1) ** own <= 256 < (most + 1) ** (own + 1)
    generator = torch.Generator().manual_seed(most)
    counts = torch.randint(most + 1, (7 * own,), generator=generator).to(torch.uint8)
    counts[:own] = most
    packed = pack_counts(counts, most)
    assert packed.numel() == 7
    assert torch.equal(unpack_counts(packed, most), counts)


def test_bits_are_packed_eight_to_a_byte():
    flags = torch.rand(80, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(flags)
    assert packed.numel() == 10
    assert torch.equal(unpack_bits(packed).bool(), flags)
    assert pack_bits(torch.arange(8) == 0).item() == 1


def matrices(rank, kind=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    first, second = torch.randn(2, 5, 7, generator=generator), torch.randn(3, 16, generator=generator)
    first[0, 1] = 0.0 if rank == 0 else first[0, 1]  # a row that one rank has nothing to say about
    first[1, 2] = 0.0  # and one that nobody has
    return [first.to(kind), second.to(kind)]


def mean_of_signs(values, how="signs"):
    """By the definition, in float64."""
    stacked = torch.stack([value.double() for value in values])
    sizes = stacked.abs().mean(-1, keepdim=True)
    voters = (sizes != 0).sum(0).clamp(min=1)
    votes = stacked.sign().sum(0)
    return sizes.mean(0) * (votes.sign() if how == "majority" else votes / voters)


def exchanged(kind, how):
    return turned(Signs(matrices(dist.get_rank(), kind), None, TALLIES[how]))


def turned(signs):
    signs.turn()
    return signs.mean()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["signs", "majority"])
def test_the_mean_is_of_signs_and_of_sizes(ranks, size, kind, how):
    answers = ranks(size).run(exchanged, kind, how)
    everyone = [matrices(rank, kind) for rank in range(size)]
    expected = torch.cat([mean_of_signs([own[i] for own in everyone], how).flatten() for i in (0, 1)])
    torch.testing.assert_close(answers[0].double(), expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(found, answers[0]) for found in answers)


def with_zeros_and_worse():
    rank = dist.get_rank()
    value = torch.ones(4, 8)
    value[0] = torch.tensor([3.0, 0, 0, 0, 0, 0, 0, 0])
    value[1, 3] = torch.nan if rank == 1 else 1.0
    value[2, 3] = torch.inf if rank == 1 else 1.0
    return turned(Signs([value], None, TALLIES["signs"])).view(4, 8)


def test_zeros_weigh_nothing_and_what_is_no_number_shows(ranks):
    for found in ranks(2).run(with_zeros_and_worse):
        assert found[0].tolist() == [3 / 8] + [0.0] * 7
        assert not found[1:3].isfinite().any()
        assert torch.equal(found[3], torch.ones(8))


@pytest.mark.parametrize("subspace", [PowerIteration(rank=3), FixedColumns(rank=3)], ids=["power", "dct"])
def test_what_is_in_the_subspace_is_exact_whatever_happens_to_the_rest(subspace):
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.randn(2, 9, 6, generator=generator), torch.randn(2, 9, 6, generator=generator)
    state = subspace.init((2, 9, 6), x.device)
    subspace.renew(x + 1, state, Step(count=[0, 0], keys=[1, 2]))
    low, rest = apart(x, subspace, state)
    torch.testing.assert_close(together(low, rest, subspace, state), x, rtol=0, atol=2e-6)
    assert subspace.down(rest, state).abs().max() < 2e-6
    found = together(low, noise, subspace, state)
    torch.testing.assert_close(subspace.down(found, state), low, rtol=0, atol=2e-6)
    # the nearest to the noise that has these coordinates: what it differs by lies in the subspace
    left = found - noise
    torch.testing.assert_close(subspace.up(subspace.down(left, state), state, 6).materialise(), left, rtol=0, atol=2e-6)


def test_methods_that_leave_a_rest():
    """Those that need whole gradients and have a subspace that stays; no other."""
    found = {name for name in METHODS if leaves_remainder(small(name).matrix_rule())}
    assert found == {"fira", "subspace_adamw"}
    assert all(leaves_remainder(config_of(name).matrix_rule()) for name in METHODS_WITH_REST)
    assert not leaves_remainder(small("dct_adamw", residual="full", update_proj_gap=1).matrix_rule())
    assert not leaves_remainder(small("apollo").matrix_rule())
    assert not leaves_remainder(None)


def slow(config, n, how):
    """In one process: the gradient of each share by itself, and what `replicate` is said to make of them."""
    model = seeded_model()
    optimizer = build(model, config)
    owed = {} if getattr(config, "sign_feedback", "off") != "off" else None
    for step in range(STEPS):
        found = []
        for share in shares(n):
            optimizer.zero_grad()
            loss(model, step, share).backward()
            found.append({p: p.grad.clone() for p in model.parameters() if p.grad is not None})
        for param in {p for own in found for p in own}:
            grads = [own.get(param, torch.zeros_like(param)) for own in found]
            param.grad = mean_by_parts(optimizer, param, grads, how, owed)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def mean_by_parts(optimizer, param, grads, how, owed=None):
    """`owed`: by matrix, what each share has not told yet; None: it is forgotten."""
    mean = torch.stack(grads).mean(0)
    homes = optimizer._homes.get(param, [])
    for group, bucket, i in homes:
        rule, _ = optimizer.rules(group, bucket.section, bucket.rank)
        state = bucket.state([i])
        before = None if owed is None else owed.pop((param, bucket.prefix), None)
        if rule.chooses(state, bucket.step([i], group)):
            if before is not None:
                bucket.view.of(mean).add_(torch.stack(before).mean(0))
            continue
        basis = (state["basis"] if "basis" in state else rule.subspace.atoms(state, bucket.view.shape[1])).double()
        views = [bucket.view.of(grad).double() for grad in grads]
        rests = [view - view @ basis @ basis.mT for view in views]
        if owed is not None:
            rests = rests if before is None else [own + more for own, more in zip(rests, before, strict=True)]
            told = [own.abs().mean(-1, keepdim=True) * own.sign() for own in rests]
            owed[param, bucket.prefix] = [own - said for own, said in zip(rests, told, strict=True)]
        rest = mean_of_signs(rests, how)
        low = torch.stack([view @ basis for view in views]).mean(0)
        bucket.view.of(mean).copy_(rest + (low - rest @ basis) @ basis.mT)
    return mean


def together_by_signs(names, how):
    found = {}
    for name in names:
        model = seeded_model(dist.get_rank())
        optimizer = build(model, config_of(name))
        replicate(model, optimizer, messages=how, check_every=5)
        found[name] = run(model, optimizer, mine())
    return found


@pytest.mark.parametrize("how", ["signs", "majority"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_train_as_the_definition_does(ranks, size, how):
    """Twenty steps with renewals; less than 1e-6 apart here, where rounding decides no sign."""
    names = (*METHODS_WITH_REST, *REMEMBERING)
    answers = ranks(size).run(together_by_signs, names, how, timeout=120)
    for name in names:
        expected, exact = slow(config_of(name), size, how), run_alone(config_of(name), size)
        for key, value in expected.items():
            gap = float((answers[0][name][key] - value).norm() / value.norm().clamp(min=1e-30))
            assert gap <= 1e-5, (name, key)
        assert any(not torch.allclose(exact[key], value, rtol=1e-3) for key, value in expected.items()), name
        for found in answers[1:]:
            assert all(torch.equal(value, answers[0][name][key]) for key, value in found[name].items()), name


def run_alone(config, n):
    model = seeded_model()
    return run(model, build(model, config), shares(n))


def resumed(config):
    model = seeded_model()
    optimizer = build(model, config)
    replicate(model, optimizer, messages="signs")
    run(model, optimizer, mine(), steps=range(11))
    second = seeded_model(3 + dist.get_rank())
    second.load_state_dict(model.state_dict())
    after = build(second, config)
    replicate(second, after, messages="signs")
    after.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return run(model, optimizer, mine(), steps=range(11, STEPS)), run(second, after, mine(), steps=range(11, STEPS))


@pytest.mark.parametrize("name", ["fira/power", "subspace_adamw/sign", *REMEMBERING, *CODED])
def test_a_run_goes_on_to_the_bit(ranks, name):
    for whole, found in ranks(2).run(resumed, config_of(name)):
        assert all(torch.equal(found[key], value) for key, value in whole.items())


@pytest.mark.parametrize("how", [{"overlap": False}, {"bucket_bytes": 1}], ids=str)
def test_when_and_in_how_many_messages_makes_no_difference(ranks, how):
    usual, other = ranks(2).run(in_messages, {})[0], ranks(2).run(in_messages, how)[0]
    # entries that are zero in rows that are not would be for or against by where in a message they lie: none are here
    assert furthest(other, usual) <= 2e-6


def in_messages(how):
    model = seeded_model()
    optimizer = build(model, config_of("fira/power"))
    replicate(model, optimizer, messages="signs", **how)
    return run(model, optimizer, mine(), clip=0.5)


def counted(how):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 96, bias=False)
    optimizer = build(model, small("fira", svd="power", rank=4, update_proj_gap=3))
    replicate(model, optimizer, messages=how)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 64)).square().sum().backward()
        optimizer.step()
    wire = optimizer.wire
    assert wire is not None
    return dict(wire.payload), wire.egress


@pytest.mark.parametrize(
    ("size", "how", "to_a_byte"), [(1, "signs", 8), (2, "signs", 5), (4, "signs", 3), (4, "majority", 5)]
)
def test_what_travels_is_what_is_said_to(ranks, size, how, to_a_byte):
    (payload, egress), *_ = ranks(size).run(counted, how)
    entries = 64 * 96
    assert payload["renewals"] == 4 * entries
    assert payload["coordinates"] == 4 * 96 * 4
    assert entries / 8 <= payload["signs"] <= entries / 8 + 32
    assert entries / to_a_byte <= payload["votes"] <= entries / to_a_byte + 32
    assert payload["sizes"] == size * 4 * 96
    twice = payload["renewals"] + payload["coordinates"] + payload["present"]
    once = payload["signs"] + payload["votes"] + payload["sizes"]
    assert egress == pytest.approx((2 * twice + once) * (size - 1) / size)


def refusals():
    said = {}
    cases = {"galore": "galore", "muon": "muon", "apollo": "apollo", "adamw": "adamw"}
    for name in cases:
        model = Language()
        try:
            build(model, small(name)).replicate(messages="signs")
        except ValueError as error:
            said[name] = str(error)
    model = Language()
    try:
        build(model, small("fira", svd="power")).own(messages="signs")
    except ValueError as error:
        said["owned"] = str(error)
    for config in (SubspaceAdamWConfig, DCTAdamWConfig):
        with pytest.raises(ValueError, match="is for messages of a residual"):
            config(residual="off", sign_feedback="8bit")
    return said


def test_where_signs_are_of_no_use_they_are_refused(ranks):
    said = ranks(2).run(refusals)[0]
    assert said.keys() == {"galore", "muon", "apollo", "adamw", "owned"}
    assert all("use messages='auto'" in sentence for sentence in said.values())


def test_what_is_told_and_what_is_owed_are_all_that_was():
    generator = torch.Generator().manual_seed(3)
    owing, told, all_ = torch.zeros(2, 5, 8), torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)
    for rest in torch.randn(6, 2, 5, 8, generator=generator):
        whole, owing = with_untold(rest, owing)
        told, all_ = told + whole - owing, all_ + rest
        size = (whole - owing).abs()
        torch.testing.assert_close(size, size.mean(-1, keepdim=True).expand_as(size), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(told + owing, all_, rtol=0, atol=1e-5)
    assert torch.equal(with_untold(all_ * torch.nan, owing)[1], owing)


def thrown_away(name):
    """Whether a step that was begun and thrown away has left no trace."""
    model = seeded_model()
    optimizer = build(model, config_of(name))
    replicate(model, optimizer, messages="signs")
    run(model, optimizer, mine(), steps=range(2))
    before = copy.deepcopy(optimizer.state_dict())["state"]
    loss(model, 2, *mine()).backward()
    optimizer.gradient_norm()
    optimizer.zero_grad()
    after = optimizer.state_dict()["state"]
    keys = [key for key in before[1] if key.startswith("error")]
    assert keys
    assert any(bool(state[key].any()) for state in before.values() for key in keys if key in state)
    return all(torch.equal(value, after[i][key]) for i, state in before.items() for key, value in state.items())


@pytest.mark.parametrize("name", ["fira/feedback", *CODED])
def test_what_is_owed_does_not_change_in_a_step_that_is_thrown_away(ranks, name):
    assert all(ranks(2).run(thrown_away, name))


def coded(name):
    model = seeded_model()
    optimizer = build(model, config_of(name))
    replicate(model, optimizer, messages="signs", check_every=5)
    return run(model, optimizer, mine())


def test_feedback_in_codes_is_nearly_the_same(ranks):
    """Equal on all ranks to the bit, and the nearer to full precision the more bits; without feedback farther off."""
    full, none, eight, four = (ranks(2).run(coded, name) for name in ("fira/feedback", "fira/power", *CODED))
    for answers in (eight, four):
        assert all(torch.equal(answers[1][key], value) for key, value in answers[0].items())
    gaps = [furthest(answers[0], full[0]) for answers in (eight, four, none)]
    assert 0 < gaps[0] < gaps[1] < gaps[2], gaps


def unused(caplog_name):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger(caplog_name).addHandler(handler)
    model = seeded_model()
    replicate(model, build(model, config_of("fira/8bit feedback")))
    return records


def test_feedback_that_nothing_uses_is_told(ranks):
    for said in ranks(2).run(unused, "thinrank.optim.replicated"):
        assert any(UNUSED_FEEDBACK in sentence for sentence in said)


def skips(bad):
    model = seeded_model()
    optimizer = build(model, config_of("fira/power"))
    replicate(model, optimizer, messages="signs")
    run(model, optimizer, mine(), steps=range(2))
    (loss(model, 2, *mine()) * (torch.nan if bad and dist.get_rank() == 1 else 1.0)).backward()
    return bool(optimizer.gradient_norm().isfinite())


def test_a_gradient_that_is_no_number_on_one_rank_is_none_anywhere(ranks):
    assert ranks(2).run(skips, True) == [False, False]
    assert ranks(2).run(skips, False) == [True, True]


class Fused(torch.nn.Module):
    """A convolution in channels-last memory, and a weight of three parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv = torch.nn.Conv2d(4, 12, 3, bias=False)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.parts = torch.nn.Linear(12, 24, bias=False)


def fused(model):
    groups = [{"params": [model.conv.weight]}, {"params": [model.parts.weight], "sections": (12, 6, 6)}]
    return Fira(groups, lr=0.02, rank=2, update_proj_gap=3, svd="power")


def fused_gradients(model, step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    for param in (model.conv.weight, model.parts.weight):
        param.grad = torch.randn(param.shape, generator=generator)
        param.grad = param.grad.contiguous(memory_format=torch.channels_last) if param.ndim == 4 else param.grad


def fused_by_signs():
    model = Fused()
    optimizer = fused(model)
    replicate(model, optimizer, messages="signs", overlap=False)
    for step in range(7):
        fused_gradients(model, step, dist.get_rank())
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_convolutions_and_fused_weights(ranks):
    model = Fused()
    optimizer = fused(model)
    for step in range(7):
        found = []
        for rank in (0, 1):
            fused_gradients(model, step, rank)
            found.append([p.grad.contiguous() for p in model.parameters() if p.grad is not None])
        for param, grads in zip(model.parameters(), zip(*found, strict=True), strict=True):
            param.grad = mean_by_parts(optimizer, param, list(grads), "signs")
        optimizer.step()
    for answer in ranks(2).run(fused_by_signs):
        for expected, value in zip(model.parameters(), answer, strict=True):
            torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-5)


def in_half(dtype, message):
    model = seeded_model(dist.get_rank()).to(dtype)
    optimizer = build(model, config_of("fira/power"))
    replicate(model, optimizer, messages="signs", dtype=message, check_every=5)
    return run(model, optimizer, mine(2), clip=0.5)


@pytest.mark.parametrize(("dtype", "message"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_16_bit_weights_and_messages(ranks, dtype, message):
    """Accumulated and clipped; equal on all ranks to the bit.

    Rounding to 8 bits of mantissa decides a share of 2⁻⁹ of all signs, so that residuals are apart by its square root.
    """
    exact, _ = ranks(2).run(in_half, torch.float32, None)
    found, other = ranks(2).run(in_half, dtype, message)
    assert all(torch.equal(found[name], other[name]) for name in exact)
    assert 0 < furthest(found, exact) <= 2**-4.5  # 0.044; 0.023 and 0.009 found
