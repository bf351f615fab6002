"""APOLLO: its random projection, its factors, and what apollo-torch gives (measured from outside; no code was read)."""

import pytest
import torch
from cases import moved
from laws import seeded
from reference.apollo import apollo as equations
from torch import nn

from thinrank.optim import Apollo, ApolloConfig, ApolloMini, ApolloMiniConfig
from thinrank.optim.inner.adam import Adam
from thinrank.optim.linalg.adam import adam_direction
from thinrank.optim.lowrank import subspace as subspaces
from thinrank.optim.lowrank.lift import ScaledGradient
from thinrank.optim.lowrank.rule import LowRank
from thinrank.optim.lowrank.subspace import Gaussian, gaussian_projection
from thinrank.optim.rule import Step

SHAPES = {"tall": (24, 10), "wide": (9, 31), "square": (12, 12)}
STEPS, GAP, RANK, BETAS = 50, 20, 4, (0.9, 0.99)
OPTIONS = {"lr": 0.01, "betas": BETAS, "eps": 1e-6, "weight_decay": 0.1}
CPU = torch.device("cpu")


def projection(epoch, short, *, rank=RANK, seed=0):
    return gaussian_projection(short, rank, seed=seed, epoch=epoch, dtype=torch.float32, device=CPU)


def gradient(shape, step):
    return seeded(*shape, seed=1 + step) * (1 + step % 4)  # of changing size: the limiter is at work


def stepped(cls, shape, steps=STEPS, **options):
    weight = nn.Parameter(seeded(*shape) * 0.1)
    optimizer = cls([weight], **{**OPTIONS, "rank": RANK, "update_proj_gap": GAP, **options})
    for step in range(steps):
        weight.grad = gradient(shape, step)
        optimizer.step()
    return weight.detach()


# --- the projection ---------------------------------------------------------------------------------------------------


def test_lengths_are_kept_in_the_mean():
    """Johnson and Lindenstrauss: E‖g P‖² = ‖g‖², with variance 2/r; over 2000 draws, five standard errors."""
    row = seeded(1, 12)
    for rank in (1, 4):
        squares = torch.stack([(row @ projection(i, 12, rank=rank)).square().sum() for i in range(2000)])
        ratio = float(squares.mean() / row.square().sum())
        assert ratio == pytest.approx(1.0, abs=5 * (2 / rank / 2000) ** 0.5)
        spread = float((squares / row.square().sum()).var())
        assert spread == pytest.approx(2 / rank, rel=0.3)


def test_a_projection_is_a_function_of_seed_size_and_period():
    found = {
        "it": projection(0, 12),
        "seed": projection(0, 12, seed=1),
        "period": projection(1, 12),
        "size": projection(0, 13)[:12],
        "rank": projection(0, 12, rank=5)[:, :4] * (5 / 4) ** 0.5,
    }
    for a in found:
        for b in found:
            assert (a == b) == torch.allclose(found[a], found[b])
    again = projection(0, 12)
    subspaces._kept_gaussians.cache_clear()
    assert torch.equal(projection(0, 12), again)


def test_a_step_draws_no_random_numbers(monkeypatch):
    """One draw for all matrices of a size and a period; what is remembered does not grow with the periods."""
    drawn = []
    real = subspaces.random_columns
    monkeypatch.setattr(subspaces, "random_columns", lambda *args: drawn.append(args[:2]) or real(*args))
    subspaces._kept_gaussians.cache_clear()
    params = [nn.Parameter(seeded(8, 5)), nn.Parameter(seeded(8, 5)), nn.Parameter(seeded(5, 9))]
    optimizer = Apollo(params, rank=2, update_proj_gap=4)
    for step in range(12):
        for p in params:
            p.grad = seeded(*p.shape, seed=step)
        optimizer.step()
    assert drawn == [(5, 2)] * 3
    assert len(subspaces._kept_gaussians(5, 2, 0, torch.float32, CPU)) == subspaces.GAUSSIANS_KEPT


def test_matrices_of_other_counts_are_in_other_periods():
    """In one batch: each with the matrix of its own period, and a first step beside later ones."""
    subspace = Gaussian(rank=RANK, gap=3)
    rule = LowRank(subspace=subspace, inner=Adam(betas=BETAS), lift=ScaledGradient(betas=BETAS))
    for counts in ([0, 2, 3, 7], [1, 1, 1, 1], [1, 2, 4, 8]):
        grad = seeded(4, 9, 6)
        state = rule.init((4, 9, 6), CPU)
        rule.update(grad, state, Step(count=counts, seed=5))
        for i, count in enumerate(counts):
            low = grad[i] @ projection(count // 3, 6, seed=5)
            torch.testing.assert_close(state["exp_avg"][i], 0.1 * low, rtol=1e-4, atol=1e-6)
        change, _ = subspace.renew(grad, state, Step(count=counts, seed=5))
        assert change.overlap().tolist() == [float(count % 3 > 0) for count in counts]


def test_there_is_no_way_back():
    for call in (Gaussian(rank=2).down, lambda x, state: Gaussian(rank=2).up(x, state, 3)):
        with pytest.raises(RuntimeError, match="a Gaussian projection"):
            call(torch.ones(1, 4, 3), {})


# --- the factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("proj", ["random", "svd"])
def test_at_full_rank_the_factors_are_adams_own(proj, per):
    """Of each row, or of the matrix: its length after Adam over its length before, in the whole space.

    Exactly without a projection; for singular vectors, Adam in the turned coordinates.
    """
    options = {"lr": 1.0, "eps": 1e-6, "disable_nl": True, "weight_decay": 0.0}
    weight = nn.Parameter(torch.zeros(12, 7))
    optimizer = Apollo([weight], rank=1.0, proj=proj, scale_type=per, **options)
    m, v = torch.zeros(1, 12, 7), torch.zeros(1, 12, 7)
    turn = torch.linalg.svd(seeded(12, 7, seed=1), full_matrices=False)[2].T if proj == "svd" else torch.eye(7)
    for step in range(1, 6):
        weight.grad = seeded(12, 7, seed=step)
        before = weight.detach().clone()
        optimizer.step()
        low = (weight.grad @ turn).unsqueeze(0)
        direction = adam_direction(low, m, v, [step], betas=(0.9, 0.999), eps=1e-6, eps_raw=True)
        dims = (-1,) if per == "channel" else (-2, -1)
        ratio = direction.norm(dim=dims, keepdim=True) / weight.grad.norm(dim=dims, keepdim=True)
        torch.testing.assert_close(before - weight.detach(), (ratio * weight.grad)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_equations_in_float64(shape, proj, per, rank):
    grads = [gradient(shape, step) for step in range(STEPS)]
    project = None if proj == "svd" else lambda epoch, short: projection(epoch, short, rank=rank)
    for scale, limit in ((1.0, 1.01), (16.0, None)):
        found = stepped(Apollo, shape, rank=rank, proj=proj, scale_type=per, scale=scale, disable_nl=limit is None)
        start = seeded(*shape) * 0.1
        named = {"rank": rank, "gap": GAP, "scale": scale, "per": per, "limit": limit, **OPTIONS}
        expected = equations(start, grads, project=project, **named)
        assert moved(found, expected) <= 2e-4 * moved(start, expected)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_every_side_equals_the_equations(side, proj, per):
    """Of one-wide matrices too: the side of one has no projection, the other may."""
    for shape in (*SHAPES.values(), (7, 1), (1, 7), (1, 1)):
        rank = min(RANK, *shape)
        grads = [gradient(shape, step) for step in range(STEPS)]

        def project(epoch, short, rank=rank):
            return torch.eye(short) if short == rank else projection(epoch, short, rank=rank)

        found = stepped(Apollo, shape, rank=rank, proj=proj, proj_type=side, scale_type=per)
        named = {"rank": rank, "gap": GAP, "scale": 1.0, "side": side, "per": per, **OPTIONS}
        start = seeded(*shape) * 0.1
        expected = equations(start, grads, project=None if proj == "svd" else project, **named)
        rounding = STEPS * 2.0**-24 * float(expected.norm())  # of the weight, in every step
        assert moved(found, expected) <= 1e-5 * moved(start, expected) + rounding, shape


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_the_update_grows_slowly(per):
    """The limiter sees norms without the bias correction: of the steps, √(1−β2ᵗ)/(1−β1ᵗ) taken out."""
    lengths = {}
    for limit in (1e9, 1.01):
        weight = nn.Parameter(torch.zeros(9, 6))
        optimizer = Apollo([weight], lr=1.0, rank=2, betas=BETAS, scale_type=per, update_limit=limit)
        lengths[limit] = []
        for step in range(8):
            weight.grad = gradient((9, 6), step)
            before = weight.detach().clone()
            optimizer.step()
            size = (1 - BETAS[1] ** (step + 1)) ** 0.5 / (1 - BETAS[0] ** (step + 1))
            lengths[limit].append(float((weight.detach() - before).norm()) / size)
    expected = lengths[1e9][:1]
    for norm in lengths[1e9][1:]:
        expected.append(min(norm, 1.01 * expected[-1]))
    assert lengths[1.01] == pytest.approx(expected, rel=1e-4)
    assert lengths[1.01] != pytest.approx(lengths[1e9], rel=1e-2)


def test_mini_is_apollo_with_its_defaults():
    mini = stepped(ApolloMini, (24, 10), rank=1)
    assert torch.equal(mini, stepped(Apollo, (24, 10), rank=1, scale=128.0, scale_type="tensor"))
    assert (
        ApolloMiniConfig(lr=0.02).matrix_rule() == ApolloConfig(rank=1, scale=128.0, scale_type="tensor").matrix_rule()
    )
    assert ApolloMiniConfig().name == "apollo_mini"


# --- apollo-torch -----------------------------------------------------------------------------------------------------

# outputs of apollo-torch 1.0.3 with proj="svd", scale=16: the weight's norm, and its product with a fixed matrix; one
# basis, so that signs do not matter
PUBLISHED = {
    ((24, 10), "channel", False): (2.0860186, 1.9002534),
    ((24, 10), "channel", True): (2.2363903, 2.263081),
    ((24, 10), "tensor", False): (1.9619446, 1.3489131),
    ((24, 10), "tensor", True): (2.0210987, 1.4675758),
    ((9, 31), "channel", False): (2.3729216, 3.4040341),
    ((9, 31), "channel", True): (2.4525172, 3.3954217),
    ((9, 31), "tensor", False): (2.1245162, 2.6205499),
    ((9, 31), "tensor", True): (2.1556352, 2.6415159),
}


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize(("shape", "per", "free"), PUBLISHED, ids=str)
def test_gives_what_apollo_torch_gave(shape, per, free, front):
    """Its parameter groups are taken as they are, `scale` by its root; and `scale_front` is nothing there either."""
    weight = nn.Parameter(seeded(*shape) * 0.1)
    group = {"params": [weight], "rank": RANK, "update_proj_gap": 100, "scale": 16.0, "proj": "svd"}
    group |= {"proj_type": "std", "scale_type": per}
    optimizer = Apollo([group], disable_nl=free, scale_front=front, **OPTIONS)
    for step in range(30):
        weight.grad = gradient(shape, step)
        optimizer.step()
    end = weight.detach().double()
    found = (float(end.norm()), float((end * seeded(*shape, seed=99, dtype=torch.float64)).sum()))
    assert found == pytest.approx(PUBLISHED[shape, per, free], rel=1e-5, abs=1e-5)
