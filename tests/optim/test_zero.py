"""DeepSpeed's ZeRO-1, 2 and 3: gradients are read as one process has them, and N ranks step as one process does."""

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, small
from test_replicated import PLAIN, STEPS, TINY, alone, apart, bound, loss, mine, no_farther, seeded_model, shares
from test_replicated import run as run_alone
from torch import nn

from thinrank.optim import build
from thinrank.optim.replicated import ReplicaDrift

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

STAGES = (1, 2, 3)


def engine(config, stage, *, model=None, start=0, **settings: Any) -> Any:
    """A run of `Language` under ZeRO, and its optimizer."""
    from thinrank.trainers import zero

    # how DeepSpeed calls torch: not ours to repair
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # as torchrun does
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports
    zero.load_deepspeed().utils.logging.logger.setLevel("ERROR")
    model = seeded_model(start, all_alike=True) if model is None else model
    optimizer = build(model, config)
    optimizer.check_every = 7
    base = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    return zero.initialize(model, optimizer, {**base, **settings}), optimizer


def train(zero, parts=1, steps: Iterable[int] = range(STEPS)):
    """On this rank's share of a step's data, in `parts` micro-batches."""
    for step in steps:
        for share in mine(parts):
            zero.engine.backward(loss(zero.engine, step, share))
            zero.engine.step()


def run(zero, parts=1, steps: Iterable[int] = range(STEPS)):
    """The weights after training, on the first rank; the engine is gone then."""
    train(zero, parts, steps)
    found = zero.weights()
    zero.release()
    return found


def together(configs, stage, parts=1, **settings):
    found = {}
    for name, config in configs.items():
        zero, _ = engine(config, stage, start=dist.get_rank(), gradient_accumulation_steps=parts, **settings)
        found[name] = run(zero, parts)
    return found


# --- what is read -----------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Shapes that no number of ranks divides, some with fewer entries than ranks."""

    def __init__(self, with_empty):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)
        self.c = nn.Conv1d(1, 1, 1, bias=False)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(3))
        if with_empty:
            self.empty = nn.Parameter(torch.empty(0, 4))
        self.never = nn.Parameter(torch.ones(2, 5))

    def forward(self, x, use_gain):
        y = self.frozen(self.b(torch.tanh(self.a(x))))
        y = self.c(y[:, None])[:, 0]
        return (y * self.gain if use_gain else y).square().mean()


def odd(stage=1):
    torch.manual_seed(1)
    return Odd(with_empty=stage < 3)  # ZeRO-3 itself stops at parameters without entries


def rows(step, ranks, parts):
    """(parts, rows of a rank, 5) for every rank."""
    data = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return data.view(ranks, parts, -1, 5)


def pieces(stage, parts, clip):
    """By step and name: the shape, where this rank's piece lies, its gradient, and the norm of all."""
    zero, optimizer = engine(
        small("galore", svd="power", rank=1),
        stage,
        model=odd(stage),
        gradient_accumulation_steps=parts,
        gradient_clipping=clip or 0.0,
    )
    shards, rank = zero.front.shards, dist.get_rank()
    read: dict[Any, Any] = {}
    norm: Any = None
    optimizer.step_of = lambda params, last: read.update({p: shards.gradient(p) for p in params})
    found = []
    for step in range(3):
        read.clear()
        for part in rows(step, dist.get_world_size(), parts)[rank]:
            zero.engine.backward(zero.engine(part, step != 1))
            norm = (
                zero.gradient_norm() if part is not None and zero.engine.is_gradient_accumulation_boundary() else None
            )
            zero.engine.step()
        names = {param: name for name, param in zero.engine.module.named_parameters()}
        assert float(norm) == pytest.approx(float(zero.engine.get_global_grad_norm()), rel=1e-6)
        found.append(
            (
                float(norm),
                {
                    names[p]: (
                        shards.shape(p),
                        shards.spans(p),
                        None if g is None else g.clone(),
                        shards.weight(p).numel(),
                    )
                    for p, g in read.items()
                },
            )
        )
    zero.release()
    return found


@pytest.mark.timeout(150)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("ranks_", "parts", "clip"), [(1, 1, None), (2, 2, None), (4, 1, None), (2, 1, 0.01)])
def test_all_pieces_together_are_the_gradient_of_one_process(ranks, stage, ranks_, parts, clip):
    """Averaged and clipped; where nobody had a gradient there is none, though ZeRO has zeros, or what was before."""
    answers = ranks(ranks_).run(pieces, stage, parts, clip, timeout=140)
    for step in range(3):
        model = odd(stage)
        for part in rows(step, ranks_, parts).flatten(0, 1):
            (model(part, step != 1) / (ranks_ * parts)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.numel()}
        norm = torch.nn.utils.get_total_norm([grad for grad in grads.values() if grad is not None])
        scale = 1.0 if clip is None else clip / float(norm + 1e-6)
        assert scale <= 1.0
        assert (step == 1) == (grads["gain"] is None)
        for found_norm, found in (answer[step] for answer in answers):
            assert found_norm == pytest.approx(float(norm), rel=1e-5)
            assert found.keys() == grads.keys()
        for name, grad in grads.items():
            parts_of = [answer[step][1][name] for answer in answers]
            spans = parts_of[0][1]
            assert all(other[:2] == parts_of[0][:2] for other in parts_of)
            assert parts_of[0][0] == tuple(model.get_parameter(name).shape)
            assert [b - a for a, b in spans] == [other[3] for other in parts_of]
            if grad is None:
                assert all(other[2] is None for other in parts_of), name
                continue
            whole = torch.full((grad.numel(),), torch.nan)
            for (start, stop), other in zip(spans, parts_of, strict=True):
                whole[start:stop] = other[2]
            torch.testing.assert_close(whole.view(grad.shape), grad * scale, rtol=1e-5, atol=1e-6)


# --- steps ------------------------------------------------------------------------------------------------------------


def wide(name):
    """As far as rounding may take a run; moments of 8 bits, too, may fall to the next code."""
    return 2e-2 if getattr(CONFIGS[name], "state_bits", 32) == 8 else bound(name)


def names_alike(found):
    return {name: value for name, value in found.items() if name != "lm_head.weight"}  # it is the embedding


ALL = PLAIN | TINY | {name: CONFIGS[name] for name in ("adamw/8bit",)}
RUNS = [
    (1, 1, TINY),
    (1, 2, PLAIN),
    (1, 4, TINY),
    (2, 1, TINY),
    (2, 2, PLAIN),
    (2, 4, TINY),
    (3, 1, TINY),
    (3, 2, ALL),
    (3, 4, PLAIN),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stage", "ranks_", "configs"), RUNS, ids=lambda value: str(value) if value in (1, 2, 3, 4) else ""
)
def test_ranks_under_zero_are_one_process(ranks, stage, ranks_, configs):
    """Twenty steps, seven renewals; tied, frozen, unused and seldom used weights among them."""
    found = ranks(ranks_).run(together, configs, stage, timeout=280)
    assert all(not other[name] for other in found[1:] for name in configs)
    for name, config in configs.items():
        expected = alone(config, ranks_, all_alike=True)
        assert names_alike(found[0][name]).keys() == expected.keys()
        assert apart(found[0][name], expected) <= wide(name), name


ROWS = {name: CONFIGS[name] for name in ("galore/power", "dion", "ldadam/8bit")}


def cut_through_rows(stage):
    """By name: weights and state after training, and who steps `up`, as one rank knows it."""
    found = {}
    for name, config in ROWS.items():
        model = seeded_model(all_alike=True, inner=27)
        zero, optimizer = engine(config, stage, model=model)
        train(zero)
        found[name] = zero.weights(), optimizer.full_state_dict(), optimizer._cut[model.up.weight]
        zero.release()
    return found


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("stage", "ranks_"), [(2, 4), (3, 2)])
def test_rows_that_a_cut_goes_through_are_stepped_by_one_of_their_ranks(ranks, stage, ranks_):
    """A matrix of 27 rows is not brought to an owner: its ranks lend each other what is lacking of whole rows."""
    found = ranks(ranks_).run(cut_through_rows, stage, timeout=140)[0]
    for name, config in ROWS.items():
        model = seeded_model(all_alike=True, inner=27)
        optimizer = build(model, config)
        expected = run_alone(model, optimizer, shares(ranks_))
        weights, state, place = found[name]
        assert (place.way, place.rows is not None) == ("rows", True), name
        assert apart(names_alike(weights), expected) <= wide(name), name
        alone_ = optimizer.state_dict()["state"]
        assert state["state"].keys() == alone_.keys()
        for key, own in alone_.items():
            assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in state["state"][key].items()}
        whole = {str(i): own["step"] for i, own in alone_.items()}
        assert {str(i): own["step"] for i, own in state["state"].items()} == whole


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_and_clipping(ranks, stage):
    """DeepSpeed accumulates, and clips by the norm of whole gradients."""
    found = ranks(2).run(together, TINY, stage, parts=2, gradient_clipping=0.3)[0]
    for name, config in TINY.items():
        expected = alone(config, 4, all_alike=True, clip=0.3, joint=True)
        assert apart(found[name], expected) <= wide(name), name
        assert apart(alone(config, 4, all_alike=True), expected) > 1e-3  # it did clip


# --- resume -----------------------------------------------------------------------------------------------------------

KEPT = {name: CONFIGS[name] for name in ("galore/power", "ldadam/8bit moments", "muon", "adamw")}


def first_part(stage):
    """Nine steps, and what one process would have after them; and where all steps would have ended."""
    found = {}
    for name, config in KEPT.items():
        zero, optimizer = engine(config, stage)
        train(zero, steps=range(9))
        found[name] = zero.weights(), optimizer.full_state_dict()
        train(zero, steps=range(9, STEPS))
        found[name] += (zero.weights(),)
        zero.release()
    return found


def second_part(stage, saved):
    found = {}
    for name, config in KEPT.items():
        zero, optimizer = engine(config, stage, start=3)
        weights, state, _ = saved[name]
        zero.load_weights(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        found[name] = run(zero, steps=range(9, STEPS))
    return found


@pytest.mark.timeout(200)
def test_a_run_goes_on_anywhere(ranks):
    """With as many ranks and the same stage to the bit, and on others, or without ZeRO, up to rounding."""
    saved = {stage: ranks(2).run(first_part, stage)[0] for stage in STAGES}
    for stage in STAGES:
        same = ranks(2).run(second_part, stage, saved[stage])[0]
        for name, (_, _, end) in saved[stage].items():
            assert all(torch.equal(same[name][key], value) for key, value in end.items()), (stage, name)
    for before, after, number in ((1, 3, 2), (3, 2, 2), (3, 1, 1), (2, 3, 4)):
        found = ranks(number).run(second_part, after, saved[before])[0]
        for name in KEPT:
            assert apart(names_alike(found[name]), names_alike(saved[before][name][2])) <= wide(name), (before, after)
    for name, config in KEPT.items():
        weights, state, end = saved[3][name]
        model = seeded_model(5, all_alike=True)
        model.load_state_dict(weights)
        optimizer = build(model, config)
        optimizer.load_state_dict(copy.deepcopy(state))
        found = run_alone(model, optimizer, shares(2), steps=range(9, STEPS))
        assert apart(found, names_alike(end)) <= wide(name), name


# --- precision, settings ----------------------------------------------------------------------------------------------


ROUNDED = ("galore/power", "adamw", "fira", "dion", "muon")


def in_half(stage):
    found = {}
    for name in ROUNDED if stage == 3 else ROUNDED[:2]:
        zero, _ = engine(CONFIGS[name], stage, bf16={"enabled": True})
        found[name] = run(zero)
        assert all(value.dtype is torch.float32 for value in zero.engine.module.parameters())  # as it came
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_has_float32_masters(ranks, stage):
    """As near to float32, at least, as a process whose weights are bfloat16 altogether, but for chance."""
    found = ranks(2).run(in_half, stage)[0]
    for name, weights in found.items():
        exact = alone(CONFIGS[name], 2, all_alike=True)
        half = alone(CONFIGS[name], 2, all_alike=True, dtype=torch.bfloat16)
        assert {key for key, v in weights.items() if v.dtype is not torch.float32} == {"frozen.weight", "frozen.bias"}
        assert no_farther(name, weights, exact, half), name


def skips():
    """What a guard throws away changes nothing, and the next step is as if it had not been."""
    found = []
    for stage in STAGES:
        ends = []
        for waste in (True, False):
            zero, optimizer = engine(CONFIGS["galore/power"], stage)
            train(zero, steps=range(2))
            before, state = zero.weights(), copy.deepcopy(optimizer.full_state_dict())
            if waste:
                for bad in (1.0, torch.nan):
                    zero.engine.backward(loss(zero.engine, 2, *mine()) * bad)
                    norm = zero.gradient_norm()
                    found.append((bad == 1.0, bool(norm.isfinite())))
                    zero.front.skip_step()
                    zero.engine.step()
                    assert all(torch.equal(value, before[name]) for name, value in zero.weights().items())
                    after = optimizer.full_state_dict()
                    for key, own in state.get("state", {}).items():
                        assert all(torch.equal(value, after["state"][key][what]) for what, value in own.items())
            train(zero, steps=range(3, 6))
            ends.append(zero.weights())
            zero.release()
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()), stage
    return found


def test_a_step_that_is_skipped_leaves_no_trace(ranks):
    for found in ranks(2).run(skips):
        assert all(was == said for was, said in found)


def drifts(stage, name, key):
    """What a rank says once the last bit of one number of the state is another on rank 1."""
    zero, optimizer = engine(CONFIGS["galore/power"], stage)
    optimizer.check_every = 3
    train(zero, steps=range(2))
    if dist.get_rank() == 1:
        tensor = optimizer.state[zero.engine.module.get_parameter(name)][key]
        tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    said = ""
    try:
        train(zero, steps=[2])
    except ReplicaDrift as drift:
        said = str(drift)
    zero.release()
    return said


@pytest.mark.parametrize(("stage", "name", "key"), [(3, "up.weight", "basis"), (2, "embed.weight", "step")])
def test_state_that_drifts_apart_stops_all_ranks(ranks, stage, name, key):
    for sentence in ranks(2).run(drifts, stage, name, key):
        assert f"drifted apart: {key} of {name} is not the same on all ranks after 3 steps" in sentence


def rates(stage):
    """A scheduler may act on the optimizer or on what DeepSpeed has; the first steps here are at rate 0."""
    found = []
    for on_front in (False, True):
        zero, optimizer = engine(CONFIGS["galore/power"], stage)
        scheduled = zero.front if on_front else optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: min(1.0, step / 3))
        for step in range(6):
            train(zero, steps=[step])
            scheduler.step()
        found.append((zero.weights(), zero.engine.get_lr(), [group["lr"] for group in optimizer.param_groups]))
        zero.release()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_rates_are_those_of_the_optimizer(ranks, stage):
    config = CONFIGS["galore/power"]
    model = seeded_model(all_alike=True)
    optimizer = build(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    expected = {}
    for step in range(6):
        expected = run_alone(model, optimizer, shares(2), steps=[step])
        scheduler.step()
    for weights, said, lrs in ranks(2).run(rates, stage)[0]:
        assert apart(weights, expected) <= bound("galore")
        assert said == lrs == [group["lr"] for group in optimizer.param_groups]


def sub_groups():
    """ZeRO-3 may step in sub-groups of a group, and the reports of a step are complete after the last."""
    zero, optimizer = engine(
        CONFIGS["galore/power"],
        3,
        zero_optimization={"stage": 3, "sub_group_size": 200, "stage3_max_live_parameters": 0},
    )
    assert len(zero.engine.optimizer.fp16_groups) > len(optimizer.param_groups)
    optimizer.measure = True
    train(zero, steps=range(1))
    seen = set(optimizer.measured["captured_energy"]), set(optimizer.measured["update_rms"])
    train(zero, steps=range(1, STEPS))
    found = zero.weights()
    zero.release()
    return found, seen


def test_sub_groups_are_one_step(ranks):
    found, (energy, rms) = ranks(2).run(sub_groups)[0]
    assert apart(found, alone(CONFIGS["galore/power"], 2, all_alike=True)) <= bound("galore")
    assert energy == {"up.weight", "down.weight", "square.weight"}
    assert len(rms) == 3


def in_pieces_from_the_start():
    """Weights that `deepspeed.zero.Init` has cut: built while they are gathered, or refused."""
    from thinrank.trainers import zero

    deepspeed = zero.load_deepspeed()
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": 3}}
    with zero.quiet_deepspeed(), deepspeed.zero.Init(config_dict_or_path=settings):
        model = seeded_model(all_alike=True)
    said = None
    try:
        zero.initialize(model, build(model, CONFIGS["galore/power"]), settings)
    except Exception as error:
        said = str(error)
    with zero.quiet_deepspeed(), deepspeed.zero.GatheredParameters(list(model.parameters())):
        optimizer = build(model, CONFIGS["galore/power"])
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
    return start, said, run(zero.initialize(model, optimizer, settings))
