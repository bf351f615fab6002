"""`strategy=thinrank_gossip` in whole runs, and `Trainer(strategy="thinrank_gossip")` around a user's own module."""

import json
import math
import subprocess
import sys

import pytest
import tiny_gossip
import tiny_replicas
import torch
from test_pretrain import final, same
from tiny_pretrain import config, losses, write_corpus

from thinrank.configs.load import load
from thinrank.configs.schema import PRETRAIN
from thinrank.optim.gossip.compress import compressor
from thinrank.optim.gossip.message import HEADER_BYTES
from thinrank.trainers import GossipStrategy, UserError
from thinrank.trainers import checkpoint as ckpt
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies.gossip import part_of

runs = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gossip")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tiny_gossip.__file__, str(folder)], capture_output=True, text=True, timeout=280, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def report(folder):
    return json.loads((folder / "report.json").read_text())


class TestRuns:
    pytestmark = runs

    @pytest.mark.parametrize("name", ["choco", "dcd"])
    def test_an_interrupted_run_goes_on_to_the_bit(self, base, name):
        """Rank 0 was told to stop; of `dcd` that was between two exchanges."""
        same(final(base / f"{name} parts"), final(base / f"{name} whole"))
        assert json.loads((base / "result.json").read_text())["resumed_from"] == 7

    def test_a_checkpoint_has_the_average_and_each_rank_a_part(self, base):
        folder = base / "choco whole" / "checkpoints"
        path = ckpt.newest(folder)
        assert path is not None
        parts = [ckpt.load(part_of(path, rank)) for rank in range(2)]
        weights = [part["exchange"]["weights"] for part in parts]
        assert not torch.equal(*weights)
        state = ckpt.load(path)["state_dict"]
        flat = torch.cat([state[name].reshape(-1) for name in trained_names(state)])
        torch.testing.assert_close(flat, (weights[0] + weights[1]) / 2, rtol=1e-5, atol=1e-7)
        kept = {part.name for part in folder.glob("*.rank*")}
        assert kept == {f"{each.name}.rank{rank}" for each in ckpt.listed(folder) for rank in range(2)}

    def test_what_is_exported_and_measured_at_the_end_is_the_average(self, base):
        """What one process finds in the weights of the last checkpoint."""
        settings = {"optimizer": tiny_gossip.METHOD, **tiny_gossip.PARTS}
        found = report(base / "choco whole")["metrics"]["test/loss"]
        with pytest.warns(UserWarning, match="is of 2 rank"):
            again = pretrain(config(base, "alone", **settings))  # from step 7, which both had
        assert again["run"]["resumed_from"] == 7
        assert again["metrics"]["test/loss"] == pytest.approx(found, abs=0.1)
        assert losses(base / "choco whole", "val/loss")[12] == pytest.approx(
            losses(base / "alone", "val/loss")[12], abs=0.1
        )

    def test_other_settings_go_on_from_the_average_and_say_so(self, base):
        assert report(base / "other")["run"]["state"] == "finished"
        assert "goes on from the average of the weights" in (base / "stderr").read_text()

    def test_bytes_are_those_of_the_plan_and_of_the_formula(self, base):
        """A ring of two has one neighbour; every second step of `dcd`, whose copies' checks come on top."""
        for name, codec, interval in (("choco whole", "uniform4", 1), ("dcd whole", "uniform8", 2)):
            found = report(base / name)
            count = found["model"]["parameters"]
            formula = (HEADER_BYTES + compressor(codec).bind([(count,)]).nbytes) / interval
            assert found["plan"]["planned"]["sent_bytes"] == pytest.approx(formula)
            assert formula <= found["plan"]["measured"]["sent_bytes"] <= formula * 1.02 + 2 * HEADER_BYTES
            curve = losses(base / name, "comm/gossip(MiB)")
            assert curve[2] * 2**20 == pytest.approx(formula * interval, rel=0.02)

    def test_what_is_exchanged_is_said_and_logged(self, base):
        said = (base / "stdout").read_text()
        assert "exchange    choco on ring of 2 ranks, spectral gap 1; " in said
        error = losses(base / "choco whole", "gossip/error")
        assert 0.05 < error[12] < 0.5
        assert losses(base / "dcd whole", "gossip/repaired")[12] == 0
        assert losses(base / "dcd whole", "gossip/seconds")[12] > 0
        assert 0 < losses(base / "choco whole", "gossip/consensus")[12] < 0.5  # of the last validation

    def test_the_local_models_of_a_complete_graph_are_the_average(self, base):
        found = losses(base / "local", "val/loss")
        assert all(math.isfinite(value) for value in found.values())
        assert found[12] < found[4]

    def test_16_bit_weights_with_masters(self, base):
        found = report(base / "half")
        assert found["run"]["state"] == "finished"
        path = ckpt.newest(base / "half" / "checkpoints")
        assert path is not None
        weights = ckpt.load(part_of(path, 1))["exchange"]["weights"]
        assert not torch.equal(weights, weights.bfloat16().float())

    def test_a_module_of_ones_own(self, base):
        ends, exact = torch.load(base / "own.pt", weights_only=True)
        facts = json.loads((base / "result.json").read_text())
        assert facts["by name"] == "GossipStrategy"
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])  # after training: the average
        alone = tiny_replicas.fit(tiny_gossip.SGD["optimizer"], accumulate=2).state_dict()
        for name, value in alone.items():  # plain SGD, averaged over a complete graph, is one process with all data
            torch.testing.assert_close(exact[name], value, rtol=1e-5, atol=1e-6)
        assert any(not torch.allclose(ends[0][name], value, rtol=1e-4) for name, value in alone.items())

    def test_the_guard_skips_on_the_rank_alone_that_cannot_take_a_step(self, base):
        facts = json.loads((base / "result.json").read_text())
        assert facts["skipped"] == [0, 1]
        assert facts["finite"] == [True, True]
        assert facts["repaired"] == [0, 0]


def trained_names(state):
    """Names of weights as they are exchanged: each once, in the module's order."""
    seen, names = set(), []
    for name, value in state.items():
        if value.is_floating_point() and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            names.append(name)
    return names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy.scheme=gossip"], "scheme must be one of"),
        (["strategy.topology=mesh"], "topology must be one of ring, torus"),
        (["strategy.compressor=uniform5"], "compressor must be one of"),
        (["strategy.compressor=uniform8", "strategy.compressor_options={bucket: 9}"], "bucket must be a positive"),
        (["strategy.scheme_options={gama: 0.5}"], "scheme=choco has no option gama; its options are gamma, order"),
        (["strategy.interval=0"], "interval must be a whole number of at least 1"),
        (["strategy.evaluate=both"], "evaluate must be one of average, local"),
        (["trainer.precision=16-mixed"], "use trainer.precision=bf16-mixed or 32-true"),
    ],
)
@pytest.mark.parametrize("name", ["thinrank_gossip", "gossip"])
def test_configurations_that_cannot_work_are_refused(name, words, said):
    with pytest.raises(Exception, match=said) as caught:
        load(PRETRAIN, [f"strategy={name}", *words])
    assert type(caught.value).__name__ == "ConfigError"


def test_settings_of_the_strategy_are_those_of_its_configuration():
    GossipStrategy(topology=[(0, 1), (1, 2), (2, 0)], scheme="dcd", compressor="uniform8", interval=1)
    with pytest.raises(UserError, match="scheme must be one of"):
        GossipStrategy(scheme="average")
    with pytest.raises(UserError, match="has no option restart"):
        GossipStrategy(scheme="dcd", scheme_options={"restart": 5})
