"""The study: it tunes all methods alike, runs nothing twice, says what the runs say, and refuses a bad file."""

import importlib
import importlib.util
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # a folder of scripts that import each other by name
study = importlib.import_module("study")
study_file = importlib.import_module("study_file")
study_report = importlib.import_module("study_report")

from thinrank.configs.errors import ConfigError  # noqa: E402

pytestmark = [
    # Lightning 2.6 asks torch 2.13 in a deprecated way whether a batch is nested; nothing of ours can change that.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small corpus and the overrides of the smallest run."""
    folder = tmp_path_factory.mktemp("study")
    for number in range(12):
        (folder / f"{number}.txt").write_text(" ".join(f"def f{i * number % 7}(x): return x" for i in range(60)))
    return {
        "data": "files",
        "data.train": [f"{folder}/*.txt"],
        "data.validation_fraction": 0.4,
        "data.tokenizer": "bytes",
        "data.sequence_length": 16,
        "data.validation_tokens": 2500,
        "data.cache_dir": str(folder / "cache"),
        "model.hidden_size": 16,
        "model.intermediate_size": 32,
        "model.num_hidden_layers": 1,
        "model.num_attention_heads": 2,
        "trainer.batch_size": 4,
        "trainer.max_steps": 3,
        "trainer.log_every": 1,
        "trainer.validate_every": 0,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
    }


@pytest.fixture
def write(base, tmp_path):
    """Writes a study of two methods with two settings; keyword arguments replace or, with None, drop its keys."""

    def write(**changes):
        tree = {
            "name": "tiny",
            "base": base,
            "tune": {"runs": 2, "overrides": {"trainer.max_steps": 2}},
            "final": {"seeds": [1, 2]},
            "methods": [
                {"name": "adamw", "grid": {"optimizer.lr": [1e-3, 1e-2]}},
                {"name": "galore", "overrides": {"optimizer.rank": 4}, "grid": {"optimizer.lr": [1e-2, 1e-1]}},
                {"name": "unheard", "overrides": {"optimizer": "unheard_of"}, "grid": {"optimizer.depth": [1, 2]}},
            ],
            **changes,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
        return path

    return write


class InProcess:
    """Runs of launch/pretrain.py without a process each: what is started is over at once."""

    def __init__(self):
        spec = importlib.util.spec_from_file_location("launch_pretrain", study.LAUNCH / "pretrain.py")
        assert spec is not None
        assert spec.loader is not None
        self.script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)
        self.started = []

    def __call__(self, run):
        self.started.append(run)
        code = self.script.main(list(run.words))

        class Ended:
            def poll(self):
                return code

        return Ended()


def reports(study_, stage, method):
    found = [json.loads(path.read_text()) for path in (study_.root / "tiny" / stage / method).glob("*/report.json")]
    return sorted(found, key=lambda report: report["seeds"]["data order"])


def test_a_study_from_file_to_table_and_nothing_twice(write, tmp_path):
    chosen = study_file.load_study(write(), root=tmp_path / "runs")
    assert chosen.left_out == ("unheard is left out: this version has no optimizer=unheard_of.",)
    runs = InProcess()
    quiet = {"say": lambda text: None}
    assert study.conduct(chosen, runs, **quiet) == []
    assert [(run.stage, run.method, run.seed) for run in runs.started] == [
        *(("tune", name, 0) for _ in range(2) for name in ("adamw", "galore")),
        *(("final", name, seed) for seed in (1, 2) for name in ("adamw", "galore")),
    ]
    again = InProcess()
    assert study.conduct(chosen, again, **quiet) == []
    assert again.started == []

    out = tmp_path / "study.md"
    study.write_results(chosen, study.results(chosen), out, command="python benchmarks/study.py tiny.yaml")
    page = out.read_text()
    table, appendix = page[: page.index("## Every tuning run")], page[page.index("## Every tuning run") :]
    means = {}
    for name in ("adamw", "galore"):
        tuned, final = reports(chosen, "tune", name), reports(chosen, "final", name)
        cells = next(line for line in table.splitlines() if line.startswith(f"| {name} ")).strip("| ").split(" | ")
        best = min(tuned, key=lambda report: report["metrics"]["test/bits_per_byte"])
        bits = [report["metrics"]["test/bits_per_byte"] for report in final]
        means[name] = sum(bits) / 2
        state = final[0]["optimizer_state"]
        assert cells[1] == ("" if name == "adamw" else "rank=4 ") + f"lr={best['config']['optimizer']['lr']}"
        assert cells[2:7] == [
            "2",
            f"{best['metrics']['test/bits_per_byte']:.4f}",
            f"{bits[0]:.4f}",
            f"{bits[1]:.4f}",
            f"**{means[name]:.4f}**",
        ]
        assert cells[8] == f"{state['measured_bytes'] / 2**20:.2f}"
        assert cells[9] == f"{100 * state['measured_bytes'] / state['adamw_bytes']:.0f} %"
        assert final[0]["config"]["optimizer"]["lr"] == best["config"]["optimizer"]["lr"]
        assert [report["training"]["tokens"] for report in [*tuned, *final]] == [2 * 64, 2 * 64, 3 * 64, 3 * 64]
        for report in tuned:
            assert f"{report['metrics']['test/bits_per_byte']:.4f}" in appendix
        energy = [report["metrics"].get("lowrank/captured_energy") for report in final]
        assert cells[12] == ("–" if name == "adamw" else f"{sum(energy) / 2:.3f}")
        assert cells[7] == f"{means[name] / means['adamw']:.4f}"
    assert "unheard is left out" in page
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
        assert "![tiny](study.png)" in page
    else:
        assert "No plot: matplotlib is not installed" in page

    # what tuning reads and what the final figure is of share no document: together they are all that is held out
    tuning, final = reports(chosen, "tune", "adamw")[0]["config"], reports(chosen, "final", "adamw")[0]["config"]
    assert tuning["data"]["final_validation_tokens"] == tuning["data"]["validation_tokens"] == 2500
    assert final["data"]["final_validation_unseen"]


def test_at_equal_time_a_slower_method_takes_fewer_steps(write, tmp_path, monkeypatch):
    """Steps of launch/pretrain.py, but the clock says that one of GaLore takes three of AdamW's."""
    path = write(time={"steps": 2, "runs": 3}, final={"seeds": [1, 2]})
    chosen = study_file.load_study(path, root=tmp_path / "runs")
    quiet = {"say": lambda text: None}
    runs = InProcess()
    assert study.conduct(chosen, runs, stage="tune", **quiet) == []
    assert study.conduct(chosen, runs, stage="time", **quiet) == []  # nothing is paced yet
    assert study.conduct(chosen, runs, stage="pace", jobs=2, **quiet) == []
    for name, seconds in (("adamw", [0.1, 7.0, 0.02]), ("galore", [0.3, 0.29, 0.5])):  # the median counts
        found = [each.run.folder / "report.json" for each in study.results(chosen)[name == "galore"].pace]
        for report, value in zip(found, seconds, strict=True):
            tree = json.loads(report.read_text())
            assert tree["training"]["steps"] == 2
            tree["training"]["step_seconds_mean"] = value
            report.write_text(json.dumps(tree))
    del runs.started[:]
    assert study.conduct(chosen, runs, **quiet) == []
    assert {(run.stage, run.method, run.seed) for run in runs.started} == {
        *(("final", name, seed) for name in ("adamw", "galore") for seed in (1, 2)),
        *(("time", "galore", seed) for seed in (1, 2)),  # AdamW's are its final runs
    }
    assert [report["training"]["steps"] for report in reports(chosen, "time", "galore")] == [1, 1]
    assert [report["training"]["steps"] for report in reports(chosen, "final", "galore")] == [3, 3]
    out = tmp_path / "study.md"
    study.write_results(chosen, study.results(chosen), out, command="")
    part = out.read_text().split("## Equal time")[1].split("## Every")[0]
    bits = [report["metrics"]["test/bits_per_byte"] for report in reports(chosen, "time", "galore")]
    base = [report["metrics"]["test/bits_per_byte"] for report in reports(chosen, "final", "adamw")]
    ratio = sum(bits) / sum(base)
    assert (
        f"| galore | 300 | 3.000 | 1 | {bits[0]:.4f} | {bits[1]:.4f} | **{sum(bits) / 2:.4f}** | {ratio:.4f} |" in part
    )
    assert "| adamw | 100 | 1.000 | 3 |" in part
    assert "of 3 runs of the best setting (their median" in part


def test_a_run_that_diverges_is_counted_and_not_repeated(write, tmp_path):
    """A gradient that overflows: the guard stops the run, so its setting is tried, the worst, and never again."""
    methods = [{"name": "adamw", "overrides": {"trainer.clip_norm": None}, "grid": {"optimizer.lr": [1e-3, 1e30]}}]
    path = write(methods=methods, tune={"runs": 2, "overrides": {"trainer.max_steps": 6, "trainer.nonfinite_limit": 1}})
    chosen = study_file.load_study(path, root=tmp_path / "runs")
    quiet = {"say": lambda text: None}
    assert study.conduct(chosen, InProcess(), stage="tune", **quiet) == []
    (found,) = study.results(chosen)
    tuned = found.tune
    assert [each.state for each in tuned] == ["finished", "diverged"]
    assert tuned[1].score == math.inf
    again = InProcess()
    study.conduct(chosen, again, stage="tune", **quiet)
    assert again.started == []
    out = tmp_path / "study.md"
    study.write_results(chosen, study.results(chosen), out, command="")
    assert re.search(r"\| adamw \| 2 \| lr=1e\+30 \| diverged \|", out.read_text())


def test_a_budget_that_is_spent_starts_nothing_and_still_reports(write, tmp_path):
    chosen = study_file.load_study(write(), root=tmp_path / "runs")
    runs = InProcess()
    assert study.conduct(chosen, runs, deadline=time.monotonic() - 1) == []
    assert runs.started == []
    out = tmp_path / "study.md"
    study.write_results(chosen, study.results(chosen), out, command="")
    for text in ("No method is tuned yet.", "galore: 0 of 2 tuning runs are done.", "No plot yet", "None yet."):
        assert text in out.read_text()


def test_the_command_runs_processes_and_passes_a_refusal_on(write, tmp_path, monkeypatch, capfd):
    """In place of launch/pretrain.py stands a script that says what it was given and refuses."""
    script, out = tmp_path / "pretrain.py", tmp_path / "study.md"
    script.write_text(
        "import json, os, sys\n"
        f"json.dump([os.environ['OMP_NUM_THREADS'], *sys.argv[1:]], open({str(tmp_path / 'given')!r}, 'w'))\n"
        "sys.exit(print('error: the disk is full: free some space', file=sys.stderr) or 2)\n"
    )
    monkeypatch.setattr(study, "LAUNCH", tmp_path)
    argv = [str(write()), "--only", "adamw", "--threads", "1", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert study.main(argv) == 1
    sentence = "tune adamw lr=0.001 seed=0 ended with code 2: the disk is full: free some space"
    assert f"failed   {sentence}" in capfd.readouterr().out
    assert f"Failed: {sentence}." in out.read_text()
    given = json.loads((tmp_path / "given").read_text())
    assert given[0] == "1"
    assert {"optimizer=adamw", "optimizer.lr=0.001", "trainer.seed=0", "trainer.export=false"} <= set(given)
    assert not list((tmp_path / "runs").rglob("galore"))
    assert study.main([*argv, "--only", "adamv"]) == 2
    assert (
        capfd.readouterr().err
        == "error: --only: the study tiny has no method adamv that can run: did you mean adamw?\n"
    )


def test_nothing_is_compared_with_a_baseline_that_is_not_complete():
    assert study_report._ratio(1.5, 1.6) == "0.9375"
    assert study_report._ratio(1.5, math.inf) == study_report._ratio(1.5, math.nan) == "–"


def test_the_search_goes_to_the_neighbours_of_the_best():
    """A bowl over 5 × 4 settings: from (0, 0) it reaches the bottom at (3, 2), and then looks at what is around it."""

    def bowl(point):
        return (point[0] - 3) ** 2 + 2 * (point[1] - 2) ** 2

    scores = {}
    while (point := study.next_point((5, 4), (0, 0), scores)) is not None:
        assert point not in scores
        scores[point] = bowl(point)
    order = list(scores)
    assert len(order) == 20
    assert order[0] == (0, 0)
    reached = order.index((3, 2))
    assert reached <= 10
    assert set(order[: reached + 5]) >= {(2, 2), (4, 2), (3, 1), (3, 3)}


def test_where_all_diverges_the_search_goes_down():
    assert study.next_point((5,), (2,), {(2,): math.inf}) == (1,)
    assert study.next_point((5,), (2,), {(2,): 1.0}) == (3,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": None}, "name is missing: add it"),
        ({"nmae": 1}, "unknown key nmae: it has name, base, "),
        ({"tune": {"runs": 0}}, "tune.runs must be a number of at least 1, got 0"),
        ({"tune": {"runs": 3}}, "grid of adamw must have at least the 3 settings of tune.runs, .*, got 2: add values"),
        (
            {"tune": {"runs": 2, "overrides": {"data.seed": 3}}},
            "tune.overrides must not give data.seed: the study sets",
        ),
        ({"tune": {"runs": 2, "overrides": {"model": "9m"}}}, "tune.overrides must not give model: only trainer"),
        ({"final": {"seeds": [1]}}, r"final.seeds must be a list of at least two different seeds, got \[1\]"),
        ({"final": {"seeds": [0, 1]}}, r"must leave out the seed of tuning \(0\), got \[0, 1\]"),
        ({"base": {"trainer.max_stepz": 3}}, "base: unknown key trainer.max_stepz: did you mean trainer.max_steps"),
        ({"base": {"run.dir": "x"}}, "base must not give run.dir: the study sets it itself"),
        ({"base": {"data.validation_tokens": 0}}, "final_validation_unseen needs validation_tokens"),
        ({"baseline": "sgd"}, "baseline must be one of the methods, got sgd"),
        ({"methods": []}, "methods must be a list of methods"),
        ({"methods": [{"grid": {}}]}, "every method needs a name"),
        ({"methods": [{"name": "adamw", "grid": {}}] * 2}, "the method adamw stands there twice"),
        ({"methods": [{"name": "adamw", "grid": {"optimizer.lr": 1}}]}, "must give a list of values for optimizer.lr"),
        ({"methods": [{"name": "adamw", "grid": {"model": ["2m", "9m"]}}]}, "grid of adamw must not give model: only"),
        (
            {"methods": [{"name": "adamw", "grid": {"optimizer.lr": [1, 2]}, "start": {"optimizer.lr": 3}}]},
            "start of adamw must be in its grid, and optimizer.lr=3 is not",
        ),
        (
            {"methods": [{"name": "adamw", "grid": {"optimizer.lr": [1e-3, -1.0]}}]},
            "adamw with lr=-1.0: .*optimizer.lr must be",
        ),
        ({"job": "train"}, "job must be one of pretrain, finetune, got 'train'"),
        ({"time": {"steps": 0}}, "time.steps must be a number of at least 1, got 0"),
        (
            {"methods": [{"name": "adamw", "grid": {"optimizer.rnk": [1, 2]}}]},
            "adamw with rnk=1: unknown key optimizer",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(write, changes, sentence):
    path = write(**changes)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: .*{sentence}") as caught:
        study_file.load_study(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_are_shipped_can_begin(path):
    chosen = study_file.load_study(path)
    assert chosen.name == path.stem
    assert chosen.baseline == "adamw"
    assert "adamw" in {method.name for method in chosen.methods}
    assert "optimizer.lr" in chosen.methods[0].grid
