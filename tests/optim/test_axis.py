"""The seam to the machines: N ranks must equal one, whether they share the rows of a matrix or hold other data."""

import pytest
import torch
import torch.distributed as dist
from laws import decaying, seeded, side_by_side

from thinrank.optim.axis import WHOLE, Axis
from thinrank.optim.inner.adam import Adam
from thinrank.optim.inner.mfac import MFAC
from thinrank.optim.linalg.basis import captured_energy, subspace_iteration
from thinrank.optim.linalg.fixed import column_norms
from thinrank.optim.linalg.norms import frobenius
from thinrank.optim.lowrank.feedback import ErrorFeedback, QuantisedFeedback
from thinrank.optim.lowrank.lift import Residual, ScaledGradient
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import FixedColumns, Gaussian, PowerIteration, Svd, TwoSidedSvd
from thinrank.optim.lowrank.transport import Rotate
from thinrank.optim.methods.dion import DionRule
from thinrank.optim.methods.ldadam import LDAdamConfig, LDAdamRule
from thinrank.optim.methods.trion import TrionRule
from thinrank.optim.rule import MatrixRule, Step

LONG, SHORT, RANK, STEPS = 11, 8, 3, 7
SPLITS = {"uneven": (7, 4), "narrower than the rank": (9, 2), "empty": (11, 0)}
BETAS = (0.9, 0.99)
RULES: dict[str, LowRank | LDAdamRule] = {
    "power": LowRank(
        subspace=PowerIteration(rank=RANK, every=3), transport=Rotate(BETAS), inner=Adam(betas=BETAS, eps=1e-3)
    ),
    "power, residual": LowRank(
        subspace=PowerIteration(rank=RANK, every=3), inner=Adam(betas=BETAS, eps=1e-3), lift=Residual(limit=1.01)
    ),
    "power, Fira's residual": LowRank(
        subspace=PowerIteration(rank=RANK, every=3),
        inner=Adam(betas=BETAS, eps=1e-3, eps_raw=True),
        lift=Residual(alpha=0.25, betas=BETAS),
    ),
    "random, by channel": LowRank(
        subspace=Gaussian(rank=RANK, gap=3),
        inner=Adam(betas=BETAS, eps=1e-3, eps_raw=True),
        lift=ScaledGradient(betas=BETAS),
    ),
    "random, by tensor": LowRank(
        subspace=Gaussian(rank=RANK, gap=3),
        inner=Adam(betas=BETAS, eps=1e-3, eps_raw=True),
        lift=ScaledGradient(betas=BETAS, per="tensor"),
    ),
    "power, signs": LowRank(
        subspace=PowerIteration(rank=RANK, every=3), inner=Adam(betas=BETAS, eps=1e-3), lift=Residual(signs=True)
    ),
    "columns": LowRank(
        subspace=FixedColumns(rank=RANK), transport=Rotate(BETAS), inner=Adam(betas=BETAS, eps=1e-3, ages=True)
    ),
    "columns by l2 with feedback": LowRank(
        subspace=FixedColumns(rank=RANK, every=2, norm="l2", basis="hadamard"),
        transport=Rotate(BETAS),
        inner=Adam(betas=BETAS, eps=1e-3),
        feedback=ErrorFeedback(),
    ),
    "columns with 8-bit feedback": LowRank(
        subspace=FixedColumns(rank=RANK, basis="random"),
        inner=Adam(betas=BETAS, eps=1e-3),
        feedback=QuantisedFeedback(8),
    ),
    "unit columns with 4-bit feedback": LowRank(
        subspace=FixedColumns(rank=RANK, basis="identity"),
        inner=Adam(betas=BETAS, eps=1e-3),
        feedback=QuantisedFeedback(4),
    ),
    "ldadam": LDAdamRule(
        subspace=PowerIteration(rank=RANK),
        inner=Adam(betas=BETAS, eps=1e-3),
        transport=Rotate(BETAS),
        feedback=ErrorFeedback(),
        rho=0.9,
        exact=False,
    ),
    "mfac": LowRank(
        subspace=PowerIteration(rank=RANK, every=3),
        transport=Rotate(BETAS, also=("window",)),
        inner=MFAC(window=4, damping=0.01),
    ),
}


def gradients(data=0):
    return [torch.stack([decaying(LONG, SHORT, seed=1000 * data + 10 * t + b) for b in range(2)]) for t in range(STEPS)]


def run(rule, grads, state, axis=WHOLE):
    """The updates of all steps, and the captured energies."""
    updates, energies = [], []
    for count, grad in enumerate(grads):
        record: dict[str, torch.Tensor] = {}
        step = Step(count=[count, count], keys=[5, 6], seed=3, axis=axis, record=record)
        updates.append(rule.update(grad, state, step).materialise())
        energies.append(record.get("captured_energy", torch.zeros(2)))  # a random projection has none
    return torch.stack(updates), torch.stack(energies)


def share(value, mine):
    """The rows `mine` of a state tensor, wherever it has rows."""
    return (
        value.movedim(value.shape.index(LONG), 0)[mine].movedim(0, value.shape.index(LONG))
        if LONG in value.shape
        else value
    )


def sharded(name, split):
    rank = dist.get_rank()
    start = sum(split[:rank])
    mine = slice(start, start + split[rank])
    whole = RULES[name].init((2, LONG, SHORT), torch.device("cpu"))
    state = {key: share(value, mine) for key, value in whole.items()}
    axis = Axis(rows=dist.group.WORLD)
    assert not axis.whole
    return *run(RULES[name], [grad[:, mine] for grad in gradients()], state, axis), state


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", RULES)
def test_sharded_rows_equal_the_whole_matrix(ranks, name, split):
    state = RULES[name].init((2, LONG, SHORT), torch.device("cpu"))
    updates, energies = run(RULES[name], gradients(), state)
    parts = ranks(2).run(sharded, name, split)
    together = torch.cat([part[0] for part in parts], -2)
    torch.testing.assert_close(together, updates, rtol=1e-3, atol=1e-4)
    for _, energy, own in parts:
        torch.testing.assert_close(energy, energies, rtol=1e-4, atol=1e-5)
        for key in ("columns", "basis", "residual_norm", "update_norm", "age", "window_norm"):
            if key in state:  # what is shared is the same on every rank, an empty one included
                torch.testing.assert_close(own[key], state[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["columns by l2 with feedback", "ldadam"])
def test_replicas_with_their_own_gradients_and_errors_step_by_the_mean(name):
    """The mean after a projection is the projection of the mean; errors stay where they were made."""
    rule, shape = RULES[name], (2, LONG, SHORT)
    state = rule.init(shape, torch.device("cpu"))
    own = [rule.init(shape, torch.device("cpu")) for _ in range(3)]
    for count in range(STEPS):
        step = Step(count=[count, count], keys=[5, 6], seed=3)
        grads = [gradients(data)[count] for data in range(3)]
        expected = rule.update(torch.stack(grads).mean(0), state, step)
        found = side_by_side([rule.exchange(grad, s, step) for grad, s in zip(grads, own, strict=True)])
        for update in found:
            assert torch.equal(update.materialise(), found[0].materialise())
        torch.testing.assert_close(found[0].materialise(), expected.materialise(), rtol=1e-3, atol=1e-4)
    errors = [rule.recall(s, SHORT) for s in own]
    assert not torch.allclose(errors[0], errors[1], rtol=0.1, atol=0.1)
    torch.testing.assert_close(torch.stack(errors).mean(0), rule.recall(state, SHORT), rtol=1e-3, atol=1e-5)


RULES_OF_THEIR_OWN: dict[str, MatrixRule] = {
    "columns": RULES["columns"],
    "power": RULES["power"],
    "ldadam": RULES["ldadam"],
    "dion": DionRule(rank=RANK),
    "trion": TrionRule(subspace=FixedColumns(rank=RANK)),
}


def one_spoilt(name):
    """What a rank holds as its basis before and after a step in which the last rank's gradient is no number."""
    last = dist.get_rank() == 1
    rule = RULES_OF_THEIR_OWN[name]
    mine = slice(7, 11) if last else slice(0, 7)
    grads = [grad[:, mine] for grad in gradients()]
    state = rule.init((2, grads[0].shape[1], SHORT), torch.device("cpu"))
    axis = Axis(rows=dist.group.WORLD)
    key = "columns" if "columns" in state else "basis"
    for count in range(3):
        rule.update(grads[count], state, Step(count=[count, count], keys=[5, 6], axis=axis))
    before, grad = state[key].clone(), grads[3].clone()
    if last:
        grad[0, 1, 2] = torch.nan
    step = Step(count=[3, 3], keys=[5, 6], axis=axis, notes=[], held=[])
    rule.update(grad, state, step)
    held = [bool(value) for _, values in step.held or () for value in values]
    return before, state[key], held or [any(note.matrix == i for note in step.notes or ()) for i in range(2)]


@pytest.mark.parametrize("name", RULES_OF_THEIR_OWN)
def test_all_ranks_keep_a_subspace_that_one_cannot_renew(ranks, name):
    """A rank that kept its basis alone would step its rows by another one from then on."""
    first, second = ranks(2).run(one_spoilt, name)
    for before, after, held in (first, second):
        assert held == [True, False]
        assert torch.equal(before[0], after[0])
    assert torch.equal(first[1], second[1])


def sums():
    x = torch.full((2, 2), float(dist.get_rank() + 1)).mT
    return Axis(rows=dist.group.WORLD).sum(x), x


def test_a_sum_on_two_ranks(ranks):
    for rank, (total, x) in enumerate(ranks(2).run(sums)):
        assert torch.equal(total, torch.full((2, 2), 3.0))
        assert torch.equal(x, torch.full((2, 2), float(rank + 1)))


def test_one_process_has_nobody_to_ask():
    x = seeded(3, 3)
    assert WHOLE.sum(x) is x
    assert WHOLE.whole


def exactly(split):
    rank = dist.get_rank()
    start = sum(split[:rank])
    x = seeded(1, LONG, SHORT, dtype=torch.float64)[:, start : start + split[rank]]
    axis = Axis(rows=dist.group.WORLD)
    begin = seeded(1, SHORT, 5, seed=1, dtype=torch.float64)
    basis, _ = subspace_iteration(x, begin, RANK, iterations=2, axis=axis)
    norm = frobenius(x, axis)
    return (
        basis,
        column_norms(x, "l1", axis),
        column_norms(x, "l2", axis),
        norm,
        captured_energy(x, x @ basis, axis),
    )


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_the_functions_agree_in_float64(ranks, split):
    x = seeded(1, LONG, SHORT, dtype=torch.float64)
    basis, _ = subspace_iteration(x, seeded(1, SHORT, 5, seed=1, dtype=torch.float64), RANK, iterations=2)
    norm = frobenius(x)
    expected = (basis, column_norms(x, "l1"), column_norms(x, "l2"), norm)
    parts = ranks(2).run(exactly, split)
    for part in parts:
        torch.testing.assert_close(part[:4], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(part[4], captured_energy(x, x @ basis), rtol=1e-6, atol=1e-6)


def refusals():
    sentences = []
    rules: list[MatrixRule] = [LowRank(subspace=each, inner=Adam()) for each in (Svd(rank=2), TwoSidedSvd(rank=2))]
    exact = LDAdamConfig(rank=2).matrix_rule()
    assert exact is not None
    for rule in (*rules, exact):
        state = rule.init((1, 4, 3), torch.device("cpu"))
        try:
            rule.update(torch.ones(1, 4, 3), state, Step(count=[0], axis=Axis(rows=dist.group.WORLD)))
        except RuntimeError as error:
            sentences.append(str(error))
    return sentences


def test_a_factorisation_of_the_whole_refuses_rows(ranks):
    for sentences in ranks(2).run(refusals):
        assert len(sentences) == 3
        assert "svd='power'" in sentences[0]
        assert "'std'" in sentences[1]
        assert "svd='power'" in sentences[2]
