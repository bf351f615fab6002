"""`benchmarks/gossip.py`: clocks are those of simulators, PowerSGD is itself, pages are made and trainings kept."""

import importlib
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # a folder of scripts that import each other by name
clocks = importlib.import_module("gossip_clocks")
means = importlib.import_module("gossip_means")
train = importlib.import_module("gossip_train")
report = importlib.import_module("gossip_report")
methods = importlib.import_module("gossip_methods")
gossip = importlib.import_module("gossip")

from thinrank.optim.gossip.compress import compressor  # noqa: E402
from thinrank.optim.gossip.cost import Network  # noqa: E402
from thinrank.optim.gossip.simulator import Simulator, run  # noqa: E402
from thinrank.trainers.models import PRESETS, ModelConfig  # noqa: E402

SMALL = ModelConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
SHAPES = [(40, 30), (7,)]
NETWORKS = [
    Network(latency=0.0, bandwidth=1e6),
    Network(latency=0.05, bandwidth=1e9),
    Network(latency=0.2, bandwidth=2e4),
]
COMPUTE = 0.03


def steps(schemes, weights, t):
    """One exchange of updates that depend on the rank and the step."""
    made = [torch.randn(len(x), generator=torch.Generator().manual_seed(10 * t + i)) for i, x in enumerate(weights)]
    return [side.step(x, u) for side, x, u in zip(schemes, weights, made, strict=True)]


@pytest.mark.parametrize(
    ("scheme", "codec", "ranks"),
    [
        ("dpsgd", "float32", 4),
        ("dcd", "uniform8", 5),
        ("choco", "uniform4", 2),
        ("allreduce", "uniform8", 4),
        ("diloco", "float32", 3),
    ],
)
def test_a_trace_has_the_clocks_of_a_simulator_of_its_own_on_every_network(scheme, codec, ranks):
    """Without overlap, which a simulator does not have; with the rounds of a check of copies among them."""
    everyone = [clocks.Recorder(ranks), *(Simulator(ranks, rate=n.bandwidth, latency=n.latency) for n in NETWORKS)]
    sides = [clocks.ranks_of(scheme, ranks, compressor(codec), SHAPES, 0, {}) for _ in everyone]
    for side in (each for sides_of_one in sides for each in sides_of_one):
        side.place = replace(side.place, check_every=2)
        side.start(torch.zeros(1207))
    weights = [[torch.zeros(1207)] * ranks for _ in everyone]
    trace, ends = clocks.Trace(), [[] for _ in NETWORKS]
    for t in range(5):
        for k, simulator in enumerate(everyone):
            for i in range(ranks):
                simulator.work(i, COMPUTE)
            weights[k] = run(simulator, steps(sides[k], weights[k], t))
            if k:
                ends[k - 1].append(max(simulator.clock))
        trace.add(tuple(replace(each, early=False) for each in everyone[0].rounds))
    trace = clocks.Trace.of_json(trace.as_json())
    for network, expected in zip(NETWORKS, ends, strict=True):
        assert clocks.replay(trace, ranks, network, compute=COMPUTE) == pytest.approx(expected, rel=1e-9)
    sent = sum(everyone[0].sent) / ranks / 5
    assert trace.bytes(ranks) == pytest.approx(sent, abs=1.0)


def pair(early):
    return (clocks.Round(sends=((0, 1, 100), (1, 0, 100)), early=early),)


def test_what_is_known_early_travels_behind_the_next_step():
    network = Network(latency=0.5, bandwidth=1000.0)  # 0.6 s for a message

    def ends(exchanges, **more):
        trace = clocks.Trace()
        for each in exchanges:
            trace.add(each)
        return clocks.replay(trace, 2, network, **more)

    assert ends([pair(False)] * 3, compute=1.0) == pytest.approx([1.6, 3.2, 4.8])
    assert ends([pair(True)] * 3, compute=1.0) == pytest.approx([1.0, 2.0, 3.0])
    assert ends([pair(True)] * 3, compute=0.1) == pytest.approx([0.1, 0.7, 1.3])
    assert ends([pair(True), (), pair(True)], compute=0.2) == pytest.approx([0.2, 0.4, 0.8])  # waits for the first
    # a second round, of a check, is asked for only when the next exchange begins
    assert ends([pair(True) + pair(True), pair(True)], compute=1.0) == pytest.approx([1.0, 2.6])
    assert ends([pair(False)] * 2, compute=0.9, behind=2 / 3) == pytest.approx([0.9, 1.8])
    assert ends([pair(False)] * 2, compute=0.3, behind=2 / 3, codec=0.1) == pytest.approx([0.8, 1.6])


def test_means_go_around_a_ring_or_by_halving_and_doubling():
    trace = clocks.Trace([(clocks.Round(mean=800),)], [0])
    network = Network(latency=0.1, bandwidth=1000.0)
    assert clocks.replay(trace, 8, network, compute=0.0) == pytest.approx([14 * 0.1 + 1.4])
    assert clocks.replay(trace, 8, network, compute=0.0, reduce="tree") == pytest.approx([6 * 0.1 + 1.4])


def test_powersgd_gives_back_a_mean_of_low_rank_and_keeps_what_it_leaves_out():
    average = means.powersgd(2, seed=0)(types.SimpleNamespace(shapes=[(64, 48), (64,)]))
    torch.manual_seed(0)
    low = [torch.randn(64, 2) @ torch.randn(2, 48) for _ in range(2)]  # a mean of rank 4
    vectors = [torch.randn(64) for _ in range(2)]
    found, rounds = [], ()
    for step in range(4):
        found, rounds = average([[a.clone(), v] for a, v in zip(low, vectors, strict=True)])
        assert len(rounds) == (1 if step < 2 else 3)
        torch.testing.assert_close(found[1], torch.stack(vectors).mean(0))
    assert [each.mean for each in rounds] == [4 * 64, 4 * 4 * 64, 4 * 4 * 48]
    # 0.15 of the norm is what one iteration misses of the first mean, and error feedback of the second makes up for
    torch.testing.assert_close(found[0], torch.stack(low).mean(0), rtol=0.2, atol=2.0)


def test_a_curve_is_read_between_its_readings():
    curve = [(1.0, 5.0), (2.0, 4.0), (4.0, 3.0)]
    assert report.until(curve, 5.5) == 1.0
    assert report.until(curve, 3.5) == pytest.approx(3.0)
    assert report.until(curve, 2.0) is None
    assert report.at(curve, 0.5) is None
    assert report.at(curve, 3.0) == pytest.approx(3.5)
    assert report.at(curve, 9.0) == 3.0


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command's words for a training of seconds."""
    monkeypatch.setitem(PRESETS, "2m", SMALL)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"m{number}.py").write_text("\n".join(f"def f{i * number % 7}(x): return x" for i in range(60)))
    small = [
        "--vocabulary",
        "300",
        "--length",
        "16",
        "--rows",
        "4",
        "--steps",
        "4",
        "--every",
        "2",
        "--held-out",
        "200",
    ]
    networks = ["--held-out", "200", "--rates", "100", "5", "--delays", "0", "20", "--compute", "0.05"]
    places = ["--text", str(folder), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "page.md")]
    return [*small, *networks, *places]


def test_a_page_is_made_and_no_training_made_again(command, tmp_path, monkeypatch):
    words = ["--ranks", "2", "4", "--methods", *report.CLAIM, "ecd-8", *command]
    gossip.main(words)
    page = (tmp_path / "page.md").read_text()
    for part in ("## 2 ranks", "## 4 ranks", "### The paper's claim", "beats both parents", "5 Mbit/s, 20 ms one way"):
        assert part in page
    assert "where rate and delay are both bad is " in page
    cells = next(line for line in page.splitlines() if line.startswith("| `dcd-8` |")).split("|")
    assert 0.9 < float(cells[3]) < 1.1
    assert 0.0 < float(cells[2]) < math.log(300) + 0.5

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "train", refuse)
    gossip.main(words)
    tables = [text.split("\n## ", 1)[1] for text in (page, (tmp_path / "page.md").read_text())]
    assert tables[0] == tables[1]
    with pytest.raises(AssertionError, match="trained again"):
        gossip.main([*words, "--seed", "1"])
    gossip.main([*words, "--seed", "1", "--report"])
    assert "Not trained yet: allreduce on 2 ranks" in (tmp_path / "page.md").read_text()


def test_every_method_trains_and_sends_what_its_formula_says(command):
    args = gossip.arguments(["--ranks", "4", *command])
    args.steps = args.every = methods.INTERVAL
    (job,) = gossip.jobs(args)
    sizes = methods.sizes_of(job.recipe(job.data().vocab_size))
    for name, method in methods.METHODS.items():
        found = train.train(name, job, say=lambda _: None)
        assert found.loss < math.log(300) + 0.5, name
        if name not in ("powersgd-4", "thinrank"):  # whose first steps are not like the others
            headers = 32 * 12
            assert abs(found.trace.bytes(4) - method.bytes(sizes, 4)) < headers + 0.1 * method.bytes(sizes, 4), name


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(SystemExit, match="cannot be shared out over 3 ranks: give a multiple of them"):
        gossip.main(["--ranks", "3"])
