"""The planning command: tables, JSON, comparisons, mistakes in a sentence; and the plan in a dry run."""

import importlib.util
import json
from pathlib import Path

import pytest

from thinrank.configs.planning import combinations, request
from thinrank.configs.schema import PRETRAIN

LAUNCH = Path(__file__).parents[2] / "launch"
LAYERS = 4 * (4 * 192**2 + 3 * 192 * 512)  # weights of the 2m preset's matrices
REST = 2 * 1024 * 192 + 9 * 192


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs a script's `main` in an empty folder, which must stay empty: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, script="plan"):
        code = load_script(script).main(list(argv))
        assert list(tmp_path.iterdir()) == []
        return code, *capsys.readouterr()

    return call


def numbers(line):
    return [float(word.replace(",", "")) for word in line.split() if word.replace(",", "").replace(".", "").isdigit()]


def test_a_plan_of_replicas(call):
    code, out, err = call("optimizer=galore", "optimizer.rank=16", "strategy=thinrank_ddp", "--world", "8")
    assert (code, err) == (0, "")
    lines = {line[:38].strip(): line for line in out.splitlines()}
    weights = 4 * (LAYERS + REST)
    coordinates = 4 * 16 * 4 * (4 * 192 + 3 * 512)
    assert numbers(lines["weights"]) == [round(weights / 2**20, 1)]
    assert numbers(lines["optimizer state"])[0] == pytest.approx((2 * coordinates + 8 * REST) / 2**20, abs=0.4)
    between = next(line for line in out.splitlines() if line.startswith("between renewals"))
    sketches = 4 * 4 * 7 * 1021  # by which the norms of gradients are known
    assert numbers(between)[0] == pytest.approx((coordinates + sketches + 4 * REST) / 2**20, abs=0.06)
    assert numbers(between)[1] == pytest.approx(1.75 * numbers(between)[0], abs=0.1)
    assert "in the mean of 200 steps" in out
    assert "≈ peak" in out


def test_json_has_bytes(call):
    code, out, err = call("optimizer=adamw", "--json", "--world=2")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    weights = 4 * (LAYERS + REST)
    assert plan["weights_bytes"] == plan["gradients_bytes"] == plan["buffers_bytes"] == weights
    assert plan["state_bytes"] == 2 * weights + 4 * 39
    assert plan["wire"]["payload"]["between"] == plan["wire"]["leaving"]["between"] == weights
    assert plan["peak_bytes"] > 4 * weights


def test_a_comparison_has_a_line_for_every_combination(call):
    code, out, err = call(
        "optimizer.rank=16", "--world", "2", "--compare", "optimizer=adamw,galore", "strategy=ddp,thinrank_ddp"
    )
    assert (code, err) == (0, "")
    names = ["adamw ddp", "adamw thinrank_ddp", "galore ddp", "galore thinrank_ddp"]
    found = {
        name: numbers(line.removeprefix(name))
        for name in names
        for line in out.splitlines()
        if line.startswith(f"{name} ")
    }
    assert list(found) == names
    weights, gradients, state, bases, buffers, *_, between, renewal, averaged = found["galore thinrank_ddp"]
    assert weights == renewal > between
    assert gradients < between <= averaged < renewal  # the norms of gradients are sent and not kept
    assert 0 < bases < state < found["adamw ddp"][2]
    assert found["galore ddp"][4] == weights >= buffers


def test_what_is_compared_may_be_any_key(call):
    code, out, err = call("--json", "--compare", "optimizer.rank=8,16", "optimizer.betas=[0.9, 0.99],[0.9, 0.95]")
    assert (code, err) == (0, "")
    plans = json.loads(out)
    assert list(plans) == ["8 [0.9, 0.99]", "8 [0.9, 0.95]", "16 [0.9, 0.99]", "16 [0.9, 0.95]"]
    assert plans["8 [0.9, 0.99]"]["state_bytes"] < plans["16 [0.9, 0.99]"]["state_bytes"]


def test_a_key_that_only_some_methods_have_is_left_out_for_the_others():
    asked = request(["optimizer.rank=8", "trainer.seed=1", "--compare", "optimizer=adamw,galore_60m"])
    found = combinations(asked, PRETRAIN)
    assert found["adamw"].words == (("trainer.seed", "1"), ("optimizer", "adamw"))
    assert found["galore_60m"].words == (("optimizer.rank", "8"), ("trainer.seed", "1"), ("optimizer", "galore_60m"))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--world", "0"], "error: --world must be at least 1 process, got '0': write --world 8"),
        (["--world"], "error: --world must be at least 1 process, got '': write --world 8"),
        (["--compare"], "error: --compare has nothing to compare: write --compare optimizer=adamw,galore"),
        (["--compare", "optimizer"], "error: cannot compare 'optimizer': write --compare key=value,value"),
        (["--compare=optimizer=adamw"], "error: --compare takes words of their own: write --compare optimizer=adamw"),
        (["--compare", "optimizer=adamw,galor"], "error: unknown choice optimizer=galor: did you mean galore?"),
        (["--dry-run"], "error: --dry-run belongs to launch/pretrain.py: leave it out here"),
        (["--wrld", "2"], "error: unknown option --wrld"),
        (["optimizer.rnk=3"], "error: unknown key optimizer.rnk: did you mean optimizer.rank?"),
        (
            ["optimizer.rnk=3", "--compare", "optimizer=galore,fira"],
            "error: none of optimizer=galore, fira has a key rnk: leave optimizer.rnk out",
        ),
        (["--world", "3"], "error: trainer.batch_size must be a multiple of the 3 processes, got 16"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_two(call, argv, sentence):
    code, out, err = call(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1


def test_help_says_what_there_is(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert all(option in out for option in ("--world", "--compare", "--json"))


def test_a_dry_run_shows_the_plan(call):
    code, out, err = call("--dry-run", "trainer.accelerator=cpu", "optimizer=galore", script="pretrain")
    assert (code, err) == (0, "")
    assert "memory of each process" in out
    assert "≈ peak" in out
    assert "on the wire: nothing" in out


def test_a_step_that_cannot_be_traced_is_said(call, monkeypatch):
    from thinrank.trainers.plan import footprint

    def work(*args, **kwargs):
        raise NotImplementedError("no kernel\nfor this")

    monkeypatch.setattr(footprint, "work", work)
    code, out, _ = call("optimizer=galore")
    assert code == 0
    assert "could not be traced: NotImplementedError: no kernel" in out
    assert "peak" not in out
