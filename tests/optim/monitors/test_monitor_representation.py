"""Ranks of activations: the values of three kinds of features, and what each measure does not see."""

import math

import pytest
import torch
from planted import normal, orthonormal

from thinrank.optim.axis import Axis
from thinrank.optim.monitors import entropy_rank, singular_values, stable_rank
from thinrank.optim.monitors.representation import (
    diffusion_entropy,
    diffusion_information,
    leading_share,
    matrix_entropy,
    matrix_nuclear_norm,
    participation_ratio,
    reference_bandwidth,
    vendi_score,
    vendi_score_of,
)

TOKENS, FEATURES = 256, 64
RICH = normal(TOKENS, FEATURES)
RANK_4 = normal(TOKENS, 4, seed=1) @ normal(4, FEATURES, seed=2)
COLLAPSED = normal(1, FEATURES, seed=3) + 1e-3 * normal(TOKENS, FEATURES, seed=4)
EACH = {"rich": RICH, "rank 4": RANK_4, "collapsed": COLLAPSED}


@pytest.mark.parametrize(("kind", "low", "high"), [("rich", 48, 54), ("rank 4", 2.5, 4), ("collapsed", 1, 1.001)])
def test_the_participation_ratio_sees_all_three(kind, low, high):
    assert low <= float(participation_ratio(EACH[kind])) <= high


@pytest.mark.parametrize(("kind", "value"), [("rich", 0.500), ("rank 4", 0.470), ("collapsed", 0.500)])
def test_the_matrix_nuclear_norm_sees_none_of_them(kind, value):
    x = EACH[kind]
    assert float(matrix_nuclear_norm(x)) == pytest.approx(value, abs=0.01)
    z = torch.nn.functional.normalize((x - x.mean(0)).double(), dim=1)
    assert float(torch.linalg.svdvals(z).sum()) / TOKENS <= float(matrix_nuclear_norm(x)) + 1e-12


def test_the_matrix_nuclear_norm_is_the_nuclear_norm_of_orthogonal_columns():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])  # centred, orthogonal columns, equal rows
    z = signs / 2**0.5
    expected = float(torch.linalg.svdvals(z).sum()) / 4
    assert float(matrix_nuclear_norm(signs)) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "value"), [("rich", 4.24), ("collapsed", 0.0)])
def test_the_diffusion_entropy_with_the_authors_bandwidth(kind, value):
    assert diffusion_entropy(EACH[kind], 10.0) == pytest.approx(value, abs=0.1)


def test_a_bandwidth_that_follows_the_data_hides_a_collapse():
    """Why it has to be kept."""
    kept = reference_bandwidth(RICH)
    assert kept == pytest.approx(math.sqrt(2 * FEATURES) / 2, rel=0.03)
    rich, gone = diffusion_entropy(RICH, kept), diffusion_entropy(COLLAPSED, kept)
    assert rich > 7
    assert gone < 0.01
    assert diffusion_entropy(COLLAPSED, reference_bandwidth(COLLAPSED)) == pytest.approx(rich, abs=0.1)


def test_the_diffusion_entropy_counts_clumps():
    clumps = 1000 * torch.eye(4).repeat(8, 1)
    assert diffusion_entropy(clumps, 1.0) == pytest.approx(2)
    assert diffusion_entropy(1e3 * normal(16, 3), 1e-3) == pytest.approx(4)  # all alone
    labels = torch.arange(4).repeat(8)
    assert diffusion_information(clumps, labels, 1.0) == pytest.approx(2)
    assert diffusion_information(clumps, torch.zeros(32), 1.0) == pytest.approx(0)


def test_powers_and_samples_of_the_diffusion():
    x = normal(50, 5)
    assert diffusion_entropy(x, 2.0, power=4.0) < diffusion_entropy(x, 2.0)
    state = torch.get_rng_state()
    assert diffusion_entropy(x, 1.0, max_rows=20) == diffusion_entropy(x, 1.0, max_rows=20)
    assert torch.equal(torch.get_rng_state(), state)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bandwidth and power must be above 0"):
            diffusion_entropy(x, wrong)
    with pytest.raises(ValueError, match="median distance between rows is zero"):
        reference_bandwidth(torch.ones(10, 3))
    with pytest.raises(ValueError, match="2 tokens at least"):
        reference_bandwidth(torch.ones(1, 3))


@pytest.mark.parametrize(("kind", "value"), [("rich", 56.8), ("rank 4", 3.95), ("collapsed", 1.0)])
def test_the_vendi_score(kind, value):
    x = EACH[kind]
    score = float(vendi_score(x))
    assert score == pytest.approx(value, rel=0.05)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    assert score == pytest.approx(float(vendi_score_of(unit @ unit.mT)), rel=1e-6)  # the dual is the same
    assert score == pytest.approx(float(entropy_rank(singular_values(unit))), rel=1e-6)
    assert float(vendi_score(x, 2)) == pytest.approx(float(vendi_score_of(unit @ unit.mT, 2)), rel=1e-6)


def test_orders_of_the_vendi_score():
    half = torch.eye(3)[[0, 0, 0, 1]]
    e = [0.75, 0.25]
    assert float(vendi_score(half)) == pytest.approx(math.exp(-sum(p * math.log(p) for p in e)))
    assert float(vendi_score(half, 2)) == pytest.approx(1 / sum(p * p for p in e))
    assert float(vendi_score(half, math.inf)) == pytest.approx(4 / 3)
    assert float(vendi_score(half, 0.5)) == pytest.approx(sum(p**0.5 for p in e) ** 2)
    scores = [float(vendi_score(RICH, q)) for q in (0.5, 1, 1.5, 2, 5, math.inf)]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match="q must be above 0"):
        vendi_score(half, 0)


def test_the_matrix_entropy_of_noise_and_of_one_direction():
    assert float(matrix_entropy(normal(512, 512))) == pytest.approx(0.92, abs=0.005)
    line = torch.linspace(-1, 1, 9)[:, None] * torch.ones(1, 4)
    assert float(matrix_entropy(line)) == pytest.approx(0, abs=1e-9)
    assert float(matrix_entropy(torch.ones(5, 3))) == 0
    with pytest.raises(ValueError, match="at least 2"):
        matrix_entropy(torch.ones(5, 1))


@pytest.mark.parametrize("measure", [participation_ratio, matrix_entropy, vendi_score])
def test_rotations_and_the_order_of_rows_do_not_matter(measure):
    x = normal(40, 12, dtype=torch.float64)
    other = (x @ orthonormal(12, 12)).flip(0)
    torch.testing.assert_close(measure(other), measure(x))
    torch.testing.assert_close(measure(3 * x), measure(x))
    batch = torch.stack([x, x**3])
    torch.testing.assert_close(measure(batch), torch.stack([measure(x), measure(x**3)]))
    rough = measure(x.bfloat16())
    assert float(rough) == pytest.approx(float(measure(x)), rel=0.01)


def test_the_share_of_the_leading_direction():
    assert float(leading_share(torch.eye(4))) == pytest.approx(0.5)
    assert float(leading_share(COLLAPSED)) == pytest.approx(1, abs=1e-5)
    assert float(leading_share(RICH)) == pytest.approx(float(stable_rank(singular_values(RICH))) ** -0.5, rel=1e-5)
    assert leading_share(torch.stack([RICH, 0 * RICH])).tolist() == [float(leading_share(RICH)), 0]


def test_centring_takes_the_mean_away():
    x = RICH + 100
    assert float(participation_ratio(x)) < 1.1
    expected = float(participation_ratio(RICH - RICH.mean(0)))
    assert float(participation_ratio(x, centre=True)) == pytest.approx(expected, rel=1e-3)
    assert float(participation_ratio(torch.zeros(4, 3))) == 0


def shared_participation(x):
    import torch.distributed as dist

    axis = Axis(rows=dist.group.WORLD)
    cut = 11 if dist.get_rank() == 0 else len(x)
    mine = x[:cut] if dist.get_rank() == 0 else x[11:]
    return [float(participation_ratio(mine, centre=centre, axis=axis)) for centre in (False, True)]


def test_tokens_may_lie_on_several_ranks(ranks):
    x = normal(40, 6) + 1
    expected = [float(participation_ratio(x, centre=centre)) for centre in (False, True)]
    for found in ranks(2).run(shared_participation, x):
        assert found == pytest.approx(expected, rel=1e-6)
