"""Dion against its equations, its limits, and one rank against several."""

import pytest
import torch
import torch.distributed as dist
from cases import moved
from laws import decaying, eye_error, seeded, side_by_side
from reference.dion import dion
from torch import nn

from thinrank.optim import Dion, DionConfig
from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.methods.dion import DionRule
from thinrank.optim.rule import Step

STEPS = 30
RIGHTS = pytest.mark.parametrize("right", ["column_norm", "qr"])


def train(start, grads, **options):
    """The weight after a step on each of `grads`, its optimizer, and the right factor of before."""
    weight = nn.Parameter(start.clone())
    optimizer = Dion([weight], **options)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()  # a zero gradient: nothing but the first right factor comes of it
    weight.data.copy_(start)
    right = optimizer.state[weight]["basis"].clone()
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight, optimizer, right


def steps(rule, grads, axis=WHOLE, transposed=False, rows=slice(None)):
    """State before, gradient, update and state after, for each of `grads` (batch, long, short), of which `rows`."""
    state = rule.init(tuple(grads[0].shape), torch.device("cpu"))
    state["momentum"] = state["momentum"][:, rows]
    grads = [grad[:, rows] for grad in grads]
    for count, grad in enumerate(grads):
        step = Step(count=[count] * len(grad), keys=[5, 6][: len(grad)], seed=3, axis=axis, transposed=transposed)
        before = {key: value.clone() for key, value in state.items()}
        yield before, grad, rule.update(grad, state, step), state


@pytest.mark.parametrize("adjust", ["spectral", "original", "match_rms_adamw", "none"])
@pytest.mark.parametrize("orthogonalizer", ["cholesky_qr", "qr"])
@RIGHTS
@pytest.mark.parametrize("shape", [(14, 9), (8, 15), (10, 10)], ids=["tall", "wide", "square"])
def test_equals_the_equations_in_float64(shape, right, orthogonalizer, adjust):
    start = seeded(*shape)
    grads = [decaying(*shape, ratio=0.9, seed=i + 1) for i in range(STEPS)]
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    weight, optimizer, begin = train(
        start, grads, rank=4, right_factor=right, orthogonalizer=orthogonalizer, adjust_lr=adjust, **options
    )
    expected, momentum = dion(start, grads, begin, right=right, adjust=adjust, **options)
    assert moved(weight, expected) <= 1e-4 * moved(start, expected)
    own = optimizer.state[weight]["momentum"]
    torch.testing.assert_close(own if shape[0] >= shape[1] else own.mT, momentum.float(), rtol=1e-3, atol=1e-4)


@RIGHTS
def test_what_is_sent_decays_and_the_rest_is_kept_whole(right):
    rule = DionRule(rank=3, right_factor=right, adjust_lr="none", momentum=0.8)
    for before, grad, update, state in steps(rule, [seeded(2, 12, 7, seed=i) for i in range(6)]):
        left, full = update.direction, before["momentum"] + grad
        assert left is not None
        assert all(eye_error(each) < 1e-5 for each in left)
        sent = left @ (left.mT @ full)
        torch.testing.assert_close(state["momentum"], full - 0.2 * sent, rtol=1e-4, atol=1e-5)


def test_the_update_of_orth_dion_is_a_partial_isometry_and_never_uphill():
    """With the signs that a factorisation leaves, columns of both factors would disagree."""
    for right in ("column_norm", "qr"):
        rule = DionRule(rank=3, right_factor=right, adjust_lr="none")
        for before, grad, update, _ in steps(rule, [seeded(2, 12, 7, seed=i) for i in range(6)]):
            full = update.materialise()
            assert bool(((before["momentum"] + grad) * full).sum((-2, -1)).gt(0).all())
            if right == "qr":
                values = torch.linalg.svdvals(full)
                torch.testing.assert_close(values[:, :3], torch.ones(2, 3), rtol=0, atol=1e-5)
                assert float(values[:, 3:].max()) < 1e-5


@RIGHTS
def test_in_the_long_run_everything_is_sent(right):
    """Of a gradient of full rank that stays, updates of rank 2 send all: the rest is kept until its turn comes."""
    grads = [decaying(12, 7, ratio=0.8).unsqueeze(0)] * 200
    *_, (_, _, _, state) = steps(DionRule(rank=2, right_factor=right, momentum=0.5), grads)
    assert float(state["momentum"].norm()) < 0.1 * float(torch.stack(grads).sum(0).norm())


@RIGHTS
@pytest.mark.parametrize("orthogonalizer", ["cholesky_qr", "qr"])
def test_directions_that_a_gradient_does_not_have_are_not_invented(orthogonalizer, right):
    """A batch with fewer tokens than the rank; when others come, all columns are in use again."""
    rule = DionRule(rank=3, orthogonalizer=orthogonalizer, right_factor=right, adjust_lr="none")
    thin = [seeded(1, 12, 1) @ seeded(1, 1, 7, seed=1)] * 3
    found = list(steps(rule, [*thin, *(seeded(1, 12, 7, seed=i) for i in range(3))]))
    for i, (_, _, update, _) in enumerate(found):
        values = torch.linalg.svdvals(update.materialise()[0])
        assert int((values > 1e-3).sum()) == (1 if i < 3 else 3)
        if i < 3:
            assert float(values[0]) == pytest.approx(1.0, abs=1e-4)
    lengths = found[-1][3]["basis"].norm(dim=-2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_a_zero_momentum_keeps_the_right_factor():
    rule = DionRule(rank=3)
    found = list(steps(rule, [torch.zeros(2, 12, 7)] * 2))
    first, second = (after["basis"] for _, _, _, after in found)
    assert torch.equal(first, second)
    assert not any(bool(update.materialise().any()) for _, _, update, _ in found)
    assert not torch.allclose(first[0], first[1])  # every matrix begins with columns of its own
    *_, (_, _, _, other) = steps(DionRule(rank=3), [torch.zeros(2, 12, 7)])
    assert torch.equal(other["basis"], first)


def test_the_published_defaults():
    config = DionConfig()
    assert (config.lr, config.momentum, config.weight_decay, config.betas) == (0.01, 0.95, 0.01, (0.9, 0.95))
    assert "update_proj_gap" not in config.group()


# --- ranks -----------------------------------------------------------------------------------------------------------

LONG, SHORT = 11, 8
RULES = {right: DionRule(rank=3, right_factor=right) for right in ("column_norm", "qr")}
SPLITS = {"uneven": (7, 4), "narrower than the rank": (9, 2), "empty": (11, 0)}


def gradients(data=0):
    return [
        torch.stack([decaying(LONG, SHORT, ratio=0.9, seed=1000 * data + 10 * t + b) for b in range(2)])
        for t in range(8)
    ]


def ends(rule, grads, axis=WHOLE, transposed=False, rows=slice(None)):
    found = list(steps(rule, grads, axis, transposed, rows))
    return torch.stack([update.materialise() for _, _, update, _ in found]), found[-1][3]


def sharded(right, split, transposed):
    start = sum(split[: dist.get_rank()])
    mine = slice(start, start + split[dist.get_rank()])
    return ends(RULES[right], gradients(), Axis(rows=dist.group.WORLD), transposed, mine)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@RIGHTS
def test_sharded_rows_equal_the_whole_matrix(ranks, right, split):
    """The shape's scale is that of all rows, too."""
    for transposed in (False, True):
        updates, state = ends(RULES[right], gradients(), transposed=transposed)
        parts = ranks(2).run(sharded, right, split, transposed)
        torch.testing.assert_close(torch.cat([part[0] for part in parts], -2), updates, rtol=1e-4, atol=1e-5)
        momenta = torch.cat([own["momentum"] for _, own in parts], -2)
        torch.testing.assert_close(momenta, state["momentum"], rtol=1e-4, atol=1e-5)
        for _, own in parts:
            torch.testing.assert_close(own["basis"], state["basis"], rtol=1e-4, atol=1e-5)


@RIGHTS
def test_replicas_that_average_factors_equal_one_with_the_mean_gradient(right):
    """No gradient travels; momenta stay where they were made, and their mean is the momentum of the mean."""
    rule, shape = RULES[right], (2, LONG, SHORT)
    state = rule.init(shape, torch.device("cpu"))
    own = [rule.init(shape, torch.device("cpu")) for _ in range(2)]
    for count, grads in enumerate(zip(gradients(0), gradients(1), strict=True)):
        step = Step(count=[count, count], keys=[5, 6])
        expected = rule.update(torch.stack(grads).mean(0), state, step).materialise()
        found = side_by_side([rule.exchange(grad, s, step) for grad, s in zip(grads, own, strict=True)])
        torch.testing.assert_close(found[0].materialise(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[0].materialise(), found[1].materialise())
        assert torch.equal(own[0]["basis"], own[1]["basis"])
    momenta = [rule.recall(each, SHORT) for each in own]
    assert not torch.allclose(*momenta, rtol=0.1, atol=0.1)
    torch.testing.assert_close(torch.stack(momenta).mean(0), state["momentum"], rtol=1e-4, atol=1e-5)


def refusal():
    rule = DionRule(rank=2, orthogonalizer="qr")
    try:
        ends(rule, [torch.ones(1, 4, 3)], Axis(rows=dist.group.WORLD))
    except RuntimeError as error:
        return str(error)
    return ""


def test_reflections_refuse_sharded_rows(ranks):
    for sentence in ranks(2).run(refusal):
        assert "use 'cholesky_qr'" in sentence
