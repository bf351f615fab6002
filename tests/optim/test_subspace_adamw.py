"""SubspaceAdamW: its limits, its residual, and what happens to the moments when the basis turns."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import moved
from hypothesis import given
from hypothesis import strategies as st
from laws import LAW, decaying, seeded
from reference.subspace_adamw import subspace_adamw
from torch import nn

from thinrank.optim import DCTAdamW, GaLore, LDAdam, SubspaceAdamW
from thinrank.optim.inner.adam import Adam
from thinrank.optim.lowrank.lift import Residual
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import PowerIteration, Svd, TwoSidedSvd, width
from thinrank.optim.lowrank.transport import Keep, Reset, Rotate, Rotation, Slots
from thinrank.optim.rule import Step

STEPS, BETAS = 20, (0.9, 0.99)


@pytest.mark.parametrize("residual", ["full", "sign", "off"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=["tall", "wide"])
def test_full_rank_is_adam_in_the_turned_basis(shape, residual):
    """Nothing is left over, so the residual is rounding."""
    start = seeded(*shape)
    weight = nn.Parameter(start.clone())
    optimizer = SubspaceAdamW([weight], lr=0.01, rank=1.0, betas=BETAS, residual=residual, weight_decay=0.1)
    weight.grad = seeded(*shape, seed=1)
    optimizer.step()
    basis = optimizer.state[weight]["basis"].clone()
    assert basis.shape == (7, 7)
    turn = (lambda x: x @ basis) if shape[0] > shape[1] else (lambda x: basis.mT @ x)
    twin = nn.Parameter(turn(start))
    reference = torch.optim.AdamW([twin], lr=0.01, betas=BETAS, weight_decay=0.1)
    twin.grad = turn(seeded(*shape, seed=1))
    reference.step()
    for step in range(2, STEPS):
        weight.grad = seeded(*shape, seed=step)
        twin.grad = turn(weight.grad)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(turn(weight.detach()), twin.detach(), rtol=1e-4, atol=1e-4)
    if residual != "off":
        # from a difference of squares, hence the root of float32's precision
        assert float(optimizer.state[weight]["residual_norm"]) < 1e-2


@pytest.mark.parametrize(
    "cls",
    [Svd, TwoSidedSvd, PowerIteration],
)
def test_a_basis_is_kept_in_the_type_of_its_products(cls):
    """Which would round it in any case; what it says of its turn is right up to that rounding."""
    x, later = seeded(2, 12, 8), seeded(2, 12, 8, seed=1)
    step = Step(count=[0, 0], keys=[1, 2])
    narrow, wide = cls(rank=3, dtype=torch.bfloat16), cls(rank=3)
    state, full = (rule.init((2, 12, 8), torch.device("cpu")) for rule in (narrow, wide))
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    for rule, own in ((narrow, state), (wide, full)):
        rule.renew(x, own, step)
    if cls is not PowerIteration:  # whose products are bfloat16's in a renewal as well
        assert all(torch.equal(state[name], full[name].bfloat16()) for name in full)
    stored = {name: value.float() for name, value in state.items()}
    low = narrow.down(later, state)
    # inputs and result are rounded by 2⁻⁹ each, of what is at most a row's length
    torch.testing.assert_close(low, wide.down(later, stored), rtol=0, atol=2.0**-8 * float(later.norm(dim=-1).max()))
    assert narrow.up(low, state, 8).materialise().dtype is torch.float32
    change, _ = narrow.renew(x, state, Step(count=[1, 1], keys=[1, 2]))  # the same directions again
    torch.testing.assert_close(change.overlap(), torch.ones(2), rtol=0, atol=0.02)


def test_a_basis_of_an_older_checkpoint_is_rounded_and_one_that_is_carried_is_not():
    weight = nn.Parameter(seeded(12, 8))
    options = {"rank": 3, "svd": "power", "projection_dtype": "bfloat16"}
    optimizer = GaLore([{"params": [weight], **options}])
    weight.grad = seeded(12, 8, seed=1)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    kept = saved["state"][0]["basis"]
    saved["state"][0]["basis"] = kept.float() * (1 + 1e-4)  # digits that bfloat16 has not
    again = GaLore([{"params": [nn.Parameter(seeded(12, 8))], **options}])
    again.load_state_dict(saved)
    (state,) = again.state.values()
    assert torch.equal(state["basis"], kept)
    other = nn.Parameter(seeded(12, 8))
    assert LDAdam([other], rank=3, projection_dtype="bfloat16").state[other]["basis"].dtype is torch.float32


def steps(rule, grads):
    """The update of every step on a batch of matrices."""
    state = rule.init(tuple(grads[0].shape), torch.device("cpu"))
    for count, grad in enumerate(grads):
        yield grad, rule.update(grad, state, Step(count=[count] * len(grad))), state


def residuals(grads, **options):
    """At every step: the gradient, the basis, Adam's direction in it, and what the residual added to the update."""
    slots: dict[str, Any] = {"subspace": PowerIteration(rank=3, every=100), "inner": Adam(betas=BETAS)}
    with_it = steps(LowRank(**slots, lift=Residual(**options)), grads)
    without = steps(LowRank(**slots), grads)
    for (grad, update, state), (_, plain, _) in zip(with_it, without, strict=True):
        assert plain.direction is not None
        yield grad, state["basis"], plain.direction, update.materialise() - plain.materialise()


def test_the_residual_is_what_the_subspace_missed_scaled_row_by_row():
    for grad, basis, direction, residual in residuals([seeded(2, 9, 6, seed=i) for i in range(5)], limit=1e9):
        low = grad @ basis
        phi = direction.norm(dim=-1, keepdim=True) / low.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(residual, phi * (grad - low @ basis.mT), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(residual @ basis, torch.zeros(2, 9, 3), rtol=0, atol=1e-4)


def test_the_sign_residual_keeps_signs_and_the_mean_magnitude():
    grads = [seeded(2, 9, 6, seed=i) for i in range(5)]
    for grad, basis, direction, residual in residuals(grads, limit=1e9, signs=True):
        missed = grad - grad @ basis @ basis.mT
        assert torch.equal(residual.sign(), missed.sign())
        spread = residual.abs()
        torch.testing.assert_close(spread, spread.mean(-1, keepdim=True).expand_as(spread))  # one number a row
        phi = direction.norm(dim=-1) / (grad @ basis).norm(dim=-1)
        torch.testing.assert_close(spread[..., 0], phi * missed.abs().mean(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("signs", [False, True], ids=["full", "sign"])
def test_the_residual_grows_slowly(signs):
    """A burst in the gradient reaches the residual by 1 % a step; a fall is followed at once."""
    grads = [seeded(1, 9, 6, seed=i) for i in range(6)]
    free = [float(residual.norm()) for *_, residual in residuals(grads, limit=1e9, signs=signs)]
    expected = free[:1]
    for norm in free[1:]:
        expected.append(min(norm, 1.01 * expected[-1]))
    found = [float(residual.norm()) for *_, residual in residuals(grads, limit=1.01, signs=signs)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(free, rel=1e-2)


def test_the_residual_makes_the_difference_to_a_low_rank_step():
    """rank 1 of 8: with the residual every singular direction moves, without it one does."""
    ranks = {}
    for residual in ("full", "off"):
        weight = nn.Parameter(torch.zeros(12, 8))
        optimizer = SubspaceAdamW([weight], lr=1.0, rank=1, residual=residual)
        weight.grad = seeded(12, 8)
        optimizer.step()
        ranks[residual] = int(torch.linalg.matrix_rank(weight.detach(), rtol=1e-4))
    assert ranks == {"full": 8, "off": 1}


# --- the equations ----------------------------------------------------------------------------------------------------

EQUATIONS = {
    "tall": (24, 9), "wide": (9, 24), "square": (10, 10), "more columns than are tried": (30, 22),
    "one wide": (7, 1), "one high": (1, 7), "one": (1, 1),
}  # fmt: skip
"""In all but the fourth, rank and oversampling are the whole short side: subspace iteration is then exact. In the
fourth the spectrum falls so fast that it is, to float32."""


def gradients(shape):
    """Singular values well apart, and sizes that change by the step: the limiter is at work."""
    return [decaying(*shape, ratio=0.5, seed=t + 1) * (1 + t % 4) for t in range(STEPS)]


@pytest.mark.parametrize("residual", ["full", "sign", "off"])
@pytest.mark.parametrize("transport", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("shape", EQUATIONS.values(), ids=EQUATIONS)
def test_equals_the_equations_in_float64(shape, transport, residual):
    """Over three renewals. Twenty roundings of weights near one (2⁻²⁴ each) are 1.2e-5 of a movement of 0.1; the other
    half of the tolerance is for a few float32 products in each step."""
    start, grads = seeded(*shape), gradients(shape)
    options = {
        "lr": 0.01, "rank": min(3, *shape), "scale": 0.5, "transport": transport, "residual": residual, "betas": BETAS,
        "eps": 1e-4, "weight_decay": 0.1,
    }  # fmt: skip
    for limit in (1.01, 1.3):
        weight = nn.Parameter(start.clone())
        optimizer = SubspaceAdamW([weight], update_proj_gap=5, residual_limit=limit, **options)
        found = []
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
            if residual != "off":
                found.append(float(optimizer.state[weight]["residual_norm"]))
        expected, norms = subspace_adamw(start, grads, gap=5, limit=limit, **options)
        assert moved(weight, expected) <= 3e-5 * moved(start, expected)
        if min(shape) == 1:  # nothing is missed; the norm is the root of a difference of squares in float32
            assert max(found, default=0.0) < 1e-2
            continue
        assert found == pytest.approx(norms, rel=1e-4)
        at_work = [b / a == pytest.approx(limit, rel=1e-4) for a, b in pairwise(norms)]
        assert residual == "off" or (any(at_work) and not all(at_work))


# --- the moments at a renewal --------------------------------------------------------------------------------------


def plain_rotation(m, v, r, count):
    """LDAdam's rule, entry by entry in float64, its variance cut off at zero."""
    m, v, r = m.double(), v.double(), r.double()
    rows, old = m.shape
    fix1, fix2 = 1 - BETAS[0] ** count, 1 - BETAS[1] ** count
    new_m, new_v = torch.zeros_like(m), torch.zeros_like(v)
    for i in range(rows):
        for j in range(old):
            mean = sum(m[i, k] / fix1 * r[j, k] for k in range(old))
            variance = sum((v[i, k] / fix2 - (m[i, k] / fix1) ** 2) * r[j, k] ** 2 for k in range(old))
            new_m[i, j] = mean * fix1
            new_v[i, j] = (max(float(variance), 0.0) + mean**2) * fix2
    return new_m.float(), new_v.float()


@given(st.integers(1, 40), st.integers(0, 99))
@LAW
def test_rotation_of_both_moments_equals_its_reference(k, seed):
    m, v = seeded(2, 4, 3, seed=seed) * 0.1, seeded(2, 4, 3, seed=seed + 1).square() * 0.05
    turns = [torch.linalg.qr(seeded(3, 3, seed=seed + 2 + i)).Q for i in range(2)]
    state = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    Rotate(BETAS).carry(state, Rotation(torch.stack(turns)), [k, k + 3])
    for i, turn in enumerate(turns):
        expected = plain_rotation(m[i], v[i], turn, k + 3 * i)
        torch.testing.assert_close(state["exp_avg"][i], expected[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_sq"][i], expected[1], rtol=1e-4, atol=1e-6)


def test_a_rotation_by_a_choice_is_a_gather():
    """For a fixed basis the rotation holds zeros and ones; slots do the same without a product."""
    m, v = seeded(1, 5, 3), seeded(1, 5, 3, seed=1).square() + seeded(1, 5, 3).square()
    kept = torch.tensor([[True, False, True]])
    turned = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    Rotate(BETAS).carry(turned, Rotation(torch.diag_embed(kept.float())), [10_000])
    slots = {"exp_avg": m.clone(), "exp_avg_sq": v.clone(), "age": torch.tensor([[7.0, 8.0, 9.0]])}
    Rotate(BETAS).carry(slots, Slots(kept), [10_000])
    torch.testing.assert_close(turned["exp_avg"], slots["exp_avg"])
    torch.testing.assert_close(turned["exp_avg_sq"], slots["exp_avg_sq"])
    assert slots["age"].tolist() == [[7.0, 0.0, 9.0]]


def test_a_slot_that_changes_its_column_forgets_also_what_is_no_number():
    """Multiplied by zero, an overflowed moment would stay NaN in the slot for ever."""
    state = {"exp_avg": torch.ones(1, 2, 2), "exp_avg_sq": torch.ones(1, 2, 2), "age": torch.ones(1, 2)}
    for value in state.values():
        value[..., 1] = float("inf")
    Rotate(BETAS).carry(state, Slots(torch.tensor([[True, False]])), [5])
    for value in state.values():
        assert bool((value[..., 0] == 1.0).all())
        assert bool((value[..., 1] == 0.0).all())


def test_keep_keeps_and_reset_resets():
    change = Rotation(torch.linalg.qr(seeded(1, 3, 3)).Q)
    for transport, expected in ((Keep(), 1.0), (Reset(), 0.0)):
        state = {"exp_avg": torch.ones(1, 5, 3), "exp_avg_sq": torch.ones(1, 5, 3), "age": torch.ones(1, 3)}
        transport.carry(state, change, [5])
        assert all(bool((value == expected).all()) for value in state.values())


def test_a_rotated_step_stays_within_adams_bound():
    """LDAdam's absolute value let the second moment pass zero where the mean did not: steps of 60 learning rates.

    Adam's own bound is (1−β1)/sqrt(1−β2) = 3.2 for the usual betas.
    """
    rule = LowRank(
        subspace=PowerIteration(rank=8, every=3), transport=Rotate((0.9, 0.999)), inner=Adam(betas=(0.9, 0.999))
    )
    grads = [decaying(64, 32, seed=i).unsqueeze(0) for i in range(150)]
    longest = [float(d.abs().max()) for _, update, _ in steps(rule, grads) if (d := update.direction) is not None]
    assert len(longest) == 150
    assert max(longest) < 3.5


def test_a_turn_within_the_subspace_changes_nothing_but_the_letters():
    """m is carried exactly: with a basis that only turns, the momentum of the whole matrix is what it was."""
    m = seeded(1, 6, 3)
    turn = torch.linalg.qr(seeded(3, 3, seed=1)).Q
    basis = torch.linalg.qr(seeded(5, 3, seed=2)).Q
    state = {"exp_avg": m.clone(), "exp_avg_sq": m.square()}
    new = basis @ turn
    Rotate(BETAS).carry(state, Rotation((new.mT @ basis).unsqueeze(0)), [50])
    torch.testing.assert_close(state["exp_avg"] @ new.mT, m @ basis.mT, rtol=1e-5, atol=1e-6)


# --- the subspace itself ----------------------------------------------------------------------------------------------


def test_power_iteration_follows_what_the_exact_basis_holds():
    """Over a whole run with renewals, the captured energy stays within 2 % of an exact SVD's at every step."""
    energies = {}
    for name, subspace in (("svd", Svd(rank=4, every=5)), ("power", PowerIteration(rank=4, every=5))):
        rule = LowRank(subspace=subspace, inner=Adam())
        state = rule.init((1, 20, 12), torch.device("cpu"))
        energies[name] = []
        for count in range(20):
            grad = decaying(20, 12, seed=7).unsqueeze(0) + 0.05 * seeded(1, 20, 12, seed=count)
            record: dict[str, torch.Tensor] = {}
            rule.update(grad, state, Step(count=[count], record=record))
            energies[name].append(float(record["captured_energy"]))
    assert min(energies["power"]) > 0.98 * min(energies["svd"])


def test_galore_with_power_iteration_learns_like_exact_galore():
    losses = {}
    for svd in ("exact", "power"):
        torch.manual_seed(0)
        net = nn.Linear(16, 16, bias=False)
        target = decaying(16, 16, ratio=0.5)
        optimizer = GaLore(net.parameters(), lr=0.02, rank=4, scale=1.0, update_proj_gap=10, svd=svd)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (net.weight - target).square().sum()
            loss.backward()
            optimizer.step()
        losses[svd] = float((net.weight.detach() - target).square().sum())
    assert losses["power"] < 1.5 * losses["exact"] + 1e-3


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (3, (1, 9, 6), 3),
        (8, (1, 9, 6), 6),
        (8, (1, 4, 6), 4),
        (8.0, (1, 9, 6), 6),
        (0.5, (1, 9, 6), 3),
        (1.0, (1, 9, 6), 6),
        (1, (1, 9, 6), 1),
        (0.01, (1, 9, 6), 1),
        (2.0, (1, 9, 6), 2),
    ],
)
def test_width(rank, shape, expected):
    assert width(rank, shape) == expected


@pytest.mark.parametrize("make", [GaLore, DCTAdamW, SubspaceAdamW])
def test_products_in_bfloat16_follow_those_in_float32(make):
    """Cheaper products at every step; bases alone are kept in 16 bits, and the path stays where it was, nearly."""
    ends = {}
    start = seeded(24, 16)
    for dtype in ("float32", "bfloat16"):
        weight = nn.Parameter(start.clone())
        options: dict[str, Any] = {"svd": "power"} if make is GaLore else {}
        optimizer = make([weight], lr=0.01, rank=4, update_proj_gap=30, projection_dtype=dtype, **options)
        for step in range(20):
            weight.grad = decaying(24, 16, ratio=0.5, seed=3) + 0.02 * seeded(24, 16, seed=step)
            optimizer.step()
        halves = {name for name, v in optimizer.state[weight].items() if v.dtype is torch.bfloat16}
        assert halves == ({"basis"} if dtype == "bfloat16" and make is not DCTAdamW else set())
        ends[dtype] = weight.detach()
    apart = (ends["bfloat16"] - ends["float32"]).norm()
    assert 0 < float(apart) < 0.05 * float((ends["float32"] - start).norm())
