"""What a transfer makes of its runs, from runs whose outcome is written down; and a small one in earnest."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_pretrain import config, write_corpus

from thinrank.configs.load import load
from thinrank.configs.reader import write
from thinrank.configs.schema import PRETRAIN
from thinrank.optim import AdamWConfig
from thinrank.optim.scaling import PRESETS, ScalingConfig
from thinrank.trainers.errors import UserError
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.transfer.analysis import Best, advise, best_of, judge, moves, sigma_at, vertex
from thinrank.trainers.transfer.conduct import Record, conduct, known
from thinrank.trainers.transfer.page import page
from thinrank.trainers.transfer.sweep import Sweep, Trial, check, trial

RATES, DECAYS, WIDTHS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), (0.1, 0.2, 0.4), (64, 128, 256)
SWEEP = Sweep(widths=WIDTHS, rates=RATES, decays=DECAYS, target=1024, rules=("const", "linear_wd"), design="grid")


def written(rule, width, rate, decay, *, optimum, p, exponent, seed=0):
    """A run whose loss is a bowl around `optimum` (log2 of the rate over 1e-3) and whose σ follows √(η/λ) d^p."""
    eta, lam = RATES[rate] * 64 / width, DECAYS[decay] * (width / 64) ** exponent
    loss = 2.0 + 0.1 * (rate - optimum) ** 2 + 0.02 * (decay - 1) ** 2
    top = math.sqrt(eta / lam) * width**p
    names = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]
    rows = [
        {"step": s, "clock": dict.fromkeys(names, 4.0 * s * eta * lam / 1e-4), "sigma": dict.fromkeys(names, top)}
        for s in (0, 1, 2, 3)
    ]
    gains = {
        "linear": dict.fromkeys(names, 1.5),
        "residual": {"model.layers.0.self_attn": width**-0.5, "model.layers.0.mlp": 0.3},
    }
    run = Trial(rule=rule, width=width, rate=rate, decay=decay, seed=seed, folder=Path("x"), config=None)
    return Record(run, loss, {"rows": rows, "peak": dict.fromkeys(names, (eta, lam)), "gains": gains}, 0.1)


def all_runs(rule, drift_of_optimum, p=1.0, seeds=(0,)):
    exponent = PRESETS[rule].get("wd_width_exp", 0.0)
    return {
        width: [
            written(rule, width, r, d, optimum=2.0 + drift_of_optimum * i, p=p, exponent=exponent, seed=s)
            for r in range(len(RATES))
            for d in range(len(DECAYS))
            for s in seeds
        ]
        for i, width in enumerate(WIDTHS)
    }


def scaling(rule):
    return ScalingConfig(**PRESETS[rule], base_width=64, base_depth=2)


def test_the_lowest_point_of_a_parabola():
    assert vertex([0, 1, 2], [(x - 1.3) ** 2 for x in (0, 1, 2)]) == pytest.approx(1.3)
    assert vertex([0, 1, 2], [1.0, 1.0, 1.0]) == 1
    assert vertex([0, 1, 2], [3.0, 2.0, 1.9]) <= 2


def test_the_optimum_and_how_far_it_moves():
    best = {width: found for width, runs in all_runs("const", -0.6).items() if (found := best_of(SWEEP, runs))}
    shown, moved = moves(SWEEP, best)
    assert best[64].place == (2, 1)
    assert best[64].rate == pytest.approx(4e-3)
    assert moved == (pytest.approx(1.2), 0.0)
    assert shown[256].step == pytest.approx(-1.2)
    edge = best_of(SWEEP, all_runs("const", -2)[256])
    assert isinstance(edge, Best)
    assert edge.edge


def test_a_place_between_two_readings():
    rows = [(1.0, 10.0), (2.0, 20.0), (4.0, 20.0)]
    assert sigma_at(rows, 1.5) == 15.0
    assert sigma_at(rows, 4.0) == 20.0
    assert sigma_at(rows, 0.5) is None


def test_exponents_and_slopes_come_out_as_they_were_put_in():
    found = judge(SWEEP, "const", scaling("const"), all_runs("const", 0.0, p=0.75))
    fit = found.fits["qk"]
    assert fit.p == pytest.approx(0.75)
    assert fit.exponent == pytest.approx(0.5)
    # const: η ∝ 1/d, so σ ∝ d^(p − ½), and its decay should have the exponent 2p − 1
    assert found.sigma["mlp_in"].slope.value == pytest.approx(0.25)
    assert found.sigma["mlp_in"].verdict == "WARN"
    assert found.sigma["mlp_in"].corrected == pytest.approx(0.5)
    assert found.gains["residual self_attn"].slope.value == pytest.approx(-0.5)
    assert found.gains["linear qk"].passes
    assert found.drifts["qk"].slope.value == pytest.approx(0.5)
    kept = judge(SWEEP, "linear_wd", scaling("linear_wd"), all_runs("linear_wd", 0.0, p=1.0))
    assert kept.sigma["qk"].passes


def test_the_rule_under_which_nothing_moves_is_advised():
    verdicts = [
        judge(SWEEP, "const", scaling("const"), all_runs("const", -0.6, seeds=(0, 1))),
        judge(SWEEP, "linear_wd", scaling("linear_wd"), all_runs("linear_wd", 0.0, seeds=(0, 1))),
    ]
    scalings = {v.rule: scaling(v.rule) for v in verdicts}
    advice = advise(SWEEP, verdicts, scalings)
    assert advice is not None
    assert (advice.rule, advice.rate, advice.decay) == ("linear_wd", pytest.approx(4e-3), 0.2)
    assert advice.hidden_rate == pytest.approx(4e-3 / 16)
    assert advice.hidden_decay == pytest.approx(0.2 * 16)
    assert (advice.confidence, advice.doubts) == ("high", ())
    one = advise(SWEEP, verdicts[:1], scalings)
    assert one is not None
    assert one.confidence == "low"
    assert any("moved by 1.2 steps" in doubt for doubt in one.doubts)
    assert advise(SWEEP, [judge(SWEEP, "const", scaling("const"), {})], scalings) is None


def test_the_page_says_it(tmp_path):
    runs = all_runs("const", 0.0)
    verdict = judge(SWEEP, "const", scaling("const"), runs)
    advice = advise(SWEEP, [verdict], {"const": scaling("const")})
    base = config(tmp_path, "x", model={"hidden_size": 64, "intermediate_size": 128})
    text = page(SWEEP, base, [verdict], advice, [r for rs in runs.values() for r in rs], command="again", plot="none")
    assert "**Recommendation for width 1024** (confidence: medium): rule const" in text
    assert "model.hidden_size=1024 model.num_attention_heads=32 model.intermediate_size=2048 scaling=const" in text
    assert "one seed says nothing of chance" in text
    assert "| const | 2.0000 at 0.004, 0.2 (+0.0) |" in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"widths": (64, 128)}, "at least 3 of them, got .64, 128.: add another proxy, such as 256"),
        ({"target": 256}, "must be wider than all proxies, got 256 and proxies up to 256"),
        ({"rates": (1e-3, 2e-3)}, "rates must be at least 3"),
        ({"rates": (2e-3, 1e-3, 4e-3)}, "rates must rise"),
        ({"widths": (64, 64, 128)}, "widths must differ"),
        ({"rules": ("konst",)}, "rules must be names"),
        ({"design": "star"}, "design must be one of cross, grid"),
        ({"decays": (-0.1,)}, "decays must be finite"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Sweep(**{"widths": WIDTHS, "rates": RATES, "decays": DECAYS, "target": 1024, **values})


def test_trials_and_their_folders(tmp_path):
    """Rules that multiply nothing at the base share their runs there; the square-root rule has no decay of vectors."""
    base = config(tmp_path, "x", optimizer=AdamWConfig(), model={"hidden_size": 64, "num_attention_heads": 2})
    check(SWEEP, base)
    at = {
        (rule, width): trial(SWEEP, base, tmp_path, rule, width, 1, 0, 3)
        for rule in ("const", "linear_wd", "sqrt_wd", "0.7")
        for width in (64, 256)
    }
    assert at["const", 64].folder == at["linear_wd", 64].folder == at["0.7", 64].folder
    assert at["sqrt_wd", 64].folder != at["const", 64].folder
    assert len({at[rule, 256].folder for rule in ("const", "linear_wd", "sqrt_wd", "0.7")}) == 4
    wide = at["0.7", 256].config
    assert (wide.optimizer.lr, wide.optimizer.weight_decay, wide.trainer.seed) == (2e-3, 0.1, 3)
    assert (wide.model.hidden_size, wide.model.num_attention_heads, wide.scaling.wd_width_exp) == (256, 8, 0.7)
    uneven = Sweep(widths=(64, 128, 200), rates=RATES, decays=DECAYS, target=1024)
    with pytest.raises(UserError, match="multiple of the head size 32"):
        check(uneven, base)
    deep = Sweep(widths=WIDTHS, rates=RATES, decays=DECAYS, target=1024, rules=("completep",))
    with pytest.raises(UserError, match="architecture=granite"):
        check(deep, base)


def fake_start(begun, loss_of, code=0) -> Any:
    """Starts a run that has ended at once, with a loss by its config, or without any where `code` is not 0."""

    def start(each):
        begun.append((each.width, each.config.optimizer.lr, each.config.optimizer.weight_decay))
        each.folder.mkdir(parents=True)
        if not code:
            report = {"run": {"state": "finished"}, "metrics": {"test/loss": loss_of(each.config)}}
            (each.folder / "report.json").write_text(json.dumps(report))
            (each.folder / "probe.json").write_text("{}")
        return SimpleNamespace(poll=lambda: code, terminate=lambda: None, wait=lambda: code)

    return start


def test_a_cross_tries_all_rates_and_then_all_decays_at_the_best(tmp_path):
    sweep = replace(SWEEP, design="cross", rules=("const", "linear_wd"))
    base = config(tmp_path, "x", optimizer=AdamWConfig(), model={"hidden_size": 64, "num_attention_heads": 2})
    begun: list[tuple[int, float, float]] = []
    start = fake_start(begun, lambda c: abs(math.log(c.optimizer.lr / 4e-3)))
    assert conduct(sweep, base, tmp_path, start=start, jobs=2, say=lambda text: None) == []
    assert len(begun) == (5 + 2) * (1 + 2 * 2)  # once at the base, for each rule at the two other widths
    narrow = [(lr, decay) for width, lr, decay in begun if width == 64]
    assert narrow == [*((lr, 0.2) for lr in RATES), (4e-3, 0.1), (4e-3, 0.4)]
    assert len(known(sweep, base, tmp_path)) == (5 + 2) * 3 * 2
    assert conduct(sweep, base, tmp_path, start=start, say=lambda text: None) == []
    assert len(begun) == 35  # nothing twice


def test_a_run_that_fails_is_told_and_one_that_was_stopped_stops_all(tmp_path, monkeypatch):
    base = config(tmp_path, "x", optimizer=AdamWConfig(), model={"hidden_size": 64, "num_attention_heads": 2})
    failures = conduct(
        replace(SWEEP, rules=("const",)), base, tmp_path, start=fake_start([], float, code=1), say=lambda text: None
    )
    assert len(failures) == 3  # the first run of each width; others would fail alike
    assert "it ended with code 1: it said nothing" in failures[0]
    asked = []
    monkeypatch.setattr("thinrank.trainers.transfer.conduct.run_one", lambda c, probes: bool(asked.append(c)))
    failures = conduct(replace(SWEEP, rules=("const",)), base, tmp_path / "again", say=lambda text: None)
    assert len(asked) == len(failures) == 1
    assert "start the same command again" in failures[0]


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Runs launch/transfer.py's `main` in a folder with a corpus: exit code, standard output, standard error."""
    path = Path(__file__).parents[2] / "launch" / "transfer.py"
    spec = importlib.util.spec_from_file_location("launch_transfer", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    words = [
        "model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1",
        "model.num_attention_heads=2", "data=files", f"data.train=[{tmp_path}/corpus/*.txt]",
        "data.validation_fraction=0.3", f"data.cache_dir={tmp_path}/cache", "data.tokenizer=bytes",
        "data.sequence_length=16", "data.validation_tokens=64", "data.final_validation_tokens=64", "optimizer=adamw",
        "trainer=debug", "trainer.validate_every=0", "trainer.batch_size=4", "trainer.precision=32-true",
        "trainer.accelerator=cpu",
    ]  # fmt: skip

    def call(*argv, keys=()):
        return script.main([*argv, *words, *keys]), *capsys.readouterr()

    return call


SMALL = ["--widths", "8,16,24", "--target=64", "--lr", "2e-3,8e-3,3.2e-2", "--rules", "const", "--steps", "3"]


def test_a_small_transfer_in_earnest(launch, tmp_path):
    """Nine runs; the same command again does none of them, whatever is reported; another setting is refused."""
    code, out, err = launch(*SMALL, "--probes", "2", "--coordinates", "2")
    assert (code, err) == (0, "")
    assert out.count("begins") == 9
    assert "runs        9 have ended, 0 failed" in out
    root = tmp_path / "runs" / "transfer"
    facts = json.loads((root / "transfer.json").read_text())
    assert facts["advice"]["rule"] == "const"
    assert {run["width"] for run in facts["runs"]} == {8, 16, 24}
    assert set(facts["rules"][0]["fits"]) == {"qk", "vo", "mlp_in", "mlp_out"}
    probe = json.loads((root / "const" / "w24" / "lr0.008-wd0.1" / "seed0" / "probe.json").read_text())
    assert [row["step"] for row in probe["rows"]] == [0, 1, 3]
    name = "model.layers.0.self_attn.q_proj"
    assert probe["peak"][name] == pytest.approx([0.008 / 3, 0.1])
    assert probe["rows"][0]["clock"] == {}
    assert 0 < probe["rows"][1]["clock"][name] < probe["rows"][2]["clock"][name] < 3 * 0.008 / 3 * 0.1
    assert set(probe["gains"]["residual"]) == {"model.layers.0.self_attn", "model.layers.0.mlp"}
    assert (root / "const" / "coordinates.txt").is_file()
    assert not (root / "const" / "w24" / "lr0.008-wd0.1" / "seed0" / "checkpoints").exists()
    text = (root / "report.md").read_text()
    assert "Where the best setting lies" in text
    assert list((root / "tensorboard").iterdir())
    # the same run without anybody who measures
    plain = dict(
        load(PRETRAIN, ["--config", str(root / "const" / "w24" / "lr0.008-wd0.1" / "seed0" / "config.yaml")]).tree
    )
    plain["run"] = {"dir": "plain"}
    (tmp_path / "plain.yaml").write_text(write(plain))
    bare = pretrain(load(PRETRAIN, ["--config", str(tmp_path / "plain.yaml")]).config)
    mine = next(run for run in facts["runs"] if (run["width"], run["lr"]) == (24, 0.008))
    assert bare["metrics"]["test/loss"] == mine["loss"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("probe.json")}
    code, out, _ = launch(*SMALL, "--probes", "2", "--coordinates", "0")
    assert (code, out.count("begins")) == (0, 0)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("probe.json")}
    code, _, err = launch(*SMALL, keys=["optimizer.eps=1e-6"])
    assert code == 2
    assert "holds runs with optimizer.eps=1e-08, and now it is 1e-06" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--widths must be given"),
        (["--widths", "8,16", "--target", "64", "--lr", "1e-3,2e-3,4e-3"], "at least 3 of them"),
        (["--widths", "8,16,24", "--target", "24", "--lr", "1e-3,2e-3,4e-3"], "wider than all proxies"),
        (["--widths", "8,x"], "takes numbers separated by commas"),
        (["--widths", "--report"], "--widths needs a value"),
        (["--dry-run"], "belongs to launch/pretrain.py"),
        ([*SMALL, "--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_a_sentence(launch, argv, words):
    code, _, err = launch(*argv)
    assert code == 2
    assert err.startswith("error: ")
    assert words in err
