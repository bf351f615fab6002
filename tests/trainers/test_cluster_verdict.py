"""What a job script is told after a job has ended: by what has changed in the run folder, and by nothing older."""

import json
import subprocess
import sys

import pytest

from thinrank.trainers.cluster.verdict import Snapshot, decide, main
from thinrank.trainers.ending import BAD_CONFIG, FAILED, FINISHED, LOST, PREEMPTED, STOPPED, UNFIT
from thinrank.trainers.run import RunFolder


@pytest.fixture
def folder(tmp_path):
    found = RunFolder(tmp_path / "run")
    found.open()
    yield found
    found.close()


def mark(folder, step):
    folder.marker.write_text(json.dumps({"step": step}))


def ends(folder, job, code=1):
    """The verdict on `job`, which changes the folder."""
    before, _ = Snapshot.of(folder.path)
    assert Snapshot.parse(str(before)) == before
    job()
    now, facts = Snapshot.of(folder.path)
    return decide(before, now, facts, code)


def runs(folder, state, **facts):
    return lambda: folder.write_status(state, **facts)


def test_a_finished_run_is_finished_whatever_torchrun_says(folder):
    code, sentence = ends(folder, runs(folder, "finished", step=7, exit_code=FINISHED), code=1)
    assert (code, sentence) == (0, "finished at step 7")


def test_a_preempted_run_goes_on(folder):
    def job():
        mark(folder, 5)
        folder.write_status("preempted", step=5, exit_code=PREEMPTED)

    assert ends(folder, job) == (75, "preempted after a save at step 5: start again to go on")


def test_the_marker_of_an_earlier_start_does_not_queue_a_run_that_never_began(folder):
    """A configuration that every rank refuses would otherwise be queued for ever."""
    mark(folder, 5)
    folder.write_status("preempted", step=5, exit_code=PREEMPTED)
    assert ends(folder, lambda: None) == (1, "the run never began: see the logs of the ranks")


def test_a_second_preemption_counts_although_the_marker_was_there(folder):
    mark(folder, 5)

    def job():
        folder.marker.unlink()
        mark(folder, 9)
        folder.write_status("preempted", step=9, exit_code=PREEMPTED)

    assert ends(folder, job)[0] == 75


@pytest.mark.parametrize(("step", "verdict"), [(7, 75), (5, LOST)])
def test_a_run_that_lost_a_rank_goes_on_only_if_it_got_further(folder, step, verdict):
    folder.write_status("running", step=5)
    said = "RankLost: rank 2 on beta gave no sign of life"
    code, sentence = ends(folder, runs(folder, "failed", step=step, exit_code=LOST, error=said))
    assert code == verdict
    assert sentence == ("lost a rank after step 7, 2 further than before: go on" if step == 7 else f"failed: {said}")


@pytest.mark.parametrize("code", [FAILED, BAD_CONFIG, UNFIT, STOPPED])
def test_a_failed_run_stays_away_with_its_own_code(folder, code):
    found, sentence = ends(folder, runs(folder, "failed", exit_code=code, error="UserError: lower it"))
    assert (found, sentence) == (code, "failed: UserError: lower it")


def test_a_failed_preflight_does_not_bring_the_old_marker_to_life(folder):
    mark(folder, 5)
    assert ends(folder, runs(folder, "failed", exit_code=UNFIT, error="rank 1 on b is slow"))[0] == 3


def test_a_run_that_was_killed_goes_on_only_if_it_got_further(folder):
    folder.write_status("running", step=20)
    assert ends(folder, runs(folder, "running", step=60)) == (
        75,
        "ended without a word after step 60, 40 further than before: go on",
    )
    assert ends(folder, runs(folder, "running", step=60, checkpoint="x"))[0] == 1
    assert ends(folder, runs(folder, "running", step=60), code=137)[0] == 137


def test_a_killed_first_start_without_a_checkpoint_stays_away(folder):
    assert ends(folder, runs(folder, "running", step=0, steps=100))[0] == 1


def test_nothing_happened_and_nothing_is_wrong(folder):
    assert ends(folder, lambda: None, code=0) == (0, "nothing was run")


def test_the_command(tmp_path, capsys):
    run = tmp_path / "not yet there"
    assert main([str(run)]) == 0
    before = capsys.readouterr().out.strip()
    assert before == "0::"
    run.mkdir()
    (run / "preempted").write_text("{}")
    assert main([str(run), "--since", before, "--code", "1"]) == 75
    assert "preempted after a save" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([str(run), "--since", "nonsense"])
    assert ended.value.code == 2


def test_the_command_needs_neither_torch_nor_lightning(tmp_path):
    """It runs twice for every job, on every pod."""
    code = (
        "import sys, thinrank.trainers.cluster.verdict\n"
        "print([name for name in ('torch', 'lightning', 'yaml', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_names_are_those_that_a_run_writes(folder):
    """The verdict reads the files by name, without the code that writes them."""
    mark(folder, 1)
    folder.write_status("running", step=1)
    snapshot, facts = Snapshot.of(folder.path)
    assert snapshot.marker
    assert snapshot.status
    assert facts["state"] == "running"
