"""Alignments of inputs with a direction: their law without one, what a shift does, and when the alarm speaks."""

import math

import pytest
import torch

from thinrank.optim.monitors.alignment import BINS, Alignment, AlignmentAlarm, counts


def gaussian(tokens, width, seed=0, shift=0.0):
    """Inputs, a direction, and inputs shifted along it by so many standard deviations of a coordinate."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(width, generator=generator)
    right /= right.norm()
    return torch.randn(tokens, width, generator=generator) + shift * right, right


def test_without_a_direction_both_signs_come_and_the_spread_is_one():
    inputs, right = gaussian(20_000, 256)
    found = Alignment.of(counts(inputs, right), 256)
    spread = (inputs @ right / inputs.norm(dim=1)).std() * 16
    assert float(spread) == pytest.approx(1, rel=0.03)
    assert found.sign_diversity > 0.9
    assert found.sign_entropy > 0.99
    assert abs(found.mean) < 0.03
    assert found.magnitude == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)


@pytest.mark.parametrize(("shift", "positive"), [(0.5, 0.69), (1.0, 0.84), (2.0, 0.977), (3.0, 0.9987)])
def test_a_shift_along_the_direction_takes_sign_diversity_away(shift, positive):
    """f+ is the normal distribution at the shift, since the length of an input hardly depends on one coordinate."""
    inputs, right = gaussian(20_000, 256, shift=shift)
    found = Alignment.of(counts(inputs, right), 256)
    assert found.positive == pytest.approx(positive, abs=0.01)
    assert found.sign_diversity == pytest.approx(2 * (1 - positive), abs=0.02)
    other = Alignment.of(counts(inputs, -right), 256)
    assert other.sign_diversity == pytest.approx(found.sign_diversity, abs=1e-12)
    assert other.mean == pytest.approx(-found.mean)


def test_counts_add_up_over_parts_and_the_histogram_has_every_token():
    inputs, right = gaussian(1000, 32, shift=1.0)
    whole = counts(inputs.reshape(10, 100, 32), right)
    parts = counts(inputs[:300], right) + counts(inputs[300:], right)
    torch.testing.assert_close(whole, parts)
    found = Alignment.of(whole, 32)
    assert len(found.histogram) == BINS
    assert sum(found.histogram) == found.tokens == 1000
    scaled = (inputs @ right / inputs.norm(dim=1)) * math.sqrt(32)
    expected = torch.histc(scaled.clamp(-10, 10), BINS, -10, 10)
    assert sum(abs(a - int(b)) for a, b in zip(found.histogram, expected, strict=True)) <= 2  # at the bins' edges


def test_tokens_without_a_direction_are_left_out_and_sixteen_bits_are_widened():
    inputs, right = gaussian(100, 16)
    with_zeros = torch.cat([inputs, torch.zeros(7, 16)])
    assert torch.equal(counts(with_zeros, right), counts(inputs, right))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(counts(inputs.bfloat16(), right), counts(inputs.bfloat16().float(), right))
    nothing = Alignment.of(counts(torch.zeros(3, 16), right), 16)
    assert nothing.tokens == 0
    assert math.isnan(nothing.positive)


def run(alarm, steps, reading, every=10):
    """The verdicts of a model with ten layers; `reading` gives each layer's SD and σ1 at a step."""
    found = []
    for step in range(every, steps + 1, every):
        values = {f"l{i}": (*reading(i, step), 2.0) for i in range(10)}
        found.append((step, alarm.update(step, values)))
    return found


def small(**how):
    return AlignmentAlarm(**{"warmup": 20, "baseline": 100, "fast": 3, **how})


def test_a_healthy_model_and_one_with_a_few_one_sided_layers_say_nothing():
    """Two layers that collapse, and one that has always been one-sided, are no alarm."""

    def reading(layer, step):
        one_sided = layer == 9 or (layer < 2 and step > 200)
        return (0.0 if one_sided else 0.8), 2.0

    verdicts = run(small(), 600, reading)
    assert {verdict.level for _, verdict in verdicts} == {"healthy"}
    assert verdicts[-1][1].collapsed == 0.2
    assert set(verdicts[-1][1].layers) == {"l0", "l1"}


def test_many_layers_are_a_warning_then_an_alert_and_recovery_clears_with_hysteresis():
    def reading(layer, step):
        gone = (layer < 3 and step > 200) or (layer < 5 and step > 300)
        return (0.10 if step > 400 and gone else 0.0 if gone else 0.8), 2.0

    verdicts = dict(run(small(), 700, reading))
    assert verdicts[200].level == "healthy"
    assert verdicts[290].level == "warn"
    assert "30%" in verdicts[290].reason
    assert verdicts[400].level == "alert"
    assert verdicts[700].level == "alert"  # 0.10 is above what collapses and below what clears

    cleared = dict(run(small(clear=0.08), 700, reading))
    assert cleared[700].collapsed == 0


def test_a_fast_rise_is_an_alert_only_while_sigma_grows():
    def reading(growing):
        return lambda layer, step: (0.0 if layer < 2 and step > 300 else 0.8, 2.0 + growing * step / 100)

    assert "alert" in {verdict.level for _, verdict in run(small(), 400, reading(1.0))}
    assert "alert" not in {verdict.level for _, verdict in run(small(), 400, reading(0.0))}


def test_a_falling_mean_warns_before_any_layer_is_one_sided():
    verdicts = dict(run(small(), 600, lambda layer, step: (0.8 if step < 300 else 0.4, 2.0)))
    assert verdicts[250].level == "healthy"
    assert verdicts[500].level == "warn"
    assert verdicts[500].collapsed == 0
    assert "0.80 to 0.4" in verdicts[500].reason


def test_layers_without_a_first_direction_are_left_out():
    alarm = small()
    verdicts = [
        alarm.update(step, {f"l{i}": (0.0 if step > 200 else 0.8, 2.0, 1.01 if i < 6 else 2.0) for i in range(10)})
        for step in range(10, 500, 10)
    ]
    verdict = verdicts[-1]
    assert verdict.collapsed == 1.0  # of the four that have one
    assert len(verdict.layers) == 4


def test_a_state_goes_on_as_if_nothing_had_been(tmp_path):
    def reading(layer, step):
        return (0.0 if layer < 4 and step > 250 else 0.8 - 0.01 * layer), 2.0 + step / 100

    whole = run(small(), 500, reading)
    one, other = small(), small()
    run(one, 300, reading)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = [
        (step, other.update(step, {f"l{i}": (*reading(i, step), 2.0) for i in range(10)}))
        for step in range(310, 501, 10)
    ]
    assert rest == whole[30:]


def test_thresholds_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="0 < collapse < clear"):
        AlignmentAlarm(collapse=0.2, clear=0.1)
    with pytest.raises(ValueError, match="0 < warn <= alert"):
        AlignmentAlarm(warn=0.5, alert=0.4)
    with pytest.raises(ValueError, match="baseline must be at least 1"):
        AlignmentAlarm(baseline=0)
    with pytest.raises(ValueError, match="warmup must be at least 0"):
        AlignmentAlarm(warmup=-1)
