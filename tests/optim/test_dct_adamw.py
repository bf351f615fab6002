"""DCT-AdamW against its equations, its limits, and the defects of the published code."""

from functools import partial

import pytest
import torch
from cases import moved, stepped
from laws import decaying, seeded
from reference.dct_adamw import dct, dct_adamw, decoded
from torch import nn

from thinrank.optim import DCTAdamW
from thinrank.optim.linalg.fixed import basis_matrix
from thinrank.optim.lowrank.feedback import FEEDBACKS
from thinrank.optim.lowrank.subspace import FixedColumns
from thinrank.optim.rule import Step

STEPS = 24


train = partial(stepped, DCTAdamW)


@pytest.mark.parametrize("ages", [False, True], ids=["matrix's count", "column ages"])
@pytest.mark.parametrize("feedback", ["off", "full"])
@pytest.mark.parametrize("gap", [1, 5])
@pytest.mark.parametrize("shape", [(14, 9), (8, 15), (10, 10)], ids=["tall", "wide", "square"])
def test_equals_the_equations_in_float64(shape, gap, feedback, ages):
    start = seeded(*shape)
    grads = [decaying(*shape, seed=i + 1) for i in range(STEPS)]
    options = {"lr": 0.01, "rank": 4, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    weight, optimizer = train(
        start, grads, update_proj_gap=gap, error_feedback=feedback, column_age=ages, transport="rotate", **options
    )
    expected, error = dct_adamw(start, grads, gap=gap, feedback=feedback == "full", ages=ages, **options)
    assert moved(weight, expected) <= 1e-4 * moved(start, expected)
    if feedback == "full":
        own = optimizer.state[weight]["error"]
        torch.testing.assert_close(own if shape[0] >= shape[1] else own.mT, error.float(), rtol=1e-3, atol=1e-5)


BASES = ["dct", "identity", "hadamard", "random"]
EVERY = {"tall": (14, 9), "wide": (8, 15), "one wide": (7, 1), "one high": (1, 7), "one": (1, 1)}
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def rounded(start, end):
    """How far from its equations a weight may be: 1e-5 of its movement, and a rounding of it in every step."""
    return 1e-5 * moved(start, end) + STEPS * 2.0**-24 * float(end.norm())


def of(basis, short):
    return dct(short) if basis == "dct" else basis_matrix(basis, short, dtype=torch.float64, device="cpu")


def over_three_choices(shape, **named):
    """Columns change at most of the choices, and sizes at every step: the residual's limiter is at work."""
    start = seeded(*shape)
    grads = [decaying(*shape, seed=i + 1) * (1 + i % 4) for i in range(STEPS)]
    named = {"rank": min(4, *shape), **OPTIONS, **named}
    weight, _ = train(start, grads, update_proj_gap=3, residual_limit=1.1, **named)
    atoms = of(named.pop("basis"), min(shape))
    expected, _ = dct_adamw(start, grads, gap=3, atoms=atoms, ages=True, limit=1.1, **named)
    assert moved(weight, expected) <= rounded(start, expected)


@pytest.mark.parametrize("residual", ["off", "full", "sign"])
@pytest.mark.parametrize("transport", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("shape", EVERY.values(), ids=EVERY)
def test_every_transport_and_residual_equals_the_equations(shape, transport, residual):
    over_three_choices(shape, basis="dct", transport=transport, residual=residual)


@pytest.mark.parametrize("transport", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("basis", [basis for basis in BASES if basis != "dct"])
def test_every_other_basis_equals_the_equations(basis, transport):
    for shape in ((14, 9), (8, 15)):
        over_three_choices(shape, basis=basis, transport=transport, residual="full")


@pytest.mark.parametrize("transport", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(14, 9), (8, 15), (70, 66), (257, 258), (7, 1)], ids=str)
def test_coded_feedback_equals_the_equations(shape, bits, transport):
    """Given what was remembered, which is the error that the equations have to within half a level. Rows of 66 numbers
    are two blocks of 4 bits, rows of 257 two blocks of 8."""
    start, rank = seeded(*shape), min(3, *shape)
    grads = [decaying(*shape, ratio=0.9, seed=i + 1) for i in range(6)]
    weight = nn.Parameter(start.clone())
    named = {"rank": rank, "transport": transport, **OPTIONS}
    optimizer = DCTAdamW([weight], error_feedback=f"{bits}bit", **named)
    memory, scales = [], []
    block, short = (256 if bits == 8 else 64), min(shape)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        codes, scale = (optimizer.state[weight][f"error_{key}"].clone() for key in ("codes", "scale"))
        memory.append(decoded(codes, scale, bits=bits, width=short, block=block))
        scales.append(scale.double())

    def remembered(t, error):
        largest = torch.stack([part.abs().amax(1) for part in error.split(block, 1)], 1)
        torch.testing.assert_close(scales[t], largest / (2 ** (bits - 1) - 1), rtol=1e-4, atol=1e-7)  # all levels
        level = scales[t][:, torch.arange(short) // block]
        assert bool(((memory[t] - error).abs() <= 0.5 * level + 1e-6).all()), t  # entries below one, in float32
        return memory[t]

    expected, _ = dct_adamw(start, grads, gap=1, feedback=True, remembered=remembered, ages=True, **named)
    assert moved(weight, expected) <= rounded(start, expected)


def test_l2_selection_equals_the_equations():
    start, grads = seeded(14, 9), [decaying(14, 9, seed=i + 1) for i in range(STEPS)]
    options = {"lr": 0.01, "rank": 4, "eps": 1e-6}
    weight, _ = train(start, grads, norm="l2", column_age=False, **options)
    expected, _ = dct_adamw(start, grads, gap=1, norm=2, **options)
    assert moved(weight, expected) <= 1e-4 * moved(start, expected)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=["tall", "wide"])
def test_full_rank_is_adamw_in_rotated_coordinates(shape, basis):
    start, grads = seeded(*shape), [seeded(*shape, seed=i + 1) for i in range(STEPS)]
    weight, _ = train(start, grads, lr=0.01, rank=7, basis=basis, weight_decay=0.1)
    matrix = basis_matrix(basis, 7, dtype=torch.float32, device="cpu")
    turn = (lambda x: x @ matrix.T) if shape[0] > shape[1] else (lambda x: matrix @ x)
    twin = nn.Parameter(turn(start))
    reference = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1)
    for grad in grads:
        twin.grad = turn(grad)
        reference.step()
    torch.testing.assert_close(turn(weight.detach()), twin.detach(), rtol=1e-4, atol=1e-5)


def test_full_rank_in_the_identity_is_adamw():
    start, grads = seeded(12, 7), [seeded(12, 7, seed=i + 1) for i in range(STEPS)]
    weight, _ = train(start, grads, rank=7, basis="identity", weight_decay=0.1)
    twin = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([twin], weight_decay=0.1)
    for grad in grads:
        twin.grad = grad.clone()
        reference.step()
    torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)


def test_a_new_column_does_not_overshoot():
    """With the matrix's count a column that enters late steps (1−β1)/sqrt(1−β2) = 3.2 learning rates."""
    steps = {}
    for ages in (True, False):
        weight = nn.Parameter(torch.zeros(4, 4))
        optimizer = DCTAdamW([weight], lr=1.0, rank=1, basis="identity", column_age=ages)
        before = weight.detach().clone()
        for t in range(301):
            grad = torch.zeros(4, 4)
            grad[:, 0] = 1.0
            if t == 300:
                grad[:, 1] = 5.0  # column 1 takes the slot
            before = weight.detach().clone()
            weight.grad = grad
            optimizer.step()
        steps[ages] = float((weight.detach() - before).abs().max())
    assert steps[True] == pytest.approx(1.0, rel=1e-3)
    assert steps[False] > 1.5


# --- what the published code does, and this one must not ------------------------------------------------------------


def test_eight_bits_follow_full_precision():
    """The published quantiser divides by 15 and keeps 16 levels; with 255 the two trajectories stay together."""
    start = seeded(40, 24)
    grads = [0.5 * seeded(40, 24, seed=99) + seeded(40, 24, seed=i + 1) for i in range(STEPS)]
    ends = {
        feedback: train(start, grads, lr=0.01, rank=6, error_feedback=feedback, update_proj_gap=4)[0]
        for feedback in ("off", "full", "8bit")
    }
    assert moved(ends["8bit"], ends["full"]) < 0.05 * moved(start, ends["full"])
    assert moved(ends["off"], ends["full"]) > 0.2 * moved(start, ends["full"])


def never_sent(feedback, steps=200):
    """‖Σ gradients − Σ what was sent‖ / ‖Σ gradients‖, and the part of it that the error at the end explains."""
    subspace, shape = FixedColumns(rank=8), (1, 40, 32)
    rule = FEEDBACKS[feedback]
    state = {**rule.init(shape, torch.device("cpu")), **subspace.init(shape, torch.device("cpu"))}
    missing = total = torch.zeros(shape)
    for t in range(steps):
        grad = 0.3 * seeded(*shape, seed=9999) + seeded(*shape, seed=t)
        x = rule.enter(grad, state)
        _, low = subspace.renew(x, state, Step(count=[t], keys=[1]))
        assert low is not None
        image = subspace.up(low, state, shape[-1]).materialise()
        rule.sent(x, image, state)
        missing, total = missing + grad - image, total + grad
    error = rule.enter(torch.zeros(shape), state)
    return float(missing.norm() / total.norm()), float((missing - error).norm() / total.norm())


def test_in_the_long_run_everything_is_sent():
    """The law of error feedback: what was sent adds up to the gradients, but for the error that is remembered.

    Rounding of the error is lost: next to nothing in 8 bits, a few hundredths in 4.
    """
    assert never_sent("off")[0] > 0.5
    for feedback, most, lost in (("full", 0.03, 1e-5), ("8bit", 0.03, 0.005), ("4bit", 0.06, 0.04)):
        missing, forgotten = never_sent(feedback)
        assert missing < most
        assert forgotten < lost


def test_four_bits_follow_full_precision_less_closely():
    start = seeded(40, 24)
    grads = [0.5 * seeded(40, 24, seed=99) + seeded(40, 24, seed=i + 1) for i in range(STEPS)]
    ends = {
        feedback: train(start, grads, lr=0.01, rank=6, error_feedback=feedback, update_proj_gap=4)[0]
        for feedback in ("off", "full", "4bit")
    }
    assert moved(ends["4bit"], ends["full"]) < 0.5 * moved(ends["off"], ends["full"])


@pytest.mark.parametrize("feedback", ["8bit", "4bit"])
def test_constant_and_zero_rows_survive_few_bits(feedback):
    """Range quantisers divided zero by zero on a row of one value."""
    grads = [torch.ones(6, 5) for _ in range(3)] + [torch.zeros(6, 5)] * 2 + [torch.ones(6, 5).tril()] * 3
    weight, optimizer = train(seeded(6, 5), grads, rank=2, error_feedback=feedback)
    assert bool(weight.isfinite().all())
    assert bool(optimizer.state[weight]["error_scale"].isfinite().all())


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)], ids=["tall", "wide"])
def test_both_engines_walk_one_path(shape):
    """The published engines use the columns of C in one mode and of Cᵀ in the other: two bases, two trajectories."""
    start, grads = seeded(*shape), [decaying(*shape, seed=i + 1) for i in range(STEPS)]
    ends = [train(start, grads, rank=4, engine=engine, error_feedback="full")[0] for engine in ("matmul", "fft")]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_matrices_of_several_sizes_in_one_model():
    """The published code keeps one basis, sized by the first matrix it meets; the others broke."""
    shapes = [(14, 9), (9, 14), (7, 7), (30, 2), (5, 12)]
    weights = [nn.Parameter(seeded(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = DCTAdamW(weights, rank=2)
    alone = [nn.Parameter(w.detach().clone()) for w in weights]
    optimizers = [DCTAdamW([w], rank=2) for w in alone]
    for step in range(3):
        for i, (w, a) in enumerate(zip(weights, alone, strict=True)):
            w.grad = seeded(*shapes[i], seed=100 * step + i)
            a.grad = w.grad.clone()
        optimizer.step()
        for each in optimizers:
            each.step()
    for w, a in zip(weights, alone, strict=True):
        torch.testing.assert_close(w, a)


def test_the_choice_is_in_the_state_dict():
    """The published indices lived in an object beside the state: lost on a plain checkpoint."""
    _, optimizer = train(seeded(14, 9), [decaying(14, 9, seed=1)], rank=4)
    saved = optimizer.state_dict()["state"][0]
    assert saved["columns"].dtype is torch.int32
    coordinates = decaying(14, 9, seed=1) @ basis_matrix("dct", 9, dtype=torch.float32, device="cpu").T
    expected = coordinates.abs().sum(0).topk(4).indices.sort().values
    assert torch.equal(saved["columns"].long().sort().values, expected)


@pytest.mark.parametrize("feedback", ["off", "full", "8bit", "4bit"])
def test_gradients_are_left_alone(feedback):
    """The published step adds the error to `p.grad` and leaves the projection there."""
    weight = nn.Parameter(seeded(14, 9))
    optimizer = DCTAdamW([weight], rank=3, error_feedback=feedback)
    for step in range(3):
        grad = seeded(14, 9, seed=step)
        weight.grad = grad
        optimizer.step()
        assert weight.grad is grad
        assert torch.equal(grad, seeded(14, 9, seed=step))


def test_state_needs_no_gradient_to_exist():
    """Ranks that own nothing had no state in the published code, so checkpoints differed between ranks."""
    optimizer = DCTAdamW([nn.Parameter(seeded(14, 9))], rank=3, error_feedback="8bit")
    state = optimizer.state_dict()["state"][0]
    assert set(state) == {"step", "columns", "exp_avg", "exp_avg_sq", "age", "error_codes", "error_scale"}
