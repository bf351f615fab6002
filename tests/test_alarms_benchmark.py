"""The judge of alarms: what is an explosion, what a lead, what a false alarm; and that its trainings are trainings."""

import importlib
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # scripts that import each other by name
judge, trainings = importlib.import_module("alarm_judge"), importlib.import_module("alarm_runs")
BROKEN, HEALTHY, Case, Run, Size = (getattr(trainings, name) for name in ("BROKEN", "HEALTHY", "Case", "Run", "Size"))


def test_an_explosion_is_a_mean_above_the_lowest_or_no_number():
    assert judge.exploded_at([3.0] * 20) is None
    assert judge.exploded_at([3.0] * 10 + [math.nan]) == 11
    assert judge.exploded_at([3.0] * 10 + [6.0] * 5) == 12  # 2/5 of 3 nats above
    assert judge.exploded_at([5.0, 4.0, 3.5, 3.2, 3.0] * 2) is None


def test_a_lead_counts_from_the_first_alarm_that_stays_on():
    steps = [10, 20, 30, 40, 50]
    assert judge.first_lasting([False, True, False, True, True], steps, 0, 50) == 40
    assert judge.first_lasting([True] * 5, steps, 20, 50) == 30  # nothing counts before the beginnings are known
    assert judge.first_lasting([False, True, True, False, True], steps, 0, 30) == 20  # what comes later does not matter
    assert judge.first_lasting([True, True, True, True, False], steps, 0, 50) is None


def test_false_alarms_are_beginnings():
    steps = [10, 20, 30, 40, 50]
    assert judge.false_alarms([True, True, False, True, True], steps, 0) == 2
    assert judge.false_alarms([True, True, False, True, True], steps, 20) == 1


def test_thresholds_are_the_least_that_no_healthy_run_passes():
    flat = {signal.name: [1.0, 2.0, 3.0] for signal in judge.SIGNALS}
    other = {signal.name: [9.0, 1.0, 2.5] for signal in judge.SIGNALS}
    assert set(judge.fit([flat, other], [[10, 20, 30]] * 2, 10).values()) == {3.0}
    assert judge.alarmed([1.0, 3.0, 3.1, math.nan], 3.0) == [False, False, True, True]


def test_z_scores_wait_for_a_history():
    losses = [3.0, 3.1] * 64
    found = judge.z_scores([*losses, 4.0])
    assert found[:64] == [0.0] * 64
    assert found[-1] == pytest.approx(19, rel=1e-6)


def test_cases_are_many_and_have_their_own_names():
    assert len(HEALTHY) >= 12
    assert len(BROKEN) >= 12
    names = [case.name for case in (*HEALTHY, *BROKEN)]
    assert len(set(names)) == len(names)


def test_a_training_is_the_same_again_and_kept_in_a_file(tmp_path):
    train = trainings.train
    (tmp_path / "text").mkdir()
    for name in "abcd":
        (tmp_path / "text" / f"{name}.py").write_text(f"def {name}(x):\n    return x + 1\n" * 1000)
    size = Size(
        width=32, layers=2, seed=0, steps=6, rows=2, length=16, vocabulary=300, every=2, text=str(tmp_path / "text")
    )
    case = Case(name="all", broken=True, begin=2, lr=8.0, half_states=True, noise=0.5, scaled=10.0)
    one, other = train(case, size), train(case, size)
    assert one == other
    assert one.steps == [2, 4, 6]
    assert len(one.losses) == 6
    assert all(len(rows) == 3 and len(rows[0]) == 14 for rows in one.layers.values())
    one.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == one
    plain = train(Case(name="plain", broken=False), size)
    assert plain.losses[:2] == one.losses[:2]
    assert plain.losses[2:] != one.losses[2:]
    guarded = train(case, size, guard="zscore")
    assert (guarded.guard, guarded.skipped) == ("zscore", 0)  # too short to have a history
    assert guarded.losses == one.losses


def test_every_training_is_kept_in_a_file_of_its_own(tmp_path):
    alarms = importlib.import_module("alarms")
    sizes = [Size(width=width, layers=1, seed=0, steps=1) for width in (8, 16)]
    work = [alarms.Work(tmp_path, case, size, g) for case in (*HEALTHY, *BROKEN) for size in sizes for g in ("", "a")]
    assert len({each.path for each in work}) == len(work)
