"""Rates by layer in whole runs: resumed to the bit, the same on all ranks, logged and reported, refused in words."""

import json
import subprocess
import sys

import pytest
import tiny_layerwise
from test_pretrain import final, same
from tiny_layerwise import LAYERWISE, run
from tiny_pretrain import losses, signalled_at, write_corpus
from tiny_training import TinyData, adamw, rows, tiny_module, tiny_trainer

from thinrank.configs.errors import ConfigError
from thinrank.configs.load import load
from thinrank.configs.schema import FINETUNE, PRETRAIN
from thinrank.optim import AdamWConfig
from thinrank.optim.layerwise import LAYERWISE as METHODS
from thinrank.optim.layerwise import AlphaDecay, LayerwiseConfig
from thinrank.trainers.callbacks.layerwise import LayerwiseSchedule
from thinrank.trainers.errors import UserError
from thinrank.trainers.run import differences, identity_json

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")

LONG = {"max_steps": 9, "checkpoint_every": 20, "log_every": 1, "tensorboard": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layerwise")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def whole(base):
    return run(base, "whole", **LONG)


@pytest.mark.parametrize("step", [4, 5])
def test_a_run_that_was_preempted_goes_on_to_the_bit(base, whole, step):
    """At 4 a look is due and not done, at 5 the ramp of a look is half over."""
    name = f"stopped at {step}"
    undo = signalled_at(step, rank=0)
    first = run(base, name, **LONG)
    undo()
    second = run(base, name, **LONG)
    assert first["run"]["state"] == "preempted"
    assert second["run"]["resumed_from"] == step
    assert second["training"]["layerwise"] == whole["training"]["layerwise"]
    same(final(base / name), final(base / "whole"))


def test_what_is_found_is_logged_and_reported(base, whole):
    found = whole["training"]["layerwise"]
    names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    assert {f"{name}.weight" for name in names} <= set(found["multipliers"])
    assert len(found["multipliers"]) == 14  # seven in each of two layers, and no head
    assert (found["method"], found["scales"], found["looked_at_step"]) == ("llr", "lr", 8)
    assert found["spread"][0] < 1.0 < found["spread"][2]
    alphas = losses(base / "whole", f"layerwise/alpha/{names[0]}.weight")
    assert sorted(alphas) == [2, 4, 6, 8]
    assert alphas[8] == pytest.approx(found["alphas"][f"{names[0]}.weight"])
    assert sorted(losses(base / "whole", f"layerwise/lr/{names[0]}.weight")) == [2, 4, 6, 8]
    page = (base / "whole" / "report.md").read_text()
    assert f"multipliers by layer, least / mean / most | {found['spread'][0]:.2f} / " in page


def test_a_run_of_before_there_was_the_choice_goes_on():
    now = {"layerwise": {"name": "none"}, "optimizer": {"name": "galore"}}
    assert identity_json(now) == identity_json({"optimizer": {"name": "galore"}})
    assert differences(identity_json(now), identity_json({**now, "layerwise": {"name": "llr"}})) == [
        "layerwise.name (absent → llr)"
    ]


def test_without_it_the_run_is_another_one_and_its_beginning_the_same(base, whole):
    run(base, "none", layerwise=LayerwiseConfig(), **LONG)
    without, with_ = (losses(base / name) for name in ("none", "whole"))
    assert [without[step] for step in (1, 2, 3)] == [
        with_[step] for step in (1, 2, 3)
    ]  # a step of its own is the third
    assert without[9] != with_[9]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_ranks_have_the_same_numbers_under_every_strategy(base):
    """The look at step 2 of each strategy is that of one process: to rounding where weights are whole, and
    nearly where ranks look at pieces. Ranks that average weights train another model."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tiny_layerwise.__file__, str(base)], capture_output=True, text=True, timeout=280, cwd=base
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    one, other = (json.loads((base / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert one.keys() == tiny_layerwise.STRATEGIES.keys()
    alone = run(base, "alone")["training"]["layerwise"]
    for name, found in one.items():
        assert found["looked_at_step"] == 2
        assert found["alphas"].keys() == alone["alphas"].keys()
        whole = name in ("ddp", "thinrank_ddp", "thinrank_owned")
        bound = 1e-3 if whole else 0.3
        assert found["alphas"] == {key: pytest.approx(value, rel=bound) for key, value in alone["alphas"].items()}, name


def test_what_cannot_be_is_refused_in_words(base):
    with pytest.raises(UserError, match=r"layerwise=alphadecay multiplies weight decay, which is 0: give optimizer"):
        run(base, "refused", layerwise=AlphaDecay(), optimizer=AdamWConfig())
    with pytest.raises(UserError, match=r"0 of 15 take part: lower layerwise\.min_evals \(50\)"):
        run(base, "refused", layerwise=AlphaDecay())
    module = tiny_module(optimizer=adamw)
    with pytest.raises(UserError, match="need an optimizer of thinrank, which has multipliers, got AdamW"):
        tiny_trainer(1, callbacks=[LayerwiseSchedule(LAYERWISE)]).fit(module, TinyData(rows(8)))


@pytest.mark.parametrize("schema", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_it_is_one_choice_on_the_command_line(schema):
    for name, method in METHODS.items():
        chosen = load(schema, [f"layerwise={name}", "optimizer.weight_decay=0.1"]).config.layerwise
        assert chosen == method()
    changed = load(schema, ["layerwise=llr", "layerwise.s2=3", "layerwise.most=null"]).config.layerwise
    assert (changed.s2, changed.most, changed.ramp) == (3.0, None, 50)
    with pytest.raises(ConfigError, match="did you mean alphadecay"):
        load(schema, ["layerwise=alphadeca"])
