"""The schedules against their closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinrank.trainers.schedule import ScheduleConfig, build_scheduler, multiplier


def test_warmup_is_linear_and_ends_at_the_peak():
    config = ScheduleConfig(kind="cosine", warmup_steps=4)
    assert [multiplier(step, 20, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_closed_form():
    config = ScheduleConfig(kind="cosine", warmup_steps=10, min_lr_fraction=0.1)
    for step in range(10, 110):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 9) / 100)) / 2
        assert multiplier(step, 110, config) == pytest.approx(expected, abs=1e-15)
    assert multiplier(59, 110, config) == pytest.approx(0.55)  # half way


def test_linear_closed_form():
    config = ScheduleConfig(kind="linear", warmup_steps=0, min_lr_fraction=0.0)
    assert [multiplier(step, 4, config) for step in range(4)] == [0.75, 0.5, 0.25, 0.0]


def test_constant_stays_at_the_peak():
    config = ScheduleConfig(kind="constant", warmup_steps=2, min_lr_fraction=0.1)
    assert [multiplier(step, 4, config) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]


def test_wsd_is_stable_then_decays_in_its_last_share():
    config = ScheduleConfig(kind="wsd", warmup_steps=2, decay_fraction=0.4, min_lr_fraction=0.2)
    values = [multiplier(step, 10, config) for step in range(10)]
    assert values[:6] == [0.5, 1, 1, 1, 1, 1]
    assert values[6:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_after_the_end_the_floor_holds(kind):
    config = ScheduleConfig(kind=kind, min_lr_fraction=0.25)
    assert multiplier(99, 100, config) == multiplier(100, 100, config) == multiplier(5000, 100, config) == 0.25


@given(
    kind=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    total=st.integers(1, 300),
    warmup=st.floats(0, 0.5),
    floor=st.floats(0, 1),
    decay=st.floats(0, 0.5),
)
def test_every_schedule_rises_then_falls_within_bounds(kind, total, warmup, floor, decay):
    config = ScheduleConfig(kind=kind, warmup_fraction=warmup, min_lr_fraction=floor, decay_fraction=decay)
    values = [multiplier(step, total, config) for step in range(total + 3)]
    assert all(0 <= value <= 1 for value in values)
    peak = max(config.warmup(total) - 1, 0)
    rising, falling = values[: peak + 1], values[peak:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_warmup_fraction_rounds_to_steps_and_steps_win():
    assert ScheduleConfig(warmup_fraction=0.1).warmup(400) == 40
    assert ScheduleConfig(warmup_fraction=0.1, warmup_steps=7).warmup(400) == 7


def test_the_scheduler_scales_each_group_by_its_own_learning_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 0.01}])
    config = ScheduleConfig(kind="linear", warmup_steps=2)
    scheduler = build_scheduler(optimizer, config, 6)
    for step in range(6):
        factor = multiplier(step, 6, config)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor, 0.01 * factor])
        optimizer.step()
        scheduler.step()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 0.01]


def test_the_scheduler_resumes_where_it_was_and_its_state_is_plain():
    def fresh():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        return optimizer, build_scheduler(optimizer, ScheduleConfig(), 50)

    first, scheduler = fresh()
    for _ in range(20):
        first.step()
        scheduler.step()
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(10):
        assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
        for optimizer, stepper in ((first, scheduler), (second, resumed)):
            optimizer.step()
            stepper.step()
    assert all(isinstance(value, int | float | list | bool) for value in scheduler.state_dict().values())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"kind": "cosin"}, r"kind must be one of cosine, linear, constant, wsd, got 'cosin'"),
        ({"warmup_steps": -1}, r"warmup_steps must be at least 0, got -1"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction must be in \[0, 1\), got 1.0"),
        ({"min_lr_fraction": 1.5}, r"min_lr_fraction must be in \[0, 1\], got 1.5"),
        ({"decay_fraction": -0.1}, r"decay_fraction must be in \[0, 1\], got -0.1"),
        ({"kind": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.6}, r"add up to at most 1, got 0.5 and 0.6"),
    ],
)
def test_bad_values_are_refused_by_one_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        ScheduleConfig(**values)


@pytest.mark.parametrize(
    ("config", "total", "sentence"),
    [
        (ScheduleConfig(), 0, "total_steps must be at least 1, got 0"),
        (ScheduleConfig(warmup_steps=30), 20, "warmup_steps must be at most the 20 steps of the run, got 30"),
        (ScheduleConfig(kind="wsd", warmup_steps=9), 10, "warmup_steps must leave room for the decay of 0.2 of 10"),
    ],
)
def test_a_warmup_that_does_not_fit_is_refused(config, total, sentence):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(ValueError, match=sentence):
        build_scheduler(optimizer, config, total)
