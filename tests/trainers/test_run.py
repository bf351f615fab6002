"""The run folder: one owner, one configuration, and the right place to go on."""

import json
import os
from dataclasses import dataclass, field

import pytest
import yaml
from tiny_run import forked

from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.errors import UserError
from thinrank.trainers.files import append_json_line, read_json_lines, replacing, write_json
from thinrank.trainers.run import (
    RunConfig,
    RunFolder,
    check_identity,
    config_hash,
    config_tree,
    differences,
    identity_json,
    identity_of,
)

TREE = {
    "run": {"dir": "a"},
    "model": {"hidden_size": 8, "extra": {}},
    "optimizer": {"name": "galore", "rank": 32, "betas": (0.9, 0.99)},
    "trainer": {"max_steps": 4, "seed": 0},
}
IDENTITY = identity_json(TREE)


def changed(**optimizer):
    return {**TREE, "optimizer": {**TREE["optimizer"], **optimizer}}


def saved(folder, step, identity=IDENTITY):
    path = folder.checkpoints / ckpt.checkpoint_name(step)
    ckpt.save({"thinrank": {"identity": identity, "step": step}}, path)
    return path


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open()
    yield run
    run.close()


def test_hash_ignores_what_may_change_and_nothing_else():
    free = {**TREE, "run": {"dir": "b"}, "trainer": {"max_steps": 9, "seed": 0}}
    assert config_hash(free) == config_hash(TREE)
    assert config_hash(changed(betas=[0.9, 0.99])) == config_hash(TREE)  # as it comes back from YAML
    others = [changed(rank=16), changed(scale=1.0), {**TREE, "trainer": {"max_steps": 4, "seed": 1}}]
    assert len({config_hash(tree) for tree in [TREE, *others]}) == 4


def test_differences_name_keys_and_values():
    rows = differences(IDENTITY, identity_json(changed(rank=64, scale=1.0)))
    assert rows == ["optimizer.rank (32 → 64)", "optimizer.scale (absent → 1.0)"]
    assert differences(IDENTITY, IDENTITY) == []
    assert differences('{"trainer.max_steps": 4, "a": 1}', '{"a": 1}') == []  # written before that key became free


def test_config_tree_is_plain():
    @dataclass
    class Inner:
        betas: tuple = (0.9, 0.99)

    @dataclass
    class Outer:
        inner: Inner = field(default_factory=Inner)

    assert config_tree(Outer()) == {"inner": {"betas": [0.9, 0.99]}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"dir": ""}, "dir must name a folder"),
        ({"resume": ""}, "resume must be auto, never or the path"),
        ({"overwrite": True}, "overwrite needs resume=never, got resume=auto"),
    ],
)
def test_bad_values_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        RunConfig(**values)


def test_a_second_owner_is_refused_and_a_dead_one_is_not_in_the_way(folder):
    with pytest.raises(
        UserError, match=rf"in use by process {os.getpid()} on .*: wait for its end or set another run.dir"
    ):
        RunFolder(folder.path).open()
    folder.close()

    def hold():
        RunFolder(folder.path).open()  # the child ends without closing

    assert os.waitpid(forked(hold), 0)[1] == 0
    folder.open()


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, parent):
    (tmp_path / "file").write_text("")
    path = f"{tmp_path}/file/run" if parent == "file" else "/proc/thinrank-run"
    with pytest.raises(UserError, match=r"cannot be written \(.+\): set run.dir to a folder that can"):
        RunFolder(path).open()


def test_auto_starts_fresh_and_later_takes_the_newest(folder):
    assert folder.choose(RunConfig()) is None
    saved(folder, 1)
    newest = saved(folder, 2)
    assert folder.choose(RunConfig()) == newest
    cut = folder.checkpoints / ckpt.checkpoint_name(3)
    cut.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000003.ckpt is truncated"):
        assert folder.choose(RunConfig()) == newest


def test_a_fresh_start_does_not_mix_with_leftovers_and_a_resume_keeps_them(folder):
    (folder.path / "tensorboard").mkdir()
    for name in ("preempted", "report.md", "notes.txt"):
        (folder.path / name).write_text("")
    folder.log("start", step=0)
    path = saved(folder, 1)
    folder.begin(TREE, resumed_from=path)
    assert (folder.path / "tensorboard").is_dir()
    assert not folder.marker.exists()
    folder.begin(TREE, resumed_from=None)
    names = {path.name for path in folder.path.iterdir()}
    assert names == {".lock", "checkpoints", "history.jsonl", "notes.txt", "config.yaml"}
    assert path.exists()
    folder.begin(TREE, resumed_from=None, overwrite=True)
    assert not path.exists()
    assert folder.history() == []


def test_discard_removes_an_empty_folder_only(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run")
    run.open()
    run.discard()
    assert not run.path.exists()
    run.open()
    saved(run, 1)
    run.discard()
    assert (run.checkpoints / ckpt.checkpoint_name(1)).exists()


def test_never_destroys_nothing_unless_told(folder):
    path = saved(folder, 1)
    with pytest.raises(UserError, match=r"already holds checkpoints: set another run.dir, or run.resume=auto"):
        folder.choose(RunConfig(resume="never"))
    assert path.exists()
    assert folder.choose(RunConfig(resume="never", overwrite=True)) is None
    assert path.exists()  # until training begins


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_another_configuration_is_refused_by_key(folder, resume):
    path = saved(folder, 1)
    config = RunConfig(resume=str(path) if resume == "path" else "auto")
    chosen = folder.choose(config)
    before, now = identity_of(chosen), identity_json(changed(rank=64))
    with pytest.raises(
        UserError, match=r"of another configuration: optimizer.rank \(32 → 64\); set .* another run.dir"
    ):
        check_identity(chosen, before, now)
    assert path.exists()


def test_a_path_is_taken_at_its_word_or_refused(folder, tmp_path):
    first, second = saved(folder, 1), saved(folder, 2)
    assert folder.choose(RunConfig(resume=str(second))) == second
    with pytest.raises(
        UserError, match=r"holds step-00000002.ckpt, which is later than .*step-00000001.ckpt: set another"
    ):
        folder.choose(RunConfig(resume=str(first)))
    other = RunFolder(tmp_path / "branch")
    other.open()
    assert other.choose(RunConfig(resume=str(first))) == first
    other.close()
    (folder.checkpoints / "cut.ckpt").write_bytes(second.read_bytes()[:50])
    with pytest.raises(UserError, match=r"cut.ckpt is truncated .*: name another one, or let run.resume=auto choose"):
        folder.choose(RunConfig(resume=str(folder.checkpoints / "cut.ckpt")))
    with pytest.raises(UserError, match="does not exist"):
        folder.choose(RunConfig(resume=str(tmp_path / "no.ckpt")))
    with pytest.raises(UserError, match="is a folder: name a checkpoint file"):
        folder.choose(RunConfig(resume=str(folder.checkpoints)))


def test_a_checkpoint_of_something_else_is_refused(folder):
    ckpt.save({"weights": 1}, folder.checkpoints / "other.ckpt")
    with pytest.raises(UserError, match="is not a checkpoint of a run"):
        identity_of(folder.choose(RunConfig(resume=str(folder.checkpoints / "other.ckpt"))))


def test_open_removes_what_dead_writers_left(tmp_path):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    (run.checkpoints / "step-00000001.ckpt.tmp-123").write_text("half")
    run.open()
    assert list(run.checkpoints.iterdir()) == []
    run.close()


def test_config_status_and_history_are_readable(folder):
    folder.begin(TREE, resumed_from=None)
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["optimizer"]["betas"] == [0.9, 0.99]
    folder.write_status("running", step=3, exit_code=None)
    status = json.loads((folder.path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("running", 3)
    folder.log("start", step=0)
    with open(folder.path / "history.jsonl", "a") as file:
        file.write('{"event": "sta')  # killed in the middle
    folder.log("start", step=3)
    assert [line["step"] for line in folder.history()] == [0, 3]


def test_replacing_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:  # noqa: PT012
        file.write(b"new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5], 3: (True, None)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5], "3": [True, None]}
    append_json_line(tmp_path / "l", {"a": 1})
    assert read_json_lines(tmp_path / "l") == [{"a": 1}]
    assert read_json_lines(tmp_path / "missing") == []
