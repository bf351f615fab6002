"""The baselines of `benchmarks/wan.py`: ranks meet as each says, its payload is what travels, and the page tells."""

import importlib
import itertools
import math
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # a folder of scripts that import each other by name
slow_network = importlib.import_module("slow_network")
wan = importlib.import_module("wan")
wan_methods = importlib.import_module("wan_methods")
wan_rank = importlib.import_module("wan_rank")

from thinrank.trainers.models import ModelConfig, build_model  # noqa: E402

REASON = slow_network.unavailable()
Link, Seen = slow_network.Link, wan_rank.Seen
WORLD, STEPS, LR = 2, 4, 1e-2
PATIENCE = 240  # seconds: each rank's first job imports transformers and Lightning
pytestmark = pytest.mark.timeout(300)
SMALL = ModelConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
WIDE = ModelConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=1, num_attention_heads=2)


def batch(rank, step, vocabulary=64):
    rows = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))
    return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(name, config=SMALL, vocabulary=64, steps=STEPS):
    """Weights after some steps, the payload of each step, and the losses."""
    model, group = build_model(config, vocabulary, seed=0), dist.group.WORLD
    training = wan_methods.METHODS[name](model, group, LR)
    payloads, losses = [0], []
    for step in range(steps):
        losses.append(float(training.step(batch(dist.get_rank(), step, vocabulary))))
        payloads.append(training.payload())
    return weights(model), [after - before for before, after in itertools.pairwise(payloads)], losses


@pytest.fixture(scope="module")
def alone():
    """What one process reaches with the mean of all ranks' gradients."""
    model = build_model(SMALL, 64, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([wan_methods.loss(model, batch(rank, step)) for rank in range(WORLD)]).mean().backward()
        optimizer.step()
    return weights(model)


def numbers():
    return sum(p.numel() for p in build_model(SMALL, 64, seed=0, meta=True).parameters())


def test_ddp_is_one_process_and_sends_every_gradient(ranks, alone):
    found = ranks(WORLD).run(train, "ddp", timeout=PATIENCE)
    for own, payloads, _ in found:
        torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-5)
        assert payloads == [4 * numbers()] * STEPS


def test_bf16_sends_half_and_is_nearly_the_same(ranks):
    exact, found = (
        ranks(WORLD).run(train, "ddp", timeout=PATIENCE),
        ranks(WORLD).run(train, "ddp-bf16", timeout=PATIENCE),
    )
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], exact[0][0])
    for (_, payloads, losses), (_, _, reference) in zip(found, exact, strict=True):
        assert payloads == [2 * numbers()] * STEPS
        assert losses == pytest.approx(reference, abs=2**-8)


@pytest.mark.parametrize("rank", [1, 4])
def test_powersgd_sends_two_factors_from_the_third_step_on(ranks, rank):
    found = ranks(WORLD).run(train, f"powersgd-{rank}", timeout=PATIENCE)
    assert torch.equal(found[0][0], found[1][0])
    factors = 0
    for p in build_model(SMALL, 64, seed=0, meta=True).parameters():
        rows, columns = p.shape[0], p[0].numel()
        compressed = (rows + columns) * min(rank, rows, columns)
        factors += compressed if 2 * compressed < p.numel() else p.numel()
    for _, payloads, _ in found:
        assert payloads == [4 * numbers()] * 2 + [4 * factors] * (STEPS - 2)


def test_powersgd_takes_a_model_of_more_than_one_ddp_bucket(ranks):
    """In DDP's own buckets, the first of 1 MiB, gloo's threads made the ranks sum P and Q of different buckets with
    each other: in the first compressed step a rank died of a message too long for its tensor, or all waited."""
    found = ranks(4).run(train, "powersgd-2", WIDE, 1024, steps=8, timeout=PATIENCE)
    assert all(torch.equal(found[0][0], own) for own, *_ in found)


def test_noop_sends_nothing_and_drifts_apart(ranks):
    found = ranks(WORLD).run(train, "noop", timeout=PATIENCE)
    assert all(payloads == [0] * STEPS for _, payloads, _ in found)
    assert not torch.allclose(found[0][0], found[1][0])


def exchanging(name):
    """Weights after some steps and after the settlement, bytes that have left, own seconds."""
    model, group = build_model(SMALL, 64, seed=0), dist.group.WORLD
    training = wan_methods.METHODS[name](model, group, LR)
    for step in range(STEPS):
        training.step(batch(dist.get_rank(), step))
    training.finish()
    before, left = weights(model), training.egress()
    training.settle()
    return before, weights(model), left, training.own()


@pytest.mark.parametrize("name", list(wan_methods.GOSSIP))
def test_ranks_that_exchange_weights_count_what_leaves_and_settle_alike(ranks, name):
    found = ranks(WORLD).run(exchanging, name, timeout=PATIENCE)
    assert torch.equal(found[0][1], found[1][1])
    alike = wan_methods.ROUTES[name].among == "pieces"
    assert torch.equal(found[0][0], found[1][0]) == alike
    assert all(own > 0.0 for *_, own in found) or name == "diloco"  # which has not met yet
    sent = {"dpsgd": 4 * numbers() * STEPS, "dcd-8": numbers() * STEPS}.get(name)
    assert sent is None or all(left == pytest.approx(sent, rel=0.05) for *_, left, _ in found)


def test_a_routes_seconds_are_the_cost_models():
    network = wan.Network(latency=0.01, bandwidth=1e6)

    def seconds(**route):
        return wan_methods.Route(**route).seconds(4, 2e5, network, compute=0.3, own=0.05)

    assert seconds(among="neighbours", behind=1.0) == pytest.approx(0.35)  # 0.21 s behind 0.3 s
    assert seconds(among="neighbours") == pytest.approx(0.35 + 0.21)
    assert seconds(among="pieces") == pytest.approx(0.35 + 0.22)
    assert seconds(among="ring", collectives=3) == pytest.approx(0.35 + 18 * 0.01 + 0.2)
    assert seconds(among="ring", interval=5) == pytest.approx(0.35 + (0.06 + 1.0) / 5)


def test_the_time_of_a_method_that_meets_now_and_then_is_a_mean():
    seen = Seen(durations=[0.1, 0.1, 0.1, 0.1, 1.1])
    assert wan.step_time([seen], "dpsgd") == pytest.approx(0.1)
    assert wan.step_time([seen], "diloco") == pytest.approx(0.3)


def test_every_method_is_explained():
    assert list(wan.ABOUT) == list(wan.METHODS)
    assert {*wan_methods.ROUTES, "noop"} == set(wan.METHODS)


def by_time(folder, seconds, uneven):
    """Steps of a rank that meets the others in each, the last ranks the slower."""

    def step(_):
        whole = torch.ones(1)
        dist.all_reduce(whole)
        if uneven:
            time.sleep(0.003 * dist.get_rank())
        return whole

    training = wan_methods.Training(step=step)
    job = types.SimpleNamespace(seconds=seconds)
    return wan_rank.by_time(job, training, itertools.repeat({}), dist.get_rank(), Path(folder, "end")).curve


@pytest.mark.parametrize("uneven", [False, True])
def test_a_training_by_time_ends_on_all_ranks_after_the_same_step(ranks, tmp_path, uneven):
    curves = ranks(4).run(by_time, str(tmp_path), 0.2, uneven, timeout=PATIENCE)
    assert len({len(curve) for curve in curves}) == 1
    times = [0.0, *(when for when, _ in curves[0])]
    assert times[-3] < 0.2 <= times[-2]  # one more step after the one in which the time was up


def test_a_training_by_time_of_ranks_that_never_meet_ends_too(ranks, tmp_path):
    assert all(len(curve) >= 1 for curve in ranks(2).run(alone_by_time, str(tmp_path), timeout=PATIENCE))


def alone_by_time(folder):
    training = wan_methods.Training(step=lambda _: torch.ones(1), together=False)
    job = types.SimpleNamespace(seconds=0.1)
    return wan_rank.by_time(job, training, itertools.repeat({}), dist.get_rank(), Path(folder, "end")).curve


def test_the_table_of_times_has_medians_bytes_of_a_step_and_the_rings():
    ranks = [
        Seen(durations=[1.0, 2.0, 9.0], sent=3_300_000, payload=2_000_000, late=0.25, dropped=3),
        Seen(durations=[1.0, 2.0, 9.0], sent=3_100_000, payload=2_000_000),
    ]
    seen = {"noop": [Seen(durations=[0.5], payload=0, sent=10)] * 2, "ddp": ranks}
    lines = wan.times_table(seen, Link(rate=8)).splitlines()
    assert lines[2].split(" | ")[:8] == ["| noop", "1", "0.500", "0.25", "10", "0", "", "0.00"]
    # a step of a ring of two: 2 · 1/2 · 2,000,000 / 3 bytes, which take 0.67 s of 1 MB/s
    row = "| ddp | 3 | 2.000 | 1.00 | 1,066,667 | 666,667 | 1.600 | 0.67 | 0.25 | 3 | 0.000 |"
    assert lines[3].startswith(row)
    # by the cost model: 0.70 s of a payload's 0.956 MB/s, of which 2/3 of the 0.5 s without an exchange hide some
    assert lines[3].removeprefix(row) == " 0.864 | 2.31 ! |"


def test_the_table_of_losses_is_a_mean_of_each_tenth():
    ranks = [
        Seen(curve=[(0.5, 4.0), (1.0, 3.0), (2.5, 2.0), (10.5, 9.0)], held_out=1.5),
        Seen(curve=[(0.6, 2.0), (1.0, 1.0), (2.5, 2.0), (10.5, 9.0)], held_out=1.5),
    ]
    lines = wan.losses_table({"ddp": ranks}, seconds=10).splitlines()
    assert lines[2:5] == ["| 1 | 2.500 |", "| 2 | no step ended |", "| 3 | 2.000 |"]
    assert lines[-2:] == ["| steps | 3 |", "| held-out text, at the end | 1.500 |"]


def test_learning_rates():
    assert wan.learning_rates(["noop", "ddp"], []) == {"noop": 3e-3, "ddp": 3e-3}
    assert wan.learning_rates(["noop", "ddp"], ["ddp=1e-2", "1e-3"]) == {"noop": 1e-3, "ddp": 1e-2}
    with pytest.raises(ValueError, match="--lr names methods of this run"):
        wan.learning_rates(["ddp"], ["noop=1"])
    with pytest.raises(ValueError, match="--lr takes numbers and NAME=NUMBER, got 'fast'"):
        wan.learning_rates(["ddp"], ["fast"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"m{number}.py").write_text("\n".join(f"def f{i * number % 7}(x): return x" for i in range(60)))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("mode", [["--steps", "3"], ["--train", "3"]], ids=["times", "losses"])
def test_ranks_train_over_a_slow_network(text, tmp_path, mode):
    """The whole command: the step cannot be faster than the wire, and the bytes are the ring's with TCP's headers."""
    out = tmp_path / "page.md"
    small = ["--ranks", "2", "--preset", "2m", "--vocabulary", "300", "--length", "16", "--text", str(text)]
    network = ["--rates", "200", "--delays", "5", "--methods", "ddp", "--held-out", "500", "--out", str(out)]
    command = [sys.executable, str(BENCHMARKS / "wan.py"), *small, *network, *mode]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr
    lines = out.read_text().splitlines()
    assert "## 200 Mbit/s, 5 ms one way" in lines
    if "--train" in mode:
        held = next(line for line in lines if line.startswith("| held-out text"))
        assert float(held.split("|")[2]) < math.log(300)
        return
    _, name, _, step, _, sent, ideal, share, least, _, dropped, *_ = (
        cell.strip() for cell in next(line for line in lines if line.startswith("| ddp")).split("|")
    )
    assert name == "ddp"
    assert float(step) >= float(least) + 2 * 0.005 > 0.01  # its bits, and a ring of two is two messages in a row
    assert int(sent.replace(",", "")) >= int(ideal.replace(",", ""))
    assert dropped != "0" or 1.045 <= float(share) <= 1.10


def test_a_page_says_which_networks_are_missing():
    text = ["# Title", "", "## 100 Mbit/s, 0 ms one way", "", "| table |", ""]
    assert wan.missing_networks(text, 1) == []
    assert wan.missing_networks(text, 3)[0].startswith("1 of 3 networks")
