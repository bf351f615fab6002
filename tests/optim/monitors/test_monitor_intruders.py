"""Directions that the reference had not are counted, and those that it had are not."""

import math

import pytest
import torch
from planted import normal, orthonormal, with_values

from thinrank.optim.monitors import intruder_dimensions, intruders, left_vectors, new_directions
from thinrank.optim.monitors.intruders import leading_left_vectors

S = 10 * 0.75 ** torch.arange(64, dtype=torch.float64)  # apart, so that vectors have an identity
REFERENCE = with_values(S, 128, 64)


def planted(count, strength=30.0, seed=7):
    """The reference with `count` strong directions that it had not."""
    left, right = orthonormal(128, count, seed), orthonormal(64, count, seed + 1)
    left = torch.linalg.qr(left - left_vectors(REFERENCE) @ (left_vectors(REFERENCE).mT @ left)).Q
    return REFERENCE + left @ torch.diag(torch.linspace(strength, 20, count, dtype=torch.float64)) @ right.mT


def test_a_weight_has_no_intruders_against_itself():
    found = intruder_dimensions(REFERENCE, REFERENCE)
    assert int(found.number) == 0
    torch.testing.assert_close(found.similarity, torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 3])
def test_planted_directions_are_intruders(count):
    found = intruder_dimensions(planted(count), REFERENCE)
    assert int(found.number) == count
    assert (found.similarity[:count] < 0.5).all()
    assert (found.similarity[count:] > 0.5).all()


def test_growth_of_known_directions_is_no_intruder():
    left, s, right = torch.linalg.svd(REFERENCE, full_matrices=False)
    grown = left @ torch.diag(s * torch.linspace(5, 1, 64).double()) @ right
    assert int(intruder_dimensions(grown, REFERENCE).number) == 0
    assert int(intruder_dimensions(-3 * REFERENCE, REFERENCE).number) == 0


def test_a_rotation_of_the_inputs_alone_is_no_intruder_and_one_of_the_outputs_is():
    turned = REFERENCE @ orthonormal(64, 64)
    assert int(intruder_dimensions(turned, REFERENCE).number) == 0
    assert int(intruder_dimensions(orthonormal(128, 128) @ REFERENCE, REFERENCE).number) == 10


def test_random_directions_are_far_below_the_threshold():
    found = intruder_dimensions(normal(512, 256), normal(512, 256, seed=1))
    assert float(found.similarity.mean()) == pytest.approx(math.sqrt(2 * math.log(256) / 512), rel=0.2)
    assert int(found.number) == 10


def test_a_reference_kept_in_sixteen_bits_and_batches():
    weights, references = torch.stack([planted(2), REFERENCE]), torch.stack([REFERENCE, REFERENCE])
    kept = left_vectors(references).bfloat16()
    found = intruders(left_vectors(weights)[..., :10], kept)
    assert found.number.tolist() == [2, 0]
    assert found.similarity.shape == (2, 10)


def test_power_iteration_finds_the_leading_vectors():
    exact = left_vectors(planted(3))[:, :3]
    state = torch.get_rng_state()
    found = leading_left_vectors(planted(3), 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close((found.mT @ exact).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-4)
    assert int(intruders(found, left_vectors(REFERENCE)).number) == 3
    assert leading_left_vectors(normal(3, 5), 10).shape == (3, 3)


def test_new_directions_and_other_shapes():
    assert int(new_directions(planted(2), REFERENCE).number) == 2
    with pytest.raises(ValueError, match=r"\(128, 64\) and its reference \(64, 128\)"):
        intruder_dimensions(REFERENCE, REFERENCE.mT)
    with pytest.raises(ValueError, match="not finite"):
        left_vectors(torch.full((3, 3), torch.inf))
